"""What users would pick instead, from PyPI: each behind the names of `Transport`.

``make bench-peers`` installs them one by one, so that one that cannot be
installed here only leaves its own line out; `Transport.missing` says why.
Each is used as its documentation shows, with room for as many messages as we
have, and where a call of its own fits, without a wrapper.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.adapters import Transport
from benchmarks.work import Work

__all__ = ["PEERS"]

_RING_BYTES = 1 << 20  # for small messages; arrays are given room for four of them
_RECORD_BYTES = 256  # where all messages have one size: a pickled dict, which knows its end
_PATIENCE_S = 50.0  # a call that looks at no signal ends before the session's deadline

_numbers = itertools.count()


def _name() -> str:
    """One that nobody else has."""
    return f"shmring-bench-{os.getpid()}-{next(_numbers)}"


def _room(work: Work) -> int:
    """Bytes: a power of two, which two of the peers ask for."""
    return max(_RING_BYTES, 4 * work.nbytes)


class Peer(Transport):
    """A package that may be missing."""

    peer = True
    package: ClassVar[str]

    @classmethod
    def _module(cls) -> Any:
        return importlib.import_module(cls.package)

    @classmethod
    def missing(cls) -> str | None:
        try:
            cls._module()
        except Exception as error:  # a peer that breaks while it is imported is no bug of ours
            return f"{cls.package} cannot be imported ({error}): `make bench-peers` installs it"
        return None


class BytesPeer(Peer):
    """A peer that moves bytes, so that objects are pickled here."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def _sends(self, put: Any) -> None:
        """Set `put` for this kind of work over a call that takes bytes."""
        self.put = put
        if self._work.kind == "object":
            dumps, protocol = pickle.dumps, pickle.HIGHEST_PROTOCOL
            self.put = lambda message: put(dumps(message, protocol))

    def _receives(self, get: Any) -> None:
        """Set `get` for this kind of work over a call that returns bytes."""
        self.get = get
        if self._work.kind == "object":
            loads = pickle.loads
            self.get = lambda: loads(get())
        elif self._work.kind == "array":  # a copy of what may not be written to
            self.get = lambda: np.frombuffer(get(), np.float32).copy()


class FasterFifo(Peer):
    """Pickles everything; a mutex and condition variables between processes."""

    label = "faster-fifo"
    package = "faster_fifo"
    batches = True

    def __init__(self, work: Work) -> None:
        self._queue: Any = self._module().Queue(max_size_bytes=_room(work))
        self.put, self.get = self._queue.put, self._queue.get
        self.put_many, self.get_many = self._queue.put_many, self._queue.get_many

    def close(self) -> None:
        self._queue.close()


class ZeroMq(BytesPeer):
    """PUSH to PULL over Unix sockets; each process has a context and its thread."""

    label = "pyzmq ipc"
    package = "zmq"
    lines = True

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._folder = Path(tempfile.mkdtemp(prefix="shmring-zmq-"))
        self._contexts: list[Any] = []

    def _socket(self, kind: str) -> Any:
        zmq = self._module()
        context = zmq.Context()
        self._contexts.append(context)
        socket = context.socket(getattr(zmq, kind))
        # No limit, as multiprocessing.Queue has none: with one, PUSH passes over a consumer that
        # is slow, so that not all get the same number, and with a low one it stood still at times.
        socket.set_hwm(0)
        return socket

    def as_producer(self, consumers: int = 1) -> None:
        self._sender = self._socket("PUSH")
        for number in range(consumers):
            self._sender.connect(f"ipc://{self._folder}/{number}")
        send = self._sender.send
        if self._work.kind == "array":  # nobody writes to it before it is sent
            self._sends(lambda array: send(array, copy=False))
        else:
            self._sends(send)

    def as_consumer(self, number: int = 0) -> None:
        receiver = self._socket("PULL")
        receiver.bind(f"ipc://{self._folder}/{number}")
        self._receives(receiver.recv)

    def flush(self) -> None:
        self._sender.close(linger=-1)  # and the context, when it goes, waits until all is sent
        self._contexts[-1].term()

    def close(self) -> None:
        for context in self._contexts:
            context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


class Cloudtoid(BytesPeer):
    """A full queue says so at once: the producer asks again and again."""

    label = "cloudtoid-interprocess"
    package = "cloudtoid_interprocess"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._folder = tempfile.mkdtemp(prefix="shmring-cloudtoid-", dir="/dev/shm")
        self._arguments = (_name(), _room(work), self._folder)
        self._ends: list[Any] = []

    def _open(self, kind: str) -> Any:
        self._ends.append(getattr(self._module(), kind)(*self._arguments))
        return self._ends[-1]

    def as_producer(self, consumers: int = 1) -> None:
        try_send = self._open("Publisher").try_send

        def put(message: Any) -> None:
            while not try_send(message):
                pass

        self._sends(put)

    def as_consumer(self, number: int = 0) -> None:
        self._receives(functools.partial(self._open("Subscriber").receive, _PATIENCE_S))

    def close(self) -> None:
        for end in self._ends:
            end.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Membridge(BytesPeer):
    """One producer, one consumer; both ask again and again."""

    label = "membridge (busy polling)"
    package = "membridge"
    shared = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._memory, self._name = self._module().SharedMemory, f"/{_name()}"
        ring = self._memory.create(self._name, 24 + _room(work)).spsc()  # with its header
        push, pop = ring.push, ring.pop

        def put(message: Any) -> None:
            while not push(message):
                pass

        def get() -> Any:
            while (message := pop()) is None:
                pass
            return message

        self._sends(put)
        self._receives(get)
        if work.kind == "array":
            self.put = lambda array: put(array.tobytes())  # takes nothing but bytes

    def close(self) -> None:
        self._memory.remove(self._name)


class ShmQueue3(BytesPeer):
    """A pool of blocks of one size, and a queue of their numbers.

    Its take wakes a producer, and its put a consumer, only when the queue was
    full or empty: with two of either kind it comes to a stand.
    """

    label = "shmqueue3"
    package = "shmqueue3.shmqueue3"
    shared = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        package = self._module()
        size = work.nbytes or _RECORD_BYTES
        pool = package.ShmPool(elem_size=size, size=max(4, min(1000, _RING_BYTES // size)))
        numbers = package.ShmQueue(pool)
        taken = package.ShmElem()
        memmove, string_at, addressof = ctypes.memmove, ctypes.string_at, ctypes.addressof

        def put(message: bytes) -> None:
            if len(message) > size:
                raise ValueError(f"{len(message)} bytes for a block of {size}")
            block = pool.allocate()
            memmove(block.ptr, message, len(message))
            numbers.put(block)

        def get() -> bytes:
            numbers.take(taken)
            message = string_at(taken.ptr, size)
            taken.free()
            return message

        self._sends(put)
        self._receives(get)
        if work.kind == "array":

            def put_array(array: Any) -> None:
                block = pool.allocate()
                memmove(block.ptr, array.ctypes.data, size)
                numbers.put(block)

            def get_array() -> Any:
                array = np.empty(size // 4, np.float32)
                numbers.take(taken)
                memmove(array.ctypes.data, addressof(taken.ptr.contents), size)
                taken.free()
                return array

            self.put, self.get = put_array, get_array


class PosixQueue(BytesPeer):
    """The kernel's message queue: ten messages of 8 KiB, unless root allows more."""

    label = "posix_ipc.MessageQueue"
    package = "posix_ipc"
    carries = frozenset({"bytes", "object"})
    largest = 8192

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        posix_ipc = self._module()
        self._queue: Any = posix_ipc.MessageQueue(f"/{_name()}", posix_ipc.O_CREX)
        receive = self._queue.receive
        self._sends(self._queue.send)
        self._receives(lambda: receive()[0])

    def close(self) -> None:
        self._queue.unlink()
        self._queue.close()


class Iceoryx2(BytesPeer):
    """Publish and subscribe on samples of one size; the subscriber asks again and again."""

    label = "iceoryx2 (busy polling)"
    package = "iceoryx2"
    carries = frozenset({"bytes", "object"})
    shared = False  # every subscriber is sent everything

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._size = work.nbytes or _RECORD_BYTES
        self._folder = tempfile.mkdtemp(prefix="shmring-iceoryx2-")
        self._prefix = f"{_name()}_"
        self._ports: list[Any] = []

    def _service(self) -> Any:
        """The service, in a node of this process, in a folder that we remove."""
        iox2 = self._module()

        class Payload(ctypes.Structure):
            _fields_ = [("data", ctypes.c_uint8 * self._size)]

        iox2.set_log_level(iox2.LogLevel.Error)
        config = iox2.config.default()
        config.global_cfg.root_path = iox2.Path.new(self._folder)
        config.global_cfg.prefix = iox2.FileName.new(self._prefix)
        node = (
            iox2.NodeBuilder.new()
            .config(config)
            .signal_handling_mode(iox2.SignalHandlingMode.Disabled)
            .create(iox2.ServiceType.Ipc)
        )
        service = (
            node.service_builder(iox2.ServiceName.new("benchmark"))
            .publish_subscribe(Payload)
            .enable_safe_overflow(False)  # its default drops the oldest when the reader is slow
            .subscriber_max_buffer_size(max(4, min(1000, _RING_BYTES // self._size)))
            .open_or_create()
        )
        self._ports += [node, service]
        return iox2, service

    def as_producer(self, consumers: int = 1) -> None:
        iox2, service = self._service()
        publisher = (
            service.publisher_builder()
            .backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        self._ports.append(publisher)
        loan, memmove, size = publisher.loan_uninit, ctypes.memmove, self._size

        def put(message: bytes) -> None:
            if len(message) > size:
                raise ValueError(f"{len(message)} bytes for a sample of {size}")
            sample = loan()
            memmove(sample.payload_ptr, message, len(message))
            sample.assume_init().send()

        def put_array(array: Any) -> None:
            sample = loan()
            memmove(sample.payload_ptr, array.ctypes.data, size)
            sample.assume_init().send()

        self._sends(put_array if self._work.kind == "array" else put)

    def as_consumer(self, number: int = 0) -> None:
        _, service = self._service()
        subscriber = service.subscriber_builder().create()
        self._ports.append(subscriber)
        self._receive = receive = subscriber.receive
        string_at, size = ctypes.string_at, self._size

        def get() -> bytes:
            while (sample := receive()) is None:
                pass
            return string_at(sample.payload_ptr, size)

        self._receives(get)

    def close(self) -> None:
        for call in ("put", "get", "_receive"):  # they hold ports
            self.__dict__.pop(call, None)
        while self._ports:
            self._ports.pop()  # each before what it was made by
        # What belonged to a process that was killed.
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


class Iceoryx2InPlace(Iceoryx2):
    """Arrays written into a sample, and added up where they lie."""

    label = "iceoryx2 in place (busy polling)"
    carries = frozenset({"in place"})

    def take_sum(self) -> float:
        receive = self._receive
        while (sample := receive()) is None:
            pass
        view = (ctypes.c_uint8 * self._size).from_address(sample.payload_ptr)
        return float(np.frombuffer(memoryview(view), np.float32).sum())


PEERS: tuple[type[Transport], ...] = (
    FasterFifo,
    ZeroMq,
    Iceoryx2,
    Iceoryx2InPlace,
    Cloudtoid,
    Membridge,
    ShmQueue3,
    PosixQueue,
)

"""Transports: shmring, the standard library and packages from PyPI, behind the same few names.

`put` and `get` are the transport's own bound methods wherever they fit: a wrapper in
Python would cost more than the fast ones do.  ``make bench-peers`` installs the packages
one by one; where one cannot be installed, `Transport.missing` says why and it is left out.
Each is used as its documentation shows, with room for as many messages as ours.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import pickle
import queue
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import shmring
from benchmarks.work import Work, WrongContent

__all__ = ["TRANSPORTS", "BareWake", "Transport", "able"]

FORK = multiprocessing.get_context("fork")

_RING_BYTES = 1 << 20  # for small messages; arrays are given room for four of them
_RECORD_BYTES = 256  # where all messages have one size: a pickled dict, which knows its end
_PATIENCE_S = 50.0  # a call that looks at no signal ends before the session's deadline


class Transport:
    """One way from producers to consumers; made of a `Work`, before the fork.

    Attributes:
        label: its name in tables.
        carries: the kinds of work it can do; "bytes" means bytes that arrive as
            bytes, "in place" arrays that are added up where they lie.
        batches: it has `put_many` and `get_many`.
        between_processes: False for what only threads can use.
        shared: several producers and several consumers may use one.
        lines: it is no queue but a line from each producer to each consumer.
        largest: bytes of the largest message it takes.
        package: the module from PyPI it needs; such are left out unless asked for.
        share: the part of `Work.count` that makes a run of decent length.
    """

    label: ClassVar[str]
    carries: ClassVar[frozenset[str]] = frozenset({"bytes", "object", "array"})
    batches: ClassVar[bool] = False
    between_processes: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    lines: ClassVar[bool] = False
    largest: ClassVar[int] = sys.maxsize
    package: ClassVar[str | None] = None
    share: ClassVar[float] = 0.1

    _queue: Any = None
    put: Callable[[Any], object]
    get: Callable[[], Any]
    put_many: Callable[[Any], object]
    get_many: Callable[[], Any]

    @classmethod
    def missing(cls) -> str | None:
        """Return why it cannot run here; None if it can."""
        if cls.package is None:
            return None
        try:
            cls._module()
        except Exception as error:  # a package may break in any way while it is imported
            return f"{cls.package} cannot be imported ({error}): `make bench-peers` installs it"
        return None

    @classmethod
    def _module(cls) -> Any:
        return importlib.import_module(str(cls.package))

    def _use(self, queue: Any) -> None:
        """Take the methods of a queue as they are."""
        self._queue = queue
        self.put, self.get = queue.put, queue.get
        if self.batches:
            self.put_many, self.get_many = queue.put_many, queue.get_many

    def as_producer(self, consumers: int = 1) -> None:
        """Open what must not be inherited; in a process that will put, before it does."""

    def as_consumer(self, number: int = 0) -> None:
        """The same in a process that will get; `number` counts the consumers from 0."""

    def take_sum(self) -> float:
        """Receive an array that may be written to, and add it up."""
        array = self.get()
        if not array.flags.writeable:
            raise WrongContent(f"{self.label} delivered an array that cannot be written to")
        return float(array.sum())

    def flush(self) -> None:
        """Return when everything is on its way; in the producer, after its last put."""

    def close(self) -> None:
        """Release it; in the process that made it, at the end."""
        if hasattr(self._queue, "close"):
            self._queue.close()


# ---- shmring --------------------------------------------------------------------------------


class ShmringQueue(Transport):
    """As a program makes it: no argument given."""

    label = "shmring.Queue"
    batches = True
    share = 1.0

    def __init__(self, work: Work) -> None:
        self._use(shmring.Queue())


class ShmringRing(Transport):
    """Bytes only."""

    label = "shmring.Ring"
    carries = frozenset({"bytes"})
    batches = True
    share = 1.0

    def __init__(self, work: Work) -> None:
        self._use(shmring.Ring.create(capacity=max(1 << 18, 4 * work.nbytes)))

    @classmethod
    def missing(cls) -> str | None:
        return None if shmring.backend == "ring" else "the fallback has no Ring"


class ShmringInPlace(ShmringRing):
    """Arrays written into the ring and added up where they lie: nothing is copied out."""

    label = "shmring.Ring in place"
    carries = frozenset({"in place"})

    def __init__(self, work: Work) -> None:
        self._nbytes = work.nbytes
        # Three arrays and their headers: more would leave the processor's cache.
        self._use(shmring.Ring.create(capacity=4 * work.nbytes))
        self.put = self._put

    def _put(self, array: Any) -> None:
        with self._queue.reserve(self._nbytes) as view:
            np.copyto(np.frombuffer(view, np.float32), array)

    def take_sum(self) -> float:
        with self._queue.peek() as view:
            return float(np.frombuffer(view, np.float32).sum())


# ---- the standard library -------------------------------------------------------------------


class MultiprocessingQueue(Transport):
    label = "multiprocessing.Queue"

    def __init__(self, work: Work) -> None:
        self._use(FORK.Queue())

    def flush(self) -> None:
        # Its feeder thread still has messages; the process could not end before they are sent.
        self._queue.close()
        self._queue.join_thread()

    def close(self) -> None:
        self.flush()


class MultiprocessingSimpleQueue(Transport):
    label = "multiprocessing.SimpleQueue"

    def __init__(self, work: Work) -> None:
        self._use(FORK.SimpleQueue())


class MultiprocessingPipe(Transport):
    """One producer, one consumer, no lock: the least the standard library can do."""

    label = "multiprocessing.Pipe"
    shared = False

    def __init__(self, work: Work) -> None:
        self._reader, self._writer = FORK.Pipe(duplex=False)
        if work.kind == "bytes":
            self.put, self.get = self._writer.send_bytes, self._reader.recv_bytes
        else:
            self.put, self.get = self._writer.send, self._reader.recv

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class MultiprocessingPipeInto(MultiprocessingPipe):
    """Arrays without pickle: both sides know dtype and shape."""

    label = "multiprocessing.Pipe recv_bytes_into"
    carries = frozenset({"array"})

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._length = work.nbytes // 4
        self.put, self.get = self._writer.send_bytes, self._get

    def _get(self) -> Any:
        array = np.empty(self._length, np.float32)
        self._reader.recv_bytes_into(array)
        return array


class ThreadQueue(Transport):
    """The cost of a queue that need not leave the process."""

    label = "queue.SimpleQueue (threads)"
    between_processes = False
    share = 1.0

    def __init__(self, work: Work) -> None:
        self._use(queue.SimpleQueue())


class BareWake(Transport):
    """A wake-up without a message, the nearest to a bare futex in Python.  Not in `TRANSPORTS`."""

    label = "multiprocessing.Semaphore"
    share = 1.0

    def __init__(self, work: Work) -> None:
        semaphore, message = FORK.Semaphore(0), work.pool[0]
        wake, wait = semaphore.release, semaphore.acquire

        def get() -> Any:
            wait()
            return message

        self.put, self.get = lambda message: wake(), get


# ---- packages from PyPI ---------------------------------------------------------------------

_numbers = itertools.count()


def _name() -> str:
    """Return a name that no other process uses."""
    return f"shmring-bench-{os.getpid()}-{next(_numbers)}"


def _room(work: Work) -> int:
    """Return bytes: a power of two, which two of the packages ask for."""
    return max(_RING_BYTES, 4 * work.nbytes)


class BytesPeer(Transport):
    """A transport of bytes: objects are pickled here."""

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


class FasterFifo(Transport):
    """Pickles everything; a mutex and condition variables between processes."""

    label = "faster-fifo"
    package = "faster_fifo"
    batches = True

    def __init__(self, work: Work) -> None:
        self._use(self._module().Queue(max_size_bytes=_room(work)))


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
        if self._work.kind == "array":  # it is not written to before it is sent
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


TRANSPORTS: tuple[type[Transport], ...] = (
    ShmringQueue,
    ShmringRing,
    ShmringInPlace,
    MultiprocessingQueue,
    MultiprocessingSimpleQueue,
    MultiprocessingPipe,
    MultiprocessingPipeInto,
    ThreadQueue,
    FasterFifo,
    ZeroMq,
    Iceoryx2,
    Iceoryx2InPlace,
    Cloudtoid,
    Membridge,
    ShmQueue3,
    PosixQueue,
)


def able(
    kind: str, *, between_processes: bool = True, shared: bool = False, peers: bool = True
) -> list[type[Transport]]:
    """Return the transports that can do work of this kind.

    Args:
        kind: what they must carry.
        between_processes: leave out those that only threads can use.
        shared: leave out those with one producer and one consumer.
        peers: include packages from PyPI.
    """
    return [
        one
        for one in TRANSPORTS
        if kind in one.carries
        and (one.between_processes or not between_processes)
        and (one.shared or not shared)
        and (one.package is None or peers)
    ]

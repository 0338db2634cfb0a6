"""Transports: shmring, the standard library and packages from PyPI, behind one interface.

`put` and `get` are the bound methods of the transport where they fit: a wrapper in Python
would cost more than the fast ones do.  ``make bench-peers`` installs the packages one by one;
one that cannot be imported is left out, and `Transport.missing` says why.  Each is used as
its documentation shows, with space for as many messages as shmring has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import mmap
import multiprocessing
import pickle
import queue
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import shmring
from benchmarks import progress
from benchmarks.work import BATCH, STOP, Work, WrongContent

with contextlib.suppress(ImportError):  # only arrays need it
    import numpy as np

FORK = multiprocessing.get_context("fork")

_RING_BYTES = 1 << 20  # for small messages; arrays get space for four
_RECORD_BYTES = 256  # for a pickled dict, where all messages have one size
_LARGEST_BYTES = 1 << 30  # of one transport
_SUBETHA_BYTES = 64  # of a slot; a shorter message is padded
_SUBETHA_SLOTS = 4096
_SUBETHA_ENDS = 18  # producers, and as many consumers: 16, and the process that stops them
_TIMEOUT_S = 50.0  # of calls that no signal interrupts: below the deadline of a session


class Transport:
    """A way from producers to consumers; made of a `Work`, before the fork.

    It carries kinds of work: "bytes" arrive as bytes, "object" as an equal object, "array" as a
    writable array; "in place" are arrays that are summed in shared memory.
    """

    label: ClassVar[str]  # the name in tables
    carries: ClassVar[frozenset[str]] = frozenset({"bytes", "object", "array"})
    batches: ClassVar[bool] = False  # it has put_many and get_many
    threads_only: ClassVar[bool] = False  # it does not leave the process
    shared: ClassVar[bool] = True  # several producers and several consumers may use it
    package: ClassVar[str | None] = None  # the module from PyPI
    share: ClassVar[float] = 0.1  # of Work.count: a run of reasonable length

    _queue: Any = None
    put: Callable[[Any], object]
    get: Callable[[], Any]
    put_many: Callable[[Any], object]
    get_many: Callable[[], Any]

    @classmethod
    def missing(cls) -> str | None:
        """Return why the package cannot be used here; None if it can."""
        if cls.package is None:
            return None
        try:
            cls._module()
        except Exception as error:  # an import may fail in any way
            return f"{cls.package} cannot be imported ({error}): `make bench-peers` installs it"
        return None

    @classmethod
    def _module(cls) -> Any:
        return importlib.import_module(str(cls.package))

    def _use(self, queue: Any) -> None:
        """Take the methods of a queue."""
        self._queue = queue
        self.put, self.get = queue.put, queue.get
        if self.batches:
            self.put_many, self.get_many = queue.put_many, queue.get_many

    def as_producer(self) -> None:
        """Open what must not be inherited; in a producer, before its first put."""

    def as_consumer(self) -> None:
        """Open what must not be inherited; in a consumer, before its first get."""

    def take_sum(self) -> float:
        """Receive a writable array and return its sum."""
        array = self.get()
        if not array.flags.writeable:
            raise WrongContent(f"{self.label} delivered an array that is not writable")
        return float(array.sum())

    def flush(self) -> None:
        """Wait until everything is sent; in a producer, after its last put."""

    def stop(self, consumers: int) -> None:
        """Send each consumer a `STOP`, after all that the producers sent."""
        for _ in range(consumers):
            self.put(STOP)

    def close(self) -> None:
        """Release it; in the process that made it, at the end."""
        if hasattr(self._queue, "close"):
            self._queue.close()


# ---- shmring --------------------------------------------------------------------------------


class ShmringQueue(Transport):
    """A queue with default arguments."""

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


class ShmringInPlace(ShmringRing):
    """Arrays are written into the ring and summed there; nothing is copied out."""

    label = "shmring.Ring in place"
    carries = frozenset({"in place"})

    def __init__(self, work: Work) -> None:
        self._nbytes = work.nbytes
        # Three arrays and their frames: more would not fit into the cache.
        self._use(shmring.Ring.create(capacity=4 * work.nbytes))
        self.put = self._put

    def _put(self, array: Any) -> None:
        with self._queue.reserve(self._nbytes) as view:
            np.copyto(np.frombuffer(view, np.float32), array)

    def take_sum(self) -> float:
        with self._queue.peek() as view:
            return float(np.frombuffer(view, np.float32).sum())


class ShmringLent(ShmringQueue):
    """Arrays are written into a block of the queue and summed there."""

    label = "shmring.Queue, lent"
    carries = frozenset({"in place"})


# ---- the standard library -------------------------------------------------------------------


class MultiprocessingQueue(Transport):
    label = "multiprocessing.Queue"

    def __init__(self, work: Work) -> None:
        self._use(FORK.Queue())

    def flush(self) -> None:
        # The feeder thread may still hold messages.
        self._queue.close()
        self._queue.join_thread()

    def close(self) -> None:
        self.flush()


class MultiprocessingSimpleQueue(Transport):
    label = "multiprocessing.SimpleQueue"

    def __init__(self, work: Work) -> None:
        self._use(FORK.SimpleQueue())


class MultiprocessingPipe(Transport):
    """One producer, one consumer, no lock."""

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


class ThreadQueue(Transport):
    """A queue between threads."""

    label = "queue.SimpleQueue (threads)"
    threads_only = True
    share = 1.0

    def __init__(self, work: Work) -> None:
        self._use(queue.SimpleQueue())


# ---- packages from PyPI ---------------------------------------------------------------------


def _name() -> str:
    """Return a unique name."""
    return f"shmring-bench-{secrets.token_hex(8)}"


def _capacity(work: Work) -> int:
    """Return a capacity in bytes; a power of two, which two of the packages require."""
    return max(_RING_BYTES, 4 * work.nbytes)


def _until_true(call: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Poll a call that refuses a message while there is no space."""

    def put(message: Any) -> None:
        while not call(message):
            pass

    return put


def _until_some(call: Callable[[], Any]) -> Callable[[], Any]:
    """Poll a call that returns None while there is no message."""

    def get() -> Any:
        while (message := call()) is None:
            pass
        return message

    return get


class BytesPeer(Transport):
    """A transport of bytes; objects are pickled here."""

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
        elif self._work.kind == "array":  # the copy is writable
            self.get = lambda: np.frombuffer(get(), np.float32).copy()


class BlockPeer(BytesPeer):
    """A transport of blocks of one size."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._size = work.nbytes or _RECORD_BYTES
        self._blocks = max(4, min(1000, _RING_BYTES // self._size))

    def _copies(self, put: Callable[[Any, int], None]) -> None:
        """Set `put` over a call that copies so many bytes from an address or bytes object."""
        size = self._size

        def put_bytes(message: bytes) -> None:
            if len(message) > size:
                raise ValueError(f"{len(message)} bytes for a block of {size}")
            put(message, len(message))

        self._sends(put_bytes)
        if self._work.kind == "array":
            self.put = lambda array: put(array.ctypes.data, size)


class FasterFifo(Transport):
    """Everything is pickled; a mutex and condition variables between processes."""

    label = "faster-fifo"
    package = "faster_fifo"
    batches = True

    def __init__(self, work: Work) -> None:
        self._use(self._module().Queue(max_size_bytes=_capacity(work)))


class Cloudtoid(BytesPeer):
    """The producer polls a full queue."""

    label = "cloudtoid-interprocess"
    package = "cloudtoid_interprocess"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._folder = tempfile.mkdtemp(prefix="shmring-cloudtoid-", dir="/dev/shm")
        self._arguments = (_name(), _capacity(work), self._folder)
        self._ends: list[Any] = []

    def _open(self, kind: str) -> Any:
        self._ends.append(getattr(self._module(), kind)(*self._arguments))
        return self._ends[-1]

    def as_producer(self) -> None:
        self._sends(_until_true(self._open("Publisher").try_send))

    def as_consumer(self) -> None:
        self._receives(functools.partial(self._open("Subscriber").receive, _TIMEOUT_S))

    def close(self) -> None:
        for end in self._ends:
            end.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Membridge(BytesPeer):
    """One producer, one consumer; both poll."""

    label = "membridge (busy polling)"
    package = "membridge"
    shared = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._memory, self._name = self._module().SharedMemory, f"/{_name()}"
        ring = self._memory.create(self._name, 24 + _capacity(work)).spsc()  # 24: the header
        put = _until_true(ring.push)
        self._sends(put)
        self._receives(_until_some(ring.pop))
        if work.kind == "array":
            self.put = lambda array: put(array.tobytes())  # it takes only bytes

    def close(self) -> None:
        self._memory.remove(self._name)


class ShmQueue3(BlockPeer):
    """A pool of blocks of one size, and a queue of their numbers.

    With two producers or consumers it hangs: only a queue that was full or empty wakes one.
    """

    label = "shmqueue3"
    package = "shmqueue3.shmqueue3"
    shared = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        package, size = self._module(), self._size
        pool = package.ShmPool(elem_size=size, size=self._blocks)
        numbers = package.ShmQueue(pool)
        taken = package.ShmElem()
        memmove, addressof = ctypes.memmove, ctypes.addressof

        def put(source: Any, length: int) -> None:
            block = pool.allocate()
            memmove(block.ptr, source, length)
            numbers.put(block)

        def get() -> bytes:
            numbers.take(taken)
            message = ctypes.string_at(taken.ptr, size)
            taken.free()
            return message

        def get_array() -> Any:
            array = np.empty(size // 4, np.float32)
            numbers.take(taken)
            memmove(array.ctypes.data, addressof(taken.ptr.contents), size)
            taken.free()
            return array

        self._copies(put)
        self._receives(get)
        if work.kind == "array":
            self.get = get_array


class Iceoryx2(BlockPeer):
    """Publish and subscribe with samples of one size; the subscriber polls."""

    label = "iceoryx2 (busy polling)"
    package = "iceoryx2"
    carries = frozenset({"bytes", "object"})
    shared = False  # each subscriber receives everything

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._folder = tempfile.mkdtemp(prefix="shmring-iceoryx2-")
        self._prefix = f"{_name()}_"
        self._ports: list[Any] = []

    def _service(self) -> Any:
        """Open the service in a node of this process; its files are in our own folder."""
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
            .enable_safe_overflow(False)  # the default drops messages
            .subscriber_max_buffer_size(self._blocks)
            .open_or_create()
        )
        self._ports += [node, service]
        return iox2, service

    def as_producer(self) -> None:
        iox2, service = self._service()
        publisher = (
            service.publisher_builder()
            .backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        self._ports.append(publisher)
        loan, memmove = publisher.loan_uninit, ctypes.memmove

        def put(source: Any, length: int) -> None:
            sample = loan()
            memmove(sample.payload_ptr, source, length)
            sample.assume_init().send()

        self._copies(put)

    def as_consumer(self) -> None:
        _, service = self._service()
        subscriber = service.subscriber_builder().create()
        self._ports.append(subscriber)
        self._receive = receive = _until_some(subscriber.receive)
        string_at, size = ctypes.string_at, self._size

        def get() -> bytes:
            sample = receive()  # the payload is valid as long as the sample lives
            return string_at(sample.payload_ptr, size)

        self._receives(get)

    def close(self) -> None:
        for call in ("put", "get", "_receive"):  # they hold ports
            self.__dict__.pop(call, None)
        while self._ports:
            self._ports.pop()  # in the reverse order of their making
        # A killed process leaves its files.
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


class Iceoryx2InPlace(Iceoryx2):
    """Arrays are written into a sample and summed there."""

    label = "iceoryx2 in place (busy polling)"
    carries = frozenset({"in place"})

    def take_sum(self) -> float:
        sample = self._receive()  # the payload is valid as long as the sample lives
        view = (ctypes.c_uint8 * self._size).from_address(sample.payload_ptr)
        return float(np.frombuffer(memoryview(view), np.float32).sum())


class KickmsgTopic(BytesPeer):
    """Publish and subscribe: what is not read in time is overwritten, so there is space for all."""

    label = "kickmsg"
    package = "kickmsg"
    carries = frozenset({"bytes", "object"})
    shared = False  # each subscriber receives everything

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        package = self._module()
        settings = package.Config()
        settings.max_subscribers = 1
        messages = 4 * max(16, int(work.count * self.share))  # four: of a longer run
        settings.sub_ring_capacity = 1 << messages.bit_length()
        settings.pool_size = 2 * settings.sub_ring_capacity
        settings.max_payload_size = work.nbytes or _RECORD_BYTES
        if settings.pool_size * settings.max_payload_size > _LARGEST_BYTES:
            raise ValueError(f"{messages} messages of {work.nbytes} bytes would not fit at once")
        self._region = package.SharedRegion.create(
            f"/{_name()}", package.ChannelType.PubSub, settings
        )
        # Before the first message, or that would not be kept.
        subscriber, timeout = package.Subscriber(self._region), timedelta(seconds=_TIMEOUT_S)
        self._receives(functools.partial(subscriber.receive, timeout))

    def as_producer(self) -> None:
        self._sends(self._module().Publisher(self._region).send)

    def close(self) -> None:
        self._region.unlink()


class SubethaSpscRing(BytesPeer):
    """One producer, one consumer; slots of 64 bytes."""

    label = "subetha SpscRing (busy polling)"
    package = "subetha"
    carries = frozenset({"bytes"})
    batches = True
    shared = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        if work.nbytes != _SUBETHA_BYTES:
            raise ValueError(f"{work.nbytes} bytes for a slot of {_SUBETHA_BYTES}")
        self._folder = tempfile.mkdtemp(prefix="shmring-subetha-", dir="/dev/shm")
        self._open()

    def _open(self) -> None:
        ring = self._module().SpscRing(f"{self._folder}/ring", _SUBETHA_SLOTS)
        self.put, self.get = _until_true(ring.push), _until_some(ring.pop)

        def put_many(messages: list[bytes]) -> None:
            while (sent := ring.push_many(messages)) < len(messages):
                messages = messages[sent:]

        def get_many() -> Any:
            while not (messages := ring.pop_many(BATCH)):
                pass
            return messages

        self.put_many, self.get_many = put_many, get_many

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class SubethaRing(SubethaSpscRing):
    """Registered producers and consumers; no order between two producers."""

    label = "subetha Ring (busy polling)"
    batches = False
    shared = True

    def _open(self) -> None:
        self._ended = mmap.mmap(-1, 1)
        arguments = (f"{self._folder}/ring", _SUBETHA_SLOTS, _SUBETHA_ENDS, _SUBETHA_ENDS)
        self._ring = functools.partial(self._module().Ring.open, *arguments)
        self._first = self._module().Ring(*arguments)

    def as_producer(self) -> None:
        ring = self._ring()
        self.put = _until_true(functools.partial(ring.send, ring.register_producer()))

        def flush() -> None:
            while not ring.is_empty():
                time.sleep(0.0001)

        self.flush = flush

    def as_consumer(self) -> None:
        ring, ended = self._ring(), self._ended
        receive = functools.partial(ring.recv, ring.register_consumer())

        def get() -> Any:
            while (message := receive()) is None:
                if ended[0]:
                    return STOP
            return message

        self.get = get

    def stop(self, consumers: int) -> None:
        # The ring decides which consumer a message is for; it is empty now.
        self._ended[0] = 1


class PySharedMemory(Transport):
    """A block of shared memory for each message, its name through `multiprocessing.Queue`."""

    label = "py-sharedmemory"
    package = "py_sharedmemory"
    shared = False  # one producer

    def __init__(self, work: Work) -> None:
        messages = max(4, min(1000, _RING_BYTES // (work.nbytes or _RECORD_BYTES)))
        pair = self._module().create_shared_memory_pair(messages, ctx=FORK)
        self._sender, self._receiver = pair
        self.put, self.get = self._sender.put, self._receiver.get

    def flush(self) -> None:
        self._sender.wait_for_all_ack()

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


TRANSPORTS: tuple[type[Transport], ...] = (
    ShmringQueue,
    ShmringRing,
    ShmringInPlace,
    ShmringLent,
    MultiprocessingQueue,
    MultiprocessingSimpleQueue,
    MultiprocessingPipe,
    ThreadQueue,
    FasterFifo,
    Iceoryx2,
    Iceoryx2InPlace,
    Cloudtoid,
    Membridge,
    ShmQueue3,
    KickmsgTopic,
    SubethaSpscRing,
    SubethaRing,
    PySharedMemory,
)


def able(kind: str, *, shared: bool = False, threads: bool = False) -> list[type[Transport]]:
    """Return the transports for a kind of work.

    Args:
        kind: what they must carry.
        shared: only those that several producers and consumers may use.
        threads: include those that do not leave the process.
    """
    return [
        one
        for one in TRANSPORTS
        if kind in one.carries and (one.shared or not shared) and (threads or not one.threads_only)
    ]


def present(kind: str, *, peers: bool, shared: bool = False) -> list[type[Transport]]:
    """Return those transports that can be used here, and say which cannot.

    Args:
        kind, shared: as for `able`.
        peers: include the packages from PyPI.
    """
    found = []
    for one in able(kind, shared=shared):
        if one.package is not None and not peers:
            continue
        if reason := one.missing():
            progress(f"left out: {one.label}: {reason}")
        else:
            found.append(one)
    return found

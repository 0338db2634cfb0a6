"""Each transport behind the same few names: ours, and those of the standard library.

``put`` and ``get`` are the transport's own bound methods wherever it has ones
that fit: a wrapper in Python would cost more than the fast ones do.
"""

from __future__ import annotations

import multiprocessing
import queue
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import shmring
from benchmarks.work import Work, WrongContent

__all__ = ["TRANSPORTS", "BareWake", "Transport"]


class Transport:
    """One way, from producers to consumers; made of a `Work`, before the fork.

    Attributes:
        label: its name in tables.
        carries: the kinds of work it can do; "bytes" means bytes that arrive as
            bytes, "in place" arrays that are added up where they lie.
        batches: whether it has `put_many` and `get_many`.
        between_processes: False for what threads use, which is shown beside
            the others where one process does both.
        shared: whether several producers and several consumers may use one.
        lines: whether it is no queue but a line from each producer to each consumer.
        largest: bytes of the largest message it takes.
        peer: whether it comes from PyPI; such are left out unless asked for.
        share: the part of `Work.count` that makes a run of decent length.
        put, get: one message.
    """

    label: ClassVar[str]
    carries: ClassVar[frozenset[str]] = frozenset({"bytes", "object", "array"})
    batches: ClassVar[bool] = False
    between_processes: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    lines: ClassVar[bool] = False
    largest: ClassVar[int] = sys.maxsize
    peer: ClassVar[bool] = False
    share: ClassVar[float] = 0.1

    put: Callable[[Any], object]
    get: Callable[[], Any]
    put_many: Callable[[Any], object]
    get_many: Callable[[], Any]

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here (a package that is not installed); None if it can."""
        return None

    def as_producer(self, consumers: int = 1) -> None:
        """In a process that will put, before it does: open what must not be inherited.

        Args:
            consumers: how many there are, for what is no queue but many lines.
        """

    def as_consumer(self, number: int = 0) -> None:
        """In a process that will get, before anybody puts; `number` counts them from 0."""

    def take_sum(self) -> float:
        """Receive an array that may be written to, and add it up."""
        array = self.get()
        if not array.flags.writeable:
            raise WrongContent(f"{self.label} delivered an array that cannot be written to")
        return float(array.sum())

    def flush(self) -> None:
        """In the producer, after its last put: return when everything is on its way."""

    def close(self) -> None:
        """In the process that made it, at the end."""


# ---- shmring --------------------------------------------------------------------------------


class ShmringQueue(Transport):
    """As a user makes it: no argument given."""

    label = "shmring.Queue"
    batches = True
    share = 1.0

    def __init__(self, work: Work) -> None:
        self._queue: Any = shmring.Queue()
        self.put = self._queue.put
        self.get = self._queue.get
        self.put_many = self._queue.put_many
        self.get_many = self._queue.get_many

    def close(self) -> None:
        self._queue.close()


class ShmringRing(Transport):
    """Bytes only."""

    label = "shmring.Ring"
    carries = frozenset({"bytes"})
    batches = True
    share = 1.0

    def __init__(self, work: Work) -> None:
        self._ring = shmring.Ring.create(capacity=max(1 << 18, 4 * work.nbytes))
        self.put = self._ring.put
        self.get = self._ring.get
        self.put_many = self._ring.put_many
        self.get_many = self._ring.get_many

    @classmethod
    def missing(cls) -> str | None:
        return None if shmring.backend == "ring" else "the fallback has no Ring"

    def close(self) -> None:
        self._ring.close()


class ShmringInPlace(ShmringRing):
    """Arrays written into the ring and added up where they lie: nothing is copied out."""

    label = "shmring.Ring in place"
    carries = frozenset({"in place"})
    batches = False

    def __init__(self, work: Work) -> None:
        self._nbytes = work.nbytes
        # Three arrays and their headers: more would leave the processor's cache.
        self._ring = shmring.Ring.create(capacity=4 * work.nbytes)
        self.put = self._put
        self.get = self._get

    def _put(self, array: Any) -> None:
        with self._ring.reserve(self._nbytes) as view:
            np.copyto(np.frombuffer(view, np.float32), array)

    def _get(self) -> Any:
        with self._ring.peek() as view:
            return np.frombuffer(view, np.float32).copy()

    def take_sum(self) -> float:
        with self._ring.peek() as view:
            return float(np.frombuffer(view, np.float32).sum())


# ---- the standard library -------------------------------------------------------------------


class MultiprocessingQueue(Transport):
    label = "multiprocessing.Queue"

    def __init__(self, work: Work) -> None:
        self._queue: Any = multiprocessing.get_context("fork").Queue()
        self.put = self._queue.put
        self.get = self._queue.get

    def flush(self) -> None:
        # Its feeder thread has them still; the process could not end before it has sent them.
        self._queue.close()
        self._queue.join_thread()

    def close(self) -> None:
        self.flush()


class MultiprocessingSimpleQueue(Transport):
    label = "multiprocessing.SimpleQueue"

    def __init__(self, work: Work) -> None:
        self._queue: Any = multiprocessing.get_context("fork").SimpleQueue()
        self.put = self._queue.put
        self.get = self._queue.get

    def close(self) -> None:
        self._queue.close()


class MultiprocessingPipe(Transport):
    """One producer, one consumer, no lock: the least the standard library can do."""

    label = "multiprocessing.Pipe"
    shared = False

    def __init__(self, work: Work) -> None:
        self._reader, self._writer = multiprocessing.get_context("fork").Pipe(duplex=False)
        if work.kind == "bytes":
            self.put, self.get = self._writer.send_bytes, self._reader.recv_bytes
        else:
            self.put, self.get = self._writer.send, self._reader.recv

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class MultiprocessingPipeInto(MultiprocessingPipe):
    """Arrays by hand: no pickle, both sides know dtype and shape."""

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
    """Not between processes: what a queue costs that need not leave the process."""

    label = "queue.SimpleQueue (threads)"
    between_processes = False
    share = 1.0

    def __init__(self, work: Work) -> None:
        threads: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put, self.get = threads.put, threads.get


class BareWake(Transport):
    """The wake-up and no message: as near to a bare futex as Python comes.  Not in `TRANSPORTS`."""

    label = "multiprocessing.Semaphore"
    share = 1.0

    def __init__(self, work: Work) -> None:
        semaphore = multiprocessing.get_context("fork").Semaphore(0)
        wake, wait, message = semaphore.release, semaphore.acquire, work.pool[0]

        def get() -> Any:
            wait()
            return message

        self.put, self.get = lambda message: wake(), get


TRANSPORTS: tuple[type[Transport], ...] = (
    ShmringQueue,
    ShmringRing,
    ShmringInPlace,
    MultiprocessingQueue,
    MultiprocessingSimpleQueue,
    MultiprocessingPipe,
    MultiprocessingPipeInto,
    ThreadQueue,
)

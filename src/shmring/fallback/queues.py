"""The queues of multiprocessing with the methods of shmring's, where the ring cannot be.

A queue here is a pipe with a feeder thread and has its weaknesses: a process that is
killed at the wrong moment can block it for the others, and it reaches another process
only as an argument.  What a pipe cannot do raises :class:`NotSupportedByFallback`.
An object becomes bytes in ``put``, so that one that cannot be pickled raises there.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.queues
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from multiprocessing import connection
from typing import Any, Generic, NoReturn, Self, TypeVar

from shmring.arguments import checked_int, checked_maxsize, checked_timeout
from shmring.errors import (
    DecodeError,
    Empty,
    Full,
    InvalidArgument,
    NotSupportedByFallback,
    RingClosed,
    ShutDown,
)
from shmring.process.leaving import close_dropped, end_thread_at_exit
from shmring.process.peers import PeerPoll
from shmring.queues.codec import find_codec

__all__ = ["JoinableQueue", "Queue", "Ring", "SimpleQueue", "SlicedWait", "encoded", "wait"]

T = TypeVar("T")
R = TypeVar("R")
Peers = Iterable[Any] | None

_OPEN, _SHUT_DOWN, _SHUT_DOWN_NOW = range(3)
_SLICE = 0.1  # seconds after which a blocked call looks whether the queue was shut down
_SHORT_SLICE = 0.001  # once all peers are dead: another consumer may have the lock of the pipe
_MOST_UNCOUNTED = 1024  # what get_many() takes at most where messages cannot be counted

_NO_NAME = "a pipe has no name"
_NO_BYTES = "a pipe does not tell its bytes"
_NO_CANCEL = "a wait for a pipe or a semaphore cannot be cancelled without a loss"


def _only_ring(what: str, reason: str) -> Callable[..., NoReturn]:
    """A stand-in for what only the compiled ring has."""

    def refuse(*args: object, **options: object) -> NoReturn:
        raise NotSupportedByFallback(
            f"{what} needs the compiled ring, and this is the fallback on multiprocessing: {reason}"
        )

    return refuse


def encoded(codec: Any, obj: object) -> tuple[int, bytes, list[bytearray]]:
    """Encode an object into the arguments of the codec's ``decode``."""
    kind, (head, *buffers) = codec.encode(obj)
    return kind, bytes(head), [bytearray(each) for each in buffers]


class SlicedWait:
    """A wait in slices, with one deadline; `block`, `timeout` and `peers` are a caller's."""

    def __init__(self, block: bool, timeout: float | None, peers: Peers) -> None:
        timeout = checked_timeout(timeout) if block else 0.0
        self._poll = None if peers is None else PeerPoll(peers)
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout

    def until(
        self, attempt: Callable[[float], R], outcome: str, proves: Callable[[], bool] | None = None
    ) -> R:
        """Call `attempt` with seconds to wait, until it raises neither Empty nor Full.

        The exception stands at the deadline.  It becomes PeerDied, with `outcome`, if all
        peers were dead before the attempt and `proves` says that it will never succeed.
        """
        while True:
            died = self._poll is not None and self._poll.all_dead()
            longest = _SHORT_SLICE if died else _SLICE if self._poll is None else self._poll.SLICE
            try:
                return attempt(max(0.0, min(longest, self._deadline - time.monotonic())))
            except (Empty, Full):
                if died and self._poll is not None and (proves is None or proves()):
                    raise self._poll.error(outcome) from None
                if time.monotonic() >= self._deadline:
                    raise


class _PipeQueue(Generic[T]):
    """Lifecycle and codec of the queues; stands before multiprocessing's class."""

    _codec: Any
    _flag: Any = None  # shared by all processes: open, shut down, shut down now
    _pid = 0
    _closed = True  # until it has been made
    _reader: Any

    attach = classmethod(_only_ring("Queue.attach()", _NO_NAME))
    unlink = _only_ring("Queue.unlink()", _NO_NAME)
    fileno = _only_ring("Queue.fileno()", _NO_NAME)
    statistics = _only_ring("Queue.statistics()", "a pipe has no counters that processes share")
    aget = _only_ring("Queue.aget()", _NO_CANCEL)
    aput = _only_ring("Queue.aput()", _NO_CANCEL)
    __aiter__ = __anext__ = _only_ring("async for", _NO_CANCEL)
    # Not properties: programs keep attributes of these names in their subclasses.
    name = cached_property(_only_ring("Queue.name", _NO_NAME))
    capacity = cached_property(_only_ring("Queue.capacity", _NO_BYTES))
    max_capacity = cached_property(_only_ring("Queue.max_capacity", _NO_BYTES))
    largest = cached_property(_only_ring("Queue.largest", _NO_BYTES))

    def close(self) -> None:
        """Close this handle; what was put is still sent. Twice is allowed."""
        if not self._closed:
            self._closed = True
            super().close()  # type: ignore[misc]

    def empty(self) -> bool:
        """Whether the pipe is empty; what a feeder thread still holds is not seen."""
        self._check_open()
        return super().empty()  # type: ignore[misc, no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # First, and bound above: at the very end the globals are gone.
        if not is_finalizing() and not self._closed and self._pid == os.getpid():
            close_dropped(self, self.close)

    def __getstate__(self) -> Any:  # the pipe refuses where this is no argument of a process
        return super().__getstate__(), self._codec, self._flag

    def __setstate__(self, state: Any) -> None:
        stock, codec, flag = state
        super().__setstate__(stock)  # type: ignore[misc]
        self._opened(codec, flag)

    def _opened(self, codec: Any, flag: Any) -> None:
        self._codec = codec
        self._flag = flag
        self._pid = os.getpid()
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            end_thread_at_exit()
            raise RingClosed("this queue has been closed by this handle")


class Queue(_PipeQueue[T], multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """``multiprocessing.Queue`` with the methods of :class:`shmring.Queue`.

    Args:
        maxsize: how many messages it holds at most; 0 is without a bound.
        ctx: the multiprocessing context of the processes that will use it.
        codec: as for :class:`shmring.Queue`.
        max_capacity: not used; what a pipe cannot hold waits in the feeder thread.
        name: must be None.
    """

    _sem: Any

    def __init__(
        self,
        maxsize: int = 0,
        *,
        ctx: Any = None,
        codec: Any = "pickle",
        max_capacity: int | None = None,
        name: str | None = None,
    ) -> None:
        from multiprocessing.synchronize import SEM_VALUE_MAX  # type: ignore[attr-defined]

        if name is not None:
            _only_ring(f"Queue(name={name!r})", _NO_NAME)()
        if max_capacity is not None and (limit := checked_int(max_capacity, "max_capacity")) <= 0:
            raise InvalidArgument(f"max_capacity={limit}: at least 1 byte is needed")
        bound, found = checked_maxsize(maxsize, SEM_VALUE_MAX), find_codec(codec)
        chosen = ctx or multiprocessing.get_context()
        super().__init__(bound, ctx=chosen)
        self._opened(found, chosen.RawValue("B", _OPEN))

    def put(
        self, obj: T, block: bool = True, timeout: float | None = None, *, peers: Peers = None
    ) -> None:
        """As :meth:`shmring.Queue.put`."""
        self._put_encoded(encoded(self._codec, obj), SlicedWait(block, timeout, peers))

    def put_many(
        self,
        items: Iterable[T],
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Peers = None,
    ) -> None:
        """As :meth:`shmring.Queue.put_many`; any exception on the way has a ``count``."""
        self._check_open()
        waiting = SlicedWait(block, timeout, peers)
        messages = [encoded(self._codec, item) for item in items]
        for count, message in enumerate(messages):
            try:
                self._put_encoded(message, waiting)
            except BaseException as error:
                if isinstance(error, Full):
                    error.args = (f"{count} of {len(messages)} objects went in",)
                vars(error)["count"] = count
                raise

    def get(self, block: bool = True, timeout: float | None = None, *, peers: Peers = None) -> T:
        """As :meth:`shmring.Queue.get`; what a feeder thread held died with its process."""
        return self._get(SlicedWait(block, timeout, peers))

    def get_many(
        self,
        max_items: int | None = None,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Peers = None,
    ) -> list[T]:
        """As :meth:`shmring.Queue.get_many`."""
        if max_items is not None and (max_items := checked_int(max_items, "max_items")) < 1:
            raise InvalidArgument(f"max_items={max_items}: None, or at least 1")
        items = [self._get(SlicedWait(block, timeout, peers))]
        most = max_items or 1 + self._count_left()  # not what quick producers put meanwhile
        while len(items) < most:
            try:
                items.append(self._get(SlicedWait(False, None, None)))
            except (Empty, ShutDown):
                break
            except DecodeError as error:
                error.items = [*items]
                raise
        return items

    def qsize(self) -> int:
        """How many messages are there, in feeder threads too; NotImplementedError on macOS."""
        self._check_open()
        return super().qsize()

    def full(self) -> bool:
        """Whether ``maxsize`` is reached."""
        self._check_open()
        return super().full()

    def shutdown(self, immediate: bool = False) -> None:
        """As :meth:`shmring.Queue.shutdown`; the next ``get`` drops what is there."""
        self._check_open()
        self._flag.value = max(self._flag.value, _SHUT_DOWN_NOW if immediate else _SHUT_DOWN)

    def _put_encoded(self, message: Any, waiting: SlicedWait) -> None:
        stock_put = super().put

        def attempt(seconds: float) -> None:
            self._check_open()
            if self._flag.value != _OPEN:
                raise ShutDown
            stock_put(message, seconds > 0, seconds)

        waiting.until(attempt, "no room came")

    def _get(self, waiting: SlicedWait) -> T:
        message = waiting.until(self._take, "nothing is left to take", self.empty)
        return self._codec.decode(*message)  # type: ignore[no-any-return]

    def _take(self, seconds: float) -> Any:
        self._check_open()
        flag = self._flag.value
        if flag == _SHUT_DOWN_NOW:
            self._drain()
            raise ShutDown
        try:
            return super().get(seconds > 0, seconds)
        except Empty:
            # Only emptiness seen after the flag proves that nothing will come.
            if flag == _SHUT_DOWN and not self._count_left():
                raise ShutDown from None
            raise

    def _count_left(self) -> int:
        try:
            return self.qsize()
        except NotImplementedError:  # macOS
            return 0 if self.empty() else _MOST_UNCOUNTED

    def _drain(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                super().get(False)
                if isinstance(self, JoinableQueue):
                    self.task_done()


class JoinableQueue(Queue[T], multiprocessing.queues.JoinableQueue):  # type: ignore[type-arg]
    """``multiprocessing.JoinableQueue`` with the methods of :class:`shmring.JoinableQueue`."""

    _cond: Any
    _unfinished_tasks: Any

    def join(  # type: ignore[override]
        self, timeout: float | None = None, *, peers: Peers = None
    ) -> bool:
        """As :meth:`shmring.JoinableQueue.join`."""

        # The standard library's join(), which has no timeout, waits for the same condition.
        def attempt(seconds: float) -> None:
            with self._cond:
                if not self._cond.wait_for(self._unfinished_tasks._semlock._is_zero, seconds):
                    raise Empty

        try:
            SlicedWait(True, timeout, peers).until(attempt, "tasks are unfinished")
        except Empty:
            return False
        return True


class SimpleQueue(_PipeQueue[T], multiprocessing.queues.SimpleQueue):  # type: ignore[type-arg]
    """``multiprocessing.SimpleQueue`` with a codec, and an end; the arguments are Queue's."""

    def __init__(self, *, ctx: Any = None, codec: Any = "pickle") -> None:
        found = find_codec(codec)
        super().__init__(ctx=ctx or multiprocessing.get_context())
        self._opened(found, None)

    def put(self, obj: T, *, peers: Peers = None) -> None:
        """Put one message; waits while the pipe is full."""
        self._check_call(peers)
        message: Any = encoded(self._codec, obj)
        super().put(message)

    def get(self, *, peers: Peers = None) -> T:
        """Wait for one message and take it."""
        self._check_call(peers)
        message: Any = super().get()
        return self._codec.decode(*message)  # type: ignore[no-any-return]

    def _check_call(self, peers: Peers) -> None:
        self._check_open()
        if peers is not None:
            _only_ring("SimpleQueue with peers=", "its lock and its pipe are waited for as one")()


class Ring:
    """Only with the compiled ring: every way to make one raises NotSupportedByFallback."""

    __init__ = _only_ring("Ring()", "a pipe has no memory that could be written in place")
    create = classmethod(_only_ring("Ring.create()", "a pipe has no memory of its own"))
    attach = classmethod(_only_ring("Ring.attach()", _NO_NAME))


def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """As :func:`shmring.wait`: a queue is ready when its pipe is not empty, or it was shut down."""
    objects = list(object_list)
    timeout = checked_timeout(timeout)
    if not objects and timeout is None:
        raise InvalidArgument("object_list is empty: this would wait for ever")
    sources = [_source(each) for each in objects]
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        shut = [isinstance(each, Queue) and each._flag.value != _OPEN for each in objects]
        left = 0.0 if any(shut) else max(0.0, min(_SLICE, deadline - time.monotonic()))
        found = connection.wait(dict.fromkeys(sources), left)
        ready = [
            each
            for each, source, is_shut in zip(objects, sources, shut, strict=True)
            if is_shut or source in found
        ]
        if ready or time.monotonic() >= deadline:
            return ready


def _source(each: Any) -> Any:
    if isinstance(each, _PipeQueue):
        each._check_open()
        return each._reader
    return getattr(each, "sentinel", each)

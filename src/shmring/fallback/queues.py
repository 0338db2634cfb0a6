"""The same classes on ``multiprocessing``, for where the compiled ring cannot be.

A queue here is a pipe with a feeder thread, as in the standard library, and
has its weaknesses: a process that is killed at the wrong moment can wedge it
for the others, and nothing but inheritance leads to it.  What a pipe cannot do
raises :class:`NotSupportedByFallback`, with the reason.

Objects are turned into bytes in ``put`` itself, so that one that cannot be
pickled raises there on this back end too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.queues
import operator
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import connection, context
from typing import Any, Generic, Literal, NoReturn, Self, TypeVar

from shmring.arguments import checked_timeout
from shmring.errors import (
    DecodeError,
    Empty,
    Full,
    InvalidArgument,
    NotSupportedByFallback,
    RingClosed,
    ShutDown,
)
from shmring.fallback.files import SharedFile, SharedMemoryManager, cleanup_stale
from shmring.fallback.server import ServedQueue, checked_maxsize
from shmring.process.leaving import end_thread_at_exit
from shmring.process.peers import PeerPoll
from shmring.queues.codec import Codec, find_codec

__all__ = [
    "JoinableQueue",
    "Queue",
    "QueueStatistics",
    "Ring",
    "ServedQueue",
    "SharedFile",
    "SharedMemoryManager",
    "SimpleQueue",
    "cleanup_stale",
    "wait",
]

T = TypeVar("T")

_OPEN, _SHUT_DOWN, _SHUT_DOWN_NOW = range(3)
# A blocked call looks this often whether the queue has been shut down, in seconds.
_SLICE = 0.1
# What get_many() takes at most where nobody can say how many there are.
_MOST_UNCOUNTED = 1024


def _refuse(what: str, reason: str) -> NoReturn:
    raise NotSupportedByFallback(
        f"{what} needs the compiled ring, and this is the fallback on multiprocessing: {reason}"
    )


def _maxsize_of_a_pipe(maxsize: object) -> int:
    from multiprocessing.synchronize import SEM_VALUE_MAX  # type: ignore[attr-defined]

    return checked_maxsize(maxsize, SEM_VALUE_MAX, f"a pipe's semaphore counts to {SEM_VALUE_MAX}")


def _stock(ctx: Any) -> Any:
    """The context of multiprocessing, whose queues serve here, even for one of ours."""
    return multiprocessing.get_context(None if ctx is None else ctx.get_start_method())


@dataclasses.dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What this handle, in this process, has done; a pipe has no counters that all share."""

    messages_put: int
    messages_taken: int
    bytes_put: int
    bytes_taken: int


class _Handle:
    """What the queues have in common: an end."""

    _inner: Any
    _pid = 0
    _closed = True  # until it has been made

    def _opened(self) -> None:
        self._pid = os.getpid()
        self._closed = False

    def close(self) -> None:
        """Close this handle; what has been put is still sent. Twice is allowed."""
        if not self._closed:
            self._closed = True
            self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> Literal[False]:
        self.close()
        return False

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # First, and bound above: at the very end the globals are gone.
        if is_finalizing() or self._closed or self._pid != os.getpid():
            return
        dropped = repr(self)
        with contextlib.suppress(OSError):
            self.close()  # first: where warnings are errors the next line raises
        warnings.warn(
            f"{dropped} was dropped open: call close()", ResourceWarning, stacklevel=2, source=self
        )

    def _check_open(self) -> None:
        if self._closed:
            end_thread_at_exit()
            raise RingClosed("this queue has been closed by this handle")


class Queue(_Handle, Generic[T], multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """``multiprocessing.Queue`` with the methods of :class:`shmring.Queue`.

    Args:
        maxsize: how many messages it holds at most; 0 is without a bound.
        ctx: the multiprocessing context of the processes that will use it.
        codec: as for :class:`shmring.Queue`.
        max_capacity: accepted for the sake of the other back end; a pipe has a
            capacity of its own, and what does not fit waits in the feeder thread.
        name: must be None.

    Raises:
        NotSupportedByFallback: a name was given.
        InvalidArgument: an impossible codec, maxsize or max_capacity.
    """

    def __init__(
        self,
        maxsize: int = 0,
        *,
        ctx: context.BaseContext | None = None,
        codec: str | Codec = "pickle",
        max_capacity: int | None = None,
        name: str | None = None,
    ) -> None:
        if name is not None:
            _refuse(f"Queue(name={name!r})", "a pipe has no name")
        if max_capacity is not None and (max_capacity := operator.index(max_capacity)) <= 0:
            raise InvalidArgument(f"max_capacity={max_capacity}: at least 1 byte is needed")
        chosen = _stock(ctx)
        self._codec = find_codec(codec)
        self._inner = self._make(chosen, _maxsize_of_a_pipe(maxsize))
        self._flag = chosen.RawValue("B", _OPEN)
        self._reset()

    @classmethod
    def _make(cls, ctx: Any, maxsize: int) -> Any:
        return ctx.Queue(maxsize)

    @classmethod
    def attach(cls, name: str, timeout: float = 0.0, *, codec: str | Codec = "pickle") -> Queue[T]:
        """Only on the ring.

        Raises:
            NotSupportedByFallback: always.
        """
        _refuse(f"Queue.attach({name!r})", "a pipe has no name")

    @property
    def name(self) -> str:
        """Only on the ring.

        Raises:
            NotSupportedByFallback: always.
        """
        _refuse("Queue.name", "a pipe has no name")

    def unlink(self) -> None:
        """Only on the ring.

        Raises:
            NotSupportedByFallback: always.
        """
        _refuse("Queue.unlink()", "a pipe has no name")

    def put(
        self,
        obj: T,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> None:
        """Put one message.

        Args:
            obj: what to put.
            block: whether to wait while the queue is full.
            timeout: how long to wait at most, in seconds; None is without end.
            peers: processes (anything with a pid, or pids) without which waiting
                is in vain.

        Raises:
            Full: no room until the deadline.
            PeerDied: every one of ``peers`` is dead, and there is no room.
            EncodeError: the object cannot be encoded; nothing was put.
            ShutDown: the queue has been shut down.
            RingClosed: this handle has been closed.
        """
        watch = None if peers is None else PeerPoll(peers)
        self._put_encoded(self._encode(obj), block, timeout, watch)

    def put_nowait(self, obj: T) -> None:
        """Put one message, or raise :class:`Full` at once."""
        self.put(obj, block=False)

    def put_many(
        self,
        items: Iterable[T],
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> None:
        """Put several messages; all are encoded before the first one is put.

        Args:
            items: what to put.
            block: whether to wait while the queue is full.
            timeout: how long to wait at most, for all together, in seconds.
            peers: processes without which waiting is in vain, as for :meth:`put`.

        Raises:
            Full: no room until the deadline; its ``count`` says how many went in.
            PeerDied: every one of ``peers`` is dead; it has the same ``count``, as
                has whatever else is raised after some went in.
            EncodeError: one cannot be encoded; nothing was put.
        """
        self._check_open()
        timeout = checked_timeout(timeout)
        watch = None if peers is None else PeerPoll(peers)
        encoded = [self._encode(item) for item in items]
        deadline = None if timeout is None else time.monotonic() + timeout
        for count, each in enumerate(encoded):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self._put_encoded(each, block, left, watch, count)
            except Full:
                full = Full(f"{count} of {len(encoded)} objects went in")
                vars(full)["count"] = count
                raise full from None
            except BaseException as error:
                vars(error)["count"] = count
                raise

    def get(
        self,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> T:
        """Take one message.

        Args:
            block: whether to wait while the queue is empty.
            timeout: how long to wait at most, in seconds; None is without end.
            peers: processes (anything with a pid, or pids) without which waiting
                is in vain.  What a feeder thread held died with its process.

        Returns:
            the oldest message.

        Raises:
            Empty: none until the deadline.
            PeerDied: every one of ``peers`` is dead, and the pipe is empty.
            DecodeError: it was taken and cannot be decoded.
            ShutDown: the queue has been shut down, and is empty or was emptied.
            RingClosed: this handle has been closed.
        """
        self._check_open()
        timeout = checked_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        watch = None if peers is None else PeerPoll(peers)
        longest = _SLICE if watch is None else watch.SLICE
        while True:
            died = watch is not None and watch.all_dead()  # before the look that finds nothing
            flag = self._flag.value
            if flag == _SHUT_DOWN_NOW:
                self._drain()
                raise ShutDown
            left = longest if deadline is None else min(longest, deadline - time.monotonic())
            try:
                if block and left > 0 and flag == _OPEN and not died:
                    taken = self._inner.get(True, left)
                else:
                    taken = self._inner.get(False)
            except Empty:
                # Only emptiness seen after the flag proves that nothing will come.
                if flag == _SHUT_DOWN and self._is_drained():
                    raise ShutDown from None
                if died and watch is not None and self._inner.empty():
                    raise watch.error("nothing is left to take") from None
                if not block or (deadline is not None and time.monotonic() >= deadline):
                    raise
                if flag == _SHUT_DOWN or died:  # another consumer has the lock of the pipe
                    threading.Event().wait(0.001)
                continue
            return self._decode(taken)

    def get_nowait(self) -> T:
        """Take one message, or raise :class:`Empty` at once."""
        return self.get(block=False)

    async def aget(self, *, timeout: float | None = None, peers: Iterable[Any] | None = None) -> T:
        """Only on the ring.

        Raises:
            NotSupportedByFallback: always.
        """
        _refuse("Queue.aget()", "a blocked read of a pipe cannot be cancelled without a loss")

    async def aput(
        self, obj: T, *, timeout: float | None = None, peers: Iterable[Any] | None = None
    ) -> None:
        """Only on the ring.

        Raises:
            NotSupportedByFallback: always.
        """
        _refuse("Queue.aput()", "a wait for a semaphore cannot be cancelled")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return await self.aget()

    def get_many(
        self,
        max_items: int | None = None,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> list[T]:
        """Wait for one message, then take what is there, in order.

        Args:
            max_items: how many at most; None is all.
            block: whether to wait for the first.
            timeout: how long to wait for the first, in seconds.
            peers: processes without which waiting is in vain, as for :meth:`get`.

        Returns:
            at least one message.

        Raises:
            Empty: none until the deadline.
            PeerDied: every one of ``peers`` is dead, and the pipe is empty.
            DecodeError: one was taken and cannot be decoded; ``items`` has those before it.
            InvalidArgument: ``max_items`` is below 1.
        """
        if max_items is not None and (max_items := operator.index(max_items)) < 1:
            raise InvalidArgument(f"max_items={max_items}: None, or at least 1")
        named = {} if peers is None else {"peers": peers}  # a subclass's get may know of none
        items = [self.get(block, timeout, **named)]
        if max_items is None:
            # As many as there are now: producers that are quick enough would keep us for ever.
            try:
                max_items = 1 + self.qsize()
            except NotImplementedError:  # macOS
                max_items = _MOST_UNCOUNTED
        while len(items) < max_items:
            try:
                items.append(self.get(block=False))
            except (Empty, ShutDown):
                break
            except DecodeError as error:
                error.items = [*items]
                raise
        return items

    def qsize(self) -> int:
        """How many messages are there, those of the feeder threads included.

        Raises:
            NotImplementedError: on macOS, as in the standard library.
        """
        self._check_open()
        return int(self._inner.qsize())

    def empty(self) -> bool:
        """Whether the pipe is empty; what a feeder thread still holds is not seen."""
        self._check_open()
        return bool(self._inner.empty())

    def full(self) -> bool:
        """Whether ``maxsize`` is reached."""
        self._check_open()
        return bool(self._inner.full())

    def shutdown(self, immediate: bool = False) -> None:
        """Refuse further puts in every process; gets go on until the queue is empty.

        Args:
            immediate: gets raise at once too, and what is there is dropped.
        """
        self._check_open()
        self._flag.value = max(self._flag.value, _SHUT_DOWN_NOW if immediate else _SHUT_DOWN)

    def join_thread(self) -> None:
        """Wait until what was put has been sent; after :meth:`close` only."""
        self._inner.join_thread()

    def cancel_join_thread(self) -> None:
        """Let the process exit before what was put has been sent: it may be lost."""
        self._inner.cancel_join_thread()

    def statistics(self) -> QueueStatistics:
        """What this handle, in this process, has done so far."""
        return QueueStatistics(*self._counts)

    def __getstate__(self) -> Any:
        # The pipe, the semaphores and the flag refuse by themselves outside of Process arguments.
        return {"_codec": self._codec, "_inner": self._inner, "_flag": self._flag}

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._counts = [0, 0, 0, 0]
        self._opened()

    def _encode(self, obj: T) -> tuple[int, list[bytes]]:
        kind, segments = self._codec.encode(obj)
        return kind, [bytes(segment) for segment in segments]

    def _put_encoded(
        self,
        encoded: tuple[int, list[bytes]],
        block: bool,
        timeout: float | None,
        watch: PeerPoll | None = None,
        count: int = 0,
    ) -> None:
        self._check_open()
        timeout = checked_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        longest = _SLICE if watch is None else watch.SLICE
        while True:
            died = watch is not None and watch.all_dead()
            if self._flag.value != _OPEN:
                raise ShutDown
            left = longest if deadline is None else min(longest, deadline - time.monotonic())
            try:
                self._inner.put(encoded, block and left > 0 and not died, max(left, 0))
                break
            except Full:
                if died and watch is not None:
                    raise watch.error("no room came", count) from None
                if not block or (deadline is not None and time.monotonic() >= deadline):
                    raise
        self._counts[0] += 1
        self._counts[2] += sum(map(len, encoded[1]))

    def _decode(self, taken: tuple[int, list[bytes]]) -> T:
        kind, segments = taken
        self._counts[1] += 1
        self._counts[3] += sum(map(len, segments))
        decoded: Any = self._codec.decode(
            kind, segments[0], [bytearray(each) for each in segments[1:]]
        )
        return decoded  # type: ignore[no-any-return]

    def _is_drained(self) -> bool:
        try:
            return bool(self._inner.qsize() == 0)  # counts what feeder threads still hold
        except NotImplementedError:  # macOS
            return bool(self._inner.empty())

    def _drain(self) -> None:
        try:
            while True:
                self._inner.get(False)
        except Empty:
            pass


class JoinableQueue(Queue[T], multiprocessing.queues.JoinableQueue):  # type: ignore[type-arg]
    """``multiprocessing.JoinableQueue`` with the methods of :class:`shmring.JoinableQueue`."""

    @classmethod
    def _make(cls, ctx: Any, maxsize: int) -> Any:
        return ctx.JoinableQueue(maxsize)

    def task_done(self) -> None:
        """Say that a message that was taken has been dealt with.

        Raises:
            ValueError: called more often than messages were put.
        """
        self._inner.task_done()

    def join(  # type: ignore[override]
        self, timeout: float | None = None, *, peers: Iterable[Any] | None = None
    ) -> bool:
        """Wait until every message that was put has been dealt with.

        Args:
            timeout: how long at most, in seconds; None is without end.
            peers: processes without which waiting is in vain.

        Returns:
            False if time ran out.

        Raises:
            PeerDied: every one of ``peers`` is dead, and tasks are unfinished.
        """
        timeout = checked_timeout(timeout)
        # The standard library's join(), which has no timeout, waits for the same condition.
        done, unfinished = self._inner._cond, self._inner._unfinished_tasks
        is_zero = unfinished._semlock._is_zero
        if peers is None:
            with done:
                return bool(done.wait_for(is_zero, timeout))
        watch = PeerPoll(peers)
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            died = watch.all_dead()
            left = 0.0 if died else max(0.0, min(watch.SLICE, deadline - time.monotonic()))
            with done:
                if done.wait_for(is_zero, left):
                    return True
            if died:
                raise watch.error("tasks are unfinished")
            if time.monotonic() >= deadline:
                return False

    def _drain(self) -> None:
        try:
            while True:
                self._inner.get(False)
                self._inner.task_done()
        except Empty:
            pass


class SimpleQueue(_Handle, Generic[T], multiprocessing.queues.SimpleQueue):  # type: ignore[type-arg]
    """``multiprocessing.SimpleQueue`` with the methods of :class:`shmring.SimpleQueue`.

    Args:
        ctx: the multiprocessing context of the processes that will use it.
        codec: as for :class:`shmring.Queue`.
    """

    def __init__(
        self, *, ctx: context.BaseContext | None = None, codec: str | Codec = "pickle"
    ) -> None:
        chosen = _stock(ctx)
        self._codec = find_codec(codec)
        self._inner = chosen.SimpleQueue()
        self._opened()

    def __getstate__(self) -> Any:
        return {"_codec": self._codec, "_inner": self._inner}

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)
        self._opened()

    def put(self, obj: T, *, peers: Iterable[Any] | None = None) -> None:
        """Put one message; waits while the pipe is full.

        Raises:
            EncodeError: the object cannot be encoded; nothing was put.
            NotSupportedByFallback: ``peers`` were named.
        """
        self._check_open()
        if peers is not None:
            _refuse("SimpleQueue.put(peers=...)", "its lock and its pipe are waited for as one")
        kind, segments = self._codec.encode(obj)
        self._inner.put((kind, [bytes(segment) for segment in segments]))

    def get(self, *, peers: Iterable[Any] | None = None) -> T:
        """Wait for one message and take it.

        Raises:
            DecodeError: it was taken and cannot be decoded.
            NotSupportedByFallback: ``peers`` were named.
        """
        self._check_open()
        if peers is not None:
            _refuse("SimpleQueue.get(peers=...)", "its lock and its pipe are waited for as one")
        kind, segments = self._inner.get()
        decoded: Any = self._codec.decode(
            kind, segments[0], [bytearray(each) for each in segments[1:]]
        )
        return decoded  # type: ignore[no-any-return]

    def empty(self) -> bool:
        """Whether the pipe is empty."""
        self._check_open()
        return bool(self._inner.empty())


class Ring:
    """Only on the ring; here it says so.

    Raises:
        NotSupportedByFallback: always.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        _refuse("Ring", "a pipe has no memory that could be written in place")

    @classmethod
    def create(cls, *args: object, **kwargs: object) -> NoReturn:
        """Raises :class:`NotSupportedByFallback`, always."""
        _refuse("Ring.create()", "a pipe has no memory that could be written in place")

    @classmethod
    def attach(cls, *args: object, **kwargs: object) -> NoReturn:
        """Raises :class:`NotSupportedByFallback`, always."""
        _refuse("Ring.attach()", "a pipe has no name")


def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """As :func:`shmring.wait`, on the pipes of the queues.

    A queue is ready when something is in its pipe, or it was shut down.

    Raises:
        RingClosed: a queue is closed.
        InvalidArgument: nothing to wait for, and no time-out.
    """
    objects = list(object_list)
    timeout = checked_timeout(timeout)
    if not objects and timeout is None:
        raise InvalidArgument("object_list is empty: this would wait for ever")
    queues = [each for each in objects if isinstance(each, Queue | SimpleQueue)]
    sources: dict[int, Any] = {}
    for each in objects:
        if isinstance(each, Queue | SimpleQueue):
            each._check_open()
            sources[id(each)] = each._inner._reader
        else:
            sources[id(each)] = getattr(each, "sentinel", each)
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        shut = {id(q) for q in queues if isinstance(q, Queue) and q._flag.value != _OPEN}
        left = 0.0 if shut else max(0.0, deadline - time.monotonic())
        if queues:
            left = min(left, _SLICE)
        unique = {id(source): source for source in sources.values()}.values()
        found = connection.wait(unique, None if left == float("inf") else left)
        ready = shut | {key for key, source in sources.items() if source in found}
        if ready or time.monotonic() >= deadline:
            return [each for each in objects if id(each) in ready]

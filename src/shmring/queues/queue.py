"""Queue, JoinableQueue and SimpleQueue: drop-ins for multiprocessing's.

Names, arguments and exceptions are those of the standard library, and each is a
subclass of its namesake, so that ``isinstance`` holds.  No method or private
name of the base is used, and the private ones do not exist (``_reader``,
``_writer``).  A subclass sends its own attributes along as with the standard
library, by ``__getstate__`` and ``__setstate__``.

Deliberate differences: an object that cannot be pickled raises in ``put``;
``qsize``, ``empty`` and ``full`` are true at an instant during the call;
``close`` affects this handle only; there is no feeder thread, so a process can
always exit.
"""

from __future__ import annotations

import contextlib
import multiprocessing.queues
import pickle
from collections.abc import Iterable
from typing import Any, Generic, Self, TypeVar

from shmring._core.handle import RingHandle
from shmring._core.ring import LAYOUT
from shmring.arguments import checked_maxsize
from shmring.errors import RingClosed
from shmring.queues.aio import AwaitableRing
from shmring.queues.codec import (
    BytesCodec,
    PickleCodec,
    decode_error,
    find_codec,
    portable,
)
from shmring.queues.handle import SharedHandle, rounded_capacity
from shmring.shm import segment

__all__ = ["JoinableQueue", "Queue", "SimpleQueue"]

T = TypeVar("T")

_FIRST_CAPACITY = 1 << 16  # small: two hundred idle queues fit into a container's 64 MiB


class _ObjectQueue(SharedHandle, AwaitableRing, Generic[T]):
    """Common part of the three."""

    _user_kind = 2

    def _lay(self, maxsize: int, codec: Any, max_capacity: int | None, name: str | None) -> None:
        bound = checked_maxsize(maxsize)
        if max_capacity is None:
            limit = max(segment.default_max_capacity(), _FIRST_CAPACITY)
        else:
            limit = rounded_capacity("max_capacity", max_capacity)
        self._choose(codec)
        self._make(min(_FIRST_CAPACITY, limit), limit, bound, name)

    @classmethod
    def attach(cls, name: str, timeout: float | None = 0.0, *, codec: Any = "pickle") -> Self:
        """Open a queue by name, from any process of this user.

        Args:
            name: as given to the constructor, or read from :attr:`name`.
            timeout: seconds to wait for its creator; None for ever.
            codec: as given to the constructor.

        Raises:
            RingNotFound: nothing of that name became ready in time.
            LayoutMismatch: it is not a queue, or of another version.
            AccessRefused: it is another user's, or of another PID namespace.
        """
        queue = cls.__new__(cls)
        queue._choose(codec)
        queue._join(name, timeout)
        return queue

    def _choose(self, codec: Any) -> None:
        self._codec = codec
        found = find_codec(codec)
        raw = isinstance(found, PickleCodec | BytesCodec)
        if isinstance(found, PickleCodec):
            self._set_codec(
                found.encode,
                found.decode,
                raw,
                True,
                found.new_pickler,
                pickle.loads,
                found.explain_encode,
                decode_error,
            )
        else:
            self._set_codec(found.encode, found.decode, raw)

    def _state(self) -> dict[str, Any]:
        return {"codec": portable(self._codec)}

    def _restore(self, state: dict[str, Any]) -> None:
        self._choose(state["codec"])

    # ---- queries ---------------------------------------------------------------------------

    def qsize(self) -> int:
        """Objects in the queue, true at an instant during the call."""
        return self._qsize()

    def empty(self) -> bool:
        """Whether there was nothing in the queue at an instant during the call."""
        return self._qsize() == 0

    def full(self) -> bool:
        """Whether `maxsize` objects were in the queue at an instant during the call."""
        bound = self._max_messages()
        return bool(bound) and self._qsize() >= bound

    # ---- shutdown --------------------------------------------------------------------------

    def shutdown(self, immediate: bool = False) -> None:
        """Refuse further puts in every process; gets when empty, or at once.

        Waiting producers, and consumers with nothing to take, get ShutDown.

        Args:
            immediate: drop what is there, and give its memory back.

        Raises:
            RingClosed: this handle was closed.
        """
        self._shutdown(immediate, without_views=True)

    # ---- claims, for the coordinator ----------------------------------------------------------

    def _claim_open(self, key: int = 0) -> int:
        # This page gets memory only when the first worker needs it.
        at = LAYOUT["CLAIMS_OFFSET"]
        segment.allocate(RingHandle._fileno(self), at, LAYOUT["HEADER_BYTES"] - at)
        return super()._claim_open(key)


class _Shadowable:
    """A property that gives way to an attribute of the same name, set on a queue.

    A plain property would make ``self.name = ...`` raise in subclasses that ran
    on the standard library's queues, which have no such names.
    """

    def __init__(self, shown: Any) -> None:
        self._shown = shown
        self.__doc__ = shown.__doc__

    def __get__(self, queue: Any, cls: type | None = None) -> Any:
        return self if queue is None else self._shown.__get__(queue, cls)


for _each in ("capacity", "closed", "largest", "max_capacity", "name"):
    setattr(_ObjectQueue, _each, _Shadowable(getattr(SharedHandle, _each)))


class Queue(_ObjectQueue[T], multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """A queue between processes, for any number of producers and consumers.

    Args:
        maxsize: how many objects it holds at most; 0 or less for no limit.
        ctx: not used: a queue works under every start method.
        codec: "pickle", "bytes" (nothing is ever unpickled), "msgpack" (extra),
            or an object or module with ``dumps`` and ``loads``.
        max_capacity: bytes to which it may grow; None is half of what /dev/shm,
            memory and cgroup allow.
        name: a file in /dev/shm, by which other processes attach; None makes an
            anonymous queue that leaves nothing behind.

    Attributes:
        name: the file in /dev/shm; an anonymous queue gets one when first asked.
        capacity: bytes of the area that producers write to now.
        max_capacity: bytes to which it may grow.
        largest: bytes of the largest message that can ever fit.
        closed: whether this handle was closed.

    Raises:
        RingExists: the name is in use.
        SharedMemoryFull: /dev/shm has no room.
        InvalidArgument: an impossible name, codec or capacity.
    """

    _closed_unused = False

    def __init__(
        self,
        maxsize: int = 0,
        *,
        ctx: Any = None,
        codec: Any = "pickle",
        max_capacity: int | None = None,
        name: str | None = None,
    ) -> None:
        self._lay(maxsize, codec, max_capacity, name)

    def empty(self) -> bool:
        """Whether there was nothing in the queue at an instant during the call.

        As in the standard library, it can be called on a handle that was closed
        before anything was put.
        """
        return (self._ended and self._closed_unused) or super().empty()

    def close(self) -> None:
        """Leave the queue: this handle only, others go on.  Twice is allowed.

        Objects that were put stay.  The last process to leave a named queue
        removes its name.  Threads that wait in this handle get RingClosed.
        """
        if not self._ended:
            with contextlib.suppress(RingClosed):  # another thread closes it too
                self._closed_unused = self._put_count() == 0
        super().close()

    def join_thread(self) -> None:
        """Do nothing: objects that were put are in the queue already."""

    def cancel_join_thread(self) -> None:
        """Do nothing: a process never waits for its messages to be read."""


class JoinableQueue(Queue[T], multiprocessing.queues.JoinableQueue):  # type: ignore[type-arg]
    """A Queue that counts the objects that were taken and not yet processed."""

    def task_done(self) -> None:
        """Report that an object that was taken has been processed.

        Raises:
            ValueError: called more often than there were objects.
        """
        if not self._task_done():
            raise ValueError("task_done() called too many times")

    def join(  # type: ignore[override]
        self, timeout: float | None = None, *, peers: Iterable[Any] | None = None
    ) -> bool:
        """Wait until every object was processed.

        Args:
            timeout: seconds to wait; None for ever.
            peers: processes (anything with a pid, or pids) without which waiting
                is in vain.  Without them, join waits for a consumer that died before
                ``task_done``, as in the standard library.

        Returns:
            False if time ran out.

        Raises:
            PeerDied: every one of `peers` is dead, and tasks are unfinished.
        """
        return self._join_all(timeout, peers)


class SimpleQueue(_ObjectQueue[T], multiprocessing.queues.SimpleQueue):  # type: ignore[type-arg]
    """A queue of which the standard library has only empty, get, put and close.

    Args:
        ctx: not used.
        codec: as for :class:`Queue`.
    """

    def __init__(self, *, ctx: Any = None, codec: Any = "pickle") -> None:
        self._lay(0, codec, None, None)

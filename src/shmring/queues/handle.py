"""Base of Ring and Queue: their block, its name, pickling, closing.

A handle travels as a descriptor to a child that is being started, and by name to
every other process.
"""

from __future__ import annotations

import contextlib
import copyreg
import errno
import multiprocessing.context
import multiprocessing.reduction
import multiprocessing.util
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from shmring._core.handle import RingHandle
from shmring._core.ring import LAYOUT
from shmring.arguments import checked_int, checked_timeout
from shmring.errors import InvalidArgument, LayoutMismatch, RingNotFound
from shmring.process.leaving import Exit, adopted_by_forks, close_dropped, end_thread_at_exit
from shmring.shm import segment

if TYPE_CHECKING:
    from shmring.queues.statistics import RingStatistics

__all__ = ["SharedHandle"]

_POLL_S = 0.002
_CREATION_GRACE_S = 1.0  # what an attacher waits for a creator that has begun

# Not `handle.closed`: a subclass may have an attribute of that name, or `name`.
_closed_of: Callable[[RingHandle], bool] = RingHandle.closed.__get__  # type: ignore[attr-defined]


def rounded_capacity(name: str, value: object) -> int:
    """A capacity in bytes, rounded up to a power of two of at least a page."""
    capacity = checked_int(value, name)
    if not 0 < capacity <= LAYOUT["MAX_CAPACITY"]:
        raise InvalidArgument(
            f"{name}={capacity}: a capacity is a number of bytes from 1 to {LAYOUT['MAX_CAPACITY']}"
        )
    return max(1 << (capacity - 1).bit_length(), LAYOUT["MIN_CAPACITY"])


def _name_of(token: int, given: bytes) -> str:
    return os.fsdecode(given) if given else f"shmring-{token:016x}"


class SharedHandle(RingHandle):
    """A compiled ring in a block of shared memory; base of Ring and Queue.

    The sender of a pickled handle keeps its own open until the receiver has
    unpickled it; otherwise the calls of the receiver's handle raise RingNotFound.
    """

    _user_kind = 0  # which class may attach
    _not_found: RingNotFound | None = None  # why unpickling could not attach

    # ---- made --------------------------------------------------------------------------

    def _make(
        self,
        capacity: int,
        max_capacity: int,
        max_messages: int = 0,
        name: str | None = None,
        buffer: object = None,
    ) -> None:
        """Make a block and lay a ring into it; errors leave nothing behind."""
        encoded = b"" if name is None else os.fsencode(segment.check_name(name))
        if buffer is not None:
            fd = segment.open_block(buffer)
        else:
            fd = segment.create_anonymous(LAYOUT["HEADER_BYTES"] + capacity)
        try:
            segment.allocate(fd, 0, LAYOUT["CLAIMS_OFFSET"])
            segment.allocate(fd, LAYOUT["HEADER_BYTES"], capacity)
        except BaseException:
            os.close(fd)
            raise
        try:
            self._create(
                fd,
                capacity,
                max_capacity,
                max_messages,
                segment.pid_namespace(),
                self._user_kind,
                int.from_bytes(os.urandom(8), sys.byteorder),
                encoded,
                buffer is not None,
            )
            if name is not None:
                segment.link(fd, name)
        except BaseException:
            self._close()
            raise
        self._enrol()

    def _join(self, name: str | None, timeout: float | None, buffer: object = None) -> None:
        """Open the ring of that name, or in that block, as soon as it is ready."""
        limit = float("inf") if timeout is None else checked_timeout(timeout)
        deadline = time.monotonic() + limit
        if buffer is not None:
            fd, what = segment.open_block(buffer), "the SharedMemory block"
        elif name is not None:
            fd, what = segment.open_named(name, limit), f"{segment.DIRECTORY}/{name}"
        else:
            raise TypeError("attach needs a name, or the SharedMemory block as buffer=")
        try:
            while not self._open(fd, segment.pid_namespace(), self._user_kind):
                if buffer is None:  # names appear when the ring is complete
                    raise LayoutMismatch("not a ring: it does not begin with the magic number")
                if time.monotonic() >= deadline + _CREATION_GRACE_S:
                    raise RingNotFound(
                        errno.ENOENT,
                        f"{what}: its creator never finished it; remove it and create it anew",
                    )
                time.sleep(_POLL_S)
        except LayoutMismatch as mismatch:
            self._close()
            raise LayoutMismatch(f"{what}: {mismatch}") from None
        except BaseException:
            self._close()
            raise
        self._enrol()

    def _enrol(self) -> None:
        """Have the ring left when the process ends, so that its name is given back."""
        self._exit = Exit(self)
        _handles.add(self)

    def _why_closed(self) -> BaseException:
        if self._not_found is not None:
            return RingNotFound(self._not_found.errno, self._not_found.strerror)
        end_thread_at_exit()
        return super()._why_closed()

    def _leave(self) -> None:
        if not self._ended:
            # A view that still exists keeps the name, which its next creator reclaims.
            with contextlib.suppress(BufferError, OSError):
                self.close()

    # ---- names -------------------------------------------------------------------------

    def _own_name(self) -> str:
        """The name this ring has, or would get on demand."""
        _, token, given = self._identity()
        return _name_of(token, given)

    @property
    def name(self) -> str:
        """The file in /dev/shm; an anonymous ring is given a name when first asked."""
        return self._linked_name()

    def _linked_name(self) -> str:
        named = self._identity()[0]
        name = self._own_name()
        if not named:
            self._set_named(True)  # first, so that the last process to leave looks for it
            try:
                segment.link(RingHandle._fileno(self), name)
            except BaseException:
                if not segment.is_named(RingHandle._fileno(self), name):
                    self._set_named(False)
                raise
        return name

    def unlink(self) -> None:
        """Remove the name now; handles that are open go on.

        Raises:
            RingNotFound: there is no name (any more).
        """
        if not self._identity()[0]:
            raise RingNotFound(errno.ENOENT, f"this {type(self).__name__} has no name")
        segment.unlink(self._own_name(), self._file())
        self._set_named(False)

    # ---- to other processes --------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """The state of a copy of this handle, beside the ring."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        pass

    def __getstate__(self) -> Any:
        # A child that is being started gets the descriptor, every other process a name.
        carried: Any
        if multiprocessing.context.get_spawning_popen() is not None:
            carried = multiprocessing.reduction.DupFd(RingHandle._fileno(self))
        else:
            carried = self._linked_name()
        return carried, self._state()

    def __setstate__(self, state: Any) -> None:
        carried, own = state
        self._restore(own)
        if isinstance(carried, str):
            # An error here would kill the receiver of a task, a Pool's worker for example.
            try:
                self._join(carried, 0.0)
            except RingNotFound as error:
                self._not_found = RingNotFound(
                    error.errno,
                    f"{error.strerror}; the sender keeps its handle open until the receiver"
                    " has unpickled this one",
                )
        else:
            self._open(carried.detach(), segment.pid_namespace(), self._user_kind)
            self._enrol()

    def __reduce__(self) -> tuple[Any, ...]:
        # In two steps, so that a subclass may extend the state.
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    # ---- ended -----------------------------------------------------------------------------

    @property
    def _ended(self) -> bool:
        return _closed_of(self)

    def statistics(self) -> RingStatistics:
        """A snapshot of the header: counts, waiters, holders, deaths."""
        # Not at the top: dataclasses cost 10 ms.
        from shmring._core.handle import counters
        from shmring.diagnostics import snapshot
        from shmring.queues.statistics import RingStatistics

        facts = counters(self)  # first: holders() recovers what the dead held
        return RingStatistics(
            **facts,
            waiters=snapshot.waiters(self),
            holders=snapshot.holders(self),
            deaths=snapshot.deaths(self),
        )

    def close(self) -> None:
        """Leave the ring: this handle only, others go on.

        The last process to leave a named ring removes its name.  Threads that
        wait in this handle get RingClosed.

        Raises:
            BufferError: a view lives; close again after its end.
        """
        if self._ended:
            return
        self._close()

    def _left(self, named: bool, token: int, given: bytes, identity: tuple[int, int]) -> None:
        # Called when the last call has left, which may be after close() has returned.
        leaving = getattr(self, "_exit", None)
        if leaving is None:
            return  # opening it failed
        leaving.cancel()
        if named:
            segment.release(_name_of(token, given), identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # First, and bound above: at the very end the globals are gone.
        if is_finalizing() or self._ended:
            return
        leaving = getattr(self, "_exit", None)
        if leaving is None or leaving.pid != os.getpid():
            return
        close_dropped(self, self._leave)

    def __repr__(self) -> str:
        if self._ended:
            return f"<{type(self).__module__}.{type(self).__name__} closed>"
        named = self._identity()[0]
        label = self._own_name() if named else "anonymous"
        return f"<{type(self).__module__}.{type(self).__name__} {label}>"


_handles = adopted_by_forks(SharedHandle, "_adopt")

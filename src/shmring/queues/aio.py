"""Queues in asyncio programs: aget, aput, async for.

::

    aget ──a message is there──> taken at once, no thread
      │ none
      ▼
    line of getters ◄── turns ── one helper thread, while a call waits:
      │ its turn has come          sleeps in the kernel until a message is there,
      ▼                            takes nothing
    get_nowait, in the loop

A turn is permission to try, never a message.  A call that is cancelled, however
late, has therefore taken nothing: it leaves the line, and the turn goes to the
next call or, where none is left, the wake-up to another process.  The thread
ends with the last waiter.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from shmring._core.object_ring import ObjectRing, Outgoing, watch
from shmring._core.wait import Bell, exhausted, pass_on, ready_now, set_brief
from shmring.arguments import checked_timeout
from shmring.errors import Empty, Full, ShutDown
from shmring.process.threads import are_greenlets

if TYPE_CHECKING:
    import asyncio

    from shmring.process.peers import PeerPoll

__all__ = ["AwaitableRing"]

# A call that was served is probably followed by another, for which the thread stays this long,
# in seconds; a loop that stopped is looked at again as often.
_LINGER = 0.02
_LONGEST_WAIT = 3600.0  # of one asyncio.wait: not every event loop takes infinity

# Not `ring.closed`: a subclass may have an attribute of that name.
_is_closed: Callable[[ObjectRing], bool] = ObjectRing.closed.__get__  # type: ignore[attr-defined]


class AwaitableRing(ObjectRing):
    """An ObjectRing with the coroutines of :class:`shmring.Queue`."""

    async def aget(
        self, *, timeout: float | None = None, peers: Iterable[Any] | None = None
    ) -> Any:
        """Take the next object, in an asyncio program.

        Calls on one handle are served in their order.  A call that is cancelled,
        or whose time runs out, has taken nothing.

        Args:
            timeout: seconds to wait; None for ever.
            peers: processes without which waiting is in vain, as for `get`.

        Returns:
            The oldest object.

        Raises:
            Empty: nothing came in time.
            PeerDied: every one of `peers` is dead, and nothing is left to take.
            DecodeError: a message was taken and could not be decoded.
            ShutDown: the queue was shut down and is empty.
            RingClosed: this handle was closed.
        """
        limits = _Limits(timeout, peers)
        lines = _lines_of(self)
        if not lines.getters:
            try:
                return _take_now(self)
            except Empty:
                pass
        limits.check_deadline(Empty)
        waiter = _Waiter()
        lines.enter(self, lines.getters, waiter)
        served = False
        try:
            while True:
                await waiter.wait(limits)
                if waiter.turn.done() or lines.is_first(waiter, lines.getters):
                    try:
                        obj = _take_now(self)
                    except Empty:  # another consumer was faster
                        pass
                    else:
                        served = True
                        return obj
                if limits.peers_are_dead and exhausted(self):
                    raise limits.peers_died("nothing is left to take")
                limits.check_deadline(Empty)
                if waiter.turn.done():
                    lines.wait_on(waiter)
        finally:
            lines.leave(self, lines.getters, waiter, served)

    async def aput(
        self, obj: Any, *, timeout: float | None = None, peers: Iterable[Any] | None = None
    ) -> None:
        """Put one object, in an asyncio program; waits only where `put` would.

        The object is encoded when the call begins; large buffers, such as arrays,
        are read when it goes in.  Calls on one handle are served in their order.
        A call that is cancelled, or whose time runs out, has put nothing.

        Args:
            obj: anything the codec can encode.
            timeout: seconds to wait; None for ever.
            peers: processes without which waiting is in vain, as for `put`.

        Raises:
            Full: no space came in time.
            PeerDied: every one of `peers` is dead, and there is no space.
            EncodeError: the object cannot be encoded; nothing was put.
            MessageTooLarge: it can never fit into max_capacity.
            ShutDown: the queue was shut down.
            RingClosed: this handle was closed.
        """
        limits = _Limits(timeout, peers)
        lines = _lines_of(self)
        outgoing = Outgoing(self, obj)
        if not lines.putters and outgoing.put():
            return
        limits.check_deadline(Full)
        waiter = _Waiter(outgoing)
        lines.enter(self, lines.putters, waiter)
        served = False
        try:
            while True:
                dead_before = limits.peers_are_dead
                await waiter.wait(limits)
                may_try = waiter.turn.done() or lines.is_first(waiter, lines.putters)
                served = may_try and outgoing.put()
                if served:
                    return
                # Not at once where others stand in front: their turns come first.
                if limits.peers_are_dead and (may_try or dead_before):
                    raise limits.peers_died("no room came")
                limits.check_deadline(Full)
                if waiter.turn.done():
                    lines.wait_on(waiter)
        finally:
            lines.leave(self, lines.putters, waiter, served)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The next object for ``async for``, which ends when the queue is shut down and empty."""
        try:
            return await self.aget()
        except ShutDown:
            raise StopAsyncIteration from None


def _take_now(ring: ObjectRing) -> Any:
    """`get_nowait`; a lock that stays held for longer than a moment is left to the thread."""
    before = set_brief(True)
    try:
        return ring.get_nowait()
    finally:
        set_brief(before)


class _Limits:
    """The end of one call: its deadline, and the death of its peers."""

    __slots__ = ("_deadline", "_peers")

    def __init__(self, timeout: float | None, peers: Iterable[Any] | None) -> None:
        timeout = checked_timeout(timeout)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._peers: PeerPoll | None = None
        if peers is not None:
            from shmring.process.peers import PeerPoll  # imported where it is used, like asyncio

            self._peers = PeerPoll(peers)

    @property
    def peers_are_dead(self) -> bool:
        """Whether a look found all of them dead."""
        return self._peers is not None and self._peers.proven

    def peers_died(self, outcome: str) -> Exception:
        assert self._peers is not None
        return self._peers.error(outcome)

    def check_deadline(self, error: type[Exception]) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise error

    def longest_wait(self) -> float | None:
        """Seconds to the next look at deadline and peers; 0: the peers were just found dead."""
        longest = None
        if self._deadline is not None:
            longest = max(0.0, min(self._deadline - time.monotonic(), _LONGEST_WAIT))
        if self._peers is not None:
            if not self._peers.proven and self._peers.all_dead():
                return 0.0
            longest = self._peers.SLICE if longest is None else min(longest, self._peers.SLICE)
        return longest


_Line: TypeAlias = "OrderedDict[_Waiter, None]"


class _Waiter:
    """One call of aget or aput that stands in line."""

    __slots__ = ("called", "loop", "outgoing", "turn")

    def __init__(self, outgoing: Outgoing | None = None) -> None:
        from asyncio import get_running_loop  # the caller has imported it

        self.loop = get_running_loop()
        self.outgoing = outgoing
        self.stand()

    def stand(self) -> None:
        self.turn: asyncio.Future[None] = self.loop.create_future()
        self.called = False

    async def wait(self, limits: _Limits) -> None:
        """Until its turn, or until the limits are to be looked at."""
        longest = limits.longest_wait()
        if longest is None:
            await self.turn
        elif longest > 0:
            from asyncio import wait

            await wait([self.turn], timeout=longest)

    def call(self) -> None:
        """Give it its turn; from any thread."""
        self.called = True
        with contextlib.suppress(RuntimeError):  # its loop has just been closed
            self.loop.call_soon_threadsafe(_give, self.turn)


def _give(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # cancelled: leaving the line passes the turn on
        turn.set_result(None)


class _Lines:
    """The calls that wait on one handle in this process, and the thread that waits for them.

    The lock is reentrant because a collection may finish a forgotten coroutine
    inside any statement, and that coroutine then leaves its line.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.getters: _Line = OrderedDict()
        self.putters: _Line = OrderedDict()
        self._lock = threading.RLock()
        self._bell = Bell()
        self._thread: threading.Thread | None = None
        self._linger = False

    # ---- in the threads of the loops ---------------------------------------------------------

    def enter(self, ring: AwaitableRing, line: _Line, waiter: _Waiter) -> None:
        with self._lock:
            line[waiter] = None
            if self._thread is None:
                try:
                    self._thread = self._start(ring)
                except BaseException:
                    del line[waiter]
                    raise
            elif self._next(line) is waiter:  # else the thread watches for the one before it
                self._bell.ring()

    def _start(self, ring: AwaitableRing) -> threading.Thread:
        if are_greenlets():
            raise RuntimeError(
                "aget and aput wait in a thread, and gevent has replaced threads by greenlets:"
                " patch with thread=False, or use get_nowait and put_nowait"
            )
        thread = threading.Thread(
            target=self._serve, args=(ring,), name="shmring-asyncio", daemon=True
        )
        thread.start()
        return thread

    def wait_on(self, waiter: _Waiter) -> None:
        """It had its turn and got nothing: it keeps its place."""
        with self._lock:
            waiter.stand()
        self._bell.ring()

    def is_first(self, waiter: _Waiter, line: _Line) -> bool:
        with self._lock:
            return next(iter(line), None) is waiter

    def leave(self, ring: AwaitableRing, line: _Line, waiter: _Waiter, served: bool) -> None:
        if self.pid != os.getpid():
            return  # a forked child has neither the loop nor the thread
        with self._lock:
            if waiter not in line:
                return  # dropped, its loop was closed
            del line[waiter]
            self._linger = served
            following = self._next(line)
            if following is not None and (
                ready_now(ring) if line is self.getters else served or _is_closed(ring)
            ):
                following.call()
                return
            idle = not self.getters and not self.putters
        if following is not None or (idle and not served):
            self._bell.ring()
        if waiter.called and not served and not line:
            pass_on(ring)

    def _next(self, line: _Line) -> _Waiter | None:
        """The waiter whose turn it is, unless it was called already; with the lock held.

        The waiters of a loop that does not run now are passed over and keep
        their place: they hold up no other loop.
        """
        gone = []
        found = None
        for waiter in line:
            if waiter.loop.is_running():
                found = None if waiter.called else waiter
                break
            if waiter.loop.is_closed():
                gone.append(waiter)
        for waiter in gone:
            del line[waiter]
        return found

    # ---- in the helper thread ----------------------------------------------------------------

    def _serve(self, ring: AwaitableRing) -> None:
        while True:
            with self._lock:
                getter, putter = self._next(self.getters), self._next(self.putters)
                if not self.getters and not self.putters:
                    if not self._linger:
                        self._thread = None
                        return
                    self._linger = False
            if getter is None and putter is None:
                self._bell.wait(_LINGER)
                continue
            outgoing = None if putter is None else putter.outgoing
            try:
                may_get, may_put = watch(ring, self._bell, getter is not None, outgoing)
            except Exception:  # the calls meet the same error, and raise it
                may_get = may_put = True
            called = False
            with self._lock:
                for may, line in ((may_get, self.getters), (may_put, self.putters)):
                    waiter = self._next(line) if may else None
                    if waiter is not None:
                        waiter.call()
                        called = called or line is self.getters
            if may_get and not called:
                pass_on(ring)


# The attribute of a queue that holds its lines: another one in each forked child.
_attribute = f"_lines_{os.getpid()}"


def _after_fork() -> None:
    global _attribute
    _attribute = f"_lines_{os.getpid()}"


os.register_at_fork(after_in_child=_after_fork)


def _lines_of(ring: AwaitableRing) -> _Lines:
    lines: _Lines | None = vars(ring).get(_attribute)
    return lines or vars(ring).setdefault(_attribute, _Lines())

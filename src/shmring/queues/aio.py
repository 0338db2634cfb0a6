"""``await queue.aget()`` and ``await queue.aput(x)``: queues in asyncio programs.

::

    aget ──is a message there──> taken at once, no thread
      │ no
      ▼
    the line of getters ◄── turns ── one helper thread, while anybody waits:
      │ its turn has come            sleeps in the kernel until a message is there,
      ▼                              takes nothing
    get_nowait, in the loop

A turn is permission to try, never a message.  Whoever is cancelled, however
late, has therefore taken nothing: he leaves the line, and the turn goes to the
next one or, where nobody is left, the wake to another process.  The thread ends
with the last waiter.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from shmring._core.object_ring import ObjectRing, Outgoing, watch
from shmring._core.wait import Bell, exhausted, pass_on, ready_now, set_brief
from shmring.errors import Empty
from shmring.process.threads import are_greenlets

if TYPE_CHECKING:
    import asyncio

    from shmring.process.peers import PeerWatch

__all__ = ["AwaitableRing"]

# Who has just been served probably asks again: the thread waits for him this long, in
# seconds; and so often it looks whether a loop that stopped runs again.
_LINGER = 0.02

# Past what a subclass may have called closed itself.
_is_closed: Callable[[ObjectRing], bool] = ObjectRing.closed.__get__  # type: ignore[attr-defined]


class AwaitableRing(ObjectRing):
    """An ObjectRing with the coroutines of :class:`shmring.Queue`."""

    async def aget(self, *, peers: Iterable[Any] | None = None) -> Any:
        """Take the next object, in an asyncio program.

        Calls on one handle are served in their order.  Set a limit with
        ``asyncio.timeout``; a call that is cancelled has taken nothing.

        Args:
            peers: processes without which waiting is in vain, as for `get`.

        Raises:
            PeerDied: every one of `peers` is dead, and nothing is left to take.
            DecodeError: a message was taken and could not be decoded.
            ShutDown: the queue was shut down and is empty.
            RingClosed: this handle was closed.
        """
        peer_watch = _watch_of(peers)
        desk = _desk_of(self)
        if not desk.getters:
            try:
                return _take_now(self)
            except Empty:
                pass
        waiter = _Waiter()
        desk.enter(self, desk.getters, waiter)
        served = False
        try:
            while True:
                await waiter.wait(peer_watch)
                if waiter.turn.done() or desk.is_first(waiter, desk.getters):
                    try:
                        obj = _take_now(self)
                    except Empty:  # somebody else was faster
                        pass
                    else:
                        served = True
                        return obj
                if peer_watch is not None and peer_watch.proven and exhausted(self):
                    raise peer_watch.error("nothing is left to take")
                if waiter.turn.done():
                    desk.wait_on(waiter)
        finally:
            desk.leave(self, desk.getters, waiter, served)

    async def aput(self, obj: Any, *, peers: Iterable[Any] | None = None) -> None:
        """Put one object, in an asyncio program; waits only where `put` would.

        It is encoded when the call begins; large buffers, such as arrays, are
        read when it goes in.  Calls on one handle are served in their order; a
        call that is cancelled has put nothing.

        Args:
            obj: anything the codec can encode.
            peers: processes without which waiting is in vain, as for `put`.

        Raises:
            PeerDied: every one of `peers` is dead, and there is no room.
            EncodeError: the object cannot be encoded; nothing was put.
            MessageTooLarge: it can never fit into max_capacity.
            ShutDown: the queue was shut down.
            RingClosed: this handle was closed.
        """
        peer_watch = _watch_of(peers)
        desk = _desk_of(self)
        outgoing = Outgoing(self, obj)
        if not desk.putters and outgoing.put():
            return
        waiter = _Waiter(outgoing)
        desk.enter(self, desk.putters, waiter)
        served = False
        try:
            while not served:
                proven_before = peer_watch is not None and peer_watch.proven
                await waiter.wait(peer_watch)
                may_try = waiter.turn.done() or desk.is_first(waiter, desk.putters)
                served = may_try and outgoing.put()
                in_vain = not served and peer_watch is not None and peer_watch.proven
                if in_vain and (may_try or proven_before):  # a slice for those before us
                    assert peer_watch is not None
                    raise peer_watch.error("no room came")
                if waiter.turn.done() and not served:
                    desk.wait_on(waiter)
        finally:
            desk.leave(self, desk.putters, waiter, served)


def _take_now(ring: ObjectRing) -> Any:
    """As `get_nowait`; a lock that is held for longer than a moment is waited for in the thread."""
    before = set_brief(True)
    try:
        return ring.get_nowait()
    finally:
        set_brief(before)


def _watch_of(peers: Iterable[Any] | None) -> PeerWatch | None:
    if peers is None:
        return None
    from shmring.process.peers import PeerWatch  # like asyncio, imported where it is used

    return PeerWatch(peers)


_Line: TypeAlias = "OrderedDict[_Waiter, None]"


class _Waiter:
    """One call of aget or aput that stands in line."""

    __slots__ = ("called", "loop", "outgoing", "turn")

    def __init__(self, outgoing: Outgoing | None = None) -> None:
        from asyncio import get_running_loop  # who waits here has imported it

        self.loop = get_running_loop()
        self.outgoing = outgoing
        self.stand()

    def stand(self) -> None:
        self.turn: asyncio.Future[None] = self.loop.create_future()
        self.called = False

    async def wait(self, peer_watch: PeerWatch | None) -> None:
        """Until its turn; beside peers for a slice, or until they are newly proven dead."""
        if peer_watch is None:
            await self.turn
        elif peer_watch.proven or not peer_watch.all_dead():
            from asyncio import wait

            await wait([self.turn], timeout=peer_watch.SLICE)

    def call(self) -> None:
        """Its turn; from any thread."""
        self.called = True
        with contextlib.suppress(RuntimeError):  # its loop has just been closed
            self.loop.call_soon_threadsafe(_come, self.turn)


def _come(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # cancelled: leaving the line passes the turn on
        turn.set_result(None)


class _Desk:
    """Who waits on one handle in this process, and the thread that waits for them.

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

    # ---- in the loops' threads -------------------------------------------------------------

    def enter(self, ring: AwaitableRing, line: _Line, waiter: _Waiter) -> None:
        with self._lock:
            line[waiter] = None
            if self._thread is None:
                if are_greenlets():
                    del line[waiter]
                    raise RuntimeError(
                        "aget and aput wait in a thread, and gevent has replaced threads by"
                        " greenlets: patch with thread=False, or use get_nowait and put_nowait"
                    )
                thread = threading.Thread(
                    target=self._serve, args=(ring,), name="shmring-asyncio", daemon=True
                )
                try:
                    thread.start()
                except BaseException:
                    del line[waiter]
                    raise
                self._thread = thread
            elif self._next(line) is waiter:  # else it watches for the one before
                self._bell.ring()

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
            return  # in a forked child, to which neither loop nor thread came along
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
        """Whose turn it is, unless he was called already; with the lock held.

        A loop that does not run now holds nobody up: its waiters are passed
        over and keep their place.
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

    # ---- in the thread -----------------------------------------------------------------------

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
            except Exception:  # it shows itself in the calls
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


# The attribute of a queue that holds its desk: another one in each forked child.
_attribute = f"_desk_{os.getpid()}"


def _after_fork() -> None:
    global _attribute
    _attribute = f"_desk_{os.getpid()}"


os.register_at_fork(after_in_child=_after_fork)


def _desk_of(ring: AwaitableRing) -> _Desk:
    desk: _Desk | None = vars(ring).get(_attribute)
    return desk or vars(ring).setdefault(_attribute, _Desk())

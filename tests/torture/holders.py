"""Killed while it waits for a lock that a living process holds and keeps.

The holder is held in the middle of its operation.  Behind it waits another, and
the victim; when the victim is dead the holder goes on, and both others come
through: no death takes the wake-up of a waiter with it, and no process takes
the lock from a holder that stands still.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from duels import end_if_alive, go_on
from looking import AT_ONCE, Finding, in_fresh_process, lock_word, message, settle
from operations import RingStage, ring_with
from shmring import Ring
from shmring.errors import Empty, Full
from sleepers import Sleeper
from tally import HUNG, LOST, Harm, Tally
from trials import Selection, Trial, watch_for_a_hang
from walking import Walker, Way, end, place

__all__ = ["HOLDERS"]

SHORT_WAIT = 0.05  # seconds, part of a slice
PUT = [message(100 + i) for i in range(3)]  # by the holder, the waiter and the other


@dataclass
class BehindAHolder(Trial):
    """A victim that waits for a lock.

    Args:
        side: whose lock it is.
        act: the operation of all three; the second argument tells which of them, 0 to 2.
        gets: whether it takes; else it puts the message of that number.
    """

    name: str
    side: str
    act: Callable[[Ring, int], object]
    gets: bool
    sleeps = True

    def run(self, walker: Walker, selection: Selection) -> Tally:
        began = time.monotonic()
        tally = Tally(self.name)
        holding, inside = self.find_lock(walker)
        way = self.trace_waiter(walker, holding, inside)
        tally.stops = f"{len(way)} instructions"
        for n in selection.of(range(len(way))):
            watch_for_a_hang()
            self.kill(walker, (holding, inside), way, n, tally)
        tally.seconds = time.monotonic() - began
        return tally

    def find_lock(self, walker: Walker) -> tuple[Way, int]:
        """The way of the holder, and a stop of it under the lock."""
        with ring_with(4).ring as ring:
            way = walker.trace(walker.victim(lambda: self.act(ring, 0)))
        for n in range(0, len(way), 10):
            with ring_with(4).ring as ring:
                pid = walker.victim(lambda: self.act(ring, 0))
                walker.hold(pid, way, n)
                held = lock_word(ring, self.side)
                end(pid)
            if held:
                return way, n
        raise AssertionError("the lock is held at no stop")

    def waiter(self, walker: Walker, ring: Ring) -> int:
        def wait() -> None:
            with contextlib.suppress(Empty, Full):
                self.act(ring, 2)

        return walker.victim(wait)

    def come_through(self, ring: Ring) -> bytes:
        self.act(ring, 1)
        return b"done"

    def trace_waiter(self, walker: Walker, holding: Way, inside: int) -> Way:
        stage = ring_with(4)
        holder = walker.victim(lambda: self.act(stage.ring, 0))
        try:
            walker.hold(holder, holding, inside)
            return walker.trace(self.waiter(walker, stage.ring))
        finally:
            end_if_alive(holder)
            stage.close()

    def kill(
        self, walker: Walker, holder_at: tuple[Way, int], way: Way, n: int, tally: Tally
    ) -> None:
        stage = ring_with(4)
        ring = stage.ring
        holder = walker.victim(lambda: self.act(ring, 0))
        walker.hold(holder, *holder_at)
        other = Sleeper(lambda: self.come_through(ring))
        try:
            arrival = walker.kill(self.waiter(walker, ring), way, n)
            if not arrival.there:
                tally.missed += 1
                return
            tally.beside += arrival.address != way.addresses[n]
            tally.tried += 1
            died = time.monotonic()
            where = f"{self.name}: killed at stop {n} at {place(arrival.address)}"
            try:
                go_on(walker, holder, "the holder")
                answer = other.answer(AT_ONCE)
                if answer is None:
                    raise Harm(HUNG, f"the other had not come through within {AT_ONCE} s")
                found = in_fresh_process(lambda: self.look(stage))
            except Harm as harm:
                tally.harmed(harm.kind, f"{where}: {harm}")
                return
            tally.outcomes[found.outcome] += 1
            tally.longest = max(tally.longest, answer[0] - died)
        finally:
            end_if_alive(holder)
            other.close()
            stage.close()

    def look(self, stage: RingStage) -> Finding:
        puts = [] if self.gets else [[each] for each in PUT]
        account = settle(stage.ring, stage.held, stage.ever, *puts, gets=2 * self.gets)
        if self.gets and account.gone != 2:
            raise Harm(LOST, f"{account.gone} were taken, by two")
        if not self.gets and account.put != [1, 1, 0]:
            raise Harm(LOST, f"the three have put {account.put}")
        return Finding("with the two others through")


def put_as(ring: Ring, turn: int) -> None:
    ring.put(PUT[turn], timeout=SHORT_WAIT if turn == 2 else AT_ONCE)


def get_as(ring: Ring, turn: int) -> None:
    ring.get(timeout=SHORT_WAIT if turn == 2 else AT_ONCE)


HOLDERS: list[Trial] = [
    BehindAHolder("put that waits for the lock", "producers", put_as, gets=False),
    BehindAHolder("get that waits for the lock", "consumers", get_as, gets=True),
]

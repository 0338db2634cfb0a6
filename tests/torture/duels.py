"""Two processes stepped against each other; none is killed.

One is held before an instruction while the other runs, from end to end or to an
instruction of its own.  What a slice of sleep would make good shows here, in a
build whose sleeps have no end: a sleeper that was not woken sleeps for ever.

Instructions take effect in the order in which they are stepped.  What a
processor holds back in its store buffer is not seen here.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from looking import AT_ONCE, in_fresh_process, message
from operations import RingStage, peek_and_leave, ring_with
from shmring import Ring, wait
from shmring.errors import Empty, Full
from sleepers import LOOK_EVERY, Sleeper, is_dead, wait_until_asleep
from support import wait_for
from tally import BROKEN, DOUBLED, HUNG, LOST, TORN, Harm, Tally
from trials import Selection, Trial, watch_for_a_hang
from wakes import HALF, Feeder
from walking import Walker, Way, end

__all__ = ["DUELS", "ENDLESS"]

ENDLESS = "endless sleeps"
MOST_HARMS = 2  # of one part; each is waited for


def ended(pid: int, limit: float) -> int | None:
    """The status of a child that has ended; None if it has not within `limit` seconds."""
    try:
        wait_for(lambda: is_dead(pid), limit, dump=False, every=LOOK_EVERY)
    except TimeoutError:
        return None
    return os.waitpid(pid, 0)[1]


def run_through(walker: Walker, act: Callable[[], object]) -> None:
    """Have another process do `act` now, from end to end."""
    pid = walker.victim(act)
    walker.hold_at_once(pid)
    go_on(walker, pid, "the one that ran through")


def go_on(walker: Walker, pid: int, name: str) -> None:
    """Release a process that is held, and wait for its end."""
    walker.release(pid)
    must_end(pid, name)


def must_end(pid: int, name: str) -> None:
    status = ended(pid, AT_ONCE)
    if status is None:
        end(pid)
        raise Harm(HUNG, f"{name} did not come back within {AT_ONCE} s: its wake-up was lost")
    if status != 0:
        raise Harm(BROKEN, f"{name} failed: {status:#x}")


def end_if_alive(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            end(pid)


def get_this(ring: Ring, *expected: bytes) -> None:
    assert ring.get() in expected


class Duel(Trial):
    """What the duels have in common."""

    build = ENDLESS

    way: Way  # of the one that is held

    @abstractmethod
    def trace(self, walker: Walker) -> None:
        """Walk the ways.

        Not in a generator: each one on the stack is a few more instructions of Cython's on
        the way, and a victim whose way is shorter sleeps before it comes to its stop.
        """

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The stops at which the two are held; here the other one runs through."""
        for n in range(len(self.way)):
            yield n, 0

    @abstractmethod
    def meet(self, walker: Walker, n: int, m: int) -> str:
        """Hold one before its n-th stop, the other before its m-th; the outcome."""

    def run(self, walker: Walker, selection: Selection) -> Tally:
        began = time.monotonic()
        tally = Tally(self.name)
        watch_for_a_hang()
        self.trace(walker)
        pairs = list(self.pairs())
        tally.stops = f"{len(pairs)} pairs of stops"
        for i in selection.of(range(len(pairs))):
            watch_for_a_hang()
            n, m = pairs[i]
            tally.tried += 1
            try:
                tally.outcomes[self.meet(walker, n, m)] += 1
            except Harm as harm:
                tally.harmed(harm.kind, f"{self.name}: stops {n} and {m}: {harm}")
                if tally.harms.total() >= MOST_HARMS:
                    break
        tally.seconds = time.monotonic() - began
        return tally


# ---- a sleeper and its waker ---------------------------------------------------------------------


@dataclass
class SleeperAndWaker(Duel):
    """The one goes to sleep, the other wakes it, and each is held at each instruction.

    Args:
        prepare: makes the ring.
        block: goes to sleep, unless the other was there before.
        wake: ends that.
        warm: what the sleeper does before, for what happens once a process.
        apart: how far the stops of the two are apart where both are held.
    """

    name: str
    prepare: Callable[[], RingStage]
    block: Callable[[Ring], object]
    wake: Callable[[Ring], object]
    warm: Callable[[Ring], object] = lambda ring: None
    apart: tuple[int, int] = (5, 61)
    way: Way = field(init=False)
    waking: Way = field(init=False)

    def trace(self, walker: Walker) -> None:
        self.way = self.trace_sleeper(walker)
        self.waking = self.trace_waker(walker)

    def pairs(self) -> Iterator[tuple[int, int]]:
        asleep, through = self.way.sleeps[0], len(self.waking)
        for n in range(asleep + 1):
            yield n, through
        for m in range(through):
            yield 0, m
        for few, many in (self.apart, self.apart[::-1]):
            for n in range(few, asleep + 1, few):
                for m in range(many, through, many):
                    yield n, m

    def sleeper(self, walker: Walker, stage: RingStage) -> int:
        return walker.victim(lambda: self.block(stage.ring), lambda: self.warm(stage.ring))

    def trace_sleeper(self, walker: Walker) -> Way:
        stage = self.prepare()
        pid = self.sleeper(walker, stage)
        feeder = Feeder(pid, [], lambda: self.wake(stage.ring))
        try:
            return walker.trace(pid)
        finally:
            feeder.close()
            stage.close()

    def trace_waker(self, walker: Walker) -> Way:
        stage = self.prepare()
        sleeper = self.sleeper(walker, stage)
        walker.hold_at_once(sleeper)
        walker.release(sleeper)
        wait_until_asleep(sleeper)
        try:
            return walker.trace(walker.victim(lambda: self.wake(stage.ring)))
        finally:
            end_if_alive(sleeper)
            stage.close()

    def meet(self, walker: Walker, n: int, m: int) -> str:
        stage = self.prepare()
        sleeper = self.sleeper(walker, stage)
        waker = walker.victim(lambda: self.wake(stage.ring))
        try:
            if not walker.hold(sleeper, self.way, n).there:
                raise Harm(BROKEN, "the sleeper came back without a message")
            if m == len(self.waking):
                walker.hold_at_once(waker)
                go_on(walker, waker, "the waker")
                held = False
            else:
                held = walker.hold(waker, self.waking, m).there
            walker.release(sleeper)
            wait_until_asleep(sleeper, lambda: is_dead(sleeper))
            slept = not is_dead(sleeper)
            if held:
                go_on(walker, waker, "the waker")
            must_end(sleeper, "the sleeper")
            return "woken" if slept else "found it by looking"
        finally:
            end_if_alive(sleeper, waker)
            stage.close()


@dataclass
class TwoSleepers(Duel):
    """One sleeper is held at each instruction; another, a consumer, sleeps behind it.

    Once the held one has been woken, and until it has arrived, there is no other
    wake-up: it must pass this one on.

    Args:
        act: what the held one does.
        first: the messages that come when both sleep; there is one wake-up for them.
        later: those that come while it is held.
        takes_none: the held one leaves the message to the other.
    """

    name: str
    act: Callable[[Ring], object]
    first: Sequence[bytes]
    later: Sequence[bytes]
    takes_none: bool = False
    way: Way = field(init=False)

    def trace(self, walker: Walker) -> None:
        ring = ring_with(0).ring
        pid = walker.victim(lambda: self.act(ring))
        other = Sleeper(ring.get, on_command=True)
        feeder = Feeder(pid, [other], lambda: ring.put_many([*self.first, *self.later]))
        try:
            self.way = walker.trace(pid)
        finally:
            feeder.close()
            other.close()
            ring.close()

    def meet(self, walker: Walker, n: int, m: int) -> str:
        ring = ring_with(0).ring
        held = walker.victim(lambda: self.act(ring))
        other = Sleeper(ring.get, on_command=True)
        feeder = None
        try:
            if n <= self.way.sleeps[0]:
                stands = walker.hold(held, self.way, n).there
                other.start()
                run_through(walker, lambda: ring.put_many(self.first))
                said = "held before its sleep"
            else:
                feeder = Feeder(held, [other], lambda: ring.put_many(self.first))
                stands = walker.hold(held, self.way, n).there
                said = "held after its sleep" if stands else "through before it could be held"
            if self.later:
                run_through(walker, lambda: ring.put_many(self.later))
            if stands:
                walker.release(held)
            answer = other.answer(AT_ONCE)
            if answer is None:
                raise Harm(HUNG, f"the other had nothing within {AT_ONCE} s")
            if self.takes_none:
                run_through(walker, lambda: ring.put(LATER[0]))
            if stands:
                must_end(held, "the one that was held")
            if answer[1] not in (*self.first, *self.later):
                raise Harm(TORN, f"the other had {answer[1][:64].hex(' ', 8)}")
            now = ring.statistics()
            if now.messages_taken != (1 if self.takes_none else 2):
                raise Harm(LOST, f"{now.messages_put} put, {now.messages_taken} taken")
            return said
        finally:
            if feeder is not None:
                feeder.close()
            end_if_alive(held)
            other.close()
            ring.close()


# ---- a producer that grows into what a consumer gives back ---------------------------------------


@dataclass
class Overtaking(Duel):
    """A consumer that moves on is held at each instruction while a producer grows.

    The next area fits nowhere but where the one lies that the consumer gives back:
    was it counted as given back before it was punched, the punch takes the new
    messages with it.  A kill in between leaves a hole too few, which a step shows
    only as a leak.
    """

    name: str
    build = None
    way: Way = field(init=False)

    def prepare(self) -> RingStage:
        stage = ring_with(0, capacity=4096, max_capacity=1 << 14)
        while len(stage.held) < OVERTAKEN:
            stage.fill(1, 500)
        assert stage.ring.statistics().growths == 2
        stage = stage.take(7)  # all of the first area
        stage.gets, stage.puts = 1, LATER
        return stage

    def trace(self, walker: Walker) -> None:
        stage = self.prepare()
        try:
            self.way = walker.trace(walker.victim(stage.ring.get))
        finally:
            stage.close()

    def meet(self, walker: Walker, n: int, m: int) -> str:
        stage = self.prepare()
        consumer = walker.victim(stage.ring.get)
        try:
            stands = walker.hold(consumer, self.way, n).there
            run_through(walker, lambda: put_what_fits(stage.ring, LATER))
            if stands:
                go_on(walker, consumer, "the consumer")
            grown = stage.ring.statistics().growths == 3
            found = in_fresh_process(lambda: stage.settle(thorough=False))
            if "taken" not in found.outcome:
                raise Harm(DOUBLED, "what the consumer took is still there")
            return "grown over it" if grown else "no room yet"
        finally:
            end_if_alive(consumer)
            stage.close()


# ---- a consumer that looks, while others put and shut down ---------------------------------------


@dataclass
class LastMessage(Duel):
    """A consumer that finds nothing is held at each instruction; a message comes, then a shutdown.

    It may have the message, or nothing; but to hear that nothing will come any more
    would leave the message behind.
    """

    name: str
    build = None
    way: Way = field(init=False)

    def trace(self, walker: Walker) -> None:
        ring = ring_with(0).ring
        try:
            self.way = walker.trace(walker.victim(lambda: get_if_any(ring)))
        finally:
            ring.close()

    def meet(self, walker: Walker, n: int, m: int) -> str:
        ring = ring_with(0).ring
        consumer = walker.victim(lambda: get_if_any(ring))
        try:
            stands = walker.hold(consumer, self.way, n).there
            run_through(walker, lambda: put_and_shut_down(ring))
            if stands:
                go_on(walker, consumer, "the consumer")
            return "taken" if ring.statistics().messages_taken else "left"
        finally:
            end_if_alive(consumer)
            ring.close()


def get_if_any(ring: Ring) -> None:
    with contextlib.suppress(Empty):
        ring.get_nowait()


def put_and_shut_down(ring: Ring) -> None:
    ring.put(TWO[0])
    ring.shutdown()


def put_what_fits(ring: Ring, messages: Sequence[bytes]) -> None:
    with contextlib.suppress(Full):
        for each in messages:
            ring.put_nowait(each)


TWO = (message(0), message(1))
LATER = [message(90 + i, 500) for i in range(3)]
# Not made while it is stepped: a loop of Python is a hundred thousand steps.
FIRST_HALF, SECOND_HALF = message(0, HALF), message(1, HALF)
OVERTAKEN = 7 + 15 + 7  # areas of 4096, 8192 and 4096 bytes, all full

DUELS: list[Trial] = [
    SleeperAndWaker(
        "a consumer sleeps, a producer wakes it",
        lambda: ring_with(0),
        lambda ring: get_this(ring, TWO[0]),
        lambda ring: ring.put(TWO[0]),
    ),
    SleeperAndWaker(
        "a producer sleeps, a consumer wakes it",
        lambda: ring_with(1, HALF),
        lambda ring: ring.put(SECOND_HALF),
        lambda ring: get_this(ring, FIRST_HALF),
        peek_and_leave,
    ),
    TwoSleepers(
        "two consumers sleep, a message comes for each",
        lambda ring: get_this(ring, *TWO),
        TWO[:1],
        TWO[1:],
    ),
    TwoSleepers(
        "two consumers sleep, a batch comes for both",
        lambda ring: get_this(ring, *TWO),
        TWO,
        (),
    ),
    TwoSleepers(
        "a waiter and a consumer sleep, a message comes",
        lambda ring: wait([ring]),
        TWO[:1],
        (),
        takes_none=True,
    ),
    Overtaking("a consumer moves on, a producer grows"),
    LastMessage("a consumer looks, a message comes and a shutdown"),
]

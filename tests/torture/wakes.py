"""Killed while another process sleeps: the waker, and the process that was woken.

Whichever dies, a message that is there is taken and room that is there is used,
after one slice of sleep at most.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from looking import AT_ONCE, Finding, check_counts, check_memory, locks_of_the_dead, message
from looking import opened_afresh as afresh
from shmring import Ring, wait
from sleepers import Sleeper, is_dead, wait_until_asleep
from support import wait_for
from tally import HUNG, LOST, TORN, Harm
from trials import Operation, Stage
from walking import die_some_day, end

__all__ = ["HALF", "WAKERS", "WOKEN", "Feeder"]

FIRST = message(0)  # made here: what Python does while it is traced is stepped too
LIMIT = 20.0  # seconds, four times what a call may have to wait
HALF = 3000  # more than half of a ring of 4096 bytes: one fits, two do not


class Feeder:
    """A process that waits until the victim sleeps or is dead, then brings up and feeds others.

    Args:
        victim: the process that it waits for.
        others: sleepers that begin then.
        feed: done when all of them sleep.
    """

    def __init__(self, victim: int, others: list[Sleeper], feed: Callable[[], object]) -> None:
        self._near, far = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                die_some_day()
                wait_until_asleep(victim, lambda: is_dead(victim))
                for other in others:
                    other.start()
                feed()
                os.write(far, struct.pack("<d", time.monotonic()))
            finally:
                os._exit(0)
        os.close(far)

    def fed(self) -> float:
        """When it had fed them; waits for it."""
        said = os.read(self._near, 8)
        if not said:
            raise Harm(HUNG, "the feeder could not put")
        return float(struct.unpack("<d", said)[0])

    def close(self) -> None:
        end(self._pid)
        os.close(self._near)


@dataclass
class WakeStage(Stage):
    """A ring, and the processes that sleep at it."""

    ring: Ring
    sleepers: list[Sleeper]

    def afresh(self) -> None:
        self.ring = afresh(self.ring)

    def close(self) -> None:
        for sleeper in self.sleepers:
            sleeper.close()
        self.ring.close()

    def awaited(self, sleeper: Sleeper, what: bytes) -> float:
        """Seconds from the kill until a sleeper had its answer, which is `what`."""
        answer = sleeper.answer(AT_ONCE)
        if answer is None:
            raise Harm(HUNG, f"a sleeper had nothing within {AT_ONCE} s")
        when, said = answer
        if said != what:
            raise Harm(TORN, f"a sleeper had {said[:64].hex(' ', 8)}")
        return max(0.0, when - self.died)

    def take(self, *expected: bytes) -> None:
        """Take these, and nothing else may be there."""
        found = [self.ring.get(timeout=AT_ONCE) for _ in expected]
        if found != list(expected) or self.ring.qsize():
            raise Harm(LOST, f"{[m[:16].hex() for m in found]} and {self.ring.qsize()} more")

    def finding(self, outcome: str, locked: int, seconds: float, put: int) -> Finding:
        """The last look: all that was put has been taken."""
        check_counts(self.ring, put, put)
        self.ring.put(message(7), timeout=AT_ONCE)  # the locks of the dead are taken once more
        self.take(message(7))
        check_memory(self.ring, thorough=False)
        return Finding(outcome, locked, seconds)


# ---- a put that wakes a consumer -----------------------------------------------------------------


class ConsumerSleeps(WakeStage):
    """The victim puts message 0."""

    def settle(self, thorough: bool) -> Finding:
        locked = locks_of_the_dead(self.ring)
        there = self.ring.statistics().messages_put == 1
        if not there:
            self.ring.put(message(0), timeout=AT_ONCE)
        seconds = self.awaited(self.sleepers[0], message(0))
        return self.finding("there" if there else "not there", locked, seconds * there, 1)


def consumer_sleeps() -> ConsumerSleeps:
    ring = Ring.create(4096)
    return ConsumerSleeps(ring, [Sleeper(lambda: ring.get(timeout=LIMIT))])


# ---- a get that wakes a producer -----------------------------------------------------------------


class ProducerSleeps(WakeStage):
    """Message 0 is in the ring, for message 1 there is no room; the victim gets."""

    def settle(self, thorough: bool) -> Finding:
        locked = locks_of_the_dead(self.ring)
        taken = self.ring.statistics().messages_taken == 1
        if not taken and self.ring.get(timeout=AT_ONCE) != message(0, HALF):
            raise Harm(TORN, "the message in front")
        seconds = self.awaited(self.sleepers[0], b"done")
        self.take(message(1, HALF))
        return self.finding("taken" if taken else "still there", locked, seconds * taken, 2)


def producer_sleeps() -> ProducerSleeps:
    ring = Ring.create(4096)
    ring.put(message(0, HALF))

    def put() -> bytes:
        ring.put(message(1, HALF), timeout=LIMIT)
        return b"done"

    return ProducerSleeps(ring, [Sleeper(put)])


# ---- a get that is woken -------------------------------------------------------------------------


class BothSleep(WakeStage):
    """The victim goes to sleep, then another; then messages come, and one wake for all.

    They are fed by one put_many, so it is for the victim to pass the wake on.
    """

    messages = 1
    feeder: Feeder | None = None

    def beside(self, victim: int) -> None:
        ring = self.ring
        fed = [message(i) for i in range(self.messages)]
        self.feeder = Feeder(victim, self.sleepers, lambda: ring.put_many(fed, timeout=AT_ONCE))

    def settle(self, thorough: bool) -> Finding:
        locked = locks_of_the_dead(self.ring)
        assert self.feeder is not None
        since = max(self.died, self.feeder.fed())
        left = [message(i) for i in range(self.messages)]
        if self.messages == 1:  # either took it; the next message shows which
            try:
                wait_for(lambda: not self.ring.qsize(), AT_ONCE, dump=False, every=0.001)
            except TimeoutError:
                raise Harm(HUNG, f"no process took it within {AT_ONCE} s") from None
            left.append(message(1))
            self.ring.put(left[1], timeout=AT_ONCE)
        answer = self.sleepers[0].answer(AT_ONCE)
        if answer is None:
            raise Harm(HUNG, f"the other had nothing within {AT_ONCE} s")
        if answer[1] not in left:
            raise Harm(TORN, f"the other had {answer[1][:64].hex(' ', 8)}")
        left.remove(answer[1])
        by_victim = self.ring.qsize() < len(left)
        self.take(*left[by_victim:])
        seconds = 0.0 if by_victim and self.messages == 1 else max(0.0, answer[0] - since)
        said = "taken" if by_victim else "left to the other"
        return self.finding(said, locked, seconds, len(left) + 1)

    def close(self) -> None:
        if self.feeder is not None:
            self.feeder.close()
        super().close()


class BothSleepForTwo(BothSleep):
    messages = 2


def both_sleep(kind: type[BothSleep]) -> Callable[[], BothSleep]:
    def prepare() -> BothSleep:
        ring = Ring.create(4096)
        return kind(ring, [Sleeper(lambda: ring.get(timeout=LIMIT), on_command=True)])

    return prepare


WAKERS = [
    Operation(
        "put that wakes a consumer",
        consumer_sleeps,
        lambda stage: stage.ring.put(FIRST),
        sleeps=True,
    ),
    Operation(
        "get that wakes a producer",
        producer_sleeps,
        lambda stage: stage.ring.get(),
        sleeps=True,
    ),
]

WOKEN = [
    Operation(
        "get that is woken",
        both_sleep(BothSleep),
        lambda stage: stage.ring.get(timeout=LIMIT),
        sleeps=True,
    ),
    Operation(
        "get that is woken and passes the baton",
        both_sleep(BothSleepForTwo),
        lambda stage: stage.ring.get(timeout=LIMIT),
        sleeps=True,
    ),
    Operation(
        "wait that is woken",
        both_sleep(BothSleep),
        lambda stage: wait([stage.ring], timeout=LIMIT),
        sleeps=True,
    ),
]

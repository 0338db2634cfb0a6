"""The loop of all kills: an operation, killed before each of its instructions."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from looking import PATIENCE, Finding, in_fresh_process
from tally import Harm, Tally
from walking import OperationFailed, Walker, Way, place

__all__ = ["Operation", "Selection", "Stage", "Trial", "watch_for_a_hang"]

ATTEMPTS = 3  # to come to a stop; what depends on time may go another way
MOST_HARMS = 20  # of one part of a trial; more of them say nothing new
THOROUGH = 100  # every so many kills the account is waited for


@dataclass(frozen=True)
class Selection:
    """Which of the stops are tried: every `stride`-th, and of these every `parts`-th."""

    stride: int = 1
    part: int = 0
    parts: int = 1

    def of(self, stops: range) -> range:
        return stops[self.part * self.stride :: self.stride * self.parts]


class Trial(ABC):
    """Something that is tried at many stops.

    Attributes:
        name: what it is called on the command line and in the summary.
        sleeps: most of its time passes asleep, so many parts can run at once.
        shared_memory: bytes of a /dev/shm of its own, if it needs one.
        build: the one of `builds.py` that it needs; None for the one under test.
    """

    name: str
    sleeps = False
    shared_memory: int | None = None
    build: str | None = None

    @abstractmethod
    def run(self, walker: Walker, selection: Selection) -> Tally:
        """Try the stops that are selected, and tell what came of them."""


class Stage(ABC):
    """What one kill happens on, and the account of it."""

    died = 0.0  # when the victim was dead, on the monotonic clock

    def beside(self, victim: int) -> None:
        """Start what goes on beside the victim, which does not run yet."""
        return  # by default there is nothing

    def afresh(self) -> None:
        """In the process that looks: look by handles that never saw anything."""
        return  # by default there is nothing

    @abstractmethod
    def settle(self, thorough: bool) -> Finding:
        """In the process that looks.

        Raises:
            Harm: something is not as it must be.
        """

    def close(self) -> None:
        """End what was started, leave the rings."""
        return  # by default there is nothing


@dataclass
class Operation(Trial):
    """One operation, killed before each of its instructions.

    Args:
        prepare: makes the stage.
        act: what the victim does with it.
        warm: what the victim does before, for what happens once a process.
    """

    name: str
    prepare: Callable[[], Any]
    act: Callable[[Any], object]
    warm: Callable[[Any], object] | None = None
    sleeps: bool = False
    shared_memory: int | None = None

    def victim(self, walker: Walker, stage: Any) -> int:
        warm = self.warm
        return walker.victim(
            lambda: self.act(stage), None if warm is None else (lambda: warm(stage))
        )

    def trace(self, walker: Walker) -> Way:
        """Walk a victim through it, unharmed; what it leaves must be right as well.

        A victim that sleeps goes a long way on a busy machine, and another sleeper may
        take what was meant for it: the shortest of some ways is one that others can go.
        """
        ways = []
        for _ in range(ATTEMPTS if self.sleeps else 1):
            with contextlib.suppress(OperationFailed):
                ways.append(self._trace_once(walker))
        if not ways:
            raise OperationFailed(f"{self.name}: an unharmed victim does not succeed")
        return min(ways, key=len)

    def _trace_once(self, walker: Walker) -> Way:
        watch_for_a_hang()
        stage = self.prepare()
        try:
            pid = self.victim(walker, stage)
            stage.beside(pid)
            way = walker.trace(pid)
            stage.died = time.monotonic()
            in_fresh_process(lambda: _look(stage, afresh=True, thorough=True))
            return way
        finally:
            stage.close()

    def run(self, walker: Walker, selection: Selection) -> Tally:
        began = time.monotonic()
        tally = Tally(self.name)
        way = self.trace(walker)
        tally.stops = f"{len(way)} instructions"
        for n in selection.of(range(len(way))):
            if tally.harms.total() >= MOST_HARMS:
                break
            self.kill(walker, way, n, tally)
        tally.seconds = time.monotonic() - began
        return tally

    def kill(self, walker: Walker, way: Way, n: int, tally: Tally) -> None:
        """Kill a victim before its n-th instruction, and have what it left looked at."""
        for _ in range(ATTEMPTS):
            watch_for_a_hang()
            stage = self.prepare()
            try:
                pid = self.victim(walker, stage)
                stage.beside(pid)
                arrival = walker.kill(pid, way, n)
                stage.died = time.monotonic()
                if arrival.there:
                    tally.beside += arrival.address != way.addresses[n]
                    self.look(stage, f"stop {n} at {place(arrival.address)}", tally)
                    return
            finally:
                stage.close()
        tally.missed += 1  # it came through unharmed, by a shorter way

    def look(self, stage: Stage, where: str, tally: Tally) -> None:
        """Count the outcome of one kill: by its own handle and by a fresh one in turns."""
        afresh = tally.tried % 2 == 1
        thorough = tally.tried % THOROUGH == 0
        tally.tried += 1
        try:
            found = in_fresh_process(lambda: _look(stage, afresh, thorough))
        except Harm as harm:
            by = "a fresh handle" if afresh else "the old handle"
            tally.harmed(harm.kind, f"{self.name}: killed at {where}; {by} looked: {harm}")
            return
        tally.outcomes[found.outcome] += 1
        tally.locked += bool(found.locked)
        tally.longest = max(tally.longest, found.seconds)


def _look(stage: Stage, afresh: bool, thorough: bool) -> Finding:
    if afresh:
        stage.afresh()
    return stage.settle(thorough)


def watch_for_a_hang() -> None:
    """Instead of a limit for a whole trial: nothing takes longer, so this one hangs."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=sys.__stderr__)

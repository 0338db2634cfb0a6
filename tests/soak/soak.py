"""Ten minutes of it: a Queue and a Ring at work, while their processes are killed and stopped.

``python tests/soak/soak.py --seconds 600`` runs four producers and four
consumers on one named Queue that grows and gives back, and two of each on a
Ring; kills, stops and replaces them at random; and accounts for every message.
Lost, doubled or torn messages are failures, and so is a time of more than two
seconds in which nothing flowed although no process was stopped.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import heapq
import itertools
import logging
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where `support` is, run as a file

from crew import ENDING_S, TICK_S, Crew, Member
from support import wait_for
from workload import DRAIN, END, LANES, PAUSE, RUN

__all__ = ["Soak", "main"]

STOP_S = (0.005, 0.25)  # shortest and longest
PAUSE_S = (0.3, 1.0)  # so that rings run empty, and idle ones give memory back
SHARED_MEMORY = Path("/dev/shm")


class Soak:
    """The supervisor: it does what kill -9 and busy machines do, and keeps the crews complete.

    Args:
        every: seconds between two faults, on average.
        seed: of the faults; when they fall is up to the machine.

    Attributes:
        failures: what must not have happened.
        lines: the report.
    """

    def __init__(self, every: float, seed: int) -> None:
        self.every = every
        self.failures: list[str] = []
        self.lines: list[str] = []
        self.faults: collections.Counter[str] = collections.Counter()
        self.crews: list[Crew] = []
        self._rng = random.Random(seed)
        self._told = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)  # of streams and of consumers; 0 is of none
        self._late = 0.0  # seconds, at most: so busy was the machine

    def run(self, seconds: float) -> None:
        """All of it: begin, disturb, end, judge."""
        self._told[0] = RUN
        try:
            for lane in LANES:
                self.crews.append(Crew(lane, self._told, self._numbers))
            self._disturb(time.monotonic() + seconds)
            self._told[0] = END
            ended = time.monotonic_ns()
            for crew in self.crews:
                crew.ended(producers=True)
                crew.flow.finish(ended)
            self._told[0] = DRAIN
            for crew in self.crews:
                crew.ended(producers=False)
                crew.judge()
                self.failures += crew.failures
            self.lines = self._report(seconds)
        finally:
            for crew in self.crews:
                crew.close()
        left = self._left_bytes()
        if left:
            self.failures.append(f"{left} bytes left in {SHARED_MEMORY}")
        self.lines.append(f"left in {SHARED_MEMORY}: {left} bytes")

    def _disturb(self, until: float) -> None:
        """One fault after the other, at random."""
        fault = look = time.monotonic()
        while True:
            due = min(until, fault, look, *(each[0] for each in self._later[:1]))
            now = time.monotonic()
            if now < due:
                ended = connection.wait(self._sentinels(), due - now)
                now = time.monotonic()
                if ended:
                    look = now
                else:
                    self._late = max(self._late, now - due)
            while self._later and self._later[0][0] <= now:
                heapq.heappop(self._later)[2]()
            if now >= until:
                break
            if now >= fault:
                self._fault()
                fault = now + self._rng.expovariate(1 / self.every)
            if now >= look:
                for crew in self.crews:
                    crew.look()
                look = now + TICK_S
        for _, _, undo in sorted(self._later):
            undo()
        self._later.clear()
        wait_for(self._are_replaced, ENDING_S, "the killed to be replaced", every=TICK_S)

    def _sentinels(self) -> list[int]:
        """Ready when one ends that was not killed."""
        members = (member for crew in self.crews for member in crew.members)
        return [member.process.sentinel for member in members if not member.killed]

    def _are_replaced(self) -> bool:
        """Look after the crews: whether none of the killed is left in them."""
        for crew in self.crews:
            crew.look()
        return not any(member.killed for crew in self.crews for member in crew.members)

    def _fault(self) -> None:
        """One of those that a program meets, of a random process."""
        crew = self._rng.choice(self.crews)
        living = [member for member in crew.members if not member.killed]
        if len(living) < 2:
            return
        member = self._rng.choice(living)
        drawn = self._rng.random()
        if drawn < 0.5:
            self._kill(crew, member)
        elif drawn < 0.6:
            for each in self._rng.sample(living, 2):
                self._kill(crew, each)
        elif drawn < 0.67:
            self._stop(crew, member, lambda: self._kill_if_there(crew, member))
        elif drawn < 0.97:
            self._stop(crew, member, lambda: crew.go_on(member))
        elif self._told[0] == RUN:
            self._pause()

    def _kill(self, crew: Crew, member: Member) -> None:
        self.faults["kills of a stopped process" if member.stopped_ns else "kills"] += 1
        crew.kill(member)

    def _kill_if_there(self, crew: Crew, member: Member) -> None:
        if not member.killed:
            self._kill(crew, member)

    def _stop(self, crew: Crew, member: Member, then: Callable[[], None]) -> None:
        if not member.stopped_ns:
            self.faults["stops"] += 1
            crew.stop(member)
            self._after(self._rng.uniform(*STOP_S), then)

    def _pause(self) -> None:
        """The producers stand still, and the rings run empty."""
        self.faults["pauses"] += 1
        began = time.monotonic_ns()
        self._told[0] = PAUSE

        def go_on() -> None:
            self._told[0] = RUN
            for crew in self.crews:
                crew.flow.stopped(began, time.monotonic_ns())

        self._after(self._rng.uniform(*PAUSE_S), go_on)

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), what))

    def _report(self, seconds: float) -> list[str]:
        done = ", ".join(f"{count:,} {what}" for what, count in sorted(self.faults.items()))
        lines = [f"{seconds:g} s with a fault every {self.every:g} s: {done}"]
        for crew in self.crews:
            lines += crew.report(seconds)
        lines.append(f"the supervisor was late by {self._late * 1000:.0f} ms at most")
        return lines

    def _left_bytes(self) -> int:
        """Of files of this run: each bears its pid."""
        ours = SHARED_MEMORY.glob(f"*soak-{os.getpid()}-*")
        return sum(file.stat().st_blocks * 512 for file in ours)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and say how it went: 0 is well."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=600, help="default: 600")
    parser.add_argument("--every", type=float, default=0.1, help="seconds a fault (default: 0.1)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    faulthandler.enable()  # children inherit it: one that does not end says where it was
    logging.getLogger("shmring").setLevel(logging.ERROR)  # that it is full, it says once a handle
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # or, on a busy machine, it would seldom come to kill
    soak = Soak(options.every, options.seed)
    soak.run(options.seconds)
    print("\n".join(soak.lines))
    for failure in soak.failures:
        print(f"FAILED: {failure}")
    return bool(soak.failures)


if __name__ == "__main__":
    sys.exit(main())

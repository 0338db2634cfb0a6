"""Two deaths in a row: the second in an operation that meets what the first one left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from looking import message
from operations import OPERATIONS, RingStage
from shmring import Ring
from tally import Tally
from trials import Operation, Selection, Trial, watch_for_a_hang
from walking import Walker, Way, place

__all__ = ["SUCCESSIONS"]


@dataclass
class Succession(Trial):
    """Kill a first victim at some of its stops, and after each a second one at some of its own.

    Args:
        first: the operation of the first victim; its stage is that of both.
        act: what the second one does on the ring that is left.
        puts: what the second one puts.
        gets: how many it takes.
        apart: every so many stops of the first, and of the second.
    """

    name: str
    first: Operation
    act: Callable[[Ring], object]
    puts: Sequence[bytes]
    gets: int
    apart: tuple[int, int]

    def run(self, walker: Walker, selection: Selection) -> Tally:
        began = time.monotonic()
        tally = Tally(self.name)
        way = self.first.trace(walker)
        tally.stops = f"every {self.apart[0]}th and then every {self.apart[1]}th instruction"
        for n in selection.of(range(0, len(way), self.apart[0])):
            later = self.trace_second(walker, way, n)
            for m in range(0, len(later), self.apart[1]):
                self.kill_both(walker, (way, later), (n, m), tally)
        tally.seconds = time.monotonic() - began
        return tally

    def prepare(self, walker: Walker, way: Way, n: int) -> RingStage:
        """A stage on which the first one was killed."""
        watch_for_a_hang()
        stage: RingStage = self.first.prepare()
        stage.more, stage.gets = self.puts, stage.gets + self.gets
        walker.kill(self.first.victim(walker, stage), way, n)
        return stage

    def trace_second(self, walker: Walker, way: Way, n: int) -> Way:
        stage = self.prepare(walker, way, n)
        try:
            return walker.trace(walker.victim(lambda: self.act(stage.ring)))
        finally:
            stage.close()

    def kill_both(
        self, walker: Walker, ways: tuple[Way, Way], stops: tuple[int, int], tally: Tally
    ) -> None:
        stage = self.prepare(walker, ways[0], stops[0])
        try:
            arrival = walker.kill(walker.victim(lambda: self.act(stage.ring)), ways[1], stops[1])
            if arrival.there:
                where = f"stops {stops}, the latter at {place(arrival.address)}"
                self.first.look(stage, where, tally)
            tally.missed += not arrival.there
        finally:
            stage.close()


def succession(
    first: str, act: Callable[[Ring], object], puts: Sequence[bytes], *apart: int
) -> Succession:
    one = next(operation for operation in OPERATIONS if operation.name == first)
    second = "put" if puts else "get"
    return Succession(
        f"{first}, then {second}", one, act, puts, 0 if puts else 1, (apart[0], apart[1])
    )


LATER = [message(98)]

SUCCESSIONS = [
    succession("put with growth", lambda r: r.put(LATER[0]), LATER, 101, 29),
    succession("put, growth of a dead one", lambda r: r.put(LATER[0]), LATER, 101, 29),
    succession("get that moves on", Ring.get, [], 61, 37),
    succession("get, move of a dead one", Ring.get, [], 61, 37),
]

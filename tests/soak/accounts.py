"""What was to be put, what arrived, and what neither side can tell.

The accounts are kept outside of the rings, in memory that a killed process
leaves behind as it was.  A *stream* is what one producer puts, numbered from 0;
its replacement begins a new one.  A kill may hide two things, and no more:
whether the put that it cut short went in, and what the get that it cut short
had taken.  So a message that no consumer got is a loss, unless some get that a kill
cut short can have taken it: one that had begun before the next message of the
stream arrived, was killed after the message in front of it was asked for, and
had asked for that many.
"""

from __future__ import annotations

import array
import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["TORN", "Accounts", "CutGet", "Gap", "Intent", "Receipts", "Stream", "unexplained"]

TORN = 0  # the stream of a message that was not what any producer wrote
_RECORD = struct.Struct("=IIQQQ")  # divides a page: a write that is cut short leaves whole records
_NEVER = 1 << 63
_AHEAD_BYTES = 8192 * _RECORD.size
_NAP_S, _NAPS_MOST = 0.001, 500


def _words() -> memoryview:
    """Words that a forked child shares; each is stored whole, whenever a kill comes."""
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")


class Intent:
    """What a producer was about to put, and what it knows to have put."""

    def __init__(self) -> None:
        self._stored = _words()

    def begin(self, intended: int) -> None:
        """Before a put: all messages below `intended` may be there from now on."""
        self._stored[0] = intended

    def end(self, done: int) -> None:
        """After a put: all messages below `done` are there, and none above."""
        self._stored[1] = done
        self._stored[0] = done

    def settle(self) -> None:
        """The producer is dead: keep the figures, and give back the page."""
        self._stored = memoryview(array.array("Q", self._stored[:2]))

    @property
    def intended(self) -> int:
        """No message from here on was put."""
        return self._stored[0]

    @property
    def done(self) -> int:
        """All messages below were put."""
        return self._stored[1]


@dataclass(frozen=True, slots=True)
class CutGet:
    """A get that a kill cut short: it may have taken up to `most` messages.

    Times are monotonic nanoseconds, here and below.
    """

    began: int
    killed: int
    most: int


class Receipts:
    """What a consumer got: written at once, by the child; read on and on, by its parent.

    A child that is `_AHEAD_BYTES` ahead waits a while, or a parent with many children would read
    for ever and keep none of them in order.
    """

    def __init__(self) -> None:
        self._stored = _words()
        self._fd = os.memfd_create("receipts", os.MFD_CLOEXEC)
        self._read = 0  # by the parent, and
        self._written = 0  # by the child

    def begin(self, now: int, most: int) -> None:
        """Before a get of up to `most` messages."""
        self._stored[0] = now
        self._stored[1] = most

    def end(self, runs: Iterable[tuple[int, int, int]], now: int) -> None:
        """After it: `runs` of (stream, first number, count), in the order of arrival."""
        began = self._stored[0]
        records = [_RECORD.pack(stream, count, first, began, now) for stream, first, count in runs]
        if records:
            self._written += os.write(self._fd, b"".join(records))
        self._stored[1] = 0
        for _ in range(_NAPS_MOST):
            if self._written - self._stored[2] <= _AHEAD_BYTES:
                break
            time.sleep(_NAP_S)

    def cut_short(self, killed: int) -> CutGet | None:
        """The get in which the consumer was killed, if it was in one."""
        began, most = self._stored[:2]
        return CutGet(began, killed, most) if most else None

    def read(self) -> Iterator[tuple[int, int, int, int, int]]:
        """What came since the last call: (stream, count, first number, began, ended)."""
        there = os.fstat(self._fd).st_size  # and not what comes meanwhile
        there -= there % _RECORD.size
        while data := os.pread(self._fd, min(1 << 20, there - self._read), self._read):
            self._read += len(data)
            yield from _RECORD.iter_unpack(data)
            self._stored[2] = self._read

    def close(self) -> None:
        """Read no more."""
        os.close(self._fd)


@dataclass(slots=True)
class _Run:
    """Messages that were received, without a gap between them."""

    first: int
    end: int
    first_ended: int  # when the get of the first one was over
    last_began: int  # when the get of the last one had begun


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages of a stream that were put and that no consumer received.

    Attributes:
        after: when the message in front of them was asked for.
        before: when the one behind them had arrived.
    """

    stream: int
    first: int
    count: int
    after: int
    before: int

    def explained_by(self, cut: CutGet) -> bool:
        """Whether the cut get can have taken any of them: each stream arrives in order."""
        return cut.began < self.before and cut.killed > self.after


class Stream:
    """What was received of one stream, by any consumer, in any order."""

    def __init__(self, number: int, began: int) -> None:
        self.number = number
        self.duplicates = 0
        self._runs = [_Run(0, 0, began, began)]

    def receive(self, first: int, count: int, began: int, ended: int) -> None:
        """A consumer got messages `first` and following; the get took from `began` to `ended`."""
        runs, end = self._runs, first + count
        i = len(runs)
        while runs[i - 1].first > first:
            i -= 1
        before = runs[i - 1]
        after = runs[i] if i < len(runs) else None
        if before.end > first or (after is not None and after.first < end):
            if count == 1:
                self.duplicates += 1
            else:
                for number in range(first, end):
                    self.receive(number, 1, began, ended)
            return
        if before.end == first:
            before.end, before.last_began = end, began
            if after is not None and after.first == end:
                before.end, before.last_began = after.end, after.last_began
                del runs[i]
        elif after is not None and after.first == end:
            after.first, after.first_ended = first, ended
        else:
            runs.insert(i, _Run(first, end, ended, began))

    @property
    def end(self) -> int:
        """The number behind the highest that was received."""
        return self._runs[-1].end

    @property
    def received(self) -> int:
        """How many different messages were received."""
        return sum(run.end - run.first for run in self._runs)

    def gaps(self, done: int) -> Iterator[Gap]:
        """What is missing of the messages below `done`, and below the highest received."""
        following = [*self._runs[1:], _Run(max(done, self.end), 0, _NEVER, 0)]
        for before, after in zip(self._runs, following, strict=True):
            if count := after.first - before.end:
                yield Gap(self.number, before.end, count, before.last_began, after.first_ended)


def unexplained(gaps: Iterable[Gap], cuts: list[CutGet]) -> list[tuple[Gap, int]]:
    """Which messages no cut get can have taken, each cut get taking what it asked for at most.

    The largest assignment of messages to cut gets is looked for, by augmenting paths.

    Returns:
        the gaps that are left, and how many messages of each.
    """
    places = [i for i, cut in enumerate(cuts) for _ in range(cut.most)]
    taken_by: list[tuple[Gap, list[int]] | None] = [None] * len(places)

    def assign(gap: Gap, candidates: list[int], seen: set[int]) -> bool:
        for place in candidates:
            if place in seen:
                continue
            seen.add(place)
            other = taken_by[place]
            if other is None or assign(*other, seen):
                taken_by[place] = gap, candidates
                return True
        return False

    left = []
    for gap in gaps:
        candidates = [place for place, i in enumerate(places) if gap.explained_by(cuts[i])]
        for assigned in range(gap.count):
            if not assign(gap, candidates, set()):
                left.append((gap, gap.count - assigned))
                break
    return left


@dataclass
class Accounts:
    """All streams of one ring, and all that went wrong with them."""

    streams: dict[int, Stream] = field(default_factory=dict)
    intents: dict[int, Intent] = field(default_factory=dict)
    cuts: list[CutGet] = field(default_factory=list)
    torn: int = 0
    disordered: int = 0
    unheard_of: int = 0  # numbers that were never put

    def open(self, number: int, intent: Intent, now: int) -> None:
        """A producer begins."""
        self.streams[number] = Stream(number, now)
        self.intents[number] = intent

    def read(self, receipts: Receipts, newest: dict[int, int]) -> list[int]:
        """Enter what a consumer got since the last call.

        Args:
            newest: by stream, the highest number this consumer got; is updated.

        Returns:
            when each of its gets was over.
        """
        times = []
        for number, count, first, began, ended in receipts.read():
            times.append(ended)
            stream = self.streams.get(number)
            if stream is None:
                self.torn += count
                continue
            if first <= newest.get(number, -1):
                self.disordered += 1
            newest[number] = first + count - 1
            stream.receive(first, count, began, ended)
        return times

    def gaps(self) -> list[Gap]:
        """What was put and no consumer received, after the last read."""
        return [
            gap
            for number, stream in self.streams.items()
            for gap in stream.gaps(self.intents[number].done)
        ]

    def beyond(self) -> int:
        """Messages that were received and never put."""
        return sum(
            max(0, stream.end - self.intents[number].intended)
            for number, stream in self.streams.items()
        )

    @property
    def duplicates(self) -> int:
        """Messages that came again."""
        return sum(stream.duplicates for stream in self.streams.values())

    @property
    def received(self) -> int:
        """Different messages that were received."""
        return sum(stream.received for stream in self.streams.values())

    @property
    def surely_put(self) -> int:
        """Messages whose producers lived to know that they were put, or that were received."""
        return sum(
            max(stream.end, self.intents[number].done) for number, stream in self.streams.items()
        )

    @property
    def perhaps_put(self) -> int:
        """The same, and what puts that were cut short may have put."""
        return sum(intent.intended for intent in self.intents.values())

"""How steadily messages flowed: the times between two arrivals, whichever consumer got them."""

from __future__ import annotations

import bisect

__all__ = ["Flow"]

MILLISECOND = 1_000_000
BOUNDS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 2000)
_HELD_BACK_NS = 1000 * MILLISECOND  # arrivals are told by several processes, and late


class Flow:
    """Collects arrivals, and knows when a process was stopped.

    A stopped process may hold a lock, and a lock is never taken from the living;
    so what is counted of a pause is the longest stretch in which none was.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_MS) + 1)  # of stretches, by length
        self.longest = 0  # ns
        self.longest_whole = 0  # ns, the times in which a process was stopped included
        self._waiting: list[int] = []
        self._last = 0
        self._stops: list[tuple[int, int]] = []

    def stopped(self, began: int, ended: int) -> None:
        """A process was stopped, or all producers were told to pause."""
        bisect.insort(self._stops, (began, ended))

    def arrived(self, times: list[int]) -> None:
        """Messages were received."""
        self._waiting += times

    def look(self, now: int) -> None:
        """Count the pauses that ended a while ago."""
        self._waiting.sort()
        known = bisect.bisect_right(self._waiting, now - _HELD_BACK_NS)
        last = self._last or (self._waiting[0] if known else 0)
        for arrival in self._waiting[:known]:
            if arrival - last < MILLISECOND:
                self.counts[0] += 1
            else:
                self._pause(last, arrival)
            if arrival > last:
                last = arrival
        self._last = last
        del self._waiting[:known]
        self._stops = [stop for stop in self._stops if stop[1] > last]

    def finish(self, now: int) -> None:
        """Count what is left; a pause that went on until `now` included."""
        self.look(1 << 63)
        if 0 < self._last < now:
            self._pause(self._last, now)

    def _pause(self, began: int, ended: int) -> None:
        self.longest_whole = max(self.longest_whole, ended - began)
        stretch, at = 0, began
        for stop_began, stop_ended in self._stops:
            if stop_ended <= at or stop_began >= ended:
                continue
            stretch = max(stretch, stop_began - at)
            at = stop_ended
        stretch = max(stretch, ended - at)
        self.longest = max(self.longest, stretch)
        self.counts[bisect.bisect_right(BOUNDS_MS, stretch / MILLISECOND)] += 1

    def histogram(self) -> str:
        """How often which pause was seen, for a reader."""
        names = [f"< {BOUNDS_MS[0]} ms", *(f"{bound}+" for bound in BOUNDS_MS)]
        return ", ".join(f"{name}: {count}" for name, count in zip(names, self.counts, strict=True))

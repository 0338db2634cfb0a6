"""One run of each after the other, as often as asked: a drift of the machine favours nobody."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.sessions import RoundTrips, Session

__all__ = ["Runs", "per_second", "progress", "take_turns"]

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Runs:
    """What the runs of one transport brought.

    Attributes:
        rates: messages a second, run by run.
        trips_ns: each round trip of all runs, where that was what was measured.
        error: what ended its last run; it has had no more turns since.
    """

    rates: list[float] = field(default_factory=list)
    trips_ns: list[int] = field(default_factory=list)
    error: Exception | None = None

    @property
    def median(self) -> float:
        """Messages a second."""
        return statistics.median(self.rates)


def take_turns(
    runs: int,
    sessions: Mapping[Key, Callable[[], Session]],
    tell: Callable[[str], None] = lambda text: None,
) -> dict[Key, Runs]:
    """Run a session of each in turn.

    Args:
        runs: how often.
        sessions: what makes a session, by whatever the caller calls it.
        tell: is told of each run.
    """
    found = {key: Runs() for key in sessions}
    for run in range(runs):
        for key, make in sessions.items():
            one = found[key]
            if one.error is not None:
                continue
            try:
                with make() as session:
                    one.rates.append(session.count / session.run())
                    if isinstance(session, RoundTrips):
                        one.trips_ns += session.samples_ns
                    told = per_second(one.rates[-1])
                    tell(f"run {run + 1} of {runs}: {session.label}: {told}")
            except Exception as error:  # the caller decides whose failure it is
                one.error = error
                tell(f"run {run + 1} of {runs}: {key}: {error!r}")
    return found


def per_second(rate: float) -> str:
    """4.52 M/s"""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}/s"
    return f"{rate:.3g}/s"


def progress(text: str) -> None:
    """Not among the results."""
    print(text, file=sys.stderr, flush=True)

"""What came of the kills of one trial, and how it is told."""

from __future__ import annotations

import collections
import dataclasses
from collections import Counter
from typing import Any

__all__ = [
    "BROKEN",
    "CAUGHT",
    "CORRUPTED",
    "DISORDERED",
    "DOUBLED",
    "HARMS",
    "HUNG",
    "KILLED",
    "LEAKED",
    "LOST",
    "MISCOUNTED",
    "STEPPED",
    "TORN",
    "Harm",
    "Tally",
]

TORN = "torn"  # something was delivered that no process had put
LOST = "lost"  # it was there, or promised, and never came
DOUBLED = "doubled"
DISORDERED = "out of order"
HUNG = "hung"  # puts or gets do not go on, or a wake-up did not come
MISCOUNTED = "miscounted"
LEAKED = "leaked"  # pages that belong to no area
CORRUPTED = "corrupted"  # the ring says so itself
BROKEN = "broken"  # an unexpected exception, or a process that crashed
HARMS = (TORN, LOST, DOUBLED, DISORDERED, HUNG, MISCOUNTED, LEAKED, CORRUPTED, BROKEN)

# The headings under which tallies are told.
KILLED = "killed before every instruction"
STEPPED = "two processes stepped against each other"
CAUGHT = "broken on purpose, and caught"

MOST_NOTES = 3


class Harm(Exception):
    """What must not be after a kill.

    Args:
        kind: one of HARMS.
        detail: what was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclasses.dataclass
class Tally:
    """The outcomes of one trial, or of a part of it."""

    name: str
    stops: str = ""  # where it could be killed, in words
    tried: int = 0
    outcomes: Counter[str] = dataclasses.field(default_factory=collections.Counter)
    locked: int = 0  # how many died with a lock in their hand
    beside: int = 0  # killed in a library, at another instruction of it than the traced one
    missed: int = 0  # stops that no victim came to
    harms: Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)  # of the first harms
    longest: float = 0.0  # seconds until a sleeper was awake
    seconds: float = 0.0

    def harmed(self, kind: str, note: str) -> None:
        self.harms[kind] += 1
        if len(self.notes) < MOST_NOTES:
            self.notes.append(note)

    def add(self, part: Tally) -> None:
        """Take in another part of the same trial, which ran beside this one."""
        self.stops = self.stops or part.stops
        self.tried += part.tried
        self.outcomes += part.outcomes
        self.locked += part.locked
        self.beside += part.beside
        self.missed += part.missed
        self.harms += part.harms
        self.notes = [*self.notes, *part.notes][:MOST_NOTES]
        self.longest = max(self.longest, part.longest)
        self.seconds = max(self.seconds, part.seconds)

    def harms_in_words(self) -> str:
        """All kinds with their numbers, the zeros too: what was looked for is said."""
        found = [f"{self.harms[kind]} {kind}" for kind in HARMS if self.harms[kind]]
        none = [kind for kind in HARMS if not self.harms[kind]]
        return ", ".join([*found, f"0 {', '.join(none[:-1])} or {none[-1]}"])

    def line(self) -> str:
        """One line for the summary."""
        told = ", ".join(f"{number} {what}" for what, number in self.outcomes.most_common())
        beside = [f"{self.locked} died with a lock"] if self.locked else []
        if self.longest:
            beside.append(f"longest sleep {self.longest * 1000:.0f} ms")
        if self.beside:
            beside.append(f"{self.beside} in libc beside the one meant")
        if self.missed:
            beside.append(f"{self.missed} not come to")
        return (
            f"{self.name}: {self.stops}, {self.tried} tried: {told or 'none right'}"
            f", {self.harms_in_words()}"
            + (f" ({', '.join(beside)})" if beside else "")
            + f" [{self.seconds:.0f} s]"
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Tally:
        tally = cls(**found)
        tally.outcomes, tally.harms = Counter(found["outcomes"]), Counter(found["harms"])
        return tally

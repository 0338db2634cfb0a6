"""All trials, by name."""

from __future__ import annotations

from claims import CLAIMS
from duels import DUELS
from holders import HOLDERS
from operations import OPERATIONS
from shortage import SHORTAGE
from successions import SUCCESSIONS
from trials import Trial
from wakes import WAKES

__all__ = ["KILLINGS", "STEPPINGS", "TRIALS"]

KILLINGS: list[Trial] = [*OPERATIONS, *CLAIMS, *WAKES, *HOLDERS, *SHORTAGE, *SUCCESSIONS]
STEPPINGS: list[Trial] = [*DUELS]
TRIALS = {trial.name: trial for trial in [*KILLINGS, *STEPPINGS]}

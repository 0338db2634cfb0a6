"""All trials, by name."""

from __future__ import annotations

from claims import CLAIMS
from duels import DUELS
from endings import ENDINGS
from holders import HOLDERS
from lending import LENDING
from operations import OPERATIONS
from shortage import SHORTAGE
from successions import SUCCESSIONS
from trials import Trial
from wakes import WAKERS, WOKEN

__all__ = ["TRIALS"]

TRIALS: dict[str, Trial] = {
    trial.name: trial
    for trials in (
        OPERATIONS,
        ENDINGS,
        CLAIMS,
        LENDING,
        WAKERS,
        WOKEN,
        HOLDERS,
        SHORTAGE,
        SUCCESSIONS,
        DUELS,
    )
    for trial in trials
}

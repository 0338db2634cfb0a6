"""Results of ``statistics()`` and ``get_stats()``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

__all__ = ["IPCStatistics", "RingStatistics"]


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """A snapshot of a ring's header, the same for every process.

    Attributes:
        capacity, max_capacity: bytes of the area that producers write to; of all areas.
        used_bytes: of frames that were put and not yet taken, headers included.
        messages: in the ring now, reservations included.  After an immediate
            shutdown this and `used_bytes` are 0: what is left is never taken.
        messages_put, messages_taken, bytes_put: since the ring was made.
        growths: how often the ring grew or shrank.
        recoveries: how many lock owners were found dead.
        consumers_waiting, producers_waiting: whether one sleeps, or did last.
        shut_down: puts are refused.
        poisoned: every call is refused.
        waiters: see :func:`shmring.diagnostics.snapshot.waiters`.
        holders: see :func:`shmring.diagnostics.snapshot.holders`.
        deaths: see :func:`shmring.diagnostics.snapshot.deaths`.
    """

    capacity: int
    max_capacity: int
    used_bytes: int
    messages: int
    messages_put: int
    messages_taken: int
    bytes_put: int
    growths: int
    recoveries: int
    consumers_waiting: bool
    producers_waiting: bool
    shut_down: bool
    poisoned: bool
    waiters: list[dict[str, Any]]
    holders: list[dict[str, Any]]
    deaths: list[dict[str, Any]]


class IPCStatistics(TypedDict):
    """The result of :meth:`HighPerformanceIPC.get_stats`."""

    messages_sent: int
    messages_received: int
    bytes_transferred: int
    errors: int
    process_id: str
    alive_processes: int
    last_heartbeat: float

"""What ``statistics()`` of a ring or a queue, and ``get_stats()``, return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

__all__ = ["IPCStatistics", "RingStatistics"]


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """What stands in a ring's header: a snapshot, readable by every process.

    Attributes:
        capacity, max_capacity: bytes, of the area producers write to and of all.
        used_bytes: frames that were put and not yet taken, headers included.
        messages: in the ring now; reservations count from their beginning.  After an
            immediate shutdown both are 0: nobody takes what is left.
        messages_put, messages_taken, bytes_put: since the ring was made.
        growths: how often the ring grew or shrank.
        recoveries: lock owners that were found dead.
        consumers_waiting, producers_waiting: somebody sleeps (or did last).
        shut_down, poisoned: no more puts; no more anything.
        waiters: who waits for what since when, see :func:`shmring.diagnostics.snapshot.waiters`.
        holders: who holds a lock, the reservation in front, or the message in
            front by a peek, see :func:`shmring.diagnostics.snapshot.holders`.
        deaths: who died last holding what, see :func:`shmring.diagnostics.snapshot.deaths`.
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
    """What :meth:`HighPerformanceIPC.get_stats` returns."""

    messages_sent: int
    messages_received: int
    bytes_transferred: int
    errors: int
    process_id: str
    alive_processes: int
    last_heartbeat: float

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
        blocks, block_bytes: of memory for large buffers.
        lent_bytes: bytes of those blocks that a message or a received array uses; the other
            blocks are free for the next ones.
        recoveries: how many lock owners were found dead.
        consumers_waiting, producers_waiting: whether one sleeps, or did last.
        shut_down: puts are refused.
        poisoned: every call is refused.
        waiters: one dict a thread that sleeps in a call, longest first, 32 at most: ``pid``,
            ``tid``, ``state`` ("alive" or "stopped"), ``call``, ``waits_for``,
            ``since_ns`` (of ``time.monotonic_ns()``) and ``seconds`` (until now).
        holders: one dict a thread that holds a lock, the reservation in front, or a peek:
            ``pid``, ``tid``, ``state`` (also "dead": the next call recovers) and ``holds``.
        deaths: one dict for the last owner that was found dead of each lock, reservation
            and peek: ``pid``, ``held``, ``when_ns`` and ``seconds`` (since then).
    """

    capacity: int
    max_capacity: int
    used_bytes: int
    messages: int
    messages_put: int
    messages_taken: int
    bytes_put: int
    growths: int
    blocks: int
    block_bytes: int
    lent_bytes: int
    recoveries: int
    consumers_waiting: bool
    producers_waiting: bool
    shut_down: bool
    poisoned: bool
    waiters: list[dict[str, Any]]
    holders: list[dict[str, Any]]
    deaths: list[dict[str, Any]]


class IPCStatistics(TypedDict):
    """The result of :meth:`HighPerformanceIPC.get_stats`.

    Attributes:
        messages_sent, messages_received: of this process.
        bytes_transferred: of messages and of shared memory, in and out.
        errors: calls that raised.
        process_id: the name of this process.
        alive_processes: how many others were seen so far.
        last_heartbeat: when :meth:`HighPerformanceIPC.send_heartbeat` was last called, in
            seconds since the epoch; 0.0 is never.
    """

    messages_sent: int
    messages_received: int
    bytes_transferred: int
    errors: int
    process_id: str
    alive_processes: int
    last_heartbeat: float

"""Snapshots of the waiters, holders and deaths of a ring.

They show what waiters, and processes that recovered from a death, wrote
(``cython/shmring/_core/diagnostics.h``), at an instant during the call.
Diagnostics only: a process that writes wrong records is not found out.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from shmring._core import handle
from shmring._core.handle import RingHandle
from shmring.process.liveness import is_process_dead, is_process_stopped

__all__ = ["deaths", "holders", "waiters"]


def waiters(ring: RingHandle) -> list[dict[str, Any]]:
    """The threads that sleep in a call on the ring now, longest first; 32 at most.

    Args:
        ring: an open handle.

    Returns:
        For each: ``pid``, ``tid``, ``state`` ("alive" or "stopped"), ``call``
        ("get", "put", ...), ``waits_for`` ("a message", "room", "a lock", ...),
        ``since_ns`` (of ``time.monotonic_ns()``) and ``seconds`` (until now).
    """
    now = time.monotonic_ns()
    return [
        {
            "pid": pid,
            "tid": tid,
            "state": _state(pid, False),
            "call": handle.CALLS.get(call, "unknown"),
            "waits_for": handle.REASONS.get(reason, "unknown"),
            "since_ns": since_ns,
            "seconds": _seconds(since_ns, now),
        }
        for pid, _, tid, call, reason, since_ns in sorted(
            handle.waiters(ring), key=lambda each: each[-1]
        )
    ]


def holders(ring: RingHandle) -> list[dict[str, Any]]:
    """The threads that hold a lock of the ring, the reservation in front, or a peek.

    Args:
        ring: an open handle.

    Returns:
        For each: ``pid`` (None: unknown), ``tid`` (of a lock; else None), ``state``
        ("alive", "stopped", or "dead": the next call recovers) and ``holds``.
    """
    return [
        {
            "pid": pid or None,
            "tid": tid or None,
            "state": _state(pid, died or is_process_dead(pid, start_ticks)),
            "holds": handle.HELD[held],
        }
        for pid, start_ticks, tid, held, died in handle.holders(ring)
    ]


def deaths(ring: RingHandle) -> list[dict[str, Any]]:
    """The last owner found dead of each lock, reservation and peek; oldest first.

    Args:
        ring: an open handle.

    Returns:
        For each: ``pid`` (None: unknown), ``held``, ``when_ns`` (the death was
        found, of ``time.monotonic_ns()``) and ``seconds`` (since then).
    """
    now = time.monotonic_ns()
    return [
        {
            "pid": pid or None,
            "held": handle.HELD[held],
            "when_ns": when_ns,
            "seconds": _seconds(when_ns, now),
        }
        for pid, held, when_ns in sorted(handle.deaths(ring), key=lambda each: each[-1])
    ]


def _state(pid: int, dead: bool) -> Literal["alive", "stopped", "dead"]:
    if dead:
        return "dead"
    return "stopped" if is_process_stopped(pid) else "alive"


def _seconds(since_ns: int, now_ns: int) -> float:
    return max(0, now_ns - since_ns) / 1e9

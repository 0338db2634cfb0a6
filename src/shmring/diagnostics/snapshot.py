"""Who waits on a ring for what since when, and who died holding what: in words.

What is shown was written by those who wait and by those who cleared up after
the dead (``cython/shmring/_core/diagnostics.h``); it is true at an instant during the
call, for those who play by the rules, and nothing is ever decided by it.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from shmring._core import handle
from shmring._core.handle import RingHandle
from shmring.process.liveness import is_process_dead, is_process_stopped

__all__ = ["deaths", "holders", "waiters"]


def waiters(ring: RingHandle) -> list[dict[str, Any]]:
    """Who sleeps in a call on the ring now, longest first; 32 can be shown.

    Args:
        ring: an open handle.

    Returns:
        for each: ``pid``, ``tid``, ``state`` ("alive" or "stopped"), ``call``
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
    """Who holds something of the ring now: a lock, the reservation in front, a peek.

    Args:
        ring: an open handle.

    Returns:
        for each: ``pid`` (None: unknown), ``tid`` (of a lock that is held; else
        None), ``state`` ("alive", "stopped", or "dead": whoever comes by next
        clears it away) and ``holds``.
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
    """Who was found dead last, for each thing that he may have held; oldest first.

    Args:
        ring: an open handle.

    Returns:
        for each: ``pid`` (None: he died before he could show it), ``held``,
        ``when_ns`` (it was found out, of ``time.monotonic_ns()``) and
        ``seconds`` (since then).
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

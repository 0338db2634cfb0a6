"""Rows of the report about a kill: how soon messages flow again, and how fast.

One process puts and one gets as fast as they can.  Then a third, the victim, is killed while
it holds a lock or sleeps in `get`::

    put, get  |---------- P -> C ----------|             |--------- P -> C ---------|
    victim                          forked | in place    ^ killed
    clock         |--- rate before ---|                  |-| next message
                                                         |--- rate after ---|
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from dataclasses import asdict, dataclass

import shmring
from benchmarks import Row, Settings, Target, progress
from benchmarks.sessions import DEADLINE_S, deadline, forever, sleeps, wait_until

WINDOW_S = 1.0  # over which a rate is taken
KINDS = {
    "producer": "a producer that holds the lock",
    "consumer": "a consumer that holds the lock",
    "sleeper": "a consumer that sleeps in get",
}


@dataclass(frozen=True)
class Recovery:
    """One kill: seconds until the next message, messages a second before and after."""

    seconds: float
    before: float
    after: float


def row(kind: str, settings: Settings) -> Row:
    """Measure one of KINDS, each kill among new processes."""
    question = f"killed: {KINDS[kind]}"
    progress(question)
    window = WINDOW_S * min(1.0, settings.scale)
    kills = [kill_once(kind, max(0.1, window)) for _ in range(settings.runs)]
    waits = [1000 * kill.seconds for kill in kills]
    ratio = statistics.median(kill.after / kill.before for kill in kills)
    targets = [
        Target("next message after {} ms at the latest", 100, max(waits), at_most=True),
        Target("the rate afterwards is {} of the rate before", 0.9, ratio),
    ]
    spread = f"{min(waits):.2f} to {max(waits):.2f} ms"
    raw = {"kills": [asdict(kill) for kill in kills]}
    return Row(question, f"{statistics.median(waits):.2f} ms", targets, spread, raw)


def _stop_in_lock(ring: shmring.Ring, pid: int, side: str) -> None:
    """Stop and continue a process until it is stopped while it holds the lock of its side."""

    def holds() -> bool:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        lock = f"the {side}s' lock"
        if any(one["pid"] == pid and lock in one["holds"] for one in ring.statistics().holders):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    wait_until(holds)


def kill_once(kind: str, window: float) -> Recovery:
    """Kill a process; take the rates over `window` seconds before and after."""
    with contextlib.ExitStack() as stack, deadline(DEADLINE_S, KINDS[kind]):
        ring = stack.enter_context(shmring.Ring.create(1 << 20))
        put, get = forever(ring.put, bytes(64)), forever(ring.get)
        producer, consumer = map(stack.enter_context, (put, get))

        def taken() -> int:
            return ring.statistics().messages_taken

        def stands_still() -> bool:
            """Return whether no message moves and the consumer can take none."""
            count = taken()
            time.sleep(0.02)
            drained = kind == "consumer" or ring.qsize() == 0
            return count == taken() and sleeps(consumer) and drained

        wait_until(taken)
        time.sleep(window / 4)  # warm up
        start, count = time.monotonic(), taken()
        time.sleep(window)
        wait_until(lambda: taken() > count)  # both may have had no CPU
        before = (taken() - count) / (time.monotonic() - start)
        if kind == "sleeper":
            os.kill(producer, signal.SIGSTOP)
            wait_until(stands_still)
        more = forever(ring.put, bytes(64)) if kind == "producer" else forever(ring.get)
        victim = stack.enter_context(more)
        if kind == "sleeper":
            wait_until(lambda: sleeps(victim))
        else:
            _stop_in_lock(ring, victim, kind)
            wait_until(stands_still)
        count, killed = taken(), time.monotonic()
        os.kill(victim, signal.SIGKILL)
        os.kill(producer, signal.SIGCONT)
        wait_until(lambda: taken() > count)
        seconds = time.monotonic() - killed
        time.sleep(max(0.0, window - seconds))
        return Recovery(seconds, before, (taken() - count) / (time.monotonic() - killed))

"""How soon the others go on after a kill and after a Ctrl-C: ``python -m benchmarks.recovery``.

One process puts, one gets, as fast as they can; a third one is killed, ``--runs`` times:
while it holds the producers' lock, the consumers' lock, or sleeps in `get`.  It is idle in
the seconds before and after, so that the same two processes are measured in both.

    go      |---------------- P -> C ----------------|---- P -> C ----|
    victim  idle                 works, is stopped   ^ killed
    clock   |--- rate before ---|      all waits     |-|  until the next message
                                                     |-- rate after --|

And a process that waits in a call gets SIGINT: how soon has it raised KeyboardInterrupt?
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shmring
from benchmarks import machine_line, parser
from benchmarks.adapters import FORK
from benchmarks.sessions import DEADLINE_S, deadline, end_with_alarm

__all__ = ["KINDS", "WAITS", "Recovery", "interrupt", "main", "measure"]

WINDOW_S = 1.0
MESSAGE = bytes(64)
STAMPS = 1 << 16  # the times of so many of the last messages are known
KINDS = {
    "producer": "a producer that holds the lock",
    "consumer": "a consumer that holds the lock",
    "sleeper": "a consumer that sleeps in get",
}
WAITS = ("get", "put", "join")


@dataclass(frozen=True)
class Recovery:
    """What one kill cost: seconds until the next message, and messages a second."""

    seconds: float
    before: float
    after: float


def _wait_until(condition: Callable[[], object]) -> None:
    """The caller has a deadline."""
    while not condition():
        time.sleep(0.0002)


@contextlib.contextmanager
def _process(body: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """A child that is killed at the end."""
    process = FORK.Process(target=_child, args=(body, *arguments), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def _child(body: Callable[..., None], *arguments: Any) -> None:
    end_with_alarm(2 * DEADLINE_S)
    body(*arguments)


def _produce(ring: shmring.Ring, control: Connection) -> None:
    """Put until told to pause; then until told to go on."""
    while True:
        for _ in range(100):
            ring.put(MESSAGE)
        if control.poll():
            control.recv()
            control.send("paused")
            control.recv()


def _consume(ring: shmring.Ring, stamps: Any, counted: Any) -> None:
    """Get, and write down when."""
    count = 0
    while True:
        ring.get()
        stamps[count % STAMPS] = time.monotonic_ns()
        count += 1
        counted[0] = count


def _be_killed(ring: shmring.Ring, control: Connection, puts: bool) -> None:
    """What the victim does once it is told to."""
    control.recv()
    while True:
        if puts:
            ring.put(MESSAGE)
        else:
            ring.get()


# ---- one kill -------------------------------------------------------------------------------


def _stop_in_lock(ring: shmring.Ring, pid: int, side: str) -> None:
    """Stop a process, again and again, until it holds the lock of its side."""

    def holds() -> bool:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        lock = f"the {side}s' lock"
        if any(one["pid"] == pid and lock in one["holds"] for one in ring.statistics().holders):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    _wait_until(holds)


def _sleeps(pid: int) -> bool:
    """Whether it waits in a futex."""
    return Path(f"/proc/{pid}/wchan").read_text().startswith("futex")


def _kill_once(kind: str, window: float) -> Recovery:
    with contextlib.ExitStack() as stack, deadline(DEADLINE_S, KINDS[kind]):
        ring = stack.enter_context(shmring.Ring.create(1 << 20))
        stamps = memoryview(FORK.RawArray("q", STAMPS)).cast("B").cast("q")
        counted = memoryview(FORK.RawArray("q", 1)).cast("B").cast("q")
        to_producer, far_end = FORK.Pipe()
        stack.enter_context(_process(_produce, ring, far_end))
        consumer = stack.enter_context(_process(_consume, ring, stamps, counted))
        to_victim, far_end = FORK.Pipe()
        victim = stack.enter_context(_process(_be_killed, ring, far_end, kind == "producer"))

        def rate(seconds: float) -> float:
            begun, count = time.monotonic(), counted[0]
            time.sleep(seconds)
            return float((counted[0] - count) / (time.monotonic() - begun))

        def standstill(drained: bool) -> int:
            """Wait until the consumer sleeps; return how many messages it took.

            `drained`: because the ring is empty; a message that was put and not yet
            announced would wake it.
            """
            count = -1
            while not (
                count == counted[0] and _sleeps(consumer) and (not drained or ring.qsize() == 0)
            ):
                count = counted[0]
                time.sleep(0.02)
            return int(count)

        _wait_until(lambda: counted[0] > 0)
        rate(window / 4)  # warm by now
        before = rate(window)
        if kind == "sleeper":
            to_producer.send("pause")
            to_producer.recv()
            standstill(drained=True)
            to_victim.send("go")
            _wait_until(lambda: _sleeps(victim))
            count, killed = counted[0], time.monotonic_ns()
            os.kill(victim, signal.SIGKILL)
            to_producer.send("go on")
        else:
            to_victim.send("go")
            _stop_in_lock(ring, victim, kind)
            count = standstill(drained=kind == "producer")
            killed = time.monotonic_ns()
            os.kill(victim, signal.SIGKILL)
        _wait_until(lambda: counted[0] > count)
        next_one = stamps[count % STAMPS]
        passed = (time.monotonic_ns() - killed) / 1e9
        left = max(0.0, window - passed)
        after = (counted[0] - count) + (rate(left) * left if left > 0 else 0.0)
        return Recovery((next_one - killed) / 1e9, before, after / max(window, passed))


def measure(kind: str, kills: int, window: float = WINDOW_S) -> list[Recovery]:
    """Kill so often, each time among new processes.

    Args:
        kind: one of KINDS.
        kills: how often.
        window: the seconds before, and after, over which the rate is taken.
    """
    return [_kill_once(kind, window) for _ in range(kills)]


# ---- one Ctrl-C -----------------------------------------------------------------------------


def _wait_to_be_interrupted(wait: Callable[[], object], raised: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        wait()
    except KeyboardInterrupt:
        raised.send(time.monotonic_ns())


def _wait_of(name: str, stack: contextlib.ExitStack) -> Callable[[], object]:
    """A call that waits for ever."""
    if name == "put":
        ring = stack.enter_context(shmring.Ring.create(1 << 12))
        with contextlib.suppress(shmring.Full):
            while True:
                ring.put_nowait(bytes(1000))
        return lambda: ring.put(bytes(1000))
    queue: Any = stack.enter_context(shmring.JoinableQueue())
    if name == "join":
        queue.put(1)
        return lambda: queue.join()
    return lambda: queue.get()


def interrupt(name: str, times: int) -> list[float]:
    """Send SIGINT to a process that waits in a call, each time to a new one.

    Args:
        name: one of WAITS.
        times: how often.

    Returns:
        seconds from the signal to the exception.
    """
    found = []
    for _ in range(times):
        with contextlib.ExitStack() as stack, deadline(DEADLINE_S, f"Ctrl-C in {name}"):
            near_end, far_end = FORK.Pipe()
            wait = _wait_of(name, stack)
            waiter = stack.enter_context(_process(_wait_to_be_interrupted, wait, far_end))
            _wait_until(functools.partial(_sleeps, waiter))
            sent = time.monotonic_ns()
            os.kill(waiter, signal.SIGINT)
            found.append((near_end.recv() - sent) / 1e9)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every kind and print medians; the aims are 100 ms and 90 %."""
    options = parser("recovery", __doc__)
    options.set_defaults(runs=15)
    runs = options.parse_args(arguments).runs
    print(machine_line())
    print(
        "\n| killed | times | until the next message (longest) | rate before | rate after |", end=""
    )
    print(" after / before |\n" + "|---" * 6 + "|")
    for kind, told in KINDS.items():
        found = measure(kind, runs)
        waits = [each.seconds * 1000 for each in found]
        before, after = (
            statistics.median(getattr(each, name) for each in found) / 1e3
            for name in ("before", "after")
        )
        ratios = [each.after / each.before for each in found]
        print(
            f"| {told} | {runs} | {statistics.median(waits):.2f} ms ({max(waits):.1f})"
            f" | {before:,.0f} k/s | {after:,.0f} k/s"
            f" | {statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%}) |",
            flush=True,
        )
    print("\n| Ctrl-C in | times | until KeyboardInterrupt (longest) |\n|---|---|---|")
    for name in WAITS:
        waits = [1000 * seconds for seconds in interrupt(name, runs)]
        print(f"| `{name}` | {runs} | {statistics.median(waits):.2f} ms ({max(waits):.1f}) |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

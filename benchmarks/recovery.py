"""What follows a kill, and a Ctrl-C, and how soon: ``python -m benchmarks.recovery [KILLS]``.

One process puts, one gets, as fast as they can; a third one is killed, again and
again: with the producers' lock in its hand, with the consumers' lock, or asleep in
`get`.  It does nothing in the seconds before and after, so that the same two
processes are measured in both.

    go      |---------------- P -> C ----------------|---- P -> C ----|
    V       idle                 works, is stopped   ^ killed
    clock   |--- rate before ---|      all waits     |-|  until the next message
                                                     |-- rate after --|

And a process that waits in a call gets SIGINT: how soon has it raised KeyboardInterrupt?
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import shmring
from benchmarks import machine
from benchmarks.sessions import DEADLINE_S, deadline

__all__ = ["KINDS", "WAITS", "Recovery", "interrupt", "main", "measure"]

KILLS = 15
WINDOW_S = 1.0
CAPACITY = 1 << 20
MESSAGE = bytes(64)
STAMPS = 1 << 16  # the times of so many of the last messages are known
STILL_S = 0.02  # between two looks at a flow that is to stand still
TID_MASK = 0x3FFFFFFF
FORK = multiprocessing.get_context("fork")
KINDS = {
    "producer": "a producer that holds the lock",
    "consumer": "a consumer that holds the lock",
    "sleeper": "a consumer that sleeps in get",
}
WAITS = ("get", "put", "join")


@dataclass(frozen=True)
class Recovery:
    """What one kill cost."""

    seconds: float  # until a message came that was put, or could be taken, only then
    before: float  # messages a second
    after: float


# ---- the three processes ---------------------------------------------------------------------


def _end_some_day() -> None:
    """In a child: should nobody come to kill it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * DEADLINE_S)


def _produce(ring: shmring.Ring, control: Connection) -> None:
    """Put until told to pause; then until told to go on."""
    _end_some_day()
    while True:
        for _ in range(100):
            ring.put(MESSAGE)
        if control.poll():
            control.recv()
            control.send("paused")
            control.recv()


def _consume(ring: shmring.Ring, stamps: Any, counted: Any) -> None:
    """Get, and write down when."""
    _end_some_day()
    count = 0
    while True:
        ring.get()
        stamps[count % STAMPS] = time.monotonic_ns()
        count += 1
        counted[0] = count


def _be_killed(ring: shmring.Ring, control: Connection, puts: bool) -> None:
    """What the victim does once it is told to."""
    _end_some_day()
    control.recv()
    while True:
        if puts:
            ring.put(MESSAGE)
        else:
            ring.get()


class _Flow:
    """One producer and one consumer that are at it."""

    def __init__(self) -> None:
        self.ring = shmring.Ring.create(CAPACITY)
        self.stamps = memoryview(FORK.RawArray("q", STAMPS)).cast("B").cast("q")
        self.counted = memoryview(FORK.RawArray("q", 1)).cast("B").cast("q")
        self.control, far_end = FORK.Pipe()
        self._processes = [
            FORK.Process(target=_produce, args=(self.ring, far_end), daemon=True),
            FORK.Process(target=_consume, args=(self.ring, self.stamps, self.counted), daemon=True),
        ]
        for process in self._processes:
            process.start()
        consumer = self._processes[1].pid
        assert consumer is not None
        self.consumer = consumer
        self.wait_for_movement(0)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self.ring.close()

    def rate(self, seconds: float) -> float:
        """Messages a second over the next so many seconds."""
        begun, count = time.monotonic(), self.counted[0]
        time.sleep(seconds)
        return float((self.counted[0] - count) / (time.monotonic() - begun))

    def wait_for_movement(self, count: int) -> None:
        """Until more than `count` messages were taken."""
        while self.counted[0] <= count:
            time.sleep(0.0002)

    def wait_for_standstill(self, drained: bool) -> int:
        """Until the consumer sleeps; returns how many messages were taken.

        Args:
            drained: it sleeps because the ring is empty, and not because it cannot have
                its lock; a message that was put and not yet announced would wake it.
        """
        count = -1
        while not (
            count == self.counted[0]
            and _sleeps(self.consumer)
            and (not drained or self.ring.qsize() == 0)
        ):
            count = self.counted[0]
            time.sleep(STILL_S)
        return int(count)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.control.send("pause")
        self.control.recv()
        yield
        self.control.send("go on")


# ---- one kill -----------------------------------------------------------------------------------


def _stop_in_lock(ring: shmring.Ring, pid: int, side: str) -> None:
    """Stop a process, again and again, until it has the lock of its side in its hand."""
    from shmring._layout import LAYOUT  # the fallback has none

    offset = LAYOUT[f"{side.upper()}S_OFFSET"]
    while True:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        word = int.from_bytes(os.pread(ring.fileno(), 4, offset), sys.byteorder)
        if word & TID_MASK == pid:
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.0001)


def _sleeps(pid: int) -> bool:
    """Whether it waits in the kernel, as one that stands in a futex does."""
    return Path(f"/proc/{pid}/wchan").read_text().startswith("futex")


def _kill_once(kind: str, window: float) -> Recovery:
    with contextlib.ExitStack() as stack, deadline(DEADLINE_S, KINDS[kind]):
        flow = _Flow()
        stack.callback(flow.close)
        near_end, far_end = FORK.Pipe()
        victim = FORK.Process(
            target=_be_killed, args=(flow.ring, far_end, kind == "producer"), daemon=True
        )
        victim.start()
        stack.callback(victim.join)
        stack.callback(victim.kill)
        assert victim.pid is not None
        flow.rate(window / 4)  # warm by now
        before = flow.rate(window)
        if kind == "sleeper":
            with flow.paused():
                flow.wait_for_standstill(drained=True)
                near_end.send("go")
                while not _sleeps(victim.pid):
                    time.sleep(0.0002)
                count, killed = flow.counted[0], time.monotonic_ns()
                victim.kill()
        else:
            near_end.send("go")
            _stop_in_lock(flow.ring, victim.pid, kind)
            count = flow.wait_for_standstill(drained=kind == "producer")
            killed = time.monotonic_ns()
            victim.kill()
        flow.wait_for_movement(count)
        next_one = flow.stamps[count % STAMPS]
        passed = (time.monotonic_ns() - killed) / 1e9
        left = max(0.0, window - passed)
        after = (flow.counted[0] - count) + (flow.rate(left) * left if left > 0 else 0.0)
        return Recovery((next_one - killed) / 1e9, before, after / max(window, passed))


def measure(kind: str, kills: int = KILLS, window: float = WINDOW_S) -> list[Recovery]:
    """Kill so often.

    Args:
        kind: one of KINDS.
        kills: how often; each time among new processes.
        window: the seconds before, and after, over which the rate is taken.
    """
    return [_kill_once(kind, window) for _ in range(kills)]


# ---- one Ctrl-C ---------------------------------------------------------------------------------


def _wait_to_be_interrupted(wait: Callable[[], object], raised: Connection) -> None:
    _end_some_day()
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


def interrupt(name: str, times: int = KILLS) -> list[float]:
    """Send SIGINT to a process that waits in a call.

    Args:
        name: one of WAITS.
        times: how often; each time to a new process.

    Returns:
        seconds from the signal to the exception.
    """
    found = []
    for _ in range(times):
        with contextlib.ExitStack() as stack, deadline(DEADLINE_S, f"Ctrl-C in {name}"):
            near_end, far_end = FORK.Pipe()
            wait = _wait_of(name, stack)
            waiter = FORK.Process(target=_wait_to_be_interrupted, args=(wait, far_end), daemon=True)
            waiter.start()
            stack.callback(waiter.join)
            stack.callback(waiter.kill)
            assert waiter.pid is not None
            while not _sleeps(waiter.pid):
                time.sleep(0.0002)
            sent = time.monotonic_ns()
            os.kill(waiter.pid, signal.SIGINT)
            found.append((near_end.recv() - sent) / 1e9)
    return found


def _row(kind: str, found: list[Recovery]) -> str:
    waits = [each.seconds * 1000 for each in found]
    ratios = [each.after / each.before for each in found]
    return (
        f"| {KINDS[kind]} | {len(found)}"
        f" | {statistics.median(waits):.2f} ms ({max(waits):.1f})"
        f" | {_middle(found, lambda each: each.before)} | {_middle(found, lambda each: each.after)}"
        f" | {statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%}) |"
    )


def _middle(found: list[Recovery], of: Callable[[Recovery], float]) -> str:
    return f"{statistics.median(map(of, found)) / 1e3:,.0f} k/s"


def main(kills: int = KILLS) -> int:
    """Measure every kind and print medians; the aims are 100 ms and 90 %."""
    print(f"Machine: {machine.one_line()}.\n")
    print(
        "| killed | kills | until the next message (longest) | rate before | rate after"
        " | after / before |\n|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        print(_row(kind, measure(kind, kills)), flush=True)
    print("\n| Ctrl-C in | times | until KeyboardInterrupt (longest) |\n|---|---|---|")
    for name in WAITS:
        waits = [1000 * seconds for seconds in interrupt(name, kills)]
        middle = statistics.median(waits)
        print(f"| `{name}` | {len(waits)} | {middle:.2f} ms ({max(waits):.1f}) |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

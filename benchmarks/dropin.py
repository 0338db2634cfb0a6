"""What the drop-in promises beyond rates: ``python -m benchmarks.dropin``.

Three questions, each asked of both libraries in turns: how fast is a JoinableQueue
whose consumer reports each message done, how soon does a spawned child's first
message arrive, and how long does a producer take that nobody reads.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import shmring
from benchmarks import machine

__all__ = ["main"]

RUNS = 5
FIRST_RUNS = 15  # starting a process varies by more than what is asked for
PATIENCE = 120  # seconds, for everything
FORK = multiprocessing.get_context("fork")


def _work_off(queue: Any, ready: Any, count: int) -> None:
    ready.put(None)
    for _ in range(count):
        queue.get()
        queue.task_done()


def joinable(make: Callable[[], Any], count: int) -> float:
    """Messages of 64 bytes a second, from the first put until join() returns."""
    queue, ready = make(), FORK.SimpleQueue()
    child = FORK.Process(target=_work_off, args=(queue, ready, count))
    child.start()
    try:
        ready.get()
        message = bytes(64)
        began = time.perf_counter()
        for _ in range(count):
            queue.put(message)
        queue.join()
        return count / (time.perf_counter() - began)
    finally:
        child.join(PATIENCE)
        child.kill()
        queue.close()


def first_message(library: str, bytecode: str) -> float:
    """Seconds from start() of a spawned child until its message is here: see hello.py.

    Args:
        library: the module whose Queue it is.
        bytecode: a folder for compiled modules, as an installed package has them; a
            tree under work may have none, and would be compiled by each child.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hello", library],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=PATIENCE,
    )
    return float(done.stdout)


def unread(make: Callable[[], Any], count: int) -> float:
    """Seconds until the last put of `count` dicts returned, with no reader; all are read after.

    The dicts are made before: that is the program's work, at 0.1 to 0.25 us each.
    """
    dicts = [{"id": n, "name": "a name", "value": 1.5, "ok": True} for n in range(count)]
    queue = make()
    began = time.perf_counter()
    for each in dicts:
        queue.put(each)
    took = time.perf_counter() - began
    for number in range(count):
        assert queue.get(timeout=PATIENCE)["id"] == number
    queue.close()
    return took


def main() -> int:
    """Measure in turns and print medians with their spread."""
    ours: dict[str, list[float]] = {"joinable": [], "first": [], "unread": []}
    theirs: dict[str, list[float]] = {name: [] for name in ours}
    for run in range(RUNS):
        print(f"run {run + 1} of {RUNS}", file=sys.stderr)
        ours["joinable"].append(joinable(shmring.JoinableQueue, 100_000))
        theirs["joinable"].append(joinable(FORK.JoinableQueue, 10_000))
        ours["unread"].append(unread(shmring.Queue, 200_000))
        theirs["unread"].append(unread(FORK.Queue, 200_000))
    with tempfile.TemporaryDirectory() as bytecode:
        for library in ("shmring", "multiprocessing"):
            first_message(library, bytecode)  # fills the folder
        for _ in range(FIRST_RUNS):
            ours["first"].append(first_message("shmring", bytecode))
            theirs["first"].append(first_message("multiprocessing", bytecode))
    middle = {name: statistics.median(times) for name, times in ours.items()}
    other = {name: statistics.median(times) for name, times in theirs.items()}
    ratios = sorted(a / b for a, b in zip(ours["joinable"], theirs["joinable"], strict=True))
    puts = sorted(b / a for a, b in zip(ours["unread"], theirs["unread"], strict=True))
    later = (middle["first"] - other["first"]) * 1000
    print(f"Machine: {machine.one_line()}.\n")
    print("| work | target | shmring | multiprocessing | outcome |\n|---|---|---|---|---|")
    print(
        f"| JoinableQueue with task_done, 64 B | at least 20 times | {middle['joinable']:,.0f}/s"
        f" | {other['joinable']:,.0f}/s | {middle['joinable'] / other['joinable']:.1f} times"
        f" ({ratios[0]:.1f}-{ratios[-1]:.1f}) |"
    )
    print(
        f"| first message of a spawned child | at most 20 ms later"
        f" | {middle['first'] * 1000:.0f} ms | {other['first'] * 1000:.0f} ms | {later:+.0f} ms |"
    )
    print(
        f"| 200,000 dicts put with no reader | at least 6 times | {middle['unread']:.2f} s"
        f" | {other['unread']:.2f} s | {other['unread'] / middle['unread']:.1f} times"
        f" ({puts[0]:.1f}-{puts[-1]:.1f}) |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

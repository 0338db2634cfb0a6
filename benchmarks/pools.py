"""Rows of the report about process pools: rates beside the standard library's and PyPI's.

All pools have two workers, are made once and take turns; the tasks do nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import secrets
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

import shmring
from benchmarks import Row, Settings, Target, per_second, progress

WORKERS = 2
FORK: Any = multiprocessing.get_context("fork")


def nothing(number: int) -> int:
    return number


def rest(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def drain(work: list[Any]) -> None:
    for each in work:
        each.result()


def shmring_pool(method: str = "fork") -> Any:
    return shmring.ProcessPoolExecutor(WORKERS, multiprocessing.get_context(method))


def standard_pool(method: str = "fork") -> Any:
    return futures.ProcessPoolExecutor(WORKERS, multiprocessing.get_context(method))


@contextlib.contextmanager
def loky_pool() -> Iterator[Any]:
    import loky

    pool = loky.get_reusable_executor(WORKERS)
    yield pool
    pool.shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def pebble_pool() -> Iterator[Any]:
    import pebble

    with pebble.ProcessPool(WORKERS, context=FORK) as pool:
        pool.submit = lambda function, *args: pool.schedule(function, args)
        yield pool


def peers(settings: Settings) -> dict[str, Callable[[], Any]]:
    """The executors from PyPI that are installed."""
    known = {"loky": loky_pool, "pebble": pebble_pool}
    if not settings.peers:
        return {}
    return {name: make for name, make in known.items() if importlib.util.find_spec(name)}


def take_turns(runs: int, sides: dict[str, tuple[int, Callable[[], object]]]) -> dict[str, Any]:
    """Tasks a second of each side, by turns, after one turn to warm up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(runs + 1):
        for name, (count, run) in sides.items():
            began = time.perf_counter()
            run()
            if turn:
                found[name].append(count / (time.perf_counter() - began))
    return found


def compared(question: str, found: dict[str, Any], targets: dict[str, float]) -> Row:
    """A row of rates: ours is the first side."""
    rates = {name: statistics.median(each) for name, each in found.items()}
    ours = next(iter(rates))
    spread = f"{per_second(min(found[ours]))} to {per_second(max(found[ours]))}"
    return Row(
        question,
        per_second(rates[ours]),
        [
            Target(
                f"{{}} times {name} ({per_second(rates[name])})", bound, rates[ours] / rates[name]
            )
            for name, bound in targets.items()
            if name in rates
        ],
        spread,
        found,
    )


def submit(settings: Settings) -> Row:
    count = max(100, int(20_000 * settings.scale))
    few = max(50, count // 5)
    with shmring_pool() as ours, standard_pool() as theirs, FORK.Pool(WORKERS) as pool:
        found = take_turns(
            settings.runs,
            {
                "shmring": (count, lambda: drain([ours.submit(nothing, n) for n in range(count)])),
                "executor.submit": (
                    few,
                    lambda: drain([theirs.submit(nothing, n) for n in range(few)]),
                ),
                "Pool.imap_unordered": (
                    count,
                    lambda: list(pool.imap_unordered(nothing, range(count))),
                ),
            },
        )
    targets = {"executor.submit": 15.0, "Pool.imap_unordered": 3.0}
    return compared("submit of tasks that do nothing", found, targets)


def chunks(settings: Settings) -> Row:
    count = max(1000, int(200_000 * settings.scale))
    with shmring_pool() as ours, FORK.Pool(WORKERS) as pool:
        found = take_turns(
            settings.runs,
            {
                "shmring": (count, lambda: list(ours.map(nothing, range(count), chunksize=64))),
                "Pool.map": (count, lambda: pool.map(nothing, range(count), 64)),
            },
        )
    return compared("map of tasks that do nothing, 64 a chunk", found, {"Pool.map": 2.0})


def coordinator(settings: Settings) -> Row:
    count = max(1000, int(20_000 * settings.scale))
    name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"

    def run() -> None:
        shmring.coordinator_process(
            ipc, WORKERS, tasks=range(count), spawn=True, handler=nothing, method="fork"
        )

    with FORK.Pool(WORKERS) as pool, shmring.HighPerformanceIPC("bench", namespace=name) as ipc:
        theirs = (count, lambda: list(pool.imap_unordered(nothing, range(count))))
        sides = {"shmring": (count, run), "Pool.imap_unordered": theirs}
        found = take_turns(settings.runs, sides)
    question = "coordinator_process, start and end of its workers included"
    return compared(question, found, {"Pool.imap_unordered": 3.0})


def arrays(settings: Settings) -> Row:
    count = max(4, int(60 * settings.scale))
    sent = np.ones(1 << 18, np.float32)

    def through(pool: Any) -> Callable[[], object]:
        return lambda: drain([pool.submit(np.negative, sent) for _ in range(count)])

    with contextlib.ExitStack() as stack:
        pools = {"shmring": stack.enter_context(shmring_pool())}
        pools["executor.submit"] = stack.enter_context(standard_pool())
        for name, make in peers(settings).items():
            pools[name] = stack.enter_context(make())
        sides = {name: (count, through(pool)) for name, pool in pools.items()}
        pool = stack.enter_context(FORK.Pool(WORKERS))
        sides["Pool.imap_unordered"] = (
            count,
            lambda: list(pool.imap_unordered(np.negative, [sent] * count)),
        )
        found = take_turns(settings.runs, sides)
    best = max(list(found)[1:], key=lambda name: statistics.median(found[name]))
    return compared("1 MiB float32 there and back", found, {best: 3.0})


def killed(settings: Settings) -> Row:
    """Two tasks run, four wait; a worker is killed in the middle of its task."""
    took = 0.2
    late = []
    for _ in range(settings.runs):
        with shmring_pool() as pool:
            drain([pool.submit(nothing, n) for n in range(10)])
            work = [pool.submit(rest, took) for _ in range(6)]
            time.sleep(took / 2)
            os.kill(next(iter(pool._processes)), signal.SIGKILL)
            began = time.perf_counter()
            drain(work)
            # Half a task ends, then four and the one that was lost run two at a time.
            late.append(1000 * (time.perf_counter() - began - 3 * took))
    targets = [Target("{} ms beyond the tasks' own time", 100, max(late), at_most=True)]
    return Row("a worker killed, 6 tasks", f"{statistics.median(late):.1f} ms", targets)


def first_result(method: str, settings: Settings) -> Row:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(settings.runs):
        for name, make in (("ours", shmring_pool), ("theirs", standard_pool)):
            began = time.perf_counter()
            with make(method) as pool:
                pool.submit(nothing, 1).result()
                seconds[name].append(time.perf_counter() - began)
    ours, theirs = (statistics.median(each) for each in seconds.values())
    text = f"{{}} times the standard library's ({1000 * theirs:.1f} ms)"
    target = Target(text, 1.0, ours / theirs, at_most=True)
    question = f"first result of a new pool, {method}"
    return Row(question, f"{1000 * ours:.1f} ms", [target], raw=dict(seconds))


def idle(settings: Settings) -> Row:
    """CPU time of a pool of 64 workers that have nothing to do, all processes together."""
    seconds = max(2.0, 10 * settings.scale)
    progress("64 idle workers")
    with shmring.ProcessPoolExecutor(64, FORK) as pool:
        drain([pool.submit(nothing, n) for n in range(1000)])
        pids = [os.getpid(), *pool._processes]
        time.sleep(1)
        before = sum(map(_cpu_seconds, pids))
        time.sleep(seconds)
        share = 100 * (sum(map(_cpu_seconds, pids)) - before) / seconds
    return Row(
        "64 idle workers", f"{share:.2f} % of a core", [Target("{} %", 1.0, share, at_most=True)]
    )


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9

"""``shmring bench``: shmring beside the standard library on this machine, by turns.

::

    this process --put, N times--> queue --get, N times--> one child
         ^                                                    |
         +------------- when the last one came ---------------+

Each rate is N by the time from the first ``put`` to the last ``get``; a row is
the median of runs that alternate between the two.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager
from typing import Any
from xml.sax.saxutils import escape

from shmring import _backend as backends
from shmring.cli.common import WRONG, Stop, amount, dump, show

__all__ = ["Row", "bench", "measure", "svg_of"]

_MEANING = "docs/cli.md says what the lines mean, docs/benchmarks.md has more of them"
_WARM_UP = 20
_RUN_S = 0.3  # what a run is to take
_MOST = 1_000_000
_PATIENCE_S = 60.0
_NAMES = ("multiprocessing", "shmring")

_PAYLOADS: dict[str, Any] = {
    "64 bytes": bytes(64),
    "small dict": {"id": 12345, "name": "a name", "values": [1.5, 2.5, 3.5], "done": False},
    "64 KiB": bytes(1 << 16),
    "1 MiB": bytes(1 << 20),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Rates of one kind of work, per second; the medians of `runs` runs each."""

    name: str
    multiprocessing: float
    shmring: float
    runs: int

    @property
    def ratio(self) -> float:
        """How many times faster shmring was."""
        return self.shmring / self.multiprocessing


def bench(options: argparse.Namespace) -> int:
    """Measure, and show the table as it grows."""
    if options.svg is not None:
        try:
            open(options.svg, "a").close()
        except OSError as error:
            raise Stop(f"--svg {options.svg}: {error.strerror}", WRONG) from None
    rows = []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    if not options.json:
        show([f"{'a second':<18} {_NAMES[0]:>16} {_NAMES[1]:>10}   times"])
    for row in measure(options.seconds):
        rows.append(row)
        if not options.json:
            rates = f"{amount(row.multiprocessing):>16} {amount(row.shmring):>10}"
            show([f"{row.name:<18} {rates} {row.ratio:>7.1f}"])
    if options.svg is not None:
        with open(options.svg, "w", encoding="utf-8") as file:
            file.write(svg_of(rows))
    if options.json:
        shown = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
        print(dump({"machine": _machine(), "load": load, "rows": shown}))
    else:
        show([f"{_machine()}, load {load:.1f}", _MEANING])
    return 0


def measure(seconds: float) -> Iterator[Row]:
    """One row for each payload, and one for a pool where there is the ring.

    Raises:
        Stop: a child died, or stands still.
    """
    pools = backends.backend == "ring"
    share = seconds / (len(_PAYLOADS) + pools)
    for name, payload in _PAYLOADS.items():
        yield _compared(name, share, _queue_runs(payload))
    if pools:
        yield _compared("pool, empty tasks", share, _pool_runs())


_Runs = dict[str, Callable[[int], float]]


def _compared(name: str, seconds: float, made: AbstractContextManager[_Runs]) -> Row:
    """Alternate between the two until time is up, at least three times."""
    with made as runs:
        deadline = time.monotonic() + seconds
        counts = dict.fromkeys(runs, _WARM_UP)
        rates: dict[str, list[float]] = {each: [] for each in runs}
        while True:
            for each, run in runs.items():
                rate = counts[each] / run(counts[each])
                if counts[each] != _WARM_UP:
                    rates[each].append(rate)
                counts[each] = min(_MOST, max(_WARM_UP + 1, int(rate * min(_RUN_S, seconds / 8))))
            done = min(map(len, rates.values()))
            if done >= 3 and time.monotonic() >= deadline:
                break
    medians = {each: statistics.median(found) for each, found in rates.items()}
    return Row(name=name, runs=done, **medians)


@contextlib.contextmanager
def _queue_runs(payload: Any) -> Iterator[_Runs]:
    """Runs through a queue of each kind, to one child."""
    queues = {"multiprocessing": multiprocessing.Queue(), "shmring": backends.Queue()}
    here, there = multiprocessing.Pipe()
    child = multiprocessing.Process(target=_receive, args=(queues, there), daemon=True)
    child.start()
    there.close()

    def run(name: str, count: int) -> float:
        put = queues[name].put
        try:
            here.send((name, count))
            here.recv()  # it is about to get
            began = time.monotonic()
            for _ in range(count):
                put(payload)
            if not here.poll(_PATIENCE_S):
                raise Stop(f"the child stands still after {_PATIENCE_S:g} s", WRONG)
            return float(here.recv()) - began
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise Stop("the child that receives died", WRONG) from None

    try:
        yield {name: functools.partial(run, name) for name in queues}
    finally:
        child.kill()
        child.join()
        here.close()
        for queue in queues.values():
            queue.cancel_join_thread()
            queue.close()


def _receive(queues: dict[str, Any], control: Any) -> None:
    while True:
        try:
            name, count = control.recv()
        except EOFError:
            return
        get = queues[name].get
        control.send(None)
        for _ in range(count):
            get()
        control.send(time.monotonic())


@contextlib.contextmanager
def _pool_runs() -> Iterator[_Runs]:
    """Runs of empty tasks through a pool of each kind, with two workers."""
    from shmring.pool.executor import ProcessPoolExecutor

    with futures.ProcessPoolExecutor(2) as stock, ProcessPoolExecutor(2) as ours:

        def run(pool: Any, count: int) -> float:
            began = time.monotonic()
            for each in [pool.submit(_nothing) for _ in range(count)]:
                each.result(_PATIENCE_S)
            return time.monotonic() - began

        yield {
            "multiprocessing": functools.partial(run, stock),
            "shmring": functools.partial(run, ours),
        }


def _nothing() -> None:
    """The task of the pool's row."""


def _machine() -> str:
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    cores = os.cpu_count()
    return f"{model or platform.machine()}, {cores} cores, Python {platform.python_version()}"


def svg_of(rows: list[Row]) -> str:
    """A drawing of the rows: two bars each, as long as the rates beside the faster one."""
    colours = {"multiprocessing": "#9aa5b1", "shmring": "#2f6fde"}
    at = 34
    parts = []
    for row in rows:
        parts.append(f'<text x="130" y="{at + 17}" text-anchor="end">{escape(row.name)}</text>')
        most = max(row.multiprocessing, row.shmring)
        for offset, name in enumerate(_NAMES):
            rate = getattr(row, name)
            y, long = at + 14 * offset, max(1.0, 360 * rate / most)
            parts.append(
                f'<rect x="140" y="{y}" width="{long:.0f}" height="12" fill="{colours[name]}"/>'
            )
            text = f"{amount(rate)}/s" + (f"  ({row.ratio:.1f} x)" if name == "shmring" else "")
            parts.append(f'<text x="{146 + long:.0f}" y="{y + 10}">{text}</text>')
        at += 44
    legend = "".join(
        f'<rect x="{140 + 150 * index}" y="10" width="12" height="12" fill="{colours[name]}"/>'
        f'<text x="{158 + 150 * index}" y="20">{name}</text>'
        for index, name in enumerate(_NAMES)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {at + 24}"'
        f' font-family="sans-serif" font-size="12">\n'
        f'<rect width="640" height="{at + 24}" fill="white"/>\n{legend}\n'
        + "\n".join(parts)
        + f'\n<text x="10" y="{at + 12}" fill="#666">{escape(_machine())}</text>\n</svg>\n'
    )

"""Benchmarks of shmring beside the standard library and packages from PyPI.

    bench_queues.py   `make bench`: the questions, on pytest-benchmark (options: conftest.py)
    report.py         `make report`: every figure beside its target
    costs.py          rows of the report: the drop-in, resources
    commands.py       rows of the report: what shmring ls and shmring top take
    recovery.py       rows of the report: how soon messages flow again after a kill
    pools.py          rows of the report: process pools
    loaders.py        rows of the report: tensors, where torch is installed
    curves.py         `make curves`: rates by size, round trips, plots
    scaling.py        `make scaling`: rates by number of processes, CPU a message, a plot
    plots.py          plots as SVG
    limits.py         `make limits`: limits of the machine, measured in C (limits.c)
    instructions.py   `make budgets`: instructions a call
    work.py           messages, and the loops that send, receive and check them
    adapters.py       the transports behind one interface
    sessions.py       processes that exchange messages, timed

Transports take turns, run by run, so that a drift of the machine affects all of them.
No speed is asserted: only wrong content is an error.  This module holds what the programs
share: the machine, the command line, JSON results, tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import shmring

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SYSTEM = Path("/sys/devices/system")


def machine() -> dict[str, str]:
    """Return the machine, the versions, and the load."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = cpus[0].partition(":")[2].strip() if cpus else platform.machine()  # none on aarch64
    return {
        "cpu": cpu,
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "places": _places(),
        "numpy": _version("numpy"),
        "shmring": f"{shmring.__version__} ({shmring.backend})",
        "load average": ", ".join(f"{value:.2f}" for value in os.getloadavg()),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _places() -> str:
    """Name the NUMA nodes and the hyper-threads of a core, where there are several."""
    nodes = _lists(SYSTEM.glob("node/node[0-9]*/cpulist"))
    cores = _lists(SYSTEM.glob("cpu/cpu[0-9]*/topology/thread_siblings_list"))
    threads = [core for core in cores if not core.isdecimal()]
    numa = f"{len(nodes)} NUMA nodes ({'; '.join(nodes)})" if len(nodes) > 1 else "one NUMA node"
    return f"{numa}, " + (
        f"hyper-threads ({'; '.join(threads)})" if threads else "one thread a core"
    )


def _lists(files: Iterable[Path]) -> list[str]:
    """Return the distinct lists of CPUs in some files."""
    return sorted({file.read_text().strip() for file in files}, key=lambda text: (len(text), text))


def machine_line() -> str:
    """Return the machine as one line of text."""
    return "Machine: " + "; ".join(f"{key} {value}" for key, value in machine().items()) + "."


def parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all measuring programs have."""

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text}: at least 1")
        return number

    made = argparse.ArgumentParser(
        prog=f"benchmarks.{program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--runs", type=positive, default=5, help="of each transport (default: 5)")
    made.add_argument("--scale", type=float, default=1.0, help="share of the work, 0.01 to try")
    made.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}"
    )
    return made


def save(folder: Path, name: str, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(results, indent=1) + "\n")


def progress(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---- tables ---------------------------------------------------------------------------------


def per_second(rate: float) -> str:
    """Format a rate: 4.52 M/s."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}/s"
    return f"{rate:.3g}/s"


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table, at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*names: str) -> None:
    """Print the head of a Markdown table."""
    print()
    print_row(*names)
    print("|---" * len(names) + "|")


# ---- the report -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to measure the rows of the report."""

    runs: int  # of each side of a comparison
    scale: float  # share of the work
    peers: bool  # compare with the packages from PyPI that are installed


@dataclass(frozen=True)
class Target:
    """A target of a row, and what was reached."""

    text: str  # what was measured, with "{}" for the value
    bound: float
    measured: float | None  # None where the peer is not installed
    at_most: bool = False  # the bound is an upper one

    @property
    def is_met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def __str__(self) -> str:
        value = "-" if self.measured is None else f"{self.measured:.3g}"
        verdict = {True: "", False: ", **not reached**", None: ", not measured"}[self.is_met]
        word = "at most" if self.at_most else "at least"
        return f"{self.text.format(value)} ({word} {self.bound:g}{verdict})"


@dataclass(frozen=True)
class Row:
    """A row of the report."""

    question: str
    measured: str  # the median of shmring, with its unit
    targets: Sequence[Target]
    spread: str = "-"  # the slowest and the fastest run of shmring
    raw: dict[str, Any] = field(default_factory=dict)

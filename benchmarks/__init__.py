"""Benchmarks of shmring beside the standard library and packages from PyPI.

    bench_queues.py   `make bench`: the questions, by pytest-benchmark (see conftest.py)
    report.py         `make report`: every promised figure beside its target
    costs.py          its lines about costs and the drop-in
    curves.py         `make curves`: rates by size and by processes, round trips, pictures
    limits.py         `make limits`: what the machine allows, measured in C (limits.c)
    instructions.py   `make budgets`: instructions a call, and the cost of each guard
    recovery.py       how soon the other processes go on after a kill or a Ctrl-C
    work.py           messages, and the loops that send, receive and check them
    adapters.py       the transports: shmring, the standard library, PyPI
    sessions.py       the processes that pass messages, and the clock

Transports take turns, run by run, so that a drift of the machine favours none.
No speed is asserted: only wrong content is an error.  This module holds what
the programs share: the machine, the command line, results as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shmring

__all__ = ["RESULTS", "ROOT", "machine", "machine_line", "parser", "per_second", "progress", "save"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, str]:
    """Name the machine, what runs on it, and how busy it is now."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = cpus[0].partition(":")[2].strip() if cpus else platform.machine()  # aarch64 has none
    return {
        "cpu": cpu,
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": version("numpy"),
        "shmring": f"{shmring.__version__} ({shmring.backend})",
        "load average": ", ".join(f"{value:.2f}" for value in os.getloadavg()),
    }


def machine_line() -> str:
    """The same for a header."""
    return "Machine: " + "; ".join(f"{key} {value}" for key, value in machine().items()) + "."


def parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every program that measures."""

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text}: at least 1")
        return number

    made = argparse.ArgumentParser(
        prog=f"benchmarks.{program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--runs", type=positive, default=5, help="of each side (default: 5)")
    made.add_argument("--scale", type=float, default=1.0, help="share of the work, 0.01 to look")
    made.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}"
    )
    return made


def save(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Write a result as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(found, indent=1) + "\n")


def per_second(rate: float) -> str:
    """Format a rate: 4.52 M/s."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}/s"
    return f"{rate:.3g}/s"


def progress(text: str) -> None:
    """Tell how far a program is, on stderr."""
    print(text, file=sys.stderr, flush=True)

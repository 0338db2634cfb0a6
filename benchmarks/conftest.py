"""The options of `make bench`, and the tables at its end."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, machine_line, save
from benchmarks.sessions import Runs

BASELINE = "multiprocessing.Queue"
Figures = dict[str, dict[str, dict[str, float]]]  # by question and transport

_figures: Figures = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shmring")
    group.addoption("--rounds", type=int, default=5, help="runs of each benchmark (default: 5)")
    group.addoption("--scale", type=float, default=1.0, help="share of the work, 0.01 to try")
    group.addoption("--peers", action="store_true", help="with the packages of the extra `peers`")
    group.addoption("--results", type=Path, metavar="FILE", help="write the figures there as JSON")


def record(question: str, label: str, runs: Runs, array_bytes: int) -> dict[str, float]:
    """Keep the figures of a transport for the tables; return them."""
    figures = {
        "messages_per_second": runs.median,
        "slowest": min(runs.rates),
        "fastest": max(runs.rates),
        "iqr_s": 0.0,
    }
    if len(runs.rates) > 1:
        seconds = [1 / rate for rate in runs.rates]
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        figures["iqr_s"] = high - low
    if array_bytes:
        figures["megabytes_per_second"] = runs.median * array_bytes / 1e6
    if runs.trips_ns:
        figures["median_us"], figures["p99_us"] = runs.trips_us(0.5, 0.99)
    _figures.setdefault(question, {})[label] = figures
    return figures


def _duration(seconds: float) -> str:
    for unit, size in (("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def table(figures: Figures) -> Iterator[str]:
    """Yield the lines of the tables, at most 100 columns wide: shmring, then the fastest first."""
    for question, rows in figures.items():
        baseline = rows.get(BASELINE, {}).get("messages_per_second")
        yield ""
        yield f"{question:38} {'median':>9} {'IQR':>9} {'operations/s':>13} {'ratio':>7}"

        ours = [pair for pair in rows.items() if pair[0].startswith("shmring")]
        others = [pair for pair in rows.items() if pair not in ours]
        others.sort(key=lambda pair: -pair[1]["messages_per_second"])
        for label, row in ours + others:
            rate = row["messages_per_second"]
            ratio = f"{rate / baseline:.1f}" if baseline else "-"
            line = f"  {label:36} {_duration(1 / rate):>9} {_duration(row['iqr_s']):>9}"
            line += f" {rate:13,.0f} {ratio:>7}"
            if "megabytes_per_second" in row:
                line += f"  {row['megabytes_per_second']:,.0f} MB/s"
            if "p99_us" in row:
                line += f"  p99 {row['p99_us']:.1f} us"
            yield line


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, and write the figures."""
    if not _figures:
        return
    if (path := config.getoption("--results")) is not None:
        rounds, scale = config.getoption("--rounds"), config.getoption("--scale")
        found = {"machine": machine(), "rounds": rounds, "scale": scale, "questions": _figures}
        save(path.parent, path.name, found)
    terminalreporter.section(f"time of an operation; ratio: times {BASELINE}")
    for line in [*table(_figures), "", machine_line()]:
        terminalreporter.write_line(line)

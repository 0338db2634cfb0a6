"""Options of `make bench`, rounds that take turns, and the table at the end.

The first benchmark of a question runs all transports that were chosen for it, in
turns; the others only report theirs.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, machine_line, save
from benchmarks.adapters import Transport
from benchmarks.sessions import Runs, Session, take_turns
from benchmarks.work import Work

BASELINE = "multiprocessing.Queue"
Compare = Callable[..., None]
Figures = dict[str, dict[str, dict[str, float]]]  # by question and transport

_taken: dict[str, dict[type[Transport], Runs]] = {}
_figures: Figures = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shmring")
    group.addoption("--rounds", type=int, default=5, help="runs of each benchmark (default: 5)")
    group.addoption("--scale", type=float, default=1.0, help="share of the work, 0.01 to look")
    group.addoption("--peers", action="store_true", help="with the packages of the extra `peers`")
    group.addoption("--results", type=Path, metavar="FILE", help="write the rates there as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--peers"):
        return
    left_out = [item for item in items if (one := _case(item)) and one["transport"].package]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _case(item: pytest.Item) -> dict[str, Any] | None:
    """The question and the transport of a benchmark."""
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None and "question" in callspec.params else None


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """Run sessions and note their rates."""

    def measure(
        question: str,
        transport: type[Transport],
        session: type[Session],
        make_work: Callable[[], Work],
        **options: Any,
    ) -> None:
        if reason := transport.missing():
            pytest.skip(reason)
        work = make_work()
        if question not in _taken:
            faulthandler.cancel_dump_traceback_later()  # each session has a deadline of its own
            cases = filter(None, map(_case, request.session.items))
            chosen = [case["transport"] for case in cases if case["question"] == question]
            scale = request.config.getoption("--scale")
            _taken[question] = take_turns(
                request.config.getoption("--rounds"),
                {
                    one: functools.partial(session, one, work, scale=scale, **options)
                    for one in chosen
                    if one.missing() is None
                },
            )
        runs = _taken[question][transport]
        if runs.error is not None:
            raise runs.error
        benchmark.group = question
        benchmark.pedantic(lambda: None, rounds=len(runs.rates))
        if benchmark.stats is not None:
            benchmark.stats.stats.data[:] = [1 / rate for rate in runs.rates]
        figures = _figures_of(runs, work)
        benchmark.extra_info.update(figures, transport=transport.label, work=work.name)
        _figures.setdefault(question, {})[transport.label] = figures

    return measure


def _figures_of(runs: Runs, work: Work) -> dict[str, float]:
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
    if work.kind == "array":
        figures["megabytes_per_second"] = runs.median * work.nbytes / 1e6
    if len(runs.trips_ns) > 1:
        figures["median_us"] = statistics.median(runs.trips_ns) / 1000
        figures["p99_us"] = statistics.quantiles(runs.trips_ns, n=100)[98] / 1000
    return figures


def _duration(seconds: float) -> str:
    unit, size = next(
        (unit, size) for unit, size in (("ms", 1e-3), ("us", 1e-6), ("ns", 0)) if seconds >= size
    )
    return f"{seconds / (size or 1e-9):.4g} {unit}"


def table(figures: Figures) -> Iterator[str]:
    """Yield the lines of a table, grouped by question; at most 100 columns wide."""
    for question, rows in figures.items():
        baseline = rows.get(BASELINE, {}).get("messages_per_second")
        yield ""
        yield f"{question:38} {'median':>9} {'IQR':>9} {'operations/s':>13} {'ratio':>7}"
        ours, others = (
            [label for label in rows if label.startswith("shmring") is first]
            for first in (True, False)
        )
        others.sort(key=lambda label: -rows[label]["messages_per_second"])
        for label in itertools.chain(ours, others):
            row = rows[label]
            rate = row["messages_per_second"]
            ratio = f"{rate / baseline:.1f}" if baseline else "-"
            line = f"  {label:36} {_duration(1 / rate):>9} {_duration(row['iqr_s']):>9}"
            line += f" {rate:13,.0f} {ratio:>7}"
            if "megabytes_per_second" in row:
                line += f"  {row['megabytes_per_second']:,.0f} MB/s"
            if "p99_us" in row:
                line += f"  p99 {row['p99_us']:.1f} us"
            yield line


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, and write what was found."""
    if not _figures:
        return
    config = terminalreporter.config
    if (path := config.getoption("--results")) is not None:
        rounds, scale = config.getoption("--rounds"), config.getoption("--scale")
        found = {"machine": machine(), "rounds": rounds, "scale": scale, "questions": _figures}
        save(path.parent, path.name, found)
    terminalreporter.section("time of an operation; ratio: times multiprocessing.Queue")
    for line in [*table(_figures), "", machine_line()]:
        terminalreporter.write_line(line)

"""The machine in the header, rounds that take turns, and a table of rates at the end.

The first benchmark of a question runs all that were chosen for it, one run of
each after the other, as often as there are rounds; the others only report
theirs.  A drift of the machine is then nobody's advantage.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.adapters import Transport
from benchmarks.sessions import Session
from benchmarks.turns import Runs, take_turns

BASELINE = "multiprocessing.Queue"

_results: list[tuple[str, str, dict[str, float]]] = []  # group, transport, figures


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shmring")
    group.addoption("--rounds", type=int, default=5, help="runs of each benchmark (default: 5)")
    group.addoption(
        "--scale", type=float, default=1.0, help="share of the messages to send, 0.01 for a look"
    )
    group.addoption("--peers", action="store_true", help="with the packages of the extra `peers`")
    group.addoption("--results", type=Path, metavar="FILE", help="write the rates there as JSON")


def pytest_report_header(config: pytest.Config) -> str:
    return f"machine: {machine.one_line()}"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["shmring"] = machine.describe()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--peers"):
        return
    left_out = [item for item in items if _transport(item) is not None and _transport(item).peer]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _transport(item: pytest.Item) -> Any:
    """What the item is about, if it is one of these benchmarks."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("transport") if callspec is not None else None


Compare = Callable[..., None]


_taken: dict[Any, dict[type[Transport], Runs]] = {}  # by question, all its transports


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """Run sessions and note their rate: ``compare(kind_of_session, transport, work)``."""
    config = request.config

    def measure(kind: type[Session], transport: type[Transport], work: Any, **options: Any) -> None:
        if reason := transport.missing():
            pytest.skip(reason)
        question = request.node.function
        if question not in _taken:
            faulthandler.cancel_dump_traceback_later()  # each session has a deadline of its own
            same = [item for item in request.session.items if _asks(item) is question]
            transports = [_transport(item) for item in same]
            scale = config.getoption("--scale")
            _taken[question] = take_turns(
                config.getoption("--rounds"),
                {
                    one: functools.partial(kind, one, work, scale=scale, **options)
                    for one in transports
                    if one.missing() is None
                },
            )
        runs = _taken[question][transport]
        if runs.error is not None:
            raise runs.error
        benchmark.pedantic(lambda: None, rounds=len(runs.rates))
        if benchmark.stats is not None:
            benchmark.stats.stats.data[:] = [1 / rate for rate in runs.rates]
        figures = _figures(runs, work.nbytes if work.kind == "array" else 0)
        benchmark.extra_info.update(figures, transport=transport.label, work=work.name)
        _results.append((benchmark.group, transport.label, figures))

    return measure


def _asks(item: pytest.Item) -> Any:
    return getattr(item, "function", None)


def _figures(runs: Runs, nbytes: int) -> dict[str, float]:
    trips_ns = runs.trips_ns
    figures = {
        "messages_per_second": runs.median,
        "slowest": min(runs.rates),
        "fastest": max(runs.rates),
    }
    if nbytes:
        figures["megabytes_per_second"] = runs.median * nbytes / 1e6
    if len(trips_ns) > 1:
        figures["median_us"] = statistics.median(trips_ns) / 1000
        figures["p99_us"] = statistics.quantiles(trips_ns, n=100)[98] / 1000
    return figures


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The same figures the other way up: messages a second, and how many times mp.Queue that is."""
    if not _results:
        return
    if (path := terminalreporter.config.getoption("--results")) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_as_json(terminalreporter.config), indent=2) + "\n")
    write = terminalreporter.write_line
    terminalreporter.section("rates (median; slowest to fastest run)")
    for group in dict.fromkeys(group for group, _, _ in _results):
        rows = [(label, figures) for name, label, figures in _results if name == group]
        baseline = next((row["messages_per_second"] for label, row in rows if label == BASELINE), 0)
        write("")
        write(group)
        for label, row in sorted(rows, key=lambda entry: -entry[1]["messages_per_second"]):
            rate = row["messages_per_second"]
            line = f"  {label:38} {rate:12,.0f}/s  ({row['slowest']:,.0f} to {row['fastest']:,.0f})"
            if baseline:
                line += f"  {rate / baseline:.1f} times {BASELINE}"
            if "megabytes_per_second" in row:
                line += f"  {row['megabytes_per_second']:,.0f} MB/s"
            if "p99_us" in row:
                line += f"  median {row['median_us']:.1f} us, p99 {row['p99_us']:.1f} us"
            write(line)
    write("")
    write(f"machine: {machine.one_line()}")


def _as_json(config: pytest.Config) -> dict[str, Any]:
    questions: dict[str, dict[str, Any]] = {}
    for group, label, figures in _results:
        questions.setdefault(group, {})[label] = figures
    return {
        "machine": machine.describe(),
        "rounds": config.getoption("--rounds"),
        "scale": config.getoption("--scale"),
        "questions": questions,
    }

"""The machine in the header, a run a round, and a table of rates at the end."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.adapters import Transport
from benchmarks.sessions import RoundTrips, Session

BASELINE = "multiprocessing.Queue"

_results: list[tuple[str, str, dict[str, float]]] = []  # group, transport, figures


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shmring")
    group.addoption("--rounds", type=int, default=5, help="runs of each benchmark (default: 5)")
    group.addoption(
        "--scale", type=float, default=1.0, help="share of the messages to send, 0.01 for a look"
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"machine: {machine.one_line()}"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["shmring"] = machine.describe()


Compare = Callable[..., None]


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """Run a session a round and note its rate: ``compare(kind_of_session, transport, work)``."""
    config = request.config

    def measure(kind: type[Session], transport: type[Transport], work: Any, **options: Any) -> None:
        if reason := transport.missing():
            pytest.skip(reason)
        seconds: list[float] = []
        trips_ns: list[int] = []

        with contextlib.ExitStack() as stack:

            def enter() -> tuple[tuple[Session], dict[str, Any]]:
                stack.close()  # the session of the round before
                session = kind(transport, work, scale=config.getoption("--scale"), **options)
                return (stack.enter_context(session),), {}

            def run(session: Session) -> None:
                seconds.append(session.run() / session.count)
                if isinstance(session, RoundTrips):
                    trips_ns.extend(session.samples_ns)

            benchmark.pedantic(run, setup=enter, rounds=config.getoption("--rounds"))

        if benchmark.stats is not None:
            # Slower transports are given fewer messages, so what pytest-benchmark
            # tabulates has to be the time of one message, not that of a run.
            benchmark.stats.stats.data[:] = seconds
        figures = _figures(seconds, work.nbytes if work.kind == "array" else 0, trips_ns)
        benchmark.extra_info.update(figures, transport=transport.label, work=work.name)
        _results.append((benchmark.group, transport.label, figures))

    return measure


def _figures(seconds: list[float], nbytes: int, trips_ns: list[int]) -> dict[str, float]:
    rate = 1 / statistics.median(seconds)
    figures = {
        "messages_per_second": rate,
        "slowest": 1 / max(seconds),
        "fastest": 1 / min(seconds),
    }
    if nbytes:
        figures["megabytes_per_second"] = rate * nbytes / 1e6
    if len(trips_ns) > 1:
        figures["median_us"] = statistics.median(trips_ns) / 1000
        figures["p99_us"] = statistics.quantiles(trips_ns, n=100)[98] / 1000
    return figures


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The same figures the other way up: messages a second, and how many times mp.Queue that is."""
    if not _results:
        return
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

"""The questions of `make bench`, each put to every transport that can do its work."""

from __future__ import annotations

import faulthandler
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.adapters import Transport, able
from benchmarks.conftest import record
from benchmarks.sessions import (
    ManyToMany,
    OneProcess,
    OneWay,
    RoundTrips,
    Runs,
    Session,
    take_turns,
    two_cpus,
)
from benchmarks.work import Work, arrays, bytes_of, records, small_dicts


@dataclass(frozen=True)
class Question:
    """A kind of session, its work, and the transports that can do it."""

    session: type[Session]
    work: Callable[[], Work]
    transports: list[type[Transport]]
    options: dict[str, Any] = field(default_factory=dict)


_bytes = functools.partial(functools.partial, bytes_of, 64)
_one_mib = functools.partial(arrays, 1 << 20, count=1200)
_eight_mib = functools.partial(arrays, 8 << 20, count=120)

QUESTIONS = {
    "64 B bytes, one call a message": Question(OneWay, _bytes(), able("bytes")),
    "64 B bytes, batches of 100": Question(
        OneWay, _bytes(count=1_200_000), able("bytes"), {"batches": True}
    ),
    "64 B bytes, 2:2": Question(ManyToMany, _bytes(count=300_000), able("bytes", shared=True)),
    "small dict, one call a message": Question(OneWay, small_dicts, able("object")),
    "small dict, batches of 100": Question(OneWay, small_dicts, able("object"), {"batches": True}),
    "small object of a class": Question(OneWay, records, able("object")),
    "1 MiB float32, writable, summed": Question(OneWay, _one_mib, able("array")),
    "8 MiB float32, writable, summed": Question(OneWay, _eight_mib, able("array")),
    "1 MiB float32, summed in place": Question(OneWay, _one_mib, able("in place")),
    "8 MiB float32, summed in place": Question(OneWay, _eight_mib, able("in place")),
    "round trip of 64 B": Question(RoundTrips, _bytes(count=20_000), able("bytes")),
    # Without this, the placement by the scheduler decides more than the transport does.
    "round trip of 64 B, a CPU each": Question(
        RoundTrips, _bytes(count=20_000), able("bytes"), {"apart": True}
    ),
    "put + get of 64 B in one process": Question(
        OneProcess, _bytes(count=200_000), able("bytes", threads=True)
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    with_peers = metafunc.config.getoption("--peers")
    cases = [
        pytest.param(question, transport, id=f"{question}-{transport.label}")
        for question, asked in QUESTIONS.items()
        for transport in asked.transports
        if with_peers or transport.package is None
    ]
    metafunc.parametrize(("question", "transport"), cases)


@functools.cache
def _measure(
    question: str, chosen: tuple[type[Transport], ...], rounds: int, scale: float
) -> dict[type[Transport], Runs]:
    """Run all transports that were chosen for a question, in turns; once."""
    faulthandler.cancel_dump_traceback_later()  # each session has its own deadline
    asked = QUESTIONS[question]
    present = [one for one in chosen if one.missing() is None]
    return take_turns(rounds, present, asked.session, asked.work(), scale=scale, **asked.options)


def test_queues(
    benchmark: Any, request: pytest.FixtureRequest, question: str, transport: type[Transport]
) -> None:
    asked = QUESTIONS[question]
    if reason := transport.missing():
        pytest.skip(reason)
    if asked.options.get("apart") and two_cpus() is None:
        pytest.skip("there is only one CPU")
    cases = [one.callspec.params for one in request.session.items if "test_queues[" in one.name]
    chosen = tuple(case["transport"] for case in cases if case["question"] == question)
    rounds, scale = map(request.config.getoption, ("--rounds", "--scale"))
    runs = _measure(question, chosen, rounds, scale)[transport]
    if runs.error is not None:
        raise runs.error
    benchmark.group = question
    benchmark.pedantic(lambda: None, rounds=len(runs.rates))
    if benchmark.stats is not None:
        benchmark.stats.stats.data[:] = [1 / rate for rate in runs.rates]
    work = asked.work()
    figures = record(question, transport.label, runs, work.nbytes if work.kind == "array" else 0)
    benchmark.extra_info.update(figures, transport=transport.label, work=work.name)

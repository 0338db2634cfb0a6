"""The questions of `make bench`, each asked of every transport that can do its work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.adapters import Transport, able
from benchmarks.conftest import Compare
from benchmarks.sessions import ManyToMany, OneProcess, OneWay, RoundTrips, Session, two_cpus
from benchmarks.work import BATCH, Work, arrays, bytes_of, small_dicts


@dataclass(frozen=True)
class Question:
    """What is measured: a kind of session over the transports that are able to do its work."""

    session: type[Session]
    work: Callable[[], Work]
    able: list[type[Transport]]
    options: dict[str, Any] = field(default_factory=dict)


_bytes = functools.partial(functools.partial, bytes_of, 64)
_one_mib = functools.partial(arrays, 1 << 20, count=1000)
_eight_mib = functools.partial(arrays, 8 << 20, count=120)
_batches = {"batches": True}

QUESTIONS = {
    "64 B bytes, one call a message": Question(OneWay, _bytes(), able("bytes")),
    f"64 B bytes, batches of {BATCH}": Question(
        OneWay, _bytes(count=1_000_000), able("bytes"), _batches
    ),
    "64 B bytes, 2:2": Question(ManyToMany, _bytes(count=300_000), able("bytes", shared=True)),
    "small dict, one call a message": Question(OneWay, small_dicts, able("object")),
    f"small dict, batches of {BATCH}": Question(
        OneWay, functools.partial(small_dicts, count=150_000), able("object"), _batches
    ),
    "1 MiB float32, writable, summed": Question(OneWay, _one_mib, able("array")),
    "8 MiB float32, writable, summed": Question(OneWay, _eight_mib, able("array")),
    "1 MiB float32, summed in place": Question(OneWay, _one_mib, able("in place")),
    "8 MiB float32, summed in place": Question(OneWay, _eight_mib, able("in place")),
    "round trip of 64 B": Question(RoundTrips, _bytes(count=20_000), able("bytes")),
    # Left alone, the scheduler decides more than the transport does.
    "round trip of 64 B, a CPU each": Question(
        RoundTrips, _bytes(count=20_000), able("bytes"), {"apart": True}
    ),
    "put + get of 64 B in one process": Question(
        OneProcess, _bytes(count=300_000), able("bytes", between_processes=False)
    ),
}


@pytest.mark.parametrize(
    ("question", "transport"),
    [
        pytest.param(name, transport, id=f"{name}-{transport.label}")
        for name, question in QUESTIONS.items()
        for transport in question.able
    ],
)
def test_queues(compare: Compare, question: str, transport: type[Transport]) -> None:
    asked = QUESTIONS[question]
    if asked.options.get("apart") and two_cpus() is None:
        pytest.skip("one CPU")
    compare(question, transport, asked.session, asked.work, **asked.options)

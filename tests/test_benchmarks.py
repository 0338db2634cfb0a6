"""The benchmarks measure what they say: content is carried, and wrong content is noticed.

Nothing here is about speed.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest

from benched import ROOT  # isort: skip  (it adds the path)
from benchmarks import costs, dropin, figures, recovery
from benchmarks.adapters import (
    MultiprocessingPipe,
    MultiprocessingQueue,
    ShmringQueue,
    Transport,
)
from benchmarks.sessions import ManyToMany, OneProcess, OneWay, RoundTrips, two_cpus
from benchmarks.transports import EVERY, able
from benchmarks.turns import per_second, take_turns
from benchmarks.work import BATCH, Work, WrongContent, arrays, bytes_of, small_dicts

import shmring

ARRAYS = arrays(1 << 20, count=10)
WORKS = {
    "bytes": bytes_of(64),
    "object": small_dicts(),
    "array": ARRAYS,
    "in place": ARRAYS,
}
PAIRS = [(kind, transport) for kind in WORKS for transport in able(kind)]


def name(value: object) -> str:
    return value.label if isinstance(value, type) else str(value)


@pytest.fixture(autouse=True)
def no_child_left() -> Any:
    yield
    assert not multiprocessing.active_children()


def usable(transport: type[Transport]) -> type[Transport]:
    if reason := transport.missing():
        pytest.skip(reason)
    return transport


@pytest.mark.parametrize(("kind", "transport"), PAIRS, ids=name)
def test_one_way(kind: str, transport: type[Transport]) -> None:
    count = 10 if WORKS[kind] is ARRAYS else 600
    with OneWay(usable(transport), WORKS[kind], count=count) as session:
        assert session.run() > 0
        assert session.count == count


@pytest.mark.parametrize(
    ("kind", "transport"), [pair for pair in PAIRS if WORKS[pair[0]] is not ARRAYS], ids=name
)
def test_batches(kind: str, transport: type[Transport]) -> None:
    with OneWay(usable(transport), WORKS[kind], batches=True, count=7 * BATCH) as session:
        assert session.run() > 0
        assert session.count == 7 * BATCH


@pytest.mark.parametrize("transport", able("bytes"), ids=name)
@pytest.mark.parametrize("apart", [False, True], ids=["free", "apart"])
def test_round_trips(transport: type[Transport], apart: bool) -> None:
    before = os.sched_getaffinity(0)
    if apart and two_cpus() is None:
        pytest.skip("one CPU")
    with RoundTrips(usable(transport), WORKS["bytes"], apart=apart, count=20) as session:
        assert session.run() > 0
        assert len(session.samples_ns) == 20
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("transport", able("bytes", between_processes=False), ids=name)
def test_one_process(transport: type[Transport]) -> None:
    with OneProcess(usable(transport), WORKS["bytes"], count=20) as session:
        assert session.run() > 0


@pytest.mark.parametrize("transport", able("bytes", shared=True), ids=name)
def test_many_to_many(transport: type[Transport]) -> None:
    session = ManyToMany(usable(transport), WORKS["bytes"], producers=3, consumers=2, count=1500)
    with session:
        assert session.run() > 0
    assert session.count == sum(session.shares) == 1500


def test_labels_are_distinct() -> None:
    labels = [transport.label for transport in EVERY]
    assert len(set(labels)) == len(labels)


# ---- what a transport can do wrong is noticed -----------------------------------------------


class Faulty(MultiprocessingPipe, ABC):
    """Does something to the 100th message it delivers."""

    label = "faulty"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._deliver, self._delivered = self.get, 0
        self.get = self._get

    def _get(self) -> Any:
        self._delivered += 1
        message = self._deliver()
        return self.harm(message) if self._delivered == 100 else message

    @abstractmethod
    def harm(self, message: Any) -> Any:
        """What goes wrong with it."""


class Losing(Faulty):
    def harm(self, message: Any) -> Any:
        return self._deliver()


class Doubling(Faulty):
    def harm(self, message: Any) -> Any:
        once, self._deliver = self._deliver, lambda: message

        def restore() -> Any:
            self._deliver = once
            return message

        self._deliver = restore
        return message


class Silent(MultiprocessingPipe):
    label = "silent"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.put = lambda message: None


class Altering(MultiprocessingPipe):
    """Every array arrives with one element changed."""

    label = "altering"

    def take_sum(self) -> float:
        return super().take_sum() + 1


@pytest.mark.parametrize("transport", [Losing, Doubling])
def test_messages_lost_or_doubled_are_noticed(transport: type[Transport]) -> None:
    with (
        OneWay(transport, WORKS["bytes"], count=600) as session,
        pytest.raises(WrongContent, match="a turn began"),
    ):
        session.run()


def test_an_altered_array_is_noticed() -> None:
    with (
        OneWay(Altering, WORKS["array"], count=4) as session,
        pytest.raises(WrongContent, match="adds up to"),
    ):
        session.run()


def test_a_session_that_hangs_ends() -> None:
    with (
        pytest.raises(TimeoutError, match=r"starting: not done after 0\.3 s"),
        OneWay(Silent, WORKS["bytes"], deadline_s=0.3),
    ):
        pass


# ---- the programs ---------------------------------------------------------------------------


def test_rows_of_the_figures() -> None:
    rates = figures.rates_in_turns(
        2,
        {
            transport.label: lambda transport=transport: OneWay(
                transport, WORKS["bytes"], count=300
            )
            for transport in (ShmringQueue, MultiprocessingQueue)
        },
    )
    row = figures.rate_row("64 B", 30, ShmringQueue.label, rates, per_second)
    assert str(row).startswith("| 64 B | at least 30 times | ")
    assert str(row).count("|") == 6


def test_costs_are_counted() -> None:
    spent = costs.blocked(0.1, consumers=1)
    assert [used["cpu_ms"] >= 0 for kind in spent.values() for used in kind] == [True, True]
    found = costs.unused()
    assert found["multiprocessing.Queue"]["descriptors"] > 0
    killed = costs.killed()
    assert killed["processes"] == 4
    assert killed["names"] == []


@pytest.mark.parametrize("library", ["shmring", "multiprocessing"])
def test_the_first_message_of_a_child_is_timed(library: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    seconds = dropin.first_message(library, str(tmp_path))
    assert 0 < seconds < time.perf_counter() - began
    assert [*tmp_path.rglob("hello.*.pyc")], "what a child imports is compiled once"


@pytest.mark.skipif(shmring.backend != "ring", reason="a pipe does not survive kills")
@pytest.mark.parametrize("kind", recovery.KINDS)
def test_the_others_go_on_after_a_kill(kind: str) -> None:
    (found,) = recovery.measure(kind, kills=1, window=0.1)
    assert found.seconds > 0
    assert found.before > 0
    assert found.after > 0


@pytest.mark.skipif(shmring.backend != "ring", reason="looks whether somebody sleeps in a futex")
@pytest.mark.parametrize("name", recovery.WAITS)
def test_a_waiter_is_interrupted(name: str) -> None:
    (seconds,) = recovery.interrupt(name, times=1)
    assert seconds > 0


def test_transports_take_turns_and_one_that_fails_has_no_more() -> None:
    order: list[str] = []

    def enter(transport: type[Transport]) -> OneWay:
        order.append(transport.label)
        return OneWay(transport, WORKS["bytes"], count=300)

    transports: list[type[Transport]] = [Losing, ShmringQueue]
    found = take_turns(2, {one: functools.partial(enter, one) for one in transports})
    assert order == ["faulty", "shmring.Queue", "shmring.Queue"]
    assert isinstance(found[Losing].error, WrongContent)
    assert len(found[ShmringQueue].rates) == 2


def test_pytest_collects_and_runs_them(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    results = tmp_path / "new" / "rates.json"
    options = ["--benchmark-only", "--rounds", "1", "--scale", "0.001", "benchmarks"]
    questions = "test_small or test_two_to_two or test_one_process"
    options += ["--results", str(results), "-k", questions]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *options],
        cwd=ROOT,
        env=costs._environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "machine: cpu" in done.stdout
    assert "times multiprocessing.Queue" in done.stdout
    found = json.loads(results.read_text())
    assert found["machine"]["cpu"] in done.stdout
    assert found["questions"]["64 B bytes, 2:2"]["shmring.Queue"]["messages_per_second"] > 0
    labels = {label for group in found["questions"].values() for label in group}
    chosen = able("bytes", between_processes=False)
    assert labels == {one.label for one in chosen if not one.peer}, "no peer without --peers"

"""The ledger: every order of answers and deaths ends with one answer for each task."""

from __future__ import annotations

import itertools

import pytest

from shmring.errors import TaskTimeout, WorkerDied
from shmring.pool.task_table import Failure, Ledger

pytestmark = pytest.mark.both_backends


def send(ledger: Ledger, position: int) -> int | None:
    chosen = ledger.next_task()
    if chosen is None:
        return None
    ledger.sent(chosen[0], position, 10)
    return chosen[0]


def test_results_stand_in_the_order_of_the_tasks() -> None:
    ledger = Ledger("abc", 2)
    assert [send(ledger, position) for position in (0, 8, 16, 24)] == [0, 1, 2, None]
    assert ledger.outstanding == 3
    assert ledger.outstanding_nbytes == 30
    for number in (2, 0, 1):
        assert not ledger.finished
        assert ledger.answered(number, number * 10)
    assert ledger.finished
    assert ledger.results(exceptions=True) == [0, 10, 20]
    assert (ledger.outstanding, ledger.outstanding_nbytes) == (0, 0)


def test_only_the_first_answer_counts() -> None:
    ledger = Ledger([5], 2)
    send(ledger, 0)
    assert ledger.answered(0, "first")
    assert not ledger.answered(0, "second")
    assert not ledger.answered(99, "of nobody")
    assert ledger.results(exceptions=True) == ["first"]


@pytest.mark.parametrize("max_retries", [0, 1, 2])
def test_a_task_is_given_up_after_max_retries(max_retries: int) -> None:
    ledger = Ledger(["poison", "good"], max_retries)
    positions = itertools.count(0, 8)
    assert send(ledger, next(positions)) == 0
    good = next(positions)
    assert send(ledger, good) == 1
    at = 0
    for attempt in range(max_retries + 1):
        assert ledger.lost(at, 100 + attempt, -9) == 0
        if attempt < max_retries:
            at = next(positions)
            assert send(ledger, at) == 0
    assert ledger.retried == max_retries
    assert not ledger.finished, "the other task has not been blamed"
    error = ledger.first_failure
    assert isinstance(error, WorkerDied)
    assert (error.task, error.pid, error.exitcode) == (0, 100 + max_retries, -9)
    assert error.attempts == max_retries + 1
    ledger.answered(1, "fine")
    assert ledger.results(exceptions=True) == [error, "fine"]
    assert ledger.results(exceptions=False) == ["fine"]


def test_a_claim_on_what_was_answered_costs_nobody() -> None:
    ledger = Ledger([1], 0)
    send(ledger, 64)
    ledger.answered(0, "done")
    assert ledger.lost(64, 1, -9) is None
    assert ledger.lost(4096, 1, -9) is None
    assert ledger.results(exceptions=True) == ["done"]


def test_an_answer_that_comes_after_the_retry_was_queued_counts_once() -> None:
    ledger = Ledger([1], 2)
    send(ledger, 0)
    ledger.lost(0, 1, -9)
    assert ledger.answered(0, "late")
    assert ledger.next_task() is None
    assert ledger.finished


def test_what_could_not_be_sent_comes_next_again() -> None:
    ledger = Ledger("ab", 2)
    assert ledger.next_task() == (0, 0, "a")
    ledger.unsent(0)
    assert ledger.next_task() == (0, 0, "a")


def test_a_killed_overrun_is_no_death_of_a_worker() -> None:
    ledger = Ledger("ab", 2)
    send(ledger, 0)
    ledger.expire(0, 1.5)
    ledger.lost(0, 1, -9)
    (failure,) = [ledger.first_failure]
    assert isinstance(failure, TaskTimeout)
    assert (failure.task, failure.seconds) == (0, 1.5)


def test_tasks_are_taken_only_as_needed() -> None:
    ledger = Ledger(itertools.count(), 2)
    assert [send(ledger, position) for position in (0, 8)] == [0, 1]
    assert not ledger.finished


def test_failures_are_told_from_results_that_are_exceptions() -> None:
    ledger = Ledger("ab", 2)
    send(ledger, 0)
    send(ledger, 8)
    result = ValueError("returned, not raised")
    ledger.answered(0, result)
    assert ledger.first_failure is None
    raised = ValueError("raised")
    ledger.answered(1, Failure(raised))
    assert ledger.first_failure is raised
    assert ledger.results(exceptions=True) == [result, raised]

"""Task table: every order of answers and deaths ends with one answer for each call."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shmring.errors import TaskTimeout, WorkerDied
from shmring.tasks.channel import CAREFUL
from shmring.tasks.task_table import Failure, PartialResults, Task, TaskTable

pytestmark = pytest.mark.both_backends


class NotedTask(Task):
    """Notes its answer in the table."""

    def __init__(self, table: Table, args: Any, flags: Any, retries: int) -> None:
        super().__init__("function", args, flags, retries)
        self.table = table

    def finish(self, outcome: Any) -> None:
        assert self.number not in self.table.answers, "answered twice"
        self.table.answers[self.number] = outcome


class Table(TaskTable):
    """A task table, and the queue beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0
        self.answers: dict[int, Any] = {}

    def add(self, args: Any, flags: Any, retries: int = 2) -> Task:
        task = NotedTask(self, args, flags, retries)
        task.number = self.submitted
        self.submitted += 1
        self.backlog.append(task)
        return task

    def send(self) -> Task:
        task = self.backlog.popleft()
        self.position += 8
        task.position = self.position
        self.sent[task.number] = task
        return task

    def finish(self, task: Task, value: Any) -> None:
        assert self.answered(task.number) is task
        task.finish(value)


def test_only_the_first_answer_counts() -> None:
    table = Table()
    table.add((5,), {})
    table.finish(table.send(), "first")
    assert table.answered(0) is None
    assert table.answered(99) is None
    assert table.answers == {0: "first"}
    assert (len(table), table.answered_count) == (0, 1)


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_task_is_given_up_after_its_retries(retries: int) -> None:
    table = Table()
    table.add(("poison",), {}, retries)
    table.add(("good",), {})
    poison, good = table.send(), table.send()
    for attempt in range(retries + 1):
        lost = table.lost(poison.position, 0, 100 + attempt, -9)
        assert lost is not None
        if attempt < retries:
            assert lost == (poison, None)
            assert table.send() is poison
    error = lost[1]
    assert isinstance(error, WorkerDied)
    assert (error.task, error.pid, error.exitcode) == (0, 100 + retries, -9)
    assert error.attempts == retries + 1
    assert table.retried == retries
    assert good.attempts == 0, "the other task is not charged"
    assert len(table) == 1


def test_a_delivery_of_what_was_answered_charges_nothing() -> None:
    table = Table()
    table.add((1,), {}, 0)
    task = table.send()
    table.finish(task, "done")
    assert table.lost(task.position, 0, 1, -9) is None
    assert table.lost(4096, 0, 1, -9) is None


def test_a_worker_killed_for_an_overrun_is_no_death() -> None:
    table = Table()
    table.add((1,), {}, 2)
    task = table.send()
    task.expired = TaskTimeout(0, 1.5)
    lost = table.lost(task.position, 0, 1, -9)
    assert lost is not None
    assert isinstance(lost[1], TaskTimeout)


def test_a_chunk_is_answered_in_parts() -> None:
    table = Table()
    task = table.add([1, 2, 3], 0)
    table.send()
    assert table.part_answered(0, 0, [10]) is None
    assert table.part_answered(0, 1, [20, 30]) is task
    assert task.outcome() == [10, 20, 30]
    assert type(task.outcome()) is list


def test_a_lost_chunk_runs_again_from_its_first_call_without_result() -> None:
    table = Table()
    task = table.add([1, 2, 3, 4], 0)
    table.send()
    table.part_answered(0, 0, [10])
    assert table.lost(task.position, 2, 1, -9) == (task, None)
    assert (task.args, task.first) == ([2, 3, 4], 1)
    assert (task.charged, task.attempts) == (2, 1), "the call that had begun is charged"
    assert task.kwargs & CAREFUL, "or what ended before it would run again and again"
    table.send()
    assert table.part_answered(0, 0, [20, 30, 40]) is task
    assert task.outcome() == [10, 20, 30, 40]


def test_a_worker_that_died_between_two_calls_charges_none() -> None:
    table = Table()
    task = table.add([1, 2], 0, retries=0)
    table.send()
    table.part_answered(0, 0, [10])
    assert table.lost(task.position, 0, 1, -9) == (task, None)
    assert task.attempts == 0
    assert task.args == [2]


@pytest.mark.parametrize("seed", range(50))
def test_whatever_dies_each_call_is_answered_once_and_only_the_deadly_fails(seed: int) -> None:
    """Workers run chunks with one deadly call each, send parts at random, and die at random."""
    rng = random.Random(seed)
    table = Table()
    deadly = {}
    for number in range(6):
        calls = [number * 100 + i for i in range(rng.randrange(1, 8))]
        table.add(list(calls), 0, rng.randrange(3))
        deadly[number] = rng.choice(calls)
    for _ in range(2000):
        if not table.backlog:
            break
        task = table.send()
        work(rng, table, task, deadly[task.number])
    assert len(table) == 0
    for number, values in table.answers.items():
        assert isinstance(values, PartialResults)
        for i, value in enumerate(values):
            call = number * 100 + i
            if call == deadly[number]:
                assert isinstance(value, Failure)
                assert isinstance(value.error, WorkerDied)
            else:
                assert value == -call
    assert len(table.answers) == 6


def work(rng: random.Random, table: Table, task: Task, deadly: int) -> None:
    items, position = list(task.args), task.position
    unsent: list[int] = []
    for item, call in enumerate(items):
        if call == deadly:
            lost = table.lost(position, item, 7, -9)
            assert lost is not None
            if lost[1] is not None and not task.args:
                task.finish(task.outcome())
            return
        unsent.append(-call)
        if task.kwargs & CAREFUL or rng.random() < 0.3:
            done = table.part_answered(task.number, item + 1 - len(unsent), unsent)
            unsent = []
            if done is not None:
                done.finish(done.outcome())
    if unsent:
        done = table.part_answered(task.number, len(items) - len(unsent), unsent)
        assert done is not None
        done.finish(done.outcome())

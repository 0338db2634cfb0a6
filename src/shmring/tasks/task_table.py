"""Task table: which task is where, how often it was tried, what is still unanswered.

It does no input or output, so that every order of events can be played through it::

    add() ----> backlog --next_task()--> sent(position) ----> answered(), failed()
                  ^                           |
                  +--- requeue: attempts <=   +----> lost(position): its worker is dead
                       max_retries ---------------<          |
                                                             +--> failed: WorkerDied
"""

from __future__ import annotations

import abc
import collections
from collections.abc import Iterable
from typing import Any

from shmring.errors import ShmringError, WorkerDied
from shmring.tasks.channel import CAREFUL

__all__ = ["Failure", "PartialResults", "Task", "TaskCancelled", "TaskTable"]

# Positions of a task that does not stand in the task queue.
UNSENT = -1  # in the backlog
TAKEN_OUT = -2  # in the table no more, without having been answered


class Failure:
    """An exception in the place of a result."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class TaskCancelled(ShmringError):
    """The task was cancelled, before it began or while it ran."""


class PartialResults(list[Any]):
    """Results of a chunk among which there are Failures."""


class Task(abc.ABC):
    """One call, or one chunk of calls, that has no complete answer yet.

    Args:
        function: what to call, or its reference.
        args: the arguments; of a chunk, a tuple of items.
        kwargs: keyword arguments; of a chunk, its flags.
        retries: how often it may be tried again after the death of a worker.
    """

    # What most tasks never change stands here once: making a task is on the fast path.
    attempts = 0  # of the call `charged` of a chunk, by workers that died of it
    charged = 0
    expired: ShmringError | None = None  # why its worker was killed
    failed = False  # whether `results` holds a Failure
    first = 0  # the call of the chunk that stands first in `args`
    number = -1
    position = UNSENT  # in the task queue
    results: list[Any] | None = None  # of a chunk
    withdrawn = False  # cancelled in the backlog; taken out when its turn comes

    def __init__(
        self, function: Any, args: Any, kwargs: dict[str, Any] | int, retries: int
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs: dict[str, Any] | int | None = kwargs
        self.retries = retries
        if type(kwargs) is int:
            self.results = []
            if retries == 0:
                self.be_careful()

    @abc.abstractmethod
    def finish(self, outcome: Any) -> None:
        """Called once the task is out of the table.

        Args:
            outcome: the result, or a Failure; of a chunk the results, which are a
                PartialResults if there are Failures among them.
        """

    def be_careful(self) -> None:
        """Have each result of a chunk sent before the next call begins."""
        if isinstance(self.kwargs, int):
            self.kwargs |= CAREFUL

    def fail(self, error: BaseException) -> None:
        """Note the failure of the next call of a chunk."""
        if self.results is not None:
            self.results.append(Failure(error))
            self.failed = True

    def outcome(self, more: Iterable[Any] = ()) -> list[Any]:
        """The results of a chunk that is complete with these."""
        results = [*(self.results or ()), *more]
        return PartialResults(results) if self.failed else results


class TaskTable:
    """All tasks that have no answer yet.

    Args:
        error: the class of WorkerDied that failed tasks get.

    Attributes:
        submitted: how many tasks there were.
        backlog: tasks that have not been sent, in order.
        sent: tasks in the queue or with a worker, by number, the oldest first.
        retried: how often a task was put back because its worker died.
        answered_count: how many tasks have their answer.
    """

    def __init__(self, error: type[WorkerDied] = WorkerDied) -> None:
        self._error = error
        self.submitted = 0
        self.backlog: collections.deque[Task] = collections.deque()
        self.sent: dict[int, Task] = {}
        self.retried = 0
        self.answered_count = 0

    def __len__(self) -> int:
        return len(self.backlog) + len(self.sent)

    def take_all(self) -> list[Task]:
        """Take out all tasks."""
        tasks = [*self.sent.values(), *self.backlog]
        for task in tasks:
            task.position = TAKEN_OUT
        self.sent.clear()
        self.backlog.clear()
        return tasks

    def answered(self, number: int) -> Task | None:
        """Take out a task whose answer is here; None if it has had one, or never existed."""
        task = self.sent.pop(number, None)
        if task is not None:
            self.answered_count += 1
        return task

    def part_answered(self, number: int, index: int, values: list[Any]) -> Task | None:
        """Note results of a chunk, from `index` on; the chunk, taken out, if it is complete now.

        The worker counts from the first call that it was sent.
        """
        task = self.sent.get(number)
        if task is None or task.results is None:
            return None
        task.results[task.first + index :] = values
        if len(task.results) < task.first + len(task.args):
            return None
        return self.answered(number)

    def requeue(self, task: Task) -> None:
        """Put a task that was sent back to the front of the backlog."""
        if task.position >= 0:
            self.sent.pop(task.number, None)
            task.position = UNSENT
        if task.results is not None:  # of a chunk only what has no result
            have = len(task.results) - task.first
            task.args = task.args[have:]
            task.first += have
        self.backlog.appendleft(task)

    def lost(
        self, position: int, item: int, pid: int, exitcode: int | None
    ) -> tuple[Task, ShmringError | None] | None:
        """Note that the worker which had taken the task at this position is dead.

        The call at which it died is charged with it; calls of the chunk that had not
        begun are not. What is not given up goes back to the front of the backlog.

        Args:
            item: the call of a chunk that began last, as the worker counts.

        Returns:
            the task, and why the call is given up if it is; None if no task without an
            answer stood there.
        """
        task = self.at(position)
        if task is None:
            return None
        call = task.first + item
        self.requeue(task)
        if call < task.first:  # its result is here: the worker died before the next one began
            return task, None
        if call != task.charged:
            task.charged, task.attempts = call, 0
        task.attempts += 1
        error, task.expired = task.expired, None
        if error is None and task.attempts > task.retries:
            error = self._error(task.number, pid, exitcode, task.attempts)
        if error is None or call > task.first:  # what ended before it has to run again first
            task.be_careful()
            self.retried += 1
            return task, None
        self.backlog.popleft()
        if task.results is not None:
            task.fail(error)
            task.args = task.args[1:]
            task.first += 1
            if task.args:
                self.backlog.appendleft(task)
                return task, error
        task.position = TAKEN_OUT
        self.answered_count += 1
        return task, error

    def at(self, position: int) -> Task | None:
        """The task that was sent at this position and has no answer."""
        for task in self.sent.values():
            if task.position == position:
                return task
        return None

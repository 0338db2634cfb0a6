"""The ledger: which task is where, how often it was tried, what its answer is.

It does no input or output, so every order of events can be played through it::

    new tasks --+                      answered ---------> results, in task order
                +--> next_task() --> sent(position) --+
    retries ----+                                     +--> lost(position)
       ^                                                       |
       +------------------ attempts <= max_retries ------------+--> failed: WorkerDied
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from shmring.errors import TaskTimeout, WorkerDied

__all__ = ["Failure", "Ledger"]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """What stands for a result in the ledger where there is an exception."""

    error: BaseException


@dataclasses.dataclass(slots=True)
class _Task:
    """One task that has no answer yet."""

    number: int
    payload: Any
    attempts: int = 0  # by workers that took it and died
    position: int | None = None  # in the task queue; None while it is not there
    nbytes: int = 0
    timeout: float | None = None  # set when its worker was killed for it


class Ledger:
    """All tasks of one run.

    Args:
        tasks: taken one by one, as they are needed.
        max_retries: how often a task whose worker died is tried again.
    """

    def __init__(self, tasks: Iterable[Any], max_retries: int) -> None:
        self._new: Iterator[tuple[int, Any]] = enumerate(tasks)
        self._max_retries = max_retries
        self._exhausted = False
        self._retries: collections.deque[_Task] = collections.deque()
        self._open: dict[int, _Task] = {}
        self._by_position: dict[int, _Task] = {}
        self._results: dict[int, Any] = {}
        self.first_failure: BaseException | None = None
        self.retried = 0
        self.outstanding = 0
        self.outstanding_nbytes = 0

    @property
    def done(self) -> int:
        """How many tasks have an answer."""
        return len(self._results)

    @property
    def finished(self) -> bool:
        """Whether every task has an answer."""
        return self._exhausted and not self._open

    def next_task(self) -> tuple[int, int, Any] | None:
        """Choose what to send next; to be followed by :meth:`sent`, :meth:`unsent` or an answer.

        Returns:
            number, attempt (from 0) and payload; None if there is nothing to send now.
        """
        if self._retries:
            task = self._retries.popleft()
        elif self._exhausted:
            return None
        else:
            try:
                number, payload = next(self._new)
            except StopIteration:
                self._exhausted = True
                return None
            task = self._open[number] = _Task(number, payload)
        return task.number, task.attempts, task.payload

    def sent(self, number: int, position: int, nbytes: int) -> None:
        """Note that a task stands in the task queue.

        Args:
            number: the task.
            position: where, as claims will name it.
            nbytes: the size of its message.
        """
        task = self._open[number]
        task.position, task.nbytes = position, nbytes
        self._by_position[position] = task
        self.outstanding += 1
        self.outstanding_nbytes += nbytes

    def unsent(self, number: int) -> None:
        """Note that a task could not be sent now: it comes next again."""
        self._retries.appendleft(self._open[number])

    def answered(self, number: int, result: Any) -> bool:
        """Note an answer; only the first one of a task counts.

        Args:
            number: the task.
            result: its result, or a :class:`Failure`.

        Returns:
            False for a task that has its answer already, or never existed.
        """
        task = self._open.pop(number, None)
        if task is None:
            return False
        self._take_back(task)
        if task in self._retries:
            self._retries.remove(task)
        self._results[number] = result
        if isinstance(result, Failure) and self.first_failure is None:
            self.first_failure = result.error
        return True

    def expire(self, number: int, timeout: float) -> None:
        """Note that the worker of this task is being killed because of it.

        Args:
            number: the task.
            timeout: the limit that it exceeded, in seconds.
        """
        task = self._open.get(number)
        if task is not None:
            task.timeout = timeout

    def lost(self, position: int, pid: int, exitcode: int | None) -> int | None:
        """Note that the worker which had claimed the task at this position is dead.

        Args:
            position: the low end of the claim.
            pid: the dead worker.
            exitcode: how it ended, if that is known.

        Returns:
            the number of the task; None if none without an answer stood there.
        """
        task = self._by_position.get(position)
        if task is None:
            return None
        self._take_back(task)
        task.attempts += 1
        if task.timeout is not None:
            self.answered(task.number, Failure(TaskTimeout(task.number, task.timeout)))
        elif task.attempts > self._max_retries:
            error = WorkerDied(task.number, pid, exitcode, task.attempts)
            self.answered(task.number, Failure(error))
        else:
            self.retried += 1
            self._retries.append(task)
        return task.number

    def results(self, exceptions: bool) -> list[Any]:
        """All answers in the order of the tasks.

        Args:
            exceptions: whether an exception stands where a task failed; failed
                tasks are left out otherwise.
        """
        ordered = (self._results[number] for number in sorted(self._results))
        if exceptions:
            return [each.error if isinstance(each, Failure) else each for each in ordered]
        return [each for each in ordered if not isinstance(each, Failure)]

    def _take_back(self, task: _Task) -> None:
        if task.position is not None:
            del self._by_position[task.position]
            task.position = None
            self.outstanding -= 1
            self.outstanding_nbytes -= task.nbytes

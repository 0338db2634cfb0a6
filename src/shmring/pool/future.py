"""Future of a task: as concurrent.futures.Future, made and finished in a fraction of the time.

The condition on which others wait is made when it is first asked for. The order
decides that no wake-up is missed: the finisher stores the state and then looks whether
there is a condition; a waiter makes the condition and then looks at the state.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, FINISHED, LOGGER, PENDING
from typing import TYPE_CHECKING, Any, TypeVar

from shmring.tasks.task_table import Failure, Task, TaskCancelled

if TYPE_CHECKING:
    from shmring.tasks.dispatcher import Dispatcher

__all__ = ["TaskFuture"]

T = TypeVar("T")


class TaskFuture(Future[T], Task):
    """What :meth:`~shmring.ProcessPoolExecutor.submit` returns; also its own task."""

    # What most futures never change stands here once: making one is on the fast path.
    _state = PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _awaited = False  # whether there is a condition, or is about to be

    def __init__(
        self,
        dispatcher: Dispatcher,
        function: Any,
        args: Any,
        kwargs: dict[str, Any] | int,
        retries: int,
    ) -> None:
        # Not Future.__init__: see __getattr__.
        Task.__init__(self, function, args, kwargs, retries)
        self._dispatcher: Dispatcher | None = dispatcher

    def __getattr__(self, name: str) -> Any:
        if name == "_condition":
            self._awaited = True
            return self.__dict__.setdefault(name, threading.Condition())
        if name in ("_waiters", "_done_callbacks"):
            return self.__dict__.setdefault(name, [])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def finish(self, outcome: Any) -> None:
        """Store a result or a Failure, and tell those that wait."""
        failed = type(outcome) is Failure
        if self.withdrawn or (failed and isinstance(outcome.error, TaskCancelled)):
            self._cancelled()
            return
        if failed:
            self._exception = outcome.error
        else:
            self._result = outcome
        self._state = FINISHED
        self.function = self.args = self.kwargs = None
        self._dispatcher = None  # last: cancel() takes a future without for cancelled
        if not self._awaited:
            return
        with self._condition:
            for waiter in self._waiters:
                if failed:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)
            self._condition.notify_all()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        """As in the base class, but SystemExit does not end the thread of the pool."""
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException as error:
                in_main = threading.current_thread() is threading.main_thread()
                if in_main and not isinstance(error, Exception):
                    raise
                LOGGER.exception("exception calling callback for %r", self)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, at most `timeout` seconds.

        Raises:
            TimeoutError: there is none yet.
            CancelledError: the task was cancelled.
            BaseException: what the task raised, or why it was given up.
        """
        if self._state == FINISHED and self._exception is None:
            value: T = self._result
            return value
        return super().result(timeout)

    def running(self) -> bool:
        """Whether the task was sent to the workers and has no answer."""
        return self._state == PENDING and self.position >= 0

    def cancel(self) -> bool:
        """Cancel the task if no worker has taken it.

        Returns:
            False if one has, or if the task is finished.
        """
        dispatcher = self._dispatcher
        if dispatcher is not None and not dispatcher.withdraw(self):
            return False
        return self._cancelled()

    def cancel_running(self, grace: float = 1.0) -> bool:
        """Cancel the task even if it is running: by SIGINT, after `grace` seconds by SIGKILL.

        In a task that is interrupted by the signal an exception is raised that ``except
        Exception`` does not catch, so that ``finally`` blocks run.

        Args:
            grace: how long the task may take to end by itself, in seconds.

        Returns:
            False if the task is finished; otherwise the future is cancelled, or
            becomes so when its worker has ended the task.
        """
        dispatcher = self._dispatcher
        if dispatcher is None:
            return self.cancelled()
        if dispatcher.withdraw(self):
            return self._cancelled()
        return dispatcher.interrupt(self, grace)

    def _cancelled(self) -> bool:
        self.function = self.args = self.kwargs = self._dispatcher = None
        done = super().cancel()
        if done:
            with self._condition:
                if self._state == CANCELLED:  # no other call has told the waiters
                    self.set_running_or_notify_cancel()
        return done

"""The worker: takes a task, answers it, takes the next.

::

    task queue --take--> delivery [low, high): written to shared memory
        |                   |          before the task leaves the queue
        |                   v
        |                function(*args) --raises--> exception and traceback
        |                   |                              |
        |                   v                              v
        |                result -------commit-------> answer queue
        |                   |
        +<-----next----- delivery released

While it waits it stores heartbeats in its slot and looks whether the process it
works for is still there; without that it exits by itself. A worker that dies between
delivery and release leaves the delivery behind, and with it the one task that
another worker must do.
"""

from __future__ import annotations

import contextvars
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from shmring._backend import backend
from shmring.errors import (
    DecodeError,
    Empty,
    EncodeError,
    Full,
    MessageTooLarge,
    RemoteError,
    RingClosed,
    RingNotFound,
)
from shmring.ipc.slot import ITEM_STEP, RegistrySlot
from shmring.tasks.channel import CAREFUL, SPREAD, Functions, PoolCodec

if TYPE_CHECKING:
    from shmring.process.lifeline import Lifeline
    from shmring.tasks.slots import PoolSlots

__all__ = ["TaskLoop", "current_worker", "echo", "run_pool_worker"]

# A waiting worker beats, and checks that its employer lives, this often, in seconds.
SLICE = 0.25
# Results of a chunk are sent on when they are older than this, in nanoseconds.
_FLUSH_NS = 1_000_000
# Freed memory that a worker keeps: arrays of one task are the room for those of the next.
_KEPT_NBYTES = 128 << 20
# What a put raises because of the object: OSError where /dev/shm has no room for it.
_UNSENDABLE = (EncodeError, MessageTooLarge, OSError)

_current: contextvars.ContextVar[Any] = contextvars.ContextVar("_current", default=None)


def echo(task: Any) -> Any:
    """Return the task: the handler that is used when none is given."""
    return task


def current_worker() -> Any:
    """The worker in whose handler the caller runs.

    Returns:
        the worker, for its ``beat()`` and its ``ipc``; None outside of a handler.
    """
    return _current.get()


class Employer(Protocol):
    """The process for which a worker works, as the worker sees it."""

    patience: float  # how long to wait for a task before asking again, in seconds

    def is_gone(self) -> bool:
        """Whether nothing will take answers any more."""
        ...


class CancelTask(BaseException):
    """Raised in a running task by the signal of ``cancel_running()``."""


class TaskLoop:
    """Takes tasks from one queue and puts answers into another until it is told to stop.

    Args:
        slot: says which task is being done and since when.
        handler: called for tasks that name no function.
        leaves_at_interrupt: let KeyboardInterrupt end the worker, its task unanswered.
        heartbeat_interval: send a heartbeat so often while waiting, in seconds; None for never.
        max_tasks, memory_limit: leave after so many tasks, or above so many resident bytes.

    Attributes:
        answered: how many calls were answered.
    """

    def __init__(
        self,
        worker_id: str,
        tasks: Any,
        answers: Any,
        slot: RegistrySlot,
        employer: Employer,
        *,
        handler: Callable[[Any], Any] = echo,
        leaves_at_interrupt: bool = False,
        heartbeat_interval: float | None = None,
        max_tasks: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.answered = 0
        self._tasks = tasks
        self._answers = answers
        self._slot = slot
        self._employer = employer
        self._handler = handler
        self._leaves_at_interrupt = leaves_at_interrupt
        self._heartbeat_interval = heartbeat_interval
        self._heartbeat_due = 0.0
        self._max_tasks = max_tasks
        self._memory_limit = memory_limit
        self._next_look = 0.0
        self._functions = Functions()
        self._words = slot.task_words()
        self._failures = PoolCodec().install(tasks).failures
        self._cancellable = False

    def beat(self) -> None:
        """Say in the slot that the worker is alive; a long task may call this."""
        self._slot.beat()

    def run(self) -> None:
        """Work until a STOP, until a limit is reached, or until the employer is gone.

        Raises:
            RingClosed: the queues were closed while the employer lives.
        """
        delivery = self._tasks._claim_open(self._slot.key) if backend == "ring" else None
        try:
            self._work(delivery)
        except (RingClosed, RingNotFound):
            if not self._employer.is_gone():
                raise
        # Not after an error: the delivery then says which task is unanswered.
        if delivery is not None:
            self._tasks._claim_close(delivery)

    def tell(self, kind: str, content: Any = None) -> None:
        """Send something that answers no task.

        Args:
            kind: "log", "left" or "broken".
            content: anything that can be pickled.

        Raises:
            RingClosed: the queue of answers was closed.
        """
        self._send((None, kind, self.worker_id, content))

    def _work(self, delivery: int | None) -> None:
        take = self._tasks.get
        patience = self._employer.patience
        release = self._tasks._claim_release if delivery is not None else None
        reason = None
        limited = self._max_tasks is not None or self._memory_limit is not None
        self._words.end(0)
        self._beat_on()
        while reason is None:
            try:
                number, function, args, kwargs = take(True, patience)
            except Empty:
                self._beat_on()
                if self._employer.is_gone():
                    return
                continue
            except DecodeError as error:
                number, error = self._failures.pop() if self._failures else (-1, error)
                self._send_error(number, 0, error)
            else:
                if number < 0:
                    reason = "stop"
                elif type(kwargs) is dict:
                    self._call(number, function, args, kwargs)
                else:
                    self._call_each(number, function, args, kwargs)
            function = args = kwargs = None  # kept by nothing while the worker waits
            if release is not None:
                release(delivery)
            if limited:
                reason = reason or self._limit_reached()
        if reason != "stop":
            self.tell("left", reason)

    def _beat_on(self) -> None:
        self._slot.beat()
        if self._heartbeat_interval is not None and time.monotonic() >= self._heartbeat_due:
            self._heartbeat_due = time.monotonic() + self._heartbeat_interval
            self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        """Send a heartbeat as a message; done by workers of a coordinator."""

    def _limit_reached(self) -> str | None:
        if self._max_tasks is not None and self.answered >= self._max_tasks:
            return f"max_tasks_per_child={self._max_tasks}"
        if self._memory_limit is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 0.05
            if resident_nbytes(os.getpid()) > self._memory_limit:
                return "max_memory_per_worker"
        return None

    def _call(self, number: int, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._words.begin(number + 1)
        token = _current.set(self)
        try:
            call = self._handler if function is None else self._functions.get(function)
            self._cancellable = True
            value = call(*args, **kwargs)
            self._cancellable = False
            self._send_value(number, 0, (number, value))
        except BaseException as error:
            self._cancellable = False
            if self._leaves_at_interrupt and isinstance(error, KeyboardInterrupt):
                raise
            self._send_error(number, 0, error)
        finally:
            _current.reset(token)
        self.answered += 1
        self._words.end(1)

    def _call_each(self, number: int, function: Any, items: tuple[Any, ...], flags: int) -> None:
        """The calls of a chunk; it ends at the first one that raises."""
        token = _current.set(self)
        values: list[Any] = []
        sent = 0  # how many of them
        span = 0 if flags & CAREFUL else _FLUSH_NS
        spread = bool(flags & SPREAD)
        try:
            call = self._functions.get(function)
            while len(values) < len(items):
                self._cancellable = True
                self._words.call_each(call, items, values, number + 1, ITEM_STEP, spread, span)
                self._cancellable = False
                if sent == 0 and len(values) == len(items):
                    self._send_all(number, tuple(values))
                else:
                    self._send_part(number, sent, values[sent:])
                sent = len(values)
        except BaseException as error:
            self._cancellable = False
            if sent < len(values):
                self._send_part(number, sent, values[sent:])
            self._send_error(number, len(values), error)
        finally:
            _current.reset(token)
        self.answered += len(items)
        self._words.end(len(items))

    def _send_all(self, number: int, values: tuple[Any, ...]) -> None:
        try:
            self._send((number, values))
        except _UNSENDABLE:
            self._send_part(number, 0, [*values])

    def _send_part(self, number: int, first: int, values: list[Any]) -> None:
        if len(values) == 1:
            self._send_value(number, first, (number, first, values))
            return
        try:
            self._send((number, first, values))
        except _UNSENDABLE:
            for index, value in enumerate(values):  # the error is told of the right one
                self._send_part(number, first + index, [value])

    def _send_value(self, number: int, index: int, answer: tuple[Any, ...]) -> None:
        """Send a result, or why it cannot be sent."""
        try:
            self._send(answer)
        except RingClosed:
            raise
        except BaseException as error:
            self._send_error(number, index, error)

    def _send_error(self, number: int, index: int, error: BaseException) -> None:
        try:
            self._send((number, index, *described(error)))
        except _UNSENDABLE as problem:
            instead = RemoteError(f"the {type(error).__name__} of the task: {problem}")
            self._send((number, index, *described(instead)))

    def _send(self, answer: tuple[Any, ...]) -> None:
        while True:
            try:
                self._answers.put(answer, True, SLICE)
                return
            except Full:
                if self._employer.is_gone():
                    raise RingClosed("the pool is gone, nothing takes answers") from None

    def cancel(self, signum: int, frame: Any) -> None:
        """Signal handler: end the task that is running, if it is at a point to be ended.

        Args:
            signum, frame: not used.

        Raises:
            CancelTask: in the running task.
        """
        if self._cancellable:
            self._cancellable = False
            raise CancelTask


def described(error: BaseException) -> tuple[bytes | None, str]:
    """An exception as a pickle that is known to load, or None, and its traceback as text."""
    if isinstance(error, CancelTask):
        return None, ""
    import traceback  # not needed where nothing fails

    text = "".join(traceback.format_exception(error))
    try:
        error.with_traceback(None)
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # many exceptions can be pickled and not unpickled
    except Exception:
        pickled = pickle.dumps(RemoteError(f"{type(error).__qualname__}: {_text_of(error)}"))
    return pickled, text


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"


def run_pool_worker(
    worker_id: str,
    index: int,
    tasks: Any,
    answers: Any,
    slots: PoolSlots,
    lifeline: Lifeline,
    setting: dict[str, Any],
) -> None:
    """Run a worker of an executor: what its process does.

    Args:
        index: of its slot.
        lifeline: ends it, and what it starts, with the pool's process.
        setting: "initializer", "initargs", "max_tasks", "memory_limit", "log_level".
    """
    from shmring._core.locked_memory import keep_freed_memory  # a fallback has no pool

    lifeline.bind()
    keep_freed_memory(_KEPT_NBYTES)
    slot = slots.take(index, worker_id)
    loop = TaskLoop(
        worker_id,
        tasks,
        answers,
        slot,
        _Owner(lifeline),
        max_tasks=setting["max_tasks"],
        memory_limit=setting["memory_limit"],
    )
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)  # of an event loop in the parent
        signal.signal(signal.SIGINT, loop.cancel)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _forward_records(loop, setting["log_level"])
    initializer = setting["initializer"]
    if initializer is not None:
        try:
            initializer(*setting["initargs"])
        except BaseException as error:
            logging.getLogger("concurrent.futures").critical(
                "Exception in initializer:", exc_info=True
            )
            loop.tell("broken", described(error)[1])
            slot.release()
            return
    loop.run()
    slot.release()
    for each in (tasks, answers):
        each.close()


class _Owner:
    """The process that made the pool."""

    patience = 1.5  # the lifeline ends the process; asking is for what it cannot reach

    def __init__(self, lifeline: Lifeline) -> None:
        self._lifeline = lifeline

    def is_gone(self) -> bool:
        return self._lifeline.is_cut()


def resident_nbytes(pid: int) -> int:
    """The resident memory of a process; 0 if it has ended."""
    import psutil

    try:
        nbytes: int = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0
    return nbytes


_STANDARD = [*logging.makeLogRecord({}).__dict__, "message"]  # attributes of a record


class _ForwardRecords(logging.Handler):
    """Sends what is logged here to the pool's process."""

    def __init__(self, loop: TaskLoop) -> None:
        super().__init__()
        self._loop = loop

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)  # with the exception, which may not travel
            record.msg, record.args, record.message = text, None, text
            record.exc_info = record.exc_text = record.stack_info = None
            try:
                self._loop.tell("log", record)
            except _UNSENDABLE:  # what `extra` holds
                standard = {name: record.__dict__.get(name) for name in _STANDARD}
                self._loop.tell("log", logging.makeLogRecord(standard))
        except Exception:
            self.handleError(record)


def _forward_records(loop: TaskLoop, level: int) -> None:
    """Have everything that is logged here arrive in the pool's process."""
    forward = _ForwardRecords(loop)
    root = logging.getLogger()
    root.setLevel(level)
    for each in [root, *root.manager.loggerDict.values()]:
        if isinstance(each, logging.Logger) and (each.handlers or each is root):
            each.handlers = [forward] if each is root or not each.propagate else []

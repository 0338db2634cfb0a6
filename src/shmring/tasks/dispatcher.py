"""Dispatcher: hands tasks to workers, and has each answered exactly once.

::

    submit() --> backlog --send: a window of tasks--> task queue --+
                    ^                                              | take, delivery
                    | requeue                                      v
                    +------ lost <-- proof of death <--------- workers
                    |                                              |
    finish() <------+------ answered <-------- answer queue <------+

Execution is at least once, answers are exactly once: a task whose answer was
committed never runs again, one whose worker died with a delivery of it runs again,
and one that only stood in the queue is charged to nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import _RemoteTraceback  # as programs know it
from operator import attrgetter
from typing import Any, TypeVar

from shmring._backend import backend
from shmring.errors import (
    DecodeError,
    Empty,
    EncodeError,
    Full,
    InvalidArgument,
    MemoryExceeded,
    MessageTooLarge,
    NotSupportedByFallback,
    RemoteError,
    SharedMemoryFull,
    ShmringError,
    TaskTimeout,
    WorkerDied,
)
from shmring.ipc.registry import RegistryEntry
from shmring.process.liveness import is_process_stopped
from shmring.tasks.channel import PoolCodec
from shmring.tasks.interrupts import without_interrupts
from shmring.tasks.task_loop import resident_nbytes
from shmring.tasks.task_table import (
    TAKEN_OUT,
    UNSENT,
    Failure,
    Task,
    TaskCancelled,
    TaskTable,
)
from shmring.tasks.workers import Departure, Workers

__all__ = ["Dispatcher"]

T = TypeVar("T")

_LOG = logging.getLogger("shmring")

# How often the workers are looked after, in seconds.
_LOOK = 0.02
# How often to look for deliveries of workers that came and went unseen, in seconds.
_ORPHANS = 1.0
# A worker that neither works nor beats for so long is named in the log, in seconds.
_SILENCE = 10.0
# How often to look for silent workers where nothing else makes it look, in nanoseconds.
_ROUND_NS = 1_000_000_000
# The window of tasks in the queue grows while workers find it empty, up to this many.
_WIDEST_WINDOW = 4096
_FIRST_WINDOW = 16  # times the floor
_WINDOW_NBYTES = 4 << 20
# A window that takes longer than this to be worked off is too wide, in seconds.
_WINDOW_SECONDS = 0.02


class Dispatcher:
    """One task table, one pair of queues, one set of workers.

    Args:
        floor: tasks that are in the queue at least, as long as there are any.
        task_timeout: seconds after which the worker of a call is killed; None for never.
        memory_limit: bytes of resident memory that a call may reach; None for no limit.
        death: the class of the error of a task whose workers died.

    Attributes:
        on_message: called with (kind, worker id, content) of what answers no task.
        on_event: called with (kind, task number or None, departure or slot of the worker).
        closed: whether tasks are refused; set while `lock` is held, so that each task
            was either refused or stands in the table.
    """

    def __init__(
        self,
        tasks: Any,
        answers: Any,
        workers: Workers,
        *,
        floor: int,
        task_timeout: float | None = None,
        memory_limit: int | None = None,
        death: type[WorkerDied] = WorkerDied,
    ) -> None:
        self.lock = threading.RLock()
        self.table = TaskTable(death)
        self.workers = workers
        self.task_timeout = task_timeout
        self.memory_limit = memory_limit
        self.died = 0
        self.closed = False
        self._tasks = tasks
        self._answers = answers
        self._put = tasks._put_position if backend == "ring" else self._put_without_position
        self._floor = floor
        self._window = self._room = _FIRST_WINDOW * floor
        self._window_filled = 0.0
        self._undecodable = PoolCodec().install(answers).failures
        self._unreadable = PoolCodec().install(tasks).failures
        self.on_message: Callable[[str, str, Any], object] = _ignore
        self.on_event: Callable[[str, int | None, Any], object] = _ignore
        self._oldest_position = 0
        self._next_look = time.monotonic() + _LOOK
        self._next_orphans = 0.0
        self._silent: set[int] = set()
        self._next_round = 0
        self._interrupts: dict[int, tuple[float, float | None]] = {}

    # -- tasks out -------------------------------------------------------------------------

    def submit(self, task: Task) -> bool:
        """Take in a task, unless `closed` is set; it is sent at once if the window has room."""
        table = self.table
        with self.lock:
            if self.closed:
                return False
            task.number = table.submitted
            table.submitted += 1
            if table.backlog or len(table.sent) >= self._room:
                table.backlog.append(task)
                return True
            failure = self._send(task)
        if failure is not None:
            task.finish(failure)
        return True

    def fill(self) -> None:
        """Send from the backlog what the window has room for."""
        table = self.table
        while table.backlog:
            failure = None
            with self.lock:
                if not table.backlog:
                    return
                if len(table.sent) >= self._room and not table.backlog[0].withdrawn:
                    return
                task = table.backlog.popleft()
                try:
                    failure = self._send(task)
                except BaseException:
                    table.backlog.appendleft(task)  # it fails with the others, by the caller
                    raise
                if task.position < 0 and failure is None:
                    return  # no room in shared memory
            if failure is not None:
                task.finish(failure)

    def _send(self, task: Task) -> Failure | None:
        """Put a task into the queue, or back; a Failure if it is not to be sent."""
        if task.withdrawn:
            task.position = TAKEN_OUT
            return Failure(TaskCancelled())
        try:
            position = self._put((task.number, task.function, task.args, task.kwargs), False)
        except Full:
            self.table.backlog.appendleft(task)
            return None
        except (EncodeError, MessageTooLarge, OSError) as error:
            if isinstance(error, SharedMemoryFull) and self.table.sent:
                self.table.backlog.appendleft(task)  # until what is there gives room
                return None
            task.position = TAKEN_OUT
            return Failure(error)
        task.position = position
        self.table.sent[task.number] = task
        if position - self._oldest_position > _WINDOW_NBYTES:
            self._room = self._floor  # large tasks: few of them, in memory that stays warm
        return None

    def _put_without_position(self, message: tuple[Any, ...], block: bool) -> int:
        self._tasks.put(message, block)
        number: int = message[0]
        return number  # nothing reads deliveries on the fallback

    def withdraw(self, task: Task) -> bool:
        """Have a task that no worker has taken dropped when its turn comes; False if one has."""
        with self.lock:
            if task.position == UNSENT:
                task.withdrawn = True
            if task.withdrawn or task.number not in self.table.sent:
                return task.withdrawn
        return self._without_interrupts(functools.partial(self._withdraw_sent, task))

    def _withdraw_sent(self, task: Task) -> bool:
        with self.lock:
            if task.number in self.table.sent:
                self.recall()
            if task.position == UNSENT:
                task.withdrawn = True
            return task.withdrawn

    def cancel_all(self) -> None:
        """Cancel all tasks that no worker has taken."""
        for task in self._without_interrupts(self._withdraw_all):
            task.finish(Failure(TaskCancelled()))

    def _withdraw_all(self) -> list[Task]:
        with self.lock:
            self.recall()
            for task in self.table.backlog:
                task.withdrawn = True
            return [*self.table.backlog]

    def _without_interrupts(self, call: Callable[[], T]) -> T:
        """What an interrupted recall had taken from the queue would be lost."""
        if self.lock._is_owned():  # type: ignore[attr-defined]  # a finalizer, in submit()
            return call()
        return without_interrupts(call)

    def recall(self) -> None:
        """Take all tasks back that no worker has taken, and narrow the window."""
        with self.lock:
            self._window = self._room = self._floor
            found: list[Task] = []
            sent = self.table.sent
            # What cannot be unpickled here is taken back too: a worker may be able to.
            while messages := [*_take_all(self._tasks, 0), *self._unreadable]:
                self._unreadable.clear()
                found += [sent[each[0]] for each in messages if each[0] in sent]
            for task in sorted(found, key=attrgetter("position"), reverse=True):
                self.table.requeue(task)

    def disown(self) -> None:
        """Leave queues and tasks to the process from which this one was forked."""
        self.lock = threading.RLock()  # any thread may have held it
        self.closed = True
        self._foreign = self.table  # kept: to free it would copy the memory it stands in
        self.table = TaskTable()

    # -- answers in ------------------------------------------------------------------------

    def turn(self, timeout: float) -> None:
        """Wait for answers, take all that are there, send more, look after the workers."""
        came = self.take_in(timeout)
        now = time.monotonic()
        if came:
            self._adapt(now)
        if self.table.backlog:
            self.fill()
        if now >= self._next_look:
            self._next_look = now + _LOOK
            self.look_after_workers()

    def _adapt(self, now: float) -> None:
        """Widen the window while workers are about to find it empty; narrow it when it is slow.

        Where the tasks are large, few of them may stand in the queue.
        """
        sent = self.table.sent
        if len(sent) * 2 > self._window:
            if now - self._window_filled > _WINDOW_SECONDS and self._window > self._floor:
                self._window = max(self._floor, self._window // 2)
                self._window_filled = now
        else:
            if self.table.backlog and now - self._window_filled < _WINDOW_SECONDS:
                self._window = min(_WIDEST_WINDOW, self._window * 4)
            self._window_filled = now
        with self.lock:  # other threads submit
            self._room = self._window
            if sent:
                self._oldest_position = next(iter(sent.values())).position
                newest = next(reversed(sent.values())).position
                if newest - self._oldest_position > _WINDOW_NBYTES:
                    self._room = self._floor

    def take_in(self, timeout: float) -> bool:
        """Wait for answers, and deal with all that are there; whether there were any."""
        answers = _take_all(self._answers, timeout)
        finished = []
        table = self.table
        with self.lock:
            for answer in answers:
                if len(answer) == 2:
                    task = table.sent.pop(answer[0], None)
                    if task is not None:
                        value = answer[1]
                        if task.results:
                            value = task.outcome(value)
                        finished.append((task, value))
            table.answered_count += len(finished)
        for task, value in finished:
            task.finish(value)
        if len(finished) < len(answers):
            for answer in answers:
                if answer[0] is None:
                    self.on_message(*answer[1:])
                elif len(answer) == 3:
                    self._part(*answer)
                elif len(answer) == 4:
                    self._raised(*answer)
        came = bool(answers or self._undecodable)
        while self._undecodable:
            self._fail(*self._undecodable.pop(0))
        return came

    def _part(self, number: int, index: int, values: list[Any]) -> None:
        with self.lock:
            task = self.table.part_answered(number, index, values)
        if task is not None:
            task.finish(task.outcome())

    def _raised(self, number: int, index: int, pickled: bytes | None, text: str) -> None:
        error: Any = TaskCancelled()
        if pickled is not None:
            try:
                error = pickle.loads(pickled)
                if not isinstance(error, BaseException):
                    raise InvalidArgument(f"a {type(error).__name__} is no exception")
            except BaseException as problem:
                error = RemoteError(f"an exception that cannot be unpickled here: {problem!r}")
            cause = _RemoteTraceback(f'\n"""\n{text}"""')  # type: ignore[arg-type]
            BaseException.__setattr__(error, "__cause__", cause)  # its class may refuse
        task = self.table.sent.get(number)
        if task is not None and task.results is not None:
            task.failed = True
            # The chunk ended here; what follows is not run.
            task.args = task.args[: index + 1]
            self._part(number, index, [Failure(error)])
        else:
            self._fail(number, error)

    def _fail(self, number: int, error: BaseException) -> None:
        with self.lock:
            task = self.table.answered(number)
        if task is not None:
            if task.results is None:
                task.finish(Failure(error))
            else:
                task.fail(error)
                task.finish(task.outcome())

    # -- workers ---------------------------------------------------------------------------

    def dismiss(self, tell_one: Callable[[], object], grace: float) -> None:
        """Tell all workers to stop; take what they still send, for `grace` seconds at most."""
        deadline = time.monotonic() + grace
        with contextlib.suppress(ShmringError, Full):
            for _ in range(self.workers.to_dismiss()):
                tell_one()
            while not self.workers.all_gone() and time.monotonic() < deadline:
                self.take_in(0)  # so that no worker waits for room
                self.workers.wait_for_one(_LOOK)
            self.take_in(0)

    def look_after_workers(self) -> None:
        """Requeue what dead workers held, replace them, see to calls that take too long."""
        self.bring_in_departed()
        now = time.monotonic()
        if backend == "ring" and now >= self._next_orphans:
            self._next_orphans = now + _ORPHANS
            orphans = self.workers.orphans(
                (pid, start_ticks, key) for _, pid, start_ticks, key, _, _ in self._tasks._claims()
            )
            if orphans:
                self._bring_in(orphans)
        self._look_at_the_living()
        self.workers.start(len(self.table))

    def bring_in_departed(self) -> None:
        """Requeue what workers held that have died since the last call."""
        departed = self.workers.departed()
        if departed:
            self._bring_in(departed)

    def _bring_in(self, departed: list[Departure]) -> None:
        """Put back what the departed held, and nothing else."""
        if backend != "ring":
            self.take_in(0)
            worst = departed[0]
            raise NotSupportedByFallback(
                f"{worst.worker_id} (process {worst.pid}) ended before it was dismissed; which "
                "task it held cannot be known on the fallback, and a pipe may be left wedged"
            )
        # In this order: reading the deliveries locks both sides once, which recovers what the
        # dead held of them; then the answers, for one that was committed counts.
        deliveries = self._tasks._claims()
        while self.take_in(0):
            pass
        for departure in departed:
            held = False
            for slot, pid, start_ticks, key, low, high in deliveries:
                if not departure.held(pid, start_ticks, key):
                    continue
                if low < high:
                    held = True
                    self._lost(low, departure)
                self._tasks._claim_free(slot)
            self.died += not departure.clean
            self.workers.reap(departure, held or departure.useful)
            self.on_event("left" if departure.clean else "died", None, departure)

    def _lost(self, position: int, departure: Departure) -> None:
        exitcode = self.workers.exitcode_of(departure.pid)
        with self.lock:
            task = self.table.at(position)
            if task is not None and task.number in self._interrupts:
                task.expired = task.expired or TaskCancelled()  # it died of the signal
            lost = self.table.lost(position, departure.item, departure.pid, exitcode)
        if lost is None:
            return
        task, error = lost
        _LOG.warning(
            "%s (process %d, exit code %s) died at task %d",
            departure.worker_id,
            departure.pid,
            exitcode,
            task.number,
        )
        if error is None:
            self.on_event("retried", task.number, departure)
        elif task.results is None:
            task.finish(Failure(error))
        elif not task.args:
            task.finish(task.outcome())

    def _look_at_the_living(self) -> None:
        if self._interrupts:
            with self.lock:
                for number in self._interrupts.keys() - self.table.sent.keys():
                    del self._interrupts[number]
        limited = self.task_timeout is not None or self.memory_limit is not None
        now = time.monotonic_ns()
        if now < self._next_round and not (self._interrupts or (limited and self.table.sent)):
            return
        self._next_round = now + _ROUND_NS
        for entry in self.workers.living():
            # A task may work for long without a beat: then only what is stopped is reported.
            if (
                entry.is_silent(_SILENCE)
                and entry.key not in self._silent
                and (entry.task is None or is_process_stopped(entry.pid))
            ):
                self._silent.add(entry.key)
                _LOG.warning(
                    "%s (process %d) is silent for %.1f s: hung, stopped or starved; "
                    "its tasks are not given to others",
                    entry.process_id,
                    entry.pid,
                    entry.silent_for(),
                )
            if entry.task is None:
                continue
            seconds = (now - entry.task_started_ns) / 1e9
            if self.task_timeout is not None and seconds > self.task_timeout:
                self._end(entry, TaskTimeout(entry.task, self.task_timeout), "timed out")

            if self.memory_limit is not None:
                size = resident_nbytes(entry.pid)
                if size > self.memory_limit:
                    error = MemoryExceeded(entry.task, entry.pid, size, self.memory_limit)
                    self._end(entry, error, "too large")
            if entry.task in self._interrupts:
                self._interrupt(entry)

    def interrupt(self, task: Task, grace: float) -> bool:
        """End a task that is running: by SIGINT, after `grace` seconds by SIGKILL.

        False if it is answered.
        """
        with self.lock:
            if task.position == UNSENT:
                task.withdrawn = True  # its worker has died meanwhile
            elif task.number in self.table.sent:
                self._interrupts[task.number] = grace, None
            else:
                return False
            return True

    def _interrupt(self, entry: RegistryEntry) -> None:
        number = entry.task or 0
        grace, deadline = self._interrupts[number]
        if deadline is None:
            if self.workers.signal(entry, signal.SIGINT):
                self._interrupts[number] = grace, time.monotonic() + grace
        elif time.monotonic() > deadline:
            self._end(entry, TaskCancelled(), "cancelled")

    def _end(self, entry: RegistryEntry, error: ShmringError, why: str) -> None:
        """Kill a worker because of the call that it is at, which fails with this error."""
        if not self.workers.signal(entry, signal.SIGKILL):
            return
        with self.lock:
            task = self.table.sent.get(entry.task or 0)
            if task is not None:
                task.expired = error
        self.on_event(why, entry.task, entry)


def _ignore(*about: Any) -> None:
    """Listen to nothing."""


def _take_all(queue: Any, timeout: float) -> list[Any]:
    """Wait for one message, and take all that are there; what cannot be decoded is left out."""
    try:
        if backend == "ring":
            messages: list[Any] = queue.get_many(None, timeout > 0, timeout)
            return messages
        return [queue.get(timeout > 0, timeout)]  # of a served queue one at a time
    except Empty:
        return []
    except DecodeError as error:
        return getattr(error, "items", [])

"""Manager of one executor: queues, workers, and the thread that runs the dispatcher."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from shmring.errors import Full, RingClosed, WorkerDied
from shmring.ipc.registry import Registry
from shmring.pool.interface import Event, PoolStatistics
from shmring.process.leaving import Exit
from shmring.process.lifeline import Lifeline
from shmring.process.liveness import process_start_ticks
from shmring.queues.queue import Queue
from shmring.tasks.channel import STOP
from shmring.tasks.dispatcher import Dispatcher
from shmring.tasks.slots import PoolSlots
from shmring.tasks.task_loop import run_pool_worker
from shmring.tasks.task_table import Failure, Task
from shmring.tasks.workers import ChildWorkers, Departure, WorkerReport

__all__ = ["Manager"]

_LOG = logging.getLogger("shmring")

_SLICE = 0.02
_IDLE_SLICE = 0.1
# How long workers that were told to stop may take, in seconds; then they are killed.
_GRACE = 10.0
# How long a worker whose initializer failed may take to end, in seconds.
_FLUSH_S = 2.0


class BrokenTask(WorkerDied, BrokenProcessPool):
    """WorkerDied, for programs that expect what the standard library's pool raises."""


class Manager:
    """Queues, workers and thread of a pool; they live on without the executor until all is done.

    Args:
        number: how many workers.
        context: of multiprocessing.
        task_timeout, on_event: as for the executor.
        setting: what each worker is told: see :func:`shmring.tasks.task_loop.run_pool_worker`.
    """

    def __init__(
        self,
        number: int,
        context: Any,
        *,
        task_timeout: float | None,
        on_event: Callable[[Event], object] | None,
        setting: dict[str, Any],
    ) -> None:
        self.pid = os.getpid()
        self.broken: BrokenProcessPool | None = None
        self.killing = False
        self._on_event = on_event
        self._thread: threading.Thread | None = None
        self._start_lock = threading.RLock()  # on_event, a finalizer or a signal may come back
        self._ended = False
        # Workers whose initializer failed, and the tracebacks. Each is given time to end by
        # itself, and to write what it logged.
        self._unusable: dict[str, str] = {}
        self._unusable_until = 0.0
        self._rows: list[WorkerReport] = []
        with contextlib.ExitStack() as undo:
            self._tasks: Queue[Any] = Queue()
            undo.callback(self._tasks.close)
            self._answers: Queue[Any] = Queue()
            undo.callback(self._answers.close)
            self._registry = Registry(slots := PoolSlots(number))
            undo.callback(self._registry.close)
            self._lifeline = Lifeline()
            undo.pop_all()
        self._slots = slots
        slots.tell(
            self.pid,
            process_start_ticks(self.pid),
            *(queue._identity()[1] for queue in (self._tasks, self._answers)),
        )
        self.workers = ChildWorkers(
            self._registry.entries,
            number,
            run_pool_worker,
            (self._tasks, self._answers, slots, self._lifeline, setting),
            context,
            at_once=context.get_start_method() == "fork",
            prefix="shmring-worker-",
            on_start=self._started if on_event is not None else None,
        )
        self.dispatcher = Dispatcher(
            self._tasks,
            self._answers,
            self.workers,
            floor=number + 1,
            task_timeout=task_timeout,
            memory_limit=setting["memory_limit"],
            death=BrokenTask,
        )
        self.dispatcher.on_message = self._heard
        self.dispatcher.on_event = self._happened
        self._exit = Exit(self, priority=10)
        _managers.add(self)

    # -- from any thread -------------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Take in a task, starting workers and the thread if need be.

        Raises:
            BrokenProcessPool: the pool is broken.
            RuntimeError: it was shut down, or was made in another process.
        """
        if not self.dispatcher.submit(task):
            raise self._refusal()
        if self.workers.missing or self._thread is None:  # Ctrl-C may come between the two
            self._start(len(self.dispatcher.table))

    def _refusal(self) -> Exception:
        if self.pid != os.getpid():
            return RuntimeError(
                f"this pool belongs to process {self.pid}, from which {os.getpid()} was forked: "
                "make one here"
            )
        return self.broken or RuntimeError("cannot schedule new futures after shutdown")

    def _start(self, unanswered: int) -> None:
        """Start workers in the calling thread: the first result then comes soonest."""
        with self._start_lock:
            if self._ended:
                return
            try:
                self.workers.start(unanswered)
            except Exception as error:
                self._break(str(error), error)
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, name="shmring-pool-manager", daemon=True
                )
                if self._thread is None:  # making one may collect garbage, which may submit
                    self._thread = thread
                    thread.start()

    def close(self, cancel: bool) -> None:
        """Let the work that is there be done, or cancel what no worker has taken; then end."""
        if self.pid != os.getpid():
            return
        dispatcher = self.dispatcher
        with dispatcher.lock:
            dispatcher.closed = True
        if cancel and not self._ended:
            with contextlib.suppress(RingClosed):
                dispatcher.cancel_all()
        with self._start_lock:
            if self._thread is not None:
                self._wake()
            elif len(dispatcher.table):  # its submit() has not come so far
                self._start(len(dispatcher.table))
            else:
                self._end()

    def kill(self, signum: int) -> None:
        """End all workers by a signal; tasks that have no answer fail."""
        if self.pid == os.getpid() and not self._ended:
            self.dispatcher.closed = self.killing = True
            self.workers.signal_all(signum)
            self._wake()

    def join(self) -> None:
        """Wait for the end of the thread."""
        thread = self._thread
        if thread not in (None, threading.current_thread()) and self.pid == os.getpid():
            thread.join()

    def statistics(self) -> PoolStatistics:
        """Counts at this moment."""
        table = self.dispatcher.table
        waiting = len(table) if self._ended else len(table.backlog) + self._tasks.qsize()
        return PoolStatistics(
            submitted=table.submitted,
            answered=table.answered_count,
            waiting=waiting,
            retried=table.retried,
            died=self.dispatcher.died,
            workers=tuple(self._rows if self._ended else self.workers.reports()),
        )

    def _wake(self) -> None:
        with contextlib.suppress(RingClosed, Full):
            self._answers.put((None, "wake", "", None), False)

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        told = (0, 0, 0, 0)  # to observers
        try:
            while not self.killing and self.broken is None:
                table = self.dispatcher.table
                if self.dispatcher.closed and not len(table):
                    break
                self.dispatcher.turn(_SLICE if len(table) else _IDLE_SLICE)
                counts = table.submitted, table.answered_count, table.retried, self.dispatcher.died
                if counts != told:
                    self._slots.tell(*counts, start=4)
                    told = counts
                if self._unusable and time.monotonic() > self._unusable_until:
                    self._break_for(next(iter(self._unusable)))
        except BaseException as error:
            self._break(f"the manager of the pool failed: {error!r}", error)
            _LOG.exception("the manager of a pool failed")  # last: a handler of it may raise
        try:
            if self.killing:
                self._break("the workers of the pool were terminated by the caller", None)
            grace = _GRACE if self.broken is None else 0.0
            self.dispatcher.dismiss(lambda: self._tasks.put(STOP, False), grace)
            self.workers.stop(0.0 if self.broken is None else 1.0)
        finally:
            with self._start_lock:
                self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._exit.cancel()
        self._rows = self.workers.reports()
        self.workers.close()
        for each in (self._tasks, self._answers, self._registry, self._lifeline):
            each.close()

    def _break(self, reason: str, cause: BaseException | None) -> None:
        """Fail all tasks; the pool takes no more."""
        error = BrokenProcessPool(reason)
        error.__cause__ = cause
        dispatcher = self.dispatcher
        with dispatcher.lock:
            if self.broken is None:
                self.broken = error
            dispatcher.closed = True
            self.workers.number = 0  # none is to be started any more
            failed = dispatcher.table.take_all()
        for task in failed:
            task.finish(Failure(error))

    def _heard(self, kind: str, worker_id: str, content: Any) -> None:
        if kind == "log":
            content.processName = worker_id
            logger = logging.getLogger(content.name)
            if logger.isEnabledFor(content.levelno):
                try:
                    logger.handle(content)
                except Exception as error:  # of a filter
                    sys.stderr.write(f"a log record of {worker_id} is lost: {error!r}\n")
        elif kind == "broken":
            self._unusable[worker_id] = content
            self._unusable_until = time.monotonic() + _FLUSH_S

    def _started(self, worker_id: str, pid: int) -> None:
        self._report(Event("started", worker_id, pid, None))

    def _happened(self, kind: str, task: int | None, about: Any) -> None:
        name = about.worker_id if isinstance(about, Departure) else about.process_id
        self._report(Event(kind, name, about.pid, task))
        if name in self._unusable:
            self._break_for(name)

    def _break_for(self, name: str) -> None:
        """Break the pool because an initializer failed."""
        reason = self._unusable[name]
        self._break(f"the initializer of {name} failed, the pool is not usable:\n{reason}", None)

    def _report(self, event: Event) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                _LOG.exception("on_event raised at %r", event)

    def _leave(self) -> None:
        """At the end of the program: as ``shutdown()``; after Ctrl-C at once."""
        if self.pid != os.getpid():
            return
        if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
            self.kill(9)
        else:
            self.close(cancel=False)
        self.join()


_managers: weakref.WeakSet[Manager] = weakref.WeakSet()
_inherited: list[Manager] = []  # of the parent, never to be collected here


def _keep_in_child() -> None:
    _inherited.extend(_managers)
    _managers.clear()
    for manager in _inherited:
        manager._ended = True
        manager._start_lock = threading.RLock()
        manager._exit.cancel()
        manager.dispatcher.disown()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_in_child)

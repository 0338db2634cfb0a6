"""Coordinator: tasks to workers of a namespace, each answered exactly once.

It runs a :class:`~shmring.tasks.dispatcher.Dispatcher` in the calling thread, over
queues that have names, so that workers can come from anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from shmring._backend import backend
from shmring.arguments import checked_int, checked_timeout
from shmring.coordinator.external_workers import ExternalWorkers
from shmring.coordinator.worker import (
    DATA_BUFFER,
    DATA_BUFFER_BYTES,
    RESULT_QUEUE,
    run_spawned_worker,
)
from shmring.errors import InvalidArgument, NotSupportedByFallback, ShmringError
from shmring.ipc.high_performance_ipc import HighPerformanceIPC, IPCStatistics
from shmring.ipc.message import MessageType
from shmring.ipc.registry import ProcessRole
from shmring.tasks.channel import PoolCodec
from shmring.tasks.dispatcher import Dispatcher
from shmring.tasks.task_loop import echo
from shmring.tasks.task_table import Failure, Task
from shmring.tasks.workers import ChildWorkers, WorkerReport, Workers

__all__ = ["Progress", "Report", "WorkerReport", "coordinator_process"]

# How long to wait for an answer before looking after the workers, in seconds.
_SLICE = 0.02
# After an error or Ctrl-C: how long workers may take to finish what they are at, in seconds.
_HASTE = 1.0
# Tasks taken from the iterable ahead of the answers: the dispatcher chooses among them.
_TAKEN_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        done: how many tasks are answered.
        total: how many there are; None where `tasks` has no length.
        retried: how often a task was tried again because its worker died.
        pids: the workers.
    """

    done: int
    total: int | None
    retried: int
    pids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What came out of a run.

    Attributes:
        results: in the order of the tasks; with ``return_exceptions`` an
            exception stands where a task failed.
        workers: one row for each worker that there was, also for the dead.
        retried: how often a task was tried again because its worker died.
        died: how many workers died before they were dismissed.
        heartbeats: how many HEARTBEAT messages came.
        seconds: how long it took.
        stats: :meth:`HighPerformanceIPC.get_stats` of the coordinator at the end.
    """

    results: list[Any]
    workers: list[WorkerReport]
    retried: int
    died: int
    heartbeats: int
    seconds: float
    stats: IPCStatistics


def coordinator_process(
    ipc: HighPerformanceIPC,
    num_workers: int,
    *,
    tasks: Iterable[Any] = (),
    spawn: bool = False,
    handler: Callable[[Any], Any] | None = None,
    method: str | None = None,
    queue_name: str = "task_queue",
    max_retries: int = 2,
    task_timeout: float | None = None,
    return_exceptions: bool = False,
    progress: Callable[[Progress], object] | None = None,
    shared_data: bytes | bytearray | memoryview = b"",
    worker_timeout: float = 30.0,
    shutdown_timeout: float = 10.0,
) -> Report:
    """Have every task answered by workers, then dismiss them.

    It makes a task queue, a result queue ("result_queue") and 1 MiB of shared
    memory ("data_buffer") in the namespace of ``ipc``, and removes them at the
    end, however it ends; so there is one coordinator a namespace at a time.
    Workers are :func:`~shmring.worker_process`; each gets one SHUTDOWN
    message at the end.

    Args:
        ipc: the caller's; it stays open.
        num_workers: how many workers there are to be.
        tasks: what the handlers are called with, one at a time; taken as needed.
        spawn: whether to start, replace and join the workers here. Without it the
            tasks of the dead are put back, and starting workers is the caller's.
        handler: with ``spawn`` only: what the workers do; None returns the task.
        method: with ``spawn`` only: the start method, None for the platform's.
        queue_name: the name of the task queue.
        max_retries: how often a task whose worker died is tried again; 0 is at
            most once.
        task_timeout: with ``spawn`` only: a worker that is at one task for longer,
            in seconds, is killed, and the task fails.
        return_exceptions: put failures among the results and go on; otherwise the
            first one ends the run and is raised.
        progress: called after each answer, in this thread.
        shared_data: what the data buffer holds when the workers come; at most 1 MiB.
        worker_timeout: without ``spawn``: how long to do without any worker, in seconds.
        shutdown_timeout: how long dismissed workers may take to end, in seconds.

    Returns:
        the results and what is to be known about the run.

    Raises:
        InvalidArgument: an impossible argument; a handler that no process can be sent.
        RingExists: another coordinator is at work in this namespace.
        WorkerDied: each worker that ran a task died.
        TaskTimeout: a task ran longer than ``task_timeout``.
        NotSupportedByFallback: a worker died, and this is not the ring: what it
            held cannot be known.
        ShmringError: no worker came, or they die before they have done anything.
        BaseException: whatever a handler raised, the remote traceback as its cause.
    """
    num_workers = checked_int(num_workers, "num_workers", 1)
    max_retries = checked_int(max_retries, "max_retries", 0)
    task_timeout = checked_timeout(task_timeout, "task_timeout")
    worker_timeout = checked_timeout(worker_timeout, "worker_timeout")
    shutdown_timeout = checked_timeout(shutdown_timeout, "shutdown_timeout")
    if not spawn:
        only = {"handler": handler, "method": method, "task_timeout": task_timeout}
        for name, value in only.items():
            if value is not None:
                raise InvalidArgument(
                    f"{name}={value!r} is for spawn=True: others start the workers"
                )
    if task_timeout is not None and backend != "ring":
        raise NotSupportedByFallback(
            f"task_timeout={task_timeout:g}: a worker cannot be killed safely on the fallback, "
            "its death may wedge the pipe"
        )
    nbytes = memoryview(shared_data).nbytes
    if nbytes > DATA_BUFFER_BYTES:
        raise InvalidArgument(
            f"shared_data of {nbytes} bytes: the data buffer holds {DATA_BUFFER_BYTES}"
        )
    was_present = ipc.is_registered
    slot = ipc.register(ProcessRole.COORDINATOR)
    try:
        with contextlib.ExitStack() as stack:
            queues = _open(ipc, queue_name, shared_data, stack)
            workers: Workers
            if spawn:
                workers = _children(ipc, num_workers, queue_name, handler or echo, method)
            else:
                workers = ExternalWorkers(ipc.registry_entries, num_workers, worker_timeout)
            dispatcher = Dispatcher(
                *queues, workers, floor=num_workers + 1, task_timeout=task_timeout
            )
            run = _Run(ipc, queue_name, dispatcher, tasks, max_retries, return_exceptions, progress)
            return run.run(num_workers, shutdown_timeout)
    finally:
        slot.set_role(ProcessRole.PEER)
        if not was_present:
            ipc.unregister()


def _open(
    ipc: HighPerformanceIPC,
    queue_name: str,
    shared_data: bytes | bytearray | memoryview,
    stack: contextlib.ExitStack,
) -> tuple[Any, Any]:
    """Make the task queue last: a worker that finds it finds the rest too.

    What is closed at the end is what was made here: a name that is taken may be the caller's.
    """
    ipc.create_shared_memory(DATA_BUFFER, DATA_BUFFER_BYTES)
    stack.callback(ipc.close_shared_memory, DATA_BUFFER)
    if len(shared_data):
        ipc.write_shared_data(DATA_BUFFER, shared_data)
    for name in (RESULT_QUEUE, queue_name):
        ipc._create_queue(name, 0, PoolCodec())
        stack.callback(ipc.close_message_queue, name)
    return ipc.message_queues[queue_name], ipc.message_queues[RESULT_QUEUE]


def _children(
    ipc: HighPerformanceIPC,
    number: int,
    queue_name: str,
    handler: Callable[[Any], Any],
    method: str | None,
) -> ChildWorkers:
    context: Any = multiprocessing.get_context(method)
    inherited = ipc if context.get_start_method() == "fork" else None
    args = queue_name, handler, ipc.namespace, inherited
    return ChildWorkers(ipc.registry_entries, number, run_spawned_worker, args, context)


class _Run:
    """One call of :func:`coordinator_process`."""

    def __init__(
        self,
        ipc: HighPerformanceIPC,
        queue_name: str,
        dispatcher: Dispatcher,
        tasks: Iterable[Any],
        max_retries: int,
        return_exceptions: bool,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self._ipc = ipc
        self._queue_name = queue_name
        self._dispatcher = dispatcher
        self._tasks: Iterator[Any] = iter(tasks)
        self._total = len(tasks) if isinstance(tasks, Sized) else None
        self.max_retries = max_retries
        self._return_exceptions = return_exceptions
        self._progress = progress
        self._exhausted = False
        self._results: dict[int, Any] = {}
        self._failure: BaseException | None = None
        self._heartbeats = 0
        dispatcher.on_message = self._heard

    def run(self, number: int, shutdown_timeout: float) -> Report:
        started = time.monotonic()
        ipc, dispatcher, table = self._ipc, self._dispatcher, self._dispatcher.table
        grace = _HASTE  # unless all goes well
        try:
            dispatcher.workers.start(number)
            self._work()
            grace = shutdown_timeout
        finally:
            self._dismiss(grace)
        with ipc._guard:
            ipc.stats["messages_sent"] += table.submitted
            ipc.stats["messages_received"] += table.answered_count + self._heartbeats
            if backend == "ring":
                for queue in ipc.message_queues.values():
                    ipc.stats["bytes_transferred"] += queue.statistics().bytes_put
        if self._failure is not None and not self._return_exceptions:
            raise self._failure
        return Report(
            results=[self._results[number] for number in range(table.submitted)],
            workers=dispatcher.workers.reports(),
            retried=table.retried,
            died=dispatcher.died,
            heartbeats=self._heartbeats,
            seconds=time.monotonic() - started,
            stats=ipc.get_stats(),
        )

    def _work(self) -> None:
        dispatcher = self._dispatcher
        while True:
            self._take_tasks()
            if self._exhausted and not len(dispatcher.table):
                return
            if self._failure is not None and not self._return_exceptions:
                return
            dispatcher.turn(_SLICE)

    def _take_tasks(self) -> None:
        """Take tasks from the iterable, a few at a time, as long as there is room for them."""
        backlog = self._dispatcher.table.backlog
        while not self._exhausted and len(backlog) < _TAKEN_AT_ONCE:
            for _ in range(_TAKEN_AT_ONCE):
                try:
                    payload = next(self._tasks)
                except StopIteration:
                    self._exhausted = True
                    return
                self._dispatcher.submit(_RunTask(self, payload))

    def answered(self, number: int, outcome: Any) -> None:
        if type(outcome) is Failure:
            if self._failure is None:
                self._failure = outcome.error
            outcome = outcome.error
        self._results[number] = outcome
        if self._progress is not None:
            table = self._dispatcher.table
            pids = self._dispatcher.workers.pids()
            self._progress(Progress(len(self._results), self._total, table.retried, pids))

    def _heard(self, kind: str, worker_id: str, content: Any) -> None:
        self._heartbeats += kind == "beat"

    def _dismiss(self, grace: float) -> None:
        """One SHUTDOWN message a worker, then wait for their end, or see to it."""
        dispatcher, workers = self._dispatcher, self._dispatcher.workers
        try:
            with contextlib.suppress(ShmringError):
                if backend == "ring":
                    dispatcher.recall()  # after an error tasks are left
                dispatcher.dismiss(
                    lambda: self._ipc._send_control(self._queue_name, MessageType.SHUTDOWN), grace
                )
                if backend == "ring":
                    dispatcher.bring_in_departed()  # a death beside the last answer counts too
        finally:
            workers.stop(0.0 if workers.all_gone() else _HASTE)


class _RunTask(Task):
    """A task of a run."""

    def __init__(self, run: _Run, payload: Any) -> None:
        super().__init__(None, (payload,), {}, run.max_retries)
        self._run = run

    def finish(self, outcome: Any) -> None:
        self._run.answered(self.number, outcome)

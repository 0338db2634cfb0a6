"""The coordinator: hands tasks to workers, and has each of them answered exactly once.

::

                      +-----------------------------------------------+
    tasks ----------> | ledger: open tasks, attempts, positions       | ----------> Report
                      +---+---------------------^-----------^---------+
       hand out: a few    | put, returns the    | answered  | lost(position)
       more than are      | message's position  |           |
       being worked on    v                     |           |
                      task queue            result queue    |  dead worker: lock both sides
                          |                     ^           |  (recovers them), drain the
                          | get, writes a claim | put       |  results, read its claim
                          v                     |           |
                      worker: claim, handler, answer, release --- registry: heartbeats, state

Execution is at least once, answers are exactly once: a task whose answer was
committed never runs again, one whose worker died with a claim on it runs
again, and one that only stood in the queue is nobody's fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sized
from multiprocessing.process import BaseProcess
from typing import Any

from shmring._backend import backend
from shmring.arguments import checked_timeout
from shmring.errors import (
    EncodeError,
    Full,
    InvalidArgument,
    MessageTooLarge,
    NotSupportedByFallback,
    PeerDied,
    RemoteError,
    ShmringError,
    _RemoteTraceback,
)
from shmring.ipc.high_performance_ipc import HighPerformanceIPC, IPCStatistics
from shmring.ipc.message import Envelope, Message, MessageType
from shmring.ipc.registry import ProcessRole
from shmring.pool.task_table import Failure, Ledger
from shmring.pool.worker import DATA_BUFFER, DATA_BUFFER_BYTES, RESULT_QUEUE, echo
from shmring.pool.workers import (
    Departure,
    SpawnedWorkers,
    VisitingWorkers,
    WorkerReport,
    Workers,
)
from shmring.process.liveness import is_process_stopped

__all__ = ["Progress", "Report", "WorkerReport", "coordinator_process"]

_LOG = logging.getLogger("shmring")

# How long to wait for a result before looking after the workers, in seconds.
_SLICE = 0.05
# After an error or Ctrl-C: how long workers may take to finish what they hold, in seconds.
_HASTE = 1.0
# How often to look whether dismissed workers that are not our children have gone, in seconds.
_LOOK = 0.01
# How often to look for claims of workers that came and went unseen, in seconds.
_STRAYS = 1.0
# A worker that neither works nor beats for so long is named in the log, in seconds.
_SILENCE = 10.0
# Tasks that wait in the queue: enough to keep every worker busy, but no hoard of memory.
_AHEAD_A_WORKER = 8
_AHEAD_NBYTES = 8 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; ``total`` is None for tasks without a length."""

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
    Workers are :func:`~shmring.pool.worker.worker_process`; each gets one SHUTDOWN
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
    _check_number("num_workers", num_workers, 1)
    _check_number("max_retries", max_retries, 0)
    task_timeout = checked_timeout(task_timeout, "task_timeout")
    worker_timeout = checked_timeout(worker_timeout, "worker_timeout")
    shutdown_timeout = checked_timeout(shutdown_timeout, "shutdown_timeout")
    if not spawn:
        for name, value in (
            ("handler", handler),
            ("method", method),
            ("task_timeout", task_timeout),
        ):
            if value is not None:
                raise InvalidArgument(
                    f"{name}={value!r} is for spawn=True: others start the workers"
                )
    if task_timeout is not None and backend != "ring":
        raise NotSupportedByFallback(
            f"task_timeout={task_timeout:g}: a worker cannot be killed safely on the fallback, "
            "its death may wedge the pipe"
        )
    if memoryview(shared_data).nbytes > DATA_BUFFER_BYTES:
        raise InvalidArgument(
            f"shared_data of {memoryview(shared_data).nbytes} bytes: "
            f"the data buffer holds {DATA_BUFFER_BYTES}"
        )
    was_present = ipc.is_registered
    slot = ipc.register(ProcessRole.COORDINATOR)
    try:
        workers: Workers
        if spawn:
            workers = SpawnedWorkers(ipc, num_workers, queue_name, handler or echo, method)
        else:
            workers = VisitingWorkers(ipc, num_workers, worker_timeout)
        run = _Run(
            ipc=ipc,
            queue_name=queue_name,
            ledger=Ledger(tasks, max_retries),
            workers=workers,
            most_ahead=num_workers * _AHEAD_A_WORKER,
            least_ahead=num_workers + 1,
            task_timeout=task_timeout,
            stop_at_failure=not return_exceptions,
            progress=progress,
            total=len(tasks) if isinstance(tasks, Sized) else None,
        )
        return run.run(shared_data, shutdown_timeout)
    finally:
        slot.set_role(ProcessRole.PEER)
        if not was_present:
            ipc.unregister()


@dataclasses.dataclass(slots=True)
class _Run:
    """One call of :func:`coordinator_process`."""

    ipc: HighPerformanceIPC
    queue_name: str
    ledger: Ledger
    workers: Workers
    most_ahead: int
    least_ahead: int
    task_timeout: float | None
    stop_at_failure: bool
    progress: Callable[[Progress], object] | None
    total: int | None
    died: int = 0
    heartbeats: int = 0
    useful: set[str] = dataclasses.field(default_factory=set)
    silent: set[int] = dataclasses.field(default_factory=set)
    next_look: float = 0.0
    next_look_for_strays: float = 0.0

    def run(self, shared_data: bytes | bytearray | memoryview, shutdown_timeout: float) -> Report:
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._open(shared_data, stack)
            grace = _HASTE  # unless all goes well
            try:
                self._work()
                grace = shutdown_timeout
            finally:
                self._dismiss(grace)
            if self.stop_at_failure and self.ledger.first_failure is not None:
                raise self.ledger.first_failure
            return Report(
                results=self.ledger.results(exceptions=True),
                workers=self.workers.reports(),
                retried=self.ledger.retried,
                died=self.died,
                heartbeats=self.heartbeats,
                seconds=time.monotonic() - started,
                stats=self.ipc.get_stats(),
            )

    def _open(
        self, shared_data: bytes | bytearray | memoryview, stack: contextlib.ExitStack
    ) -> None:
        """Make the task queue last: who finds it finds the rest too.

        What is closed at the end is what was made here: a name that is taken may be the caller's.
        """
        self.ipc.create_shared_memory(DATA_BUFFER, DATA_BUFFER_BYTES)
        stack.callback(self.ipc.close_shared_memory, DATA_BUFFER)
        if len(shared_data):
            self.ipc.write_shared_data(DATA_BUFFER, shared_data)
        for queue_name in (RESULT_QUEUE, self.queue_name):
            self.ipc.create_message_queue(queue_name)
            stack.callback(self.ipc.close_message_queue, queue_name)

    def _work(self) -> None:
        ledger = self.ledger
        self.workers.start()
        while True:
            self._hand_out()
            if ledger.finished or (self.stop_at_failure and ledger.first_failure is not None):
                return
            self._take_in(_SLICE)
            now = time.monotonic()
            if now >= self.next_look:
                self._look_after_workers()
                self.next_look = now + _SLICE

    # -- tasks and results ----------------------------------------------------------------

    def _hand_out(self) -> None:
        ledger = self.ledger
        while ledger.outstanding < self.least_ahead or (
            ledger.outstanding < self.most_ahead and ledger.outstanding_nbytes < _AHEAD_NBYTES
        ):
            chosen = ledger.next_task()
            if chosen is None:
                return
            number, attempt, payload = chosen
            try:
                position, nbytes = self._put(Envelope.seal(number, attempt, True, payload))
            except Full:
                ledger.unsent(number)
                return
            except (EncodeError, MessageTooLarge) as error:
                self._answered(number, Failure(error))
                if self.stop_at_failure:
                    return
            else:
                ledger.sent(number, position, nbytes)

    def _put(self, task: Envelope) -> tuple[int, int]:
        """Put one task; returns its position, for claims, and its size in bytes."""
        queue = self.ipc.message_queues[self.queue_name]

        def put(message: Message) -> tuple[int, int]:
            if backend == "ring":
                position: int = queue._put_position(message, timeout=_SLICE)
            else:
                queue.put(message, True, _SLICE)
                position = task.number  # nobody claims anything here
            return position, message.nbytes

        return self.ipc.send_by(put, MessageType.DATA, task)

    def _take_in(self, timeout: float, peers: list[BaseProcess] | None = None) -> None:
        """Wait for one message, then take all that are there.

        PeerDied: all of the peers are dead, and nothing is left to take.
        """
        message = self.ipc.receive_message(RESULT_QUEUE, timeout, peers=peers)
        while message is not None:
            self._take(message)
            message = self.ipc.receive_message(RESULT_QUEUE, 0)

    def _take(self, message: Message) -> None:
        if message.msg_type is MessageType.HEARTBEAT:
            self.heartbeats += 1
        elif message.msg_type is MessageType.DATA:
            if isinstance(message.data, Envelope):
                self.useful.add(message.sender_id)
                self._answered(message.data.number, _opened(message.data))
            else:
                _LOG.warning("%s sent something that is no result", message.sender_id)

    def _answered(self, number: int, result: Any) -> None:
        if self.ledger.answered(number, result):
            self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(
                Progress(self.ledger.done, self.total, self.ledger.retried, self.workers.pids())
            )

    # -- workers --------------------------------------------------------------------------

    def _look_after_workers(self) -> None:
        departed = self.workers.departed()
        if departed:
            self._settle(departed)
        self._look_for_strays()
        self._look_for_overdue()
        self.workers.start()

    def _settle(self, departed: list[Departure]) -> None:
        """Put back what the departed held, and nothing else."""
        if backend != "ring":
            self._take_in(0)
            worst = departed[0]
            raise NotSupportedByFallback(
                f"{worst.worker_id} (process {worst.pid}) ended before it was dismissed; which "
                "task it held cannot be known on the fallback, and a pipe may be left wedged"
            )
        queue = self.ipc.message_queues[self.queue_name]
        # In this order: reading the claims locks both sides once, which recovers what the dead
        # held of them; then the results, for an answer that was committed counts; then the claim.
        claims = queue._claims()
        self._take_in(0)
        for departure in departed:
            lost_any = False
            for slot, pid, start_ticks, key, low, high in claims:
                if not departure.held(pid, start_ticks, key):
                    continue
                if low < high:
                    lost_any = True
                    self._lost(low, departure)
                queue._claim_free(slot)
            self.died += not departure.clean
            self.workers.bury(departure, lost_any or departure.worker_id in self.useful)

    def _look_for_strays(self) -> None:
        now = time.monotonic()
        if backend == "ring" and now >= self.next_look_for_strays:
            self.next_look_for_strays = now + _STRAYS
            claims = self.ipc.message_queues[self.queue_name]._claims()
            strays = self.workers.strays(
                (pid, start_ticks, key) for _, pid, start_ticks, key, _, _ in claims
            )
            if strays:
                self._settle(strays)

    def _lost(self, position: int, departure: Departure) -> None:
        before = self.ledger.done
        exitcode = self.workers.exitcode_of(departure.pid)
        number = self.ledger.lost(position, departure.pid, exitcode)
        if number is not None:
            _LOG.warning(
                "%s (process %d, exit code %s) died at task %d",
                departure.worker_id,
                departure.pid,
                exitcode,
                number,
            )
        if self.ledger.done > before:
            self._tell()

    def _look_for_overdue(self) -> None:
        now = time.monotonic_ns()
        for entry in self.workers.living():
            seconds = (now - entry.task_started_ns) / 1e9
            # A handler may work for long without a beat: then only who is stopped is reported.
            if (
                entry.is_silent(_SILENCE)
                and entry.key not in self.silent
                and (entry.task is None or is_process_stopped(entry.pid))
            ):
                self.silent.add(entry.key)
                _LOG.warning(
                    "%s (process %d) is silent for %.1f s: hung, stopped or starved; "
                    "its tasks are not given to others",
                    entry.process_id,
                    entry.pid,
                    entry.silent_for(),
                )
            if (
                entry.task is not None
                and self.task_timeout is not None
                and seconds > self.task_timeout
                and self.workers.kill(entry)
            ):
                self.ledger.expire(entry.task, self.task_timeout)

    def _dismiss(self, grace: float) -> None:
        """One SHUTDOWN message a worker, then wait for their end, or see to it."""
        try:
            with contextlib.suppress(ShmringError, Full):
                self._discard_tasks()
                for _ in range(self.workers.to_dismiss()):
                    self.ipc.send_message(
                        self.queue_name, MessageType.SHUTDOWN, None, timeout=_SLICE
                    )
                self._wait_until_gone(grace)
        finally:
            self.workers.stop(0.0 if self.workers.all_gone() else _HASTE)

    def _discard_tasks(self) -> None:
        """After an error tasks are left; nobody is to start them any more."""
        while self.ipc.receive_message(self.queue_name, 0) is not None:
            pass

    def _wait_until_gone(self, grace: float) -> None:
        """Results that still come are taken, so that no worker waits for room."""
        deadline = time.monotonic() + grace
        children = self.workers.children()
        left = grace
        with contextlib.suppress(PeerDied):
            while not self.workers.all_gone() and left > 0:
                self._take_in(min(left, _LOOK) if children is None else left, children)
                left = deadline - time.monotonic()
        self._take_in(0)


def _opened(sealed: Envelope) -> Any:
    try:
        value = sealed.open()
    except Exception as error:
        return Failure(error)
    if sealed.good:
        return value
    match value:
        case (BaseException() as raised, str() as text):
            raised.__cause__ = _RemoteTraceback(text)
            return Failure(raised)
    return Failure(RemoteError(f"a worker reported a failure that is none: {value!r}"))


def _check_number(name: str, value: int, least: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: an int is needed, not {type(value).__name__}")
    if value < least:
        raise InvalidArgument(f"{name}={value}: at least {least} is needed")

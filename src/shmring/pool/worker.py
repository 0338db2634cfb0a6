"""The worker: takes a task, answers it, takes the next.

::

    task queue --take----------> claim [low, high): "this is mine", in shared memory,
        |                          |                written before the task leaves the queue
        |                          v
        |                       handler(task) --raises--> exception and traceback, as text
        |                          |                                 |
        |                          v                                 v
        |                       result ------------commit-----> result queue
        |                          |
        +<------next-------- claim released: answered

While it waits it stores heartbeats in the registry, sends a HEARTBEAT message now
and then, and looks whether its coordinator is still there: without one it
exits by itself.  A worker that dies between claim and release leaves the claim
behind, and with it the one task that another must do.
"""

from __future__ import annotations

import contextvars
import dataclasses
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from shmring._backend import backend
from shmring.errors import (
    DecodeError,
    Full,
    MessageTooLarge,
    RemoteError,
    RingClosed,
    RingNotFound,
)
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.message import Envelope, Message, MessageType
from shmring.ipc.registry import ProcessRole, RegistrySlot

__all__ = [
    "DATA_BUFFER",
    "DATA_BUFFER_BYTES",
    "RESULT_QUEUE",
    "Worker",
    "current_worker",
    "echo",
    "run_spawned_worker",
    "worker_process",
]

RESULT_QUEUE = "result_queue"
DATA_BUFFER = "data_buffer"
DATA_BUFFER_BYTES = 1 << 20

# A waiting worker beats, and looks after its coordinator, this often, in seconds.
_SLICE = 0.25

_current: contextvars.ContextVar[Worker | None] = contextvars.ContextVar("_current", default=None)


def echo(task: Any) -> Any:
    """The handler that is used when none is given: the task is its own result.

    Args:
        task: anything.

    Returns:
        the same.
    """
    return task


def current_worker() -> Worker | None:
    """The worker in whose handler the caller runs.

    Returns:
        the worker, for its ``beat()`` and its ``ipc``; None outside of a handler.
    """
    return _current.get()


@dataclasses.dataclass(frozen=True, slots=True)
class _CoordinatorWatch:
    """Whom the worker works for, as that process stood in the registry."""

    index: int
    incarnation: int


class Worker:
    """One worker; :func:`worker_process` runs it, a handler reaches it by :func:`current_worker`.

    Attributes:
        ipc: the worker's own, with the two queues and the data buffer connected.
        answered: how many tasks it has answered.
    """

    def __init__(
        self, ipc: HighPerformanceIPC, task_queue: str, handler: Callable[[Any], Any]
    ) -> None:
        self.ipc = ipc
        self.answered = 0
        self._task_queue = task_queue
        self._handler = handler
        self._slot: RegistrySlot = ipc.register(ProcessRole.WORKER)
        self._watched: _CoordinatorWatch | None = None
        self._heartbeat_due = 0.0
        self._look_due = 0.0

    def beat(self) -> None:
        """Say in the registry that the worker is alive; a long handler may call this."""
        self._slot.beat()

    def run(self, timeout: float) -> None:
        """Connect, work until SHUTDOWN or until the coordinator is gone.

        Args:
            timeout: how long to wait for the coordinator's queues, in seconds.

        Raises:
            RingNotFound: the coordinator did not make its queues until the deadline.
        """
        self.ipc.connect_message_queue(self._task_queue, timeout)
        try:
            self.ipc.connect_message_queue(RESULT_QUEUE, 0.0)
            self.ipc.connect_shared_memory(DATA_BUFFER, DATA_BUFFER_BYTES)
        except RingNotFound:
            return  # the coordinator made them first and removed them first: it has ended
        self._watched = self._find_coordinator()
        queue = self.ipc.message_queues[self._task_queue]
        claim = queue._claim_open(self._slot.key) if backend == "ring" else None
        try:
            self._work(queue, claim)
        except (RingClosed, RingNotFound):
            self._look_due = 0.0
            if not self._coordinator_is_gone():
                raise
        # Not after an error: the claim then says which task is unanswered.
        if claim is not None:
            queue._claim_close(claim)

    def _work(self, queue: Any, claim: int | None) -> None:
        while not self._coordinator_is_gone():
            message = self._next_message()
            if message is None:
                continue
            if message.msg_type is MessageType.DATA:
                self._answer(message)
            if claim is not None:
                queue._claim_release(claim)
            if message.msg_type is MessageType.SHUTDOWN:
                return

    def _next_message(self) -> Message | None:
        now = time.monotonic()
        if now >= self._heartbeat_due:
            self._send(MessageType.HEARTBEAT, None)
            self._heartbeat_due = now + self.ipc.heartbeat_interval
        return self.ipc.receive_message(self._task_queue, _SLICE)

    def _answer(self, message: Message) -> None:
        sealed = message.data
        if not isinstance(sealed, Envelope):
            raise DecodeError(f"a task is an Envelope, not {type(sealed).__name__}: who sent this?")
        number, attempt = sealed.number, sealed.attempt
        self._slot.working(number)
        token = _current.set(self)
        try:
            answer = Envelope.seal(number, attempt, True, self._handler(sealed.open()))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            answer = _seal_error(number, attempt, error)
        finally:
            _current.reset(token)
        try:
            self._send(MessageType.DATA, answer)
        except MessageTooLarge as error:
            self._send(MessageType.DATA, _seal_error(number, attempt, error))
        self.answered += 1
        self._slot.count(tasks=1)
        self._slot.idle()

    def _send(self, msg_type: MessageType, data: Any) -> None:
        while True:
            try:
                self.ipc.send_message(RESULT_QUEUE, msg_type, data, timeout=_SLICE)
            except Full:
                if self._coordinator_is_gone():
                    raise RingClosed("the coordinator is gone, nobody takes results") from None
                continue
            if msg_type is MessageType.HEARTBEAT:
                self.ipc.last_heartbeat = time.time()
            return

    def _find_coordinator(self) -> _CoordinatorWatch | None:
        for entry in self.ipc.registry_entries():
            if entry.role is ProcessRole.COORDINATOR and not entry.is_dead():
                return _CoordinatorWatch(entry.index, entry.incarnation)
        return None

    def _coordinator_is_gone(self) -> bool:
        watched = self._watched
        if watched is None:
            return True
        now = time.monotonic()
        if now < self._look_due:  # it costs more than a small task
            return False
        self._look_due = now + _SLICE
        entry = self.ipc.registry_entry(watched.index)
        return (
            entry is None
            or entry.incarnation != watched.incarnation
            or entry.role is not ProcessRole.COORDINATOR
            or entry.is_dead()
        )


def worker_process(
    worker_id: int | str,
    coordinator_queue_name: str,
    *,
    handler: Callable[[Any], Any] = echo,
    namespace: str | None = None,
    connect_timeout: float = 30.0,
    heartbeat_interval: float = 5.0,
) -> int:
    """Work for a coordinator until it says SHUTDOWN, or is gone. Run it in a process of its own.

    Args:
        worker_id: the worker's name in the registry; a number N becomes "worker-N".
        coordinator_queue_name: the coordinator's ``queue_name``.
        handler: called with each task, returns its result. What it raises is
            raised by the coordinator; it does not end the worker.
        namespace: as for :class:`~shmring.HighPerformanceIPC`; the coordinator's.
        connect_timeout: how long to wait for the coordinator, in seconds.
        heartbeat_interval: how often to send a HEARTBEAT message while waiting,
            in seconds. Heartbeats in the registry are stored all the while.

    Returns:
        how many tasks this worker answered.

    Raises:
        RingNotFound: no coordinator made its queues until the deadline.
        InvalidArgument: an impossible worker_id or namespace.
    """
    process_id = f"worker-{worker_id}" if isinstance(worker_id, int) else worker_id
    with HighPerformanceIPC(process_id, namespace=namespace) as ipc:
        ipc.heartbeat_interval = heartbeat_interval
        worker = Worker(ipc, coordinator_queue_name, handler)
        worker.run(connect_timeout)
        return worker.answered


def run_spawned_worker(
    worker_id: str,
    queue_name: str,
    handler: Callable[[Any], Any],
    namespace: str,
    inherited: HighPerformanceIPC | None,
) -> None:
    """What a coordinator with ``spawn=True`` starts: a worker that leaves Ctrl-C to it.

    Args:
        worker_id: the worker's name.
        queue_name: the name of the task queue.
        handler: as for :func:`worker_process`.
        namespace: the coordinator's.
        inherited: the coordinator's own, after fork: a handle that nobody
            closes would keep its names in /dev/shm; None otherwise.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            # Blocked around the start; what a handler starts itself need not inherit that.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if inherited is not None:
        inherited.cleanup()
    worker_process(worker_id, queue_name, handler=handler, namespace=namespace)


def _seal_error(number: int, attempt: int, error: BaseException) -> Envelope:
    """Seal an exception with its traceback; one that cannot travel is described instead."""
    text = "".join(traceback.format_exception(error))
    try:
        sealed = Envelope.seal(number, attempt, False, (error, text))
        # Many exceptions can be pickled and not unpickled: better to find out here.
        sealed.open()
    except Exception:
        described = RemoteError(f"{type(error).__qualname__}: {error}")
        sealed = Envelope.seal(number, attempt, False, (described, text))
    return sealed

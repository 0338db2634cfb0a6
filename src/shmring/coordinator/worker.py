"""Workers of a coordinator: started here or anywhere, they find its queues by name."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from shmring.errors import RingNotFound
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.message import MessageType
from shmring.ipc.slot import ProcessRole
from shmring.tasks.channel import PoolCodec
from shmring.tasks.task_loop import SLICE, TaskLoop, echo

__all__ = [
    "DATA_BUFFER",
    "DATA_BUFFER_BYTES",
    "RESULT_QUEUE",
    "Worker",
    "run_spawned_worker",
    "worker_process",
]

RESULT_QUEUE = "result_queue"
DATA_BUFFER = "data_buffer"
DATA_BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Coordinator:
    """A coordinator, as it stood in the registry when the worker came."""

    ipc: HighPerformanceIPC
    index: int
    incarnation: int
    patience = SLICE

    def is_gone(self) -> bool:
        entry = self.ipc.registry_entry(self.index)
        return (
            entry is None
            or entry.incarnation != self.incarnation
            or entry.role is not ProcessRole.COORDINATOR
            or entry.is_dead()
        )


class Worker(TaskLoop):
    """A worker of a coordinator; :func:`worker_process` runs it.

    Attributes:
        ipc: the worker's own, with the data buffer connected.
    """

    ipc: HighPerformanceIPC

    def _send_heartbeat(self) -> None:
        self.ipc._send_control(RESULT_QUEUE, MessageType.HEARTBEAT)
        self.ipc.last_heartbeat = time.time()


def _find_coordinator(ipc: HighPerformanceIPC) -> _Coordinator | None:
    for entry in ipc.registry_entries():
        if entry.role is ProcessRole.COORDINATOR and not entry.is_dead():
            return _Coordinator(ipc, entry.index, entry.incarnation)
    return None


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
        slot = ipc.register(ProcessRole.WORKER)
        ipc._connect_queue(coordinator_queue_name, connect_timeout, PoolCodec())
        try:
            ipc._connect_queue(RESULT_QUEUE, 0.0, PoolCodec())
            ipc.connect_shared_memory(DATA_BUFFER, DATA_BUFFER_BYTES)
        except RingNotFound:
            return 0  # the coordinator made them first and removed them first: it has ended
        coordinator = _find_coordinator(ipc)
        if coordinator is None:
            return 0
        worker = Worker(
            ipc.process_id,
            ipc.message_queues[coordinator_queue_name],
            ipc.message_queues[RESULT_QUEUE],
            slot,
            coordinator,
            handler=handler,
            leaves_at_interrupt=True,
            heartbeat_interval=heartbeat_interval,
        )
        worker.ipc = ipc
        worker.run()
        return worker.answered


def run_spawned_worker(
    worker_id: str,
    index: int,
    queue_name: str,
    handler: Callable[[Any], Any],
    namespace: str,
    inherited: HighPerformanceIPC | None,
) -> None:
    """What a coordinator with ``spawn=True`` starts: a worker that leaves Ctrl-C to it.

    Args:
        index: not needed: it finds a slot itself.
        inherited: the coordinator's own, after fork: a handle that is not
            closed would keep its names in /dev/shm; None otherwise.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            # Blocked around the start; what a handler starts itself need not inherit that.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if inherited is not None:
        inherited.cleanup()
    worker_process(worker_id, queue_name, handler=handler, namespace=namespace)

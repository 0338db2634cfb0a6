"""Message queues between processes, in shared memory, safe against kill -9.

>>> from shmring import Queue
>>> queue = Queue()
>>> queue.put({"answer": 42})
>>> queue.get()
{'answer': 42}
>>> queue.close()
"""

__version__ = "0.1.0"

__all__ = [
    "AccessRefused",
    "Codec",
    "DecodeError",
    "Empty",
    "EncodeError",
    "Event",
    "Full",
    "HighPerformanceIPC",
    "IPCStatistics",
    "InvalidArgument",
    "JoinableQueue",
    "LayoutMismatch",
    "MemoryExceeded",
    "Message",
    "MessageTooLarge",
    "MessageType",
    "NotSupportedByFallback",
    "PeerDied",
    "PoolStatistics",
    "ProcessPoolExecutor",
    "ProcessRole",
    "ProcessState",
    "Progress",
    "Queue",
    "RegistryEntry",
    "RegistrySlot",
    "RemoteError",
    "Report",
    "Ring",
    "RingClosed",
    "RingCorrupted",
    "RingExists",
    "RingNotFound",
    "RingStatistics",
    "SchedulerNotFound",
    "SharedArray",
    "SharedMemoryFull",
    "ShmringError",
    "ShutDown",
    "SimpleQueue",
    "TaskTimeout",
    "Worker",
    "WorkerDied",
    "WorkerReport",
    "backend",
    "cleanup_stale",
    "coordinator_process",
    "current_worker",
    "executor",
    "get_context",
    "install",
    "multiprocessing_example",
    "register_joblib",
    "share",
    "uninstall",
    "wait",
    "worker_process",
]

import typing

from shmring import _lazy

if typing.TYPE_CHECKING:
    from shmring._backend import (
        JoinableQueue,
        Queue,
        Ring,
        SimpleQueue,
        backend,
        cleanup_stale,
        wait,
    )
    from shmring._backend import (
        SharedMemoryManager as SharedMemoryManager,
    )
    from shmring.context import get_context
    from shmring.coordinator.coordinator import Progress, Report, coordinator_process
    from shmring.coordinator.example import multiprocessing_example
    from shmring.coordinator.worker import Worker, worker_process
    from shmring.drop_in import install, uninstall
    from shmring.errors import (
        AccessRefused,
        DecodeError,
        Empty,
        EncodeError,
        Full,
        InvalidArgument,
        LayoutMismatch,
        MemoryExceeded,
        MessageTooLarge,
        NotSupportedByFallback,
        PeerDied,
        RemoteError,
        RingClosed,
        RingCorrupted,
        RingExists,
        RingNotFound,
        SchedulerNotFound,
        SharedMemoryFull,
        ShmringError,
        ShutDown,
        TaskTimeout,
        WorkerDied,
    )
    from shmring.ipc.high_performance_ipc import HighPerformanceIPC
    from shmring.ipc.message import Message, MessageType
    from shmring.ipc.registry import ProcessRole, ProcessState, RegistryEntry, RegistrySlot
    from shmring.pool.entry import executor, register_joblib
    from shmring.pool.executor import ProcessPoolExecutor
    from shmring.pool.interface import Event, PoolStatistics
    from shmring.pool.shared import SharedArray, share
    from shmring.queues.codec import Codec
    from shmring.queues.statistics import IPCStatistics, RingStatistics
    from shmring.tasks.task_loop import current_worker
    from shmring.tasks.workers import WorkerReport
else:
    # SharedMemoryManager is not in __all__: multiprocessing has one too.
    __getattr__, __dir__ = _lazy.lazily(
        globals(),
        {
            "errors": __all__,  # what no line below names
            "_backend": (
                "JoinableQueue",
                "Queue",
                "Ring",
                "SharedMemoryManager",
                "SimpleQueue",
                "backend",
                "cleanup_stale",
                "wait",
            ),
            "context": ("get_context",),
            "coordinator.coordinator": ("Progress", "Report", "coordinator_process"),
            "coordinator.example": ("multiprocessing_example",),
            "coordinator.worker": ("Worker", "worker_process"),
            "drop_in": ("install", "uninstall"),
            "ipc.high_performance_ipc": ("HighPerformanceIPC",),
            "ipc.message": ("Message", "MessageType"),
            "ipc.registry": ("ProcessRole", "ProcessState", "RegistryEntry", "RegistrySlot"),
            "pool.entry": ("executor", "register_joblib"),
            "pool.executor": ("ProcessPoolExecutor",),
            "pool.interface": ("Event", "PoolStatistics"),
            "pool.shared": ("SharedArray", "share"),
            "queues.codec": ("Codec",),
            "queues.statistics": ("IPCStatistics", "RingStatistics"),
            "tasks.task_loop": ("current_worker",),
            "tasks.workers": ("WorkerReport",),
        },
    )

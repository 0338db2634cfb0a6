"""Message queues between processes, in shared memory, safe against kill -9.

>>> from shmring import Queue
>>> queue = Queue()
>>> queue.put({"answer": 42})
>>> queue.get()
{'answer': 42}
>>> queue.close()
"""

from shmring._backend import (
    JoinableQueue,
    Queue,
    Ring,
    SharedMemoryManager,  # noqa: F401  (not in __all__: multiprocessing has one of that name)
    SimpleQueue,
    backend,
    cleanup_stale,
    wait,
)
from shmring.context import get_context
from shmring.coordinator import Progress, Report, coordinator_process
from shmring.errors import (
    AccessRefused,
    DecodeError,
    Empty,
    EncodeError,
    Full,
    InvalidArgument,
    LayoutMismatch,
    MessageTooLarge,
    NameInUse,
    NameUnknown,
    NotSupportedByFallback,
    PeerDied,
    RemoteError,
    RemoteTraceback,
    RingClosed,
    RingCorrupted,
    RingExists,
    RingNotFound,
    SharedMemoryFull,
    ShmringError,
    ShutDown,
    TaskTimeout,
    WorkerDied,
)
from shmring.example import multiprocessing_example
from shmring.ipc import HighPerformanceIPC
from shmring.message import Message, MessageType
from shmring.worker import current_worker, worker_process

__version__ = "0.1.0"

__all__ = [
    "AccessRefused",
    "DecodeError",
    "Empty",
    "EncodeError",
    "Full",
    "HighPerformanceIPC",
    "InvalidArgument",
    "JoinableQueue",
    "LayoutMismatch",
    "Message",
    "MessageTooLarge",
    "MessageType",
    "NameInUse",
    "NameUnknown",
    "NotSupportedByFallback",
    "PeerDied",
    "Progress",
    "Queue",
    "RemoteError",
    "RemoteTraceback",
    "Report",
    "Ring",
    "RingClosed",
    "RingCorrupted",
    "RingExists",
    "RingNotFound",
    "SharedMemoryFull",
    "ShmringError",
    "ShutDown",
    "SimpleQueue",
    "TaskTimeout",
    "WorkerDied",
    "backend",
    "cleanup_stale",
    "coordinator_process",
    "current_worker",
    "get_context",
    "multiprocessing_example",
    "wait",
    "worker_process",
]

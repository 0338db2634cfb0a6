"""Which back end serves this process: the compiled ring, or the fallback.

``SHMRING_BACKEND=queue`` takes the fallback; ``SHMRING_BACKEND=ring`` insists
on the ring and lets the import error through.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from shmring._lazy import lazily

__all__ = [
    "JoinableQueue",
    "Queue",
    "Ring",
    "SharedMemoryManager",
    "SimpleQueue",
    "backend",
    "cleanup_stale",
    "wait",
]


def _choose() -> Literal["ring", "queue"]:
    wanted = os.environ.get("SHMRING_BACKEND", "")
    if wanted not in ("", "ring", "queue"):
        raise ImportError(f"SHMRING_BACKEND={wanted!r}: set it to ring or queue, or not at all")
    if wanted == "queue":
        return "queue"
    try:
        from shmring._core import object_ring  # noqa: F401  (the rest when used)

        for name in ("bytes_ring", "locked_memory", "wait"):
            if find_spec(f"shmring._core.{name}") is None:
                raise ModuleNotFoundError(f"No module named 'shmring._core.{name}'")
    except ImportError as error:
        if wanted == "ring":
            raise
        warnings.warn(
            f"shmring runs on its fallback, multiprocessing.Queue, because the compiled ring cannot"
            f" be loaded: {error}; SHMRING_BACKEND=queue says that this is wanted"
            " (docs: platforms)",
            RuntimeWarning,
            stacklevel=2,
        )
        return "queue"
    return "ring"


backend: Literal["ring", "queue"] = _choose()

if TYPE_CHECKING:
    from shmring.queues.queue import JoinableQueue, Queue, SimpleQueue
    from shmring.queues.ring import Ring
    from shmring.queues.wait import wait
    from shmring.shm.memory import SharedMemoryManager
    from shmring.shm.segment import cleanup_stale
else:
    _homes = {
        "queues.queue": ("JoinableQueue", "Queue", "SimpleQueue"),
        "queues.ring": ("Ring",),
        "queues.wait": ("wait",),
        "shm.memory": ("SharedMemoryManager",),
        "shm.segment": ("cleanup_stale",),
    }
    if backend == "queue":
        _homes = {
            "fallback.files": ("SharedMemoryManager", "cleanup_stale"),
            "fallback.queues": ("JoinableQueue", "Queue", "Ring", "SimpleQueue", "wait"),
        }
    __getattr__, __dir__ = lazily(globals(), _homes)

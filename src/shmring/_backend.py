"""Which back end serves this process: the compiled ring, or the fallback.

``SHMRING_BACKEND=queue`` takes the fallback; ``SHMRING_BACKEND=ring`` insists
on the ring and lets the import error through.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Literal

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
        from shmring import _memory, _queue, _ring, _wait  # noqa: F401
    except ImportError as error:
        if wanted == "ring":
            raise
        warnings.warn(
            f"shmring runs on its fallback, multiprocessing.Queue, because the compiled ring cannot"
            f" be loaded: {error}; SHMRING_BACKEND=queue says that this is wanted",
            RuntimeWarning,
            stacklevel=2,
        )
        return "queue"
    return "ring"


backend: Literal["ring", "queue"] = _choose()

if TYPE_CHECKING or backend == "ring":
    from shmring.memory import SharedMemoryManager
    from shmring.queues import JoinableQueue, Queue, SimpleQueue
    from shmring.ring import Ring
    from shmring.segment import cleanup_stale
    from shmring.waiting import wait
else:
    from shmring.fallback import (
        JoinableQueue,
        Queue,
        Ring,
        SharedMemoryManager,
        SimpleQueue,
        cleanup_stale,
        wait,
    )

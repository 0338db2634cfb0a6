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
        from shmring import _queue  # noqa: F401  (with _core and _handle; the rest when used)

        for name in ("_memory", "_ring", "_wait"):
            if find_spec(f"shmring.{name}") is None:
                raise ModuleNotFoundError(f"No module named 'shmring.{name}'")
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

if TYPE_CHECKING:
    from shmring.memory import SharedMemoryManager
    from shmring.queues import JoinableQueue, Queue, SimpleQueue
    from shmring.ring import Ring
    from shmring.segment import cleanup_stale
    from shmring.waiting import wait
else:
    _names = [name for name in __all__ if name != "backend"]
    __getattr__, __dir__ = lazily(
        globals(),
        dict.fromkeys(_names, "fallback")
        if backend == "queue"
        else {
            "JoinableQueue": "queues",
            "Queue": "queues",
            "Ring": "ring",
            "SharedMemoryManager": "memory",
            "SimpleQueue": "queues",
            "cleanup_stale": "segment",
            "wait": "waiting",
        },
    )

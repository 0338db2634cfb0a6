"""Queues and registry of a namespace, by name, on either back end."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from shmring._backend import Queue, backend
from shmring.arguments import checked_name
from shmring.errors import RingClosed, RingNotFound
from shmring.ipc.registry import REGISTRY_BYTES

__all__ = [
    "attach_queue",
    "create_queue",
    "full_name",
    "is_current",
    "open_registry",
    "remove_queue",
]

_MAX_NAME_BYTES = 100
_FORBIDDEN = "/\\\0"  # on Windows too


if TYPE_CHECKING or backend == "ring":
    from shmring.ipc.registry import open_segment as open_registry
    from shmring.shm import segment

    def create_queue(name: str, maxsize: int, codec: Any) -> Any:
        """Make a queue; RingExists if the name is in use."""
        return Queue(maxsize, codec=codec, name=name)

    def attach_queue(name: str, timeout: float, codec: Any) -> Any:
        """Open a queue; RingNotFound if there is none in time."""
        return Queue.attach(name, timeout, codec=codec)

    def is_current(queue: Any, name: str) -> bool:
        """Whether a process that opens the name now gets the queue of this handle."""
        return not queue.closed and segment.is_named(queue._fileno(), name)

    def remove_queue(queue: Any) -> None:
        """Close a queue of this process, and give its name back."""
        # The file may be removed, and the handle closed, already.
        try:
            with contextlib.suppress(RingNotFound, RingClosed):
                queue.unlink()
        finally:
            queue.close()

else:
    from shmring.fallback.files import SharedFile
    from shmring.fallback.server import ServedQueue

    create_queue, attach_queue = ServedQueue.create, ServedQueue.attach
    remove_queue = ServedQueue.close
    open_registry = functools.partial(SharedFile.create_or_attach, size=REGISTRY_BYTES)

    def is_current(queue: Any, name: str) -> bool:
        """Whether the process that serves it is there."""
        with contextlib.suppress(RingClosed):
            queue.qsize()
            return True
        return False


def full_name(namespace: str, kind: str, name: str) -> str:
    """The file of a queue (kind "q") or memory ("m"); InvalidArgument for an impossible name."""
    return f"shmring.{namespace}.{kind}.{checked_name(name, _MAX_NAME_BYTES, _FORBIDDEN)}"

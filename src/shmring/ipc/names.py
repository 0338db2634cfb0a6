"""Queues and registry of a namespace, by name, on either back end."""

from __future__ import annotations

import contextlib
from typing import Any

from shmring._backend import Queue, backend
from shmring.arguments import checked_name
from shmring.errors import RingClosed, RingNotFound
from shmring.ipc.message import MessageCodec
from shmring.ipc.registry import REGISTRY_BYTES, RegistryStorage, open_segment

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


if backend == "ring":
    from shmring.shm import segment

    def create_queue(name: str, maxsize: int) -> Any:
        """Make a queue of messages; RingExists if the name is in use."""
        return Queue(maxsize, codec=MessageCodec(), name=name)

    def attach_queue(name: str, timeout: float) -> Any:
        """Open a queue of messages; RingNotFound if there is none in time."""
        return Queue.attach(name, timeout, codec=MessageCodec())

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

    def open_registry(name: str) -> RegistryStorage:
        """Open the storage of a registry; make it if there is none."""
        return open_segment(name)

else:
    from shmring.fallback.files import SharedFile
    from shmring.fallback.server import ServedQueue

    def create_queue(name: str, maxsize: int) -> Any:
        """Make a queue of messages; RingExists if the name is in use."""
        return ServedQueue.create(name, maxsize, MessageCodec())

    def attach_queue(name: str, timeout: float) -> Any:
        """Open a queue of messages; RingNotFound if there is none in time."""
        return ServedQueue.attach(name, timeout, MessageCodec())

    def is_current(queue: Any, name: str) -> bool:
        """Whether the process that serves the queue of this handle is there."""
        try:
            queue.qsize()
        except RingClosed:
            return False
        return True

    def remove_queue(queue: Any) -> None:
        """Close a queue of this process: it ends with its creator's handle."""
        queue.close()

    def open_registry(name: str) -> RegistryStorage:
        """Open the storage of a registry; make it if there is none."""
        return SharedFile.create_or_attach(name, REGISTRY_BYTES)


def full_name(namespace: str, kind: str, name: str) -> str:
    """The file of a queue (kind "q") or memory ("m"); InvalidArgument for an impossible name."""
    return f"shmring.{namespace}.{kind}.{checked_name(name, _MAX_NAME_BYTES, _FORBIDDEN)}"

"""What HighPerformanceIPC finds by name: queues and the board, on either back end."""

from __future__ import annotations

import contextlib
from typing import Any

from shmring._backend import Queue, backend
from shmring.arguments import checked_name
from shmring.errors import RingClosed, RingNotFound
from shmring.ipc.message import MessageCodec
from shmring.ipc.registry import BOARD_BYTES, BoardStorage, open_segment

__all__ = [
    "attach_queue",
    "create_queue",
    "full_name",
    "is_current",
    "open_board",
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
        """Open a queue of messages; RingNotFound if nobody makes it in time."""
        return Queue.attach(name, timeout, codec=MessageCodec())

    def is_current(queue: Any, name: str) -> bool:
        """Whether who asks for the name now gets the queue behind this handle."""
        return not queue.closed and segment.is_named(queue._fileno(), name)

    def remove_queue(queue: Any) -> None:
        """Close a queue of one's own, and give its name back."""
        # Somebody removed the file, or closed the handle and the last one out did: all the same.
        try:
            with contextlib.suppress(RingNotFound, RingClosed):
                queue.unlink()
        finally:
            queue.close()

    def open_board(name: str) -> BoardStorage:
        """Open the storage of a board, whoever comes first makes it."""
        return open_segment(name)

else:
    from shmring.fallback.files import SharedFile
    from shmring.fallback.server import ServedQueue

    def create_queue(name: str, maxsize: int) -> Any:
        """Make a queue of messages; RingExists if the name is in use."""
        return ServedQueue.create(name, maxsize, MessageCodec())

    def attach_queue(name: str, timeout: float) -> Any:
        """Open a queue of messages; RingNotFound if nobody makes it in time."""
        return ServedQueue.attach(name, timeout, MessageCodec())

    def is_current(queue: Any, name: str) -> bool:
        """Whether the process that serves the queue of this handle is there."""
        try:
            queue.qsize()
        except RingClosed:
            return False
        return True

    def remove_queue(queue: Any) -> None:
        """Close a queue of one's own: it goes with its creator's handle."""
        queue.close()

    def open_board(name: str) -> BoardStorage:
        """Open the storage of a board, whoever comes first makes it."""
        return SharedFile.create_or_attach(name, BOARD_BYTES)


def full_name(namespace: str, kind: str, name: str) -> str:
    """The file behind a name.

    Args:
        namespace: a valid one.
        kind: "q" is a queue, "m" is memory.
        name: the user's.

    Returns:
        a name in which neither namespaces nor kinds meet.

    Raises:
        InvalidArgument: an impossible name.
    """
    return f"shmring.{namespace}.{kind}.{checked_name(name, _MAX_NAME_BYTES, _FORBIDDEN)}"

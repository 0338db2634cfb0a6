"""File descriptors that are kept for long, whose numbers a program may close and use again."""

from __future__ import annotations

import contextlib
import os

__all__ = ["close_own", "identity_of"]


def identity_of(fd: int) -> tuple[int, int]:
    """What tells the file behind a descriptor from others: (st_dev, st_ino)."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def close_own(fd: int, identity: tuple[int, int]) -> None:
    """Close a descriptor, unless its number belongs to another file by now.

    A program may have closed it behind the handle: daemons close everything.

    Args:
        fd: the descriptor.
        identity: of the file that it was opened for.
    """
    with contextlib.suppress(OSError):
        if identity_of(fd) == identity:
            os.close(fd)

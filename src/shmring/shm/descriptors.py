"""Long-lived file descriptors, and file locks with a deadline."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from shmring.errors import ShmringError

__all__ = ["close_own", "identity_at", "identity_of", "wait_for_lock"]


def identity_of(fd: int) -> tuple[int, int]:
    """The file behind a descriptor: (st_dev, st_ino)."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def identity_at(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """The file that a path names, or None."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def close_own(fd: int, identity: tuple[int, int]) -> None:
    """Close a descriptor, unless its number belongs to another file than `identity` by now.

    A program may have closed it behind the handle: daemons close everything.
    """
    with contextlib.suppress(OSError):
        if identity_of(fd) == identity:
            os.close(fd)


def wait_for_lock(try_lock: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Call `try_lock` until it grants the lock of `what`; a blocking lock has no deadline.

    Raises:
        ShmringError: its holder, which is alive, kept it for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.0002
    while not try_lock():
        if time.monotonic() >= deadline:
            raise ShmringError(
                f"the lock of {what} was not free within {timeout:g} s: "
                "the process that holds it is stopped or starved"
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.01)

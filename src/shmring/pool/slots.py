"""Slots of a pool's workers, in shared memory without a name.

The slots are those of the registry (:mod:`shmring.ipc.registry`). The pool chooses
the slot of each worker, so that no lock is needed to take one.
"""

from __future__ import annotations

import contextlib
import os
from multiprocessing import reduction
from typing import Any

from shmring._core.locked_memory import MappedFile
from shmring.ipc.registry import REGISTRY_BYTES, Registry
from shmring.shm import segment
from shmring.shm.descriptors import close_own, identity_of

__all__ = ["PoolSlots"]


class PoolSlots(Registry):
    """The registry of one pool; a worker that is being started receives its descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = segment.create_anonymous(REGISTRY_BYTES)
            try:
                segment.allocate(fd, 0, REGISTRY_BYTES)
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd
        super().__init__(_Storage(fd))

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._fd),)


def _received(duplicate: Any) -> PoolSlots:
    return PoolSlots(duplicate.detach())


class _Storage:
    """A file without a name; it ends with its last mapping."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._identity = identity_of(fd)
        self.buffer = memoryview(MappedFile(fd, REGISTRY_BYTES))

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self.buffer.release()
        close_own(self._fd, self._identity)

"""Slots of a pool's workers, in shared memory without a name.

The pool chooses the slot of each worker, so that no lock is needed to take one.
"""

from __future__ import annotations

import contextlib
import os
from multiprocessing import reduction
from typing import Any

from shmring._core.locked_memory import MappedFile
from shmring.ipc.slot import (
    H_POOL,
    H_USED,
    REGISTRY_BYTES,
    ProcessRole,
    RegistrySlot,
    Words,
    take_slot,
)
from shmring.shm import segment
from shmring.shm.descriptors import close_own, identity_of

__all__ = ["PoolSlots"]


class PoolSlots:
    """Storage of a registry, in a file that ends with its last mapping.

    Pickled to a worker that is being started, it carries the descriptor.

    Args:
        number: how many slots there are.
        fd: a descriptor of it, in a worker.
    """

    def __init__(self, number: int, fd: int | None = None) -> None:
        made = fd is None
        if fd is None:
            fd = segment.create_anonymous(REGISTRY_BYTES)
            try:
                segment.allocate(fd, 0, REGISTRY_BYTES)
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd
        self._identity = identity_of(fd)
        self.buffer = memoryview(MappedFile(fd, REGISTRY_BYTES))
        if made:
            Words(self.buffer)[H_USED] = number  # before workers take theirs, in any order

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._fd),)

    def take(self, index: int, worker_id: str) -> RegistrySlot:
        """Take the slot that the pool chose for the calling process."""
        words = Words(self.buffer)
        return take_slot(words, index, worker_id.encode(), ProcessRole.WORKER)

    def tell(self, *pool: int, start: int = 0) -> None:
        """Store some of ``POOL_WORDS``, for observers; `start` is the first of them."""
        words = Words(self.buffer)
        for at, value in enumerate(pool, H_POOL + start):
            words[at] = value

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """No lock: no two processes take the same slot."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Unmap the memory and close the file."""
        self.buffer.release()
        close_own(self._fd, self._identity)


def _received(duplicate: Any) -> PoolSlots:
    return PoolSlots(0, duplicate.detach())

"""SharedMemoryManager: bytes that several processes read and write in place."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Any

from shmring._core.locked_memory import MEMORY_HEADER_BYTES, LockedMemory
from shmring._core.ring import LAYOUT
from shmring.errors import RingNotFound
from shmring.shm import segment
from shmring.shm.block import NamedBlock
from shmring.shm.descriptors import close_own, identity_of

__all__ = ["SharedMemoryManager"]

_HEADER = struct.pack("<QQ", segment.MEMORY_MAGIC, 1)  # as MemoryHeader in locked_memory.pxd


class SharedMemoryManager(NamedBlock):
    """A named block of shared memory with a lock inside.

    Not :class:`multiprocessing.managers.SharedMemoryManager`, which manages many
    blocks; so ``from shmring import *`` leaves the name out.  No resource tracker
    is involved: a process that merely attached never removes the block.

    One process calls :meth:`create`, the others :meth:`connect`; either closes a
    block that was removed since it was opened here.  Reads and writes exclude each
    other in all processes; a process that is killed inside one blocks no other, and
    may leave a write half done.

    Args:
        name: a file in /dev/shm.
        size: in bytes.

    Raises:
        InvalidArgument: an impossible name or size.
    """

    _most_bytes = LAYOUT["MAX_CAPACITY"]

    def write_data(self, data: Any, offset: int = 0) -> None:
        """Copy bytes into the block, under the lock.

        Args:
            data: a contiguous bytes-like object.
            offset: in bytes.

        Raises:
            InvalidArgument: `offset` is negative, or the end lies past `size`.
        """
        self._attached().write(data, offset)

    def read_data(self, length: int, offset: int = 0) -> bytes:
        """Copy bytes out of the block, under the lock.

        Args:
            length: in bytes.
            offset: in bytes.

        Returns:
            A copy.

        Raises:
            InvalidArgument: `length` or `offset` is negative, or the end lies past `size`.
        """
        return self._attached().read(length, offset)  # type: ignore[no-any-return]

    def _open(self, new: bool) -> None:
        if new:
            fd = segment.create_named(self.name, MEMORY_HEADER_BYTES + self.size, _HEADER)
        else:
            fd = segment.open_memory(self.name)
        try:
            self._memory = LockedMemory(fd, self.size, MEMORY_HEADER_BYTES, segment.MEMORY_MAGIC)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._identity = identity_of(fd)

    def _is_named(self) -> bool:
        return segment.is_named(self._fd, self.name)

    def _view(self) -> memoryview:
        return memoryview(self._attached())

    def _detach(self, remove: bool) -> None:
        self._memory = None
        close_own(self._fd, self._identity)
        if not remove:
            segment.release(self.name, self._identity)
            return
        with contextlib.suppress(RingNotFound):  # it was removed before
            segment.unlink(self.name, self._identity)

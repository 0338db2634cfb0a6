"""SharedMemoryManager: bytes that several processes read and write in place."""

from __future__ import annotations

import contextlib
import errno
import math
import operator
import os
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from shmring._core.locked_memory import MEMORY_HEADER_BYTES, LockedMemory
from shmring._core.ring import LAYOUT
from shmring.errors import InvalidArgument, RingClosed, RingExists, RingNotFound
from shmring.process.leaving import Exit, end_thread_at_exit
from shmring.shm import segment
from shmring.shm.descriptors import close_own, identity_of

if TYPE_CHECKING:
    import numpy

__all__ = ["SharedMemoryManager"]

_HEADER = struct.pack("<QQ", segment.MEMORY_MAGIC, 1)  # as MemoryHeader in locked_memory.pxd


class SharedMemoryManager:
    """A named block of shared memory with a lock inside.

    Not :class:`multiprocessing.managers.SharedMemoryManager`, which hands out
    blocks and removes them; this is one block.  (For that reason the name is
    left out of ``from shmring import *``.)  No resource tracker is involved: a
    process that merely attached never removes the block.

    Args:
        name: a file in /dev/shm.
        size: bytes.

    One process calls :meth:`create`, the others :meth:`connect`; either lets go
    of a block that was removed since it was opened here.  Reads and
    writes exclude each other in all processes; a process that is killed inside
    one blocks nobody, and may leave a write half done.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = segment.check_name(name)
        self.size = operator.index(size)
        if not 0 < self.size <= LAYOUT["MAX_CAPACITY"]:
            raise InvalidArgument(
                f"size={size}: a block has from 1 to {LAYOUT['MAX_CAPACITY']} bytes"
            )
        self._memory: LockedMemory | None = None
        self._not_found: str | None = None  # why unpickling could not attach
        self._fd = -1
        self._creator_pid = 0

    def create(self) -> bool:
        """Make the block, filled with zeros; False if the name is in use.

        Raises:
            SharedMemoryFull: /dev/shm has no room.
        """
        self._make_way()
        try:
            fd = segment.create_named(self.name, MEMORY_HEADER_BYTES + self.size, _HEADER)
        except RingExists:
            return False
        self._map(fd)
        self._creator_pid = os.getpid()
        return True

    def connect(self) -> bool:
        """Attach to a block that exists; False if there is none.

        Raises:
            AccessRefused: it is somebody else's, or was made in another PID namespace.
            LayoutMismatch: it is not a block of this class.
            InvalidArgument: it is smaller than `size`.
        """
        self._make_way()
        try:
            fd = segment.open_memory(self.name)
        except RingNotFound:
            return False
        self._map(fd)
        return True

    def is_current(self) -> bool:
        """Whether who connects now gets the block that is open here.

        False after its name was removed, also where another block bears it by now.
        """
        return self._memory is not None and segment.is_named(self._fd, self.name)

    def _make_way(self) -> None:
        """Let go of a block that has gone; RingExists if it has not."""
        if self.is_current():
            raise RingExists(f"{self.name!r} is attached already: call cleanup() first")
        self.cleanup()

    def _map(self, fd: int) -> None:
        try:
            self._memory = LockedMemory(fd, self.size, MEMORY_HEADER_BYTES, segment.MEMORY_MAGIC)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._not_found = None
        self._identity = identity_of(fd)
        self._exit = Exit(self)

    def _attached(self) -> LockedMemory:
        memory = self._memory
        if memory is None:
            end_thread_at_exit()
            if self._not_found is not None:
                raise RingNotFound(errno.ENOENT, self._not_found)
            raise RingClosed(f"the block {self.name!r} is closed: call create() or connect() first")
        return memory

    def write_data(self, data: Any, offset: int = 0) -> None:
        """Copy a contiguous bytes-like object into the block, under the lock.

        Raises:
            InvalidArgument: `offset` is negative, or the end lies past `size`.
        """
        self._attached().write(data, offset)

    def read_data(self, length: int, offset: int = 0) -> bytes:
        """Copy `length` bytes out of the block, under the lock.

        Raises:
            InvalidArgument: `length` or `offset` is negative, or the end lies
                past `size`.
        """
        return self._attached().read(length, offset)

    def as_array(self, dtype: Any, shape: Any, offset: int = 0) -> numpy.ndarray[Any, Any]:
        """A writable numpy view of the block, without the lock.

        Args:
            dtype: of the elements.
            shape: an int or a tuple of ints.
            offset: bytes from the beginning.

        The view keeps the memory mapped, also after :meth:`cleanup`.

        Raises:
            InvalidArgument: the array would reach past `size`.
            ImportError: numpy is not installed.
        """
        try:
            import numpy
        except ImportError:
            raise ImportError('as_array needs numpy: pip install "shmring[numpy]"') from None
        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise InvalidArgument(
                f"dtype={kind}: objects are pointers, which mean nothing elsewhere"
            )
        dimensions = tuple(map(operator.index, shape if hasattr(shape, "__iter__") else (shape,)))
        count = math.prod(dimensions)
        offset = operator.index(offset)
        memory = self._attached()
        nbytes = count * kind.itemsize
        if offset < 0 or min(dimensions, default=0) < 0 or offset + nbytes > self.size:
            raise InvalidArgument(
                f"dtype={kind}, shape={shape}, offset={offset}: {nbytes} bytes from there do not"
                f" lie inside the block's {self.size}"
            )
        return numpy.ndarray(dimensions, kind, memoryview(memory), offset)

    def cleanup(self) -> None:
        """Leave the block.  The creator removes the name; others only detach."""
        if self._memory is None:
            return
        self._memory = None
        fd, self._fd = self._fd, -1
        self._exit.cancel()
        close_own(fd, self._identity)
        creator_pid, self._creator_pid = self._creator_pid, 0
        if creator_pid != os.getpid():
            segment.release(self.name, self._identity)
            return
        with contextlib.suppress(RingNotFound):  # somebody removed it first
            segment.unlink(self.name, self._identity)

    def _leave(self) -> None:
        if self._exit.pid == os.getpid():
            with contextlib.suppress(OSError):
                self.cleanup()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # First, and bound above: at the very end the globals are gone.
        if not is_finalizing() and getattr(self, "_memory", None) is not None:
            self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cleanup()

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (self.name, self.size)

    def __repr__(self) -> str:
        state = "closed" if self._memory is None else "attached"
        return f"<shmring.SharedMemoryManager {self.name!r} of {self.size} bytes, {state}>"


def _attached(name: str, size: int) -> SharedMemoryManager:
    memory = SharedMemoryManager(name, size)
    if not memory.connect():  # an error here would kill the receiver of a task
        memory._not_found = (
            f"/dev/shm/{name} does not exist (any more); the sender keeps its block until the"
            " receiver has unpickled this one"
        )
    return memory

"""A named block of memory: what SharedMemoryManager is on either back end."""

from __future__ import annotations

import abc
import contextlib
import errno
import math
import operator
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from shmring.arguments import checked_int, checked_name
from shmring.errors import InvalidArgument, RingClosed, RingExists, RingNotFound
from shmring.process.leaving import Exit, end_thread_at_exit

if TYPE_CHECKING:
    import numpy

__all__ = ["NamedBlock"]


class NamedBlock(abc.ABC):
    """A block that one process creates and others connect to.

    A back end adds the ways to open, read and write it.

    Args:
        name: of the file.
        size: bytes.

    Raises:
        InvalidArgument: an impossible name or size.
    """

    _most_bytes = sys.maxsize
    _most_name_bytes = 255
    _not_in_names = "/\0"

    def __init__(self, name: str, size: int) -> None:
        self.name = checked_name(name, self._most_name_bytes, self._not_in_names)
        self.size = checked_int(size, "size")
        if not 0 < self.size <= self._most_bytes:
            raise InvalidArgument(f"size={size}: a block has from 1 to {self._most_bytes} bytes")
        self._memory: Any = None  # while it is open
        self._not_found: str | None = None  # why unpickling could not connect
        self._creator_pid = 0

    def create(self) -> bool:
        """Make the block, filled with zeros.

        Returns:
            False if the name is in use.

        Raises:
            RingExists: this object has it open already.
            SharedMemoryFull: /dev/shm has no room.
        """
        try:
            self._attach(new=True)
        except RingExists:
            if self._memory is not None:
                raise
            return False
        self._creator_pid = os.getpid()
        return True

    def connect(self) -> bool:
        """Open a block that another process created.

        Returns:
            False if there is none.

        Raises:
            RingExists: this object has it open already.
            AccessRefused: it is another user's, or was made in another PID namespace.
            LayoutMismatch: it is not a block of this class.
            InvalidArgument: it is smaller than `size`.
        """
        try:
            self._attach(new=False)
        except RingNotFound:
            return False
        return True

    def is_current(self) -> bool:
        """Whether a process that connects now gets the block that is open here.

        False after its name was removed, also where another block bears it by now.
        """
        return self._memory is not None and self._is_named()

    def as_array(self, dtype: Any, shape: Any, offset: int = 0) -> numpy.ndarray[Any, Any]:
        """A writable numpy view of the block, without the lock.

        Args:
            dtype: of the elements.
            shape: an int or a tuple of ints.
            offset: in bytes.

        Returns:
            The view, which keeps the memory mapped, also after :meth:`cleanup`.

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
        offset = operator.index(offset)
        view = self._view()
        nbytes = math.prod(dimensions) * kind.itemsize
        if offset < 0 or min(dimensions, default=0) < 0 or offset + nbytes > self.size:
            raise InvalidArgument(
                f"dtype={kind}, shape={shape}, offset={offset}: {nbytes} bytes from there do not"
                f" lie inside the block's {self.size}"
            )
        return numpy.ndarray(dimensions, kind, view, offset)

    def cleanup(self) -> None:
        """Leave the block.  The creator removes the name; others only detach."""
        if self._memory is None:
            return
        self._exit.cancel()
        creator_pid, self._creator_pid = self._creator_pid, 0
        self._detach(remove=creator_pid == os.getpid())  # not its forked children

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cleanup()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # First, and bound above: at the very end the globals are gone.
        if not is_finalizing() and getattr(self, "_memory", None) is not None:
            self._leave()

    def __reduce__(self) -> tuple[Any, ...]:
        return _connected, (type(self), self.name, self.size)

    def __repr__(self) -> str:
        state = "closed" if self._memory is None else "attached"
        return f"<shmring.SharedMemoryManager {self.name!r} of {self.size} bytes, {state}>"

    # ---- a back end's ------------------------------------------------------------------------

    @abc.abstractmethod
    def _open(self, new: bool) -> None:
        """Set ``_memory``; RingExists, or RingNotFound, if that cannot be."""

    @abc.abstractmethod
    def _is_named(self) -> bool:
        """Whether the name leads to what is open."""

    @abc.abstractmethod
    def _view(self) -> memoryview:
        """The bytes of the block."""

    @abc.abstractmethod
    def _detach(self, remove: bool) -> None:
        """Drop ``_memory``; the last one out, or `remove`, takes the name away."""

    # ---- inside ------------------------------------------------------------------------------

    def _attach(self, new: bool) -> None:
        if self.is_current():
            raise RingExists(f"{self.name!r} is attached already: call cleanup() first")
        self.cleanup()  # of a block that was removed since it was opened
        self._open(new)
        self._not_found = None
        self._exit = Exit(self)

    def _attached(self) -> Any:
        if self._memory is None:
            end_thread_at_exit()
            if self._not_found is not None:
                raise RingNotFound(errno.ENOENT, self._not_found)
            raise RingClosed(f"the block {self.name!r} is closed: call create() or connect() first")
        return self._memory

    def _leave(self) -> None:
        if self._exit.pid == os.getpid():
            with contextlib.suppress(OSError):
                self.cleanup()


def _connected(kind: type[NamedBlock], name: str, size: int) -> NamedBlock:
    block = kind(name, size)
    if not block.connect():  # an error here would kill the receiver of a task
        block._not_found = (
            f"the block {name!r} does not exist (any more); the sender keeps its block until the"
            " receiver has unpickled this one"
        )
    return block

"""Ring: messages of bytes in shared memory."""

from __future__ import annotations

from typing import Any, Self

from shmring._core.bytes_ring import BytesRing
from shmring._core.ring import LAYOUT
from shmring.errors import InvalidArgument
from shmring.queues.handle import SharedHandle, rounded_capacity
from shmring.queues.statistics import RingStatistics

__all__ = ["Ring", "RingStatistics"]


class Ring(SharedHandle, BytesRing):
    """A ring of length-prefixed messages in one block of shared memory.

    For any number of producers and consumers, processes and threads; first in,
    first out for each producer; each message goes to exactly one consumer.  A
    process that is killed at any instruction leaves each message either wholly
    there or not at all, and the others go on.

    Use it where messages are bytes already; :class:`shmring.Queue` carries
    objects.  Make one with :meth:`create` or :meth:`attach`.

    Attributes:
        name: the file in /dev/shm; an anonymous ring gets one when first asked.
        capacity: bytes of the area that producers write to now.
        max_capacity: bytes to which it may grow.
        largest: bytes of the largest message that can ever fit.
        closed: whether this handle was closed.
    """

    _user_kind = 1

    @classmethod
    def create(
        cls,
        capacity: int = 1 << 16,
        *,
        max_capacity: int | None = None,
        name: str | None = None,
        buffer: Any = None,
    ) -> Self:
        """Make a ring.

        Args:
            capacity: bytes for messages, each of which takes 32 more than its
                length; rounded up to a power of two of at least a page.
            max_capacity: bytes to which it may grow; None: it never grows.
            name: a file in /dev/shm, by which other processes attach; None
                makes an anonymous ring that leaves nothing behind.
            buffer: a SharedMemory block to lay the ring into.  The capacity is
                then the largest power of two that fits behind a header of 8192
                bytes; `capacity` is not used.

        Raises:
            InvalidArgument: an impossible capacity or name.
            RingExists: the name is in use.
            SharedMemoryFull: /dev/shm has no room.
        """
        size = rounded_capacity("capacity", capacity)
        limit = size if max_capacity is None else rounded_capacity("max_capacity", max_capacity)
        if limit < size:
            raise InvalidArgument(f"max_capacity={max_capacity} is less than capacity={capacity}")
        if buffer is not None:
            if name is not None or max_capacity is not None:
                raise InvalidArgument(
                    "a ring in a block has the block's name and never grows: give buffer= alone"
                )
            size = limit = _capacity_in(buffer)
        ring = cls.__new__(cls)
        ring._make(size, limit, name=name, buffer=buffer)
        return ring

    @classmethod
    def attach(
        cls, name: str | None = None, timeout: float | None = 0.0, *, buffer: Any = None
    ) -> Self:
        """Open a ring that another process made.

        Args:
            name: as given to :meth:`create`, or read from :attr:`name`.
            timeout: seconds to wait for its creator; None for ever.
            buffer: the SharedMemory block that holds it, instead of a name.

        Raises:
            RingNotFound: nothing of that name became ready in time.
            LayoutMismatch: it is not a ring, or of another version.
            AccessRefused: it is another user's, or of another PID namespace.
        """
        ring = cls.__new__(cls)
        ring._join(name, timeout, buffer)
        return ring

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("use Ring.create(...) or Ring.attach(name)")

    def qsize(self) -> int:
        """Messages in the ring, true at an instant during the call.

        A reservation counts too; an aborted one until a consumer has passed it.
        """
        return self._qsize()

    def shutdown(self, immediate: bool = False) -> None:
        """As :meth:`shmring.Queue.shutdown`; memory is kept until the last close."""
        self._shutdown(immediate)


def _capacity_in(block: Any) -> int:
    size = getattr(block, "size", None)
    if not isinstance(size, int):
        raise TypeError(f"buffer must be a SharedMemory block, not {type(block).__name__}")
    room = size - LAYOUT["HEADER_BYTES"]
    if room < LAYOUT["MIN_CAPACITY"]:
        least = LAYOUT["HEADER_BYTES"] + LAYOUT["MIN_CAPACITY"]
        raise InvalidArgument(f"the block has {size} bytes; a ring needs at least {least}")
    return 1 << (room.bit_length() - 1)

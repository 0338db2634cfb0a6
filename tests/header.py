"""What stands in a ring's file, read and written past all locks; a lock whose holder stops."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from shmring import Queue, Ring, backend
from support import run_in_process, wait_for
from traced import Traced, state_of, stop_to_be_traced

# Where the ring does not serve, collecting the tests that need it raises no error.
if backend != "ring":
    pytest.skip("the fallback has no ring to look into", allow_module_level=True)
LAYOUT = pytest.importorskip("shmring._core.ring", exc_type=ImportError).LAYOUT

DATA_WAIT = LAYOUT["WAITING_OFFSET"]
SHUTDOWN = LAYOUT["WAITING_OFFSET"] + 8
LEASE_OWNER = LAYOUT["WAITING_OFFSET"] + 16
WATCHES = (LAYOUT["WAITING_OFFSET"] + 40, LAYOUT["WAITING_OFFSET"] + 48)
WRITE_POSITION = LAYOUT["PRODUCERS_OFFSET"] + 8
WRITE_GENERATION = LAYOUT["PRODUCERS_OFFSET"] + 16
READ_POSITION = LAYOUT["CONSUMERS_OFFSET"] + 8
READ_GENERATION = LAYOUT["CONSUMERS_OFFSET"] + 16
REAPED = LAYOUT["CONSUMERS_OFFSET"] + 24
BLOCKS_AT = LAYOUT["JOINING_OFFSET"] + 32  # where the records of the blocks lie
LOCKS = {"producers": LAYOUT["PRODUCERS_OFFSET"], "consumers": LAYOUT["CONSUMERS_OFFSET"]}

MEMORY_LOCK = 64  # in the file of a SharedMemoryManager

# In a lock word.
OWNER = 0x3FFFFFFF
OWNER_DIED = 0x40000000
WAITERS = 0x80000000

# In a wait word.
SLEEPING = 1
WOKEN = 2

AnyRing = Ring | Queue[object]


def word(ring: AnyRing | int, offset: int, value: int | None = None, *, size: int = 8) -> int:
    """A word of the file, given by a handle or a descriptor; written first, if a value is given."""
    fd = ring if isinstance(ring, int) else ring._fileno()
    if value is not None:
        os.pwrite(fd, value.to_bytes(size, "little"), offset)
    return int.from_bytes(os.pread(fd, size, offset), "little")


def lock_word(ring: AnyRing | int, side: str, value: int | None = None) -> int:
    """The lock word of the "producers" or the "consumers"; written first, if a value is given."""
    return word(ring, LOCKS[side], value, size=4)


def area(
    ring: AnyRing, generation: int, record: tuple[int, int, int] | None = None
) -> tuple[int, ...]:
    """(base, capacity, offset) of an area; written first, if a record is given."""
    at = LAYOUT["AREAS_OFFSET"] + 32 * (generation % LAYOUT["AREA_COUNT"])
    if record is not None:
        os.pwrite(ring._fileno(), struct.pack("<3Q", *record), at)
    return struct.unpack("<3Q", os.pread(ring._fileno(), 24, at))


def first_frame(ring: AnyRing) -> int:
    """Where in the file the frame in front begins."""
    read = word(ring, READ_POSITION)
    _, capacity, offset = area(ring, word(ring, READ_GENERATION))
    return offset + read % capacity


LARGE = b"a message" * 400_000  # copying this takes most of a call, under the lock


def _put_and_get_for_ever(ring: Ring, side: str) -> None:
    if side == "consumers":
        ring.put(LARGE)
    stop_to_be_traced()
    if side == "consumers":
        ring.get()
    while True:
        ring.put(LARGE)
        ring.get()


def is_stopped(pid: int) -> bool:
    """Whether a process stands still after SIGSTOP."""
    return state_of(pid) == "T"


@contextlib.contextmanager
def stopped_under_lock(ring: Ring, side: str, deep: int = 1000) -> Iterator[BaseProcess]:
    """A process that SIGSTOP holds where it has a lock of an empty ring of 16 MiB.

    It was taken there instruction by instruction, and so many under the lock: a thousand is
    inside the copying of LARGE.  It goes on, and is killed, at the end of the block.
    """
    with run_in_process(_put_and_get_for_ever, ring, side) as holder:
        pid = holder.pid
        assert pid is not None
        traced = Traced(pid)
        traced.step_under(lambda: lock_word(ring, side) & OWNER == pid, deep)
        traced.let_go(signal.SIGSTOP)
        wait_for(lambda: is_stopped(pid))
        try:
            yield holder
        finally:
            os.kill(pid, signal.SIGCONT)


def blocks(ring: AnyRing) -> list[tuple[int, int, int, int]]:
    """(holder, position, offset, capacity) of each block that has memory."""
    at = word(ring, BLOCKS_AT)
    records = os.pread(ring._fileno(), LAYOUT["BLOCKS_BYTES"], at) if at else b""
    return [record[:4] for record in struct.iter_unpack("<8Q", records) if record[3]]

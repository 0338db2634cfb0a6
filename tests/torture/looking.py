"""Looking at what a killed process left: by another process, and with a deadline.

`settle` is the account that every ring has to give: what was put and taken is
there or not, whole, once, in order; counts agree; puts and gets go on at once;
each page belongs to an area.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shmring._core.ring import LAYOUT
from shmring.errors import Empty, Full, RingCorrupted
from shmring.queues.handle import SharedHandle
from shmring.shm import segment
from tally import BROKEN, CORRUPTED, DISORDERED, DOUBLED, HUNG, LEAKED, LOST, MISCOUNTED, TORN, Harm

__all__ = [
    "AT_ONCE",
    "OWNER_DIED",
    "PATIENCE",
    "READ_GENERATION",
    "READ_POSITION",
    "Account",
    "Finding",
    "check_counts",
    "check_memory",
    "in_fresh_process",
    "lock_word",
    "locks_of_the_dead",
    "message",
    "opened_afresh",
    "settle",
    "sort_out",
    "word",
]

Handle = TypeVar("Handle", bound=SharedHandle)

OWNER_DIED = 0x40000000
AT_ONCE = 5.0  # seconds in which puts and gets go on, on however busy a machine; a slice is 0.09
PATIENCE = 60.0  # seconds, after which a process that looks is one that hangs

WRITE_POSITION = LAYOUT["PRODUCERS_OFFSET"] + 8
WRITE_GENERATION = LAYOUT["PRODUCERS_OFFSET"] + 16
READ_POSITION = LAYOUT["CONSUMERS_OFFSET"] + 8
READ_GENERATION = LAYOUT["CONSUMERS_OFFSET"] + 16
REAPED = LAYOUT["CONSUMERS_OFFSET"] + 24
LOCKS = {"producers": LAYOUT["PRODUCERS_OFFSET"], "consumers": LAYOUT["CONSUMERS_OFFSET"]}


def message(number: int, length: int = 100) -> bytes:
    """Different from all others in every word."""
    words = -(-length // 8)
    return struct.pack(f"<{words}Q", *(number << 32 | i for i in range(words)))[:length]


# ---- the ring, seen from outside -----------------------------------------------------------------


def word(ring: SharedHandle, offset: int, value: int | None = None) -> int:
    """A 64-bit word of the header, read or written past all locks."""
    if value is not None:
        os.pwrite(ring._fileno(), struct.pack("<Q", value), offset)
    return int(struct.unpack("<Q", os.pread(ring._fileno(), 8, offset))[0])


def lock_word(ring: SharedHandle, side: str, value: int | None = None) -> int:
    if value is not None:
        os.pwrite(ring._fileno(), struct.pack("<I", value), LOCKS[side])
    return int(struct.unpack("<I", os.pread(ring._fileno(), 4, LOCKS[side]))[0])


def locks_of_the_dead(*rings: SharedHandle) -> int:
    """How many locks of these rings the kernel has marked."""
    return sum(bool(lock_word(ring, side) & OWNER_DIED) for ring in rings for side in LOCKS)


def living_bytes(ring: SharedHandle) -> int:
    first, last = word(ring, REAPED), word(ring, WRITE_GENERATION)
    return sum(
        word(ring, LAYOUT["AREAS_OFFSET"] + 32 * (g % LAYOUT["AREA_COUNT"]) + 8)
        for g in range(first, last + 1)
    )


def opened_afresh(handle: Handle) -> Handle:
    """Another handle on the same ring, as a process would open it that never saw it."""
    other = type(handle).__new__(type(handle))
    other._restore(handle._state())
    assert other._open(os.dup(handle._fileno()), segment.pid_namespace(), handle._user_kind)
    other._enrol()
    return other


# ---- in another process --------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What a process that looked has found to be in order."""

    outcome: str
    locked: int = 0  # locks whose owner had died
    seconds: float = 0.0  # until a sleeper was awake


def in_fresh_process(look: Callable[[], Finding]) -> Finding:
    """Do `look` in a process of its own; a Harm that it raises is raised here.

    One that crashes, or does not come back, is a harm as well.
    """
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _say(far, look)
        finally:
            os._exit(0)
    os.close(far)
    said = b""
    try:
        if select.select([near], [], [], PATIENCE)[0]:
            said = os.read(near, 1 << 16)
        else:
            os.kill(pid, signal.SIGKILL)
            raise Harm(HUNG, f"the process that looked did not come back within {PATIENCE} s")
    finally:
        os.close(near)
        _, status = os.waitpid(pid, 0)
    if not said:
        raise Harm(BROKEN, f"the process that looked was killed by signal {os.WTERMSIG(status)}")
    harm, found = json.loads(said)
    if harm is not None:
        raise Harm(harm, found)
    return Finding(**found)


def _say(far: int, look: Callable[[], Finding]) -> None:
    said: list[Any]
    try:
        said = [None, vars(look())]
    except Harm as harm:
        said = [harm.kind, harm.detail]
    except Exception as error:
        kind = CORRUPTED if isinstance(error, RingCorrupted) else BROKEN
        kind = HUNG if isinstance(error, (Empty, Full)) else kind
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = [kind, f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:4000]]
    os.write(far, json.dumps(said).encode())


# ---- what must be true ---------------------------------------------------------------------------


def sort_out(
    found: Sequence[bytes], held: Sequence[bytes], *puts: Sequence[bytes]
) -> tuple[int, list[int]]:
    """Compare what is in a ring with what may be in it.

    Args:
        found: what was taken out of it, in order.
        held: what had been in it; any number of these may be gone, from the first.
        puts: what each of the dead meant to put; any number, from the first.

    Returns:
        how many are gone, and how many each of them had put.
    """
    groups = [held, *puts]
    place = {m: (g, i) for g, group in enumerate(groups) for i, m in enumerate(group)}
    for m in found:
        if m not in place:
            raise Harm(
                TORN, f"a message of {len(m)} bytes that no process put: {m[:64].hex(' ', 8)}"
            )
    places = [place[m] for m in found]
    if len(set(places)) != len(places):
        raise Harm(DOUBLED, f"{places}")
    if places != sorted(places):
        raise Harm(DISORDERED, f"{places}")
    numbers = [[i for g, i in places if g == group] for group in range(len(groups))]
    gone = len(held) - len(numbers[0])
    if numbers[0] != list(range(gone, len(held))):
        raise Harm(LOST, f"of {len(held)} that were held these are there: {numbers[0]}")
    for there in numbers[1:]:
        if there != list(range(len(there))):
            raise Harm(LOST, f"one in the middle of what was put: {there}")
    return gone, [len(there) for there in numbers[1:]]


def take_all(ring: Any, last: bytes, block: bool = False) -> list[bytes]:
    """Put one more, then take everything, which must not take long."""
    begun = time.monotonic()
    try:
        ring.put(last, timeout=AT_ONCE)
    except Full:
        raise Harm(HUNG, "a put did not go on") from None
    found: list[bytes] = []
    while not found or found[-1] != last:
        try:
            found += ring.get_many(block=block, timeout=AT_ONCE)
        except Empty:
            if ring.qsize():
                raise Harm(HUNG, f"{ring.qsize()} messages that get does not see") from None
            raise Harm(LOST, f"the last message; {len(found)} others were there") from None
    took = time.monotonic() - begun
    if took > AT_ONCE:
        raise Harm(HUNG, f"stalled for {took:.2f} s")
    found.pop()
    return found


def check_counts(ring: Any, put: int, taken: int) -> None:
    """The statistics say how many were put and taken, and qsize what is left."""
    now = ring.statistics()
    said = (now.messages_put, now.messages_taken, now.messages, ring.qsize())
    if said != (put, taken, put - taken, put - taken):
        raise Harm(MISCOUNTED, f"put, taken, messages, qsize are {said}, not {put} and {taken}")


def check_memory(ring: Any, thorough: bool) -> None:
    """Each page belongs to the header or to a living area, now that the locks were taken."""
    if thorough:
        with contextlib.suppress(Empty):
            ring.get(timeout=0.1)  # a slice with nothing to do gives back what is not needed
        ring.put(b"x")
        assert ring.get(timeout=AT_ONCE) == b"x"
        if living_bytes(ring) > 2 * ring.capacity:
            raise Harm(LEAKED, f"{living_bytes(ring)} bytes of areas in an idle ring")
    for side in LOCKS:
        if lock_word(ring, side) != 0:
            raise Harm(HUNG, f"the {side}' lock is held by no process: {lock_word(ring, side):#x}")
    held = os.fstat(ring._fileno()).st_blocks * 512
    if held > living_bytes(ring) + LAYOUT["HEADER_BYTES"]:
        raise Harm(LEAKED, f"{held} bytes are held for {living_bytes(ring)} of living areas")


@dataclass(frozen=True)
class Account:
    """What `settle` has found: messages gone, and put by each of the dead."""

    gone: int
    put: list[int]
    locked: int


def settle(
    ring: Any,
    held: Sequence[bytes],
    ever: int,
    *puts: Sequence[bytes],
    gets: int = 0,
    batch: bool = False,
    may_abort: bool = False,
    thorough: bool = False,
) -> Account:
    """Look at what the dead left in a ring, go on, and check that all is well.

    Args:
        ring: the handle to look by.
        held: what was in the ring before, in order.
        ever: how many had been put before.
        puts: what each of the dead meant to put.
        gets: how many they may have taken together.
        batch: what the first of them put is there as a whole or not at all.
        may_abort: what was put may be counted and never be delivered.
        thorough: wait, too, until memory was given back.

    Raises:
        Harm: something is not as it must be.
    """
    before = ring.statistics()
    locked = locks_of_the_dead(ring)
    if before.poisoned:
        raise Harm(BROKEN, "the ring was declared broken")
    found = take_all(ring, message(1 << 20), block=thorough)
    gone, put = sort_out(found, held, *puts)
    if gone > gets:
        raise Harm(LOST, f"{gone} messages are gone, at most {gets} were being taken")
    if batch and put[0] not in (0, len(puts[0])):
        raise Harm(LOST, f"part of a batch: {put}")
    now = ring.statistics()
    aborted = may_abort and now.messages_put == ever + sum(put) + 2
    seen = (before.messages_put, before.messages_taken, before.messages)
    right = (ever + sum(put), ever - len(held) + gone)
    if (not may_abort and seen[:2] != right) or seen[2] != seen[0] - seen[1]:
        raise Harm(MISCOUNTED, f"put, taken, messages were {seen}, not {right}")
    check_counts(ring, ever + sum(put) + 1 + aborted, ever + sum(put) + 1 + aborted)
    if now.used_bytes != 0:
        raise Harm(MISCOUNTED, f"{now.used_bytes} bytes are used by nothing")
    if now.recoveries > before.recoveries + 2:
        raise Harm(MISCOUNTED, f"{now.recoveries - before.recoveries} recoveries of two locks")
    check_memory(ring, thorough)
    return Account(gone, put, locked)

"""The operations that are killed, the rings they begin on, and what may be left after a kill."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from shmring import Ring, segment
from shmring.errors import Empty, Full

_handle = pytest.importorskip("shmring._handle", exc_type=ImportError)
LAYOUT = _handle.LAYOUT
PAGE = os.sysconf("SC_PAGESIZE")
OWNER_DIED = 0x40000000
AT_ONCE = 1.0  # seconds in which puts and gets must go on

ALL_OF_ONE = 7  # a ring of one page holds so many messages of 500 bytes


def message(number: int, length: int = 100) -> bytes:
    """Different from all others in every word."""
    words = -(-length // 8)
    return struct.pack(f"<{words}Q", *(number << 32 | i for i in range(words)))[:length]


# ---- the ring, seen from outside ---------------------------------------------------------


def word(ring: Ring, offset: int, value: int | None = None) -> int:
    """A 64-bit word of the header, read or written past all locks."""
    if value is not None:
        os.pwrite(ring.fileno(), struct.pack("<Q", value), offset)
    return int(struct.unpack("<Q", os.pread(ring.fileno(), 8, offset))[0])


WRITE_POSITION = LAYOUT["PRODUCERS_OFFSET"] + 8
WRITE_GENERATION = LAYOUT["PRODUCERS_OFFSET"] + 16
READ_GENERATION = LAYOUT["CONSUMERS_OFFSET"] + 16
REAPED = LAYOUT["CONSUMERS_OFFSET"] + 24
LOCKS = {"producers": LAYOUT["PRODUCERS_OFFSET"], "consumers": LAYOUT["CONSUMERS_OFFSET"]}


def forget_owner(ring: Ring, side: str) -> None:
    """Leave the lock as the kernel leaves it when its owner dies."""
    os.pwrite(ring.fileno(), struct.pack("<I", OWNER_DIED), LOCKS[side])


def lock_word(ring: Ring, side: str) -> int:
    return int(struct.unpack("<I", os.pread(ring.fileno(), 4, LOCKS[side]))[0])


def living_bytes(ring: Ring) -> int:
    first, last = word(ring, REAPED), word(ring, WRITE_GENERATION)
    return sum(
        word(ring, LAYOUT["AREAS_OFFSET"] + 32 * (g % LAYOUT["AREA_COUNT"]) + 8)
        for g in range(first, last + 1)
    )


class _Descriptor:
    """What multiprocessing would carry to a child."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        return os.dup(self.fd)


def opened_afresh(ring: Ring) -> Ring:
    other = Ring.__new__(Ring)
    assert other._open(os.dup(ring.fileno()), segment.pid_namespace(), 1)
    other._enrol()
    return other


# ---- an operation -------------------------------------------------------------------------


@dataclass
class Stage:
    """One ring, prepared; `held` is what is in it, `put` how many ever were."""

    ring: Ring
    held: list[bytes] = field(default_factory=list)
    put: int = 0

    def fill(self, count: int, length: int = 100) -> Stage:
        for _ in range(count):
            self.held.append(message(self.put, length))
            self.ring.put_nowait(self.held[-1])
            self.put += 1
        return self

    def take(self, count: int) -> Stage:
        for _ in range(count):
            assert self.ring.get_nowait() == self.held.pop(0)
        return self


@dataclass
class Operation:
    name: str
    prepare: Callable[[], Stage]
    act: Callable[[Ring], Any]
    puts: list[bytes] = field(default_factory=list)  # what it puts: any number, from the first
    one_by_one: bool = True  # else all or nothing
    gets: int = 0  # how many it takes at most
    may_abort: bool = False  # what it put may be counted and never delivered
    warm: Callable[[Ring], Any] | None = None  # in the victim, before the walk
    step: int = 1  # every instruction, or every so many


def victim_of(stepper: ModuleType, operation: Operation, stage: Stage, spare: Ring) -> int:
    pid = os.fork()
    if pid != 0:
        return pid
    code = 3
    try:
        spare.put_nowait(b"")  # the thread finds out who it is
        spare.get_nowait()
        if operation.warm is not None:
            operation.warm(stage.ring)
        stepper.traceme()
        operation.act(stage.ring)
        code = 0
    finally:
        os._exit(code)


def settle_accounts(operation: Operation, stage: Stage, ring: Ring, idle: bool) -> str:
    """Look at what the victim left, go on, and say what had come of its operation."""
    before = ring.statistics()
    assert not before.poisoned
    assert before.messages == before.messages_put - before.messages_taken == ring.qsize()
    locked = [side for side in LOCKS if lock_word(ring, side) & OWNER_DIED]

    begun = time.monotonic()
    after = message(1 << 20)
    ring.put(after, timeout=AT_ONCE)
    found: list[bytes] = []
    while not found or found[-1] != after:
        try:
            found += ring.get_many(block=idle, timeout=AT_ONCE)
        except Empty:
            raise AssertionError(f"{len(found)} messages, and not the last one") from None
    took = time.monotonic() - begun
    assert took < AT_ONCE, f"stalled for {took:.2f} s"
    found.pop()

    put = [m for m in found if m in operation.puts]
    rest = [m for m in found if m not in operation.puts]
    assert found == rest + put, "out of order"
    assert put == operation.puts[: len(put)], "torn, or out of order"
    if not operation.one_by_one:
        assert len(put) in (0, len(operation.puts)), "part of a batch"
    gone = len(stage.held) - len(rest)
    assert rest == stage.held[gone:], "torn, lost or doubled"
    assert gone <= operation.gets, f"{gone} messages are gone"

    now = ring.statistics()
    assert now.messages == 0
    assert now.messages_put == now.messages_taken, "counts disagree when all is taken"
    assert now.used_bytes == 0
    if operation.may_abort:
        assert now.messages_put - stage.put - 1 in (len(put), len(put) + 1)
    else:
        assert before.messages_put == stage.put + len(put)
        assert now.messages_put == before.messages_put + 1
        assert before.messages_taken == stage.put - len(stage.held) + gone
    assert now.recoveries <= before.recoveries + 2

    if before.growths != now.growths or now.max_capacity != now.capacity or idle:
        accounts_of_memory(ring, idle)
    did = []
    if operation.puts:
        did.append(f"put {len(put)}")
    if operation.gets:
        did.append(f"took {gone}")
    return ", ".join(did) + (f" ({' and '.join(locked)} died locked)" if locked else "")


def accounts_of_memory(ring: Ring, idle: bool) -> None:
    if idle:
        with contextlib.suppress(Empty):
            ring.get(timeout=0.1)  # a slice with nothing to do gives back what is not needed
        ring.put(b"x")
        assert ring.get(timeout=AT_ONCE) == b"x"
        assert living_bytes(ring) <= 2 * ring.capacity
    for side in LOCKS:  # a growth or a punch that was cut short is made good by recovery
        assert lock_word(ring, side) == 0
    held = os.fstat(ring.fileno()).st_blocks * 512
    assert held <= living_bytes(ring) + LAYOUT["HEADER_BYTES"], (
        f"{held} bytes are held for {living_bytes(ring)} of living areas"
    )


# ---- the operations ------------------------------------------------------------------------

SMALL = {"capacity": 4096}
GROWING = {"capacity": 4096, "max_capacity": 1 << 20}


def ring_with(count: int, length: int = 100, **shape: int) -> Stage:
    return Stage(Ring.create(**(shape or SMALL))).fill(count, length)


def wrapped() -> Stage:
    """The next frame goes over the end of the area."""
    stage = Stage(Ring.create(**SMALL)).fill(ALL_OF_ONE, 500).take(ALL_OF_ONE - 1)
    stage.fill(2, 80)
    return stage


def two_areas() -> Stage:
    """All of the first area was taken; the next message lies in the second."""
    stage = Stage(Ring.create(**GROWING)).fill(ALL_OF_ONE, 500)
    stage.fill(4, 500)
    return stage.take(ALL_OF_ONE)


def grown_and_empty() -> Stage:
    stage = Stage(Ring.create(**GROWING)).fill(3 * ALL_OF_ONE, 500)
    stage.take(3 * ALL_OF_ONE)
    return stage


def grown_behind(stage: Stage) -> Stage:
    """The victim's handle has not seen that the ring grew."""
    other = opened_afresh(stage.ring)
    while other.statistics().growths == 0:
        stage.held.append(message(stage.put, 500))
        other.put_nowait(stage.held[-1])
        stage.put += 1
    other.close()
    return stage


def died_locked(side: str, make: Callable[[], Stage]) -> Callable[[], Stage]:
    def prepare() -> Stage:
        stage = make()
        forget_owner(stage.ring, side)
        return stage

    return prepare


def growth_cut_short() -> Stage:
    """A producer died while it grew: pages that nobody knows of, a front, a half-written record."""
    stage = ring_with(3, **GROWING)
    os.posix_fallocate(stage.ring.fileno(), 1 << 16, 1 << 15)
    word(stage.ring, LAYOUT["AREAS_OFFSET"] + 32, 12345)
    for i, value in enumerate((7, 4096, time.monotonic_ns() + 10**9)):
        word(stage.ring, LAYOUT["PRODUCERS_OFFSET"] + 48 + 8 * i, value)
    forget_owner(stage.ring, "producers")
    return stage


def moving_cut_short() -> Stage:
    """A consumer died after moving on, before giving back; a lease and a claim lie about."""
    stage = two_areas()
    word(stage.ring, READ_GENERATION, 1)
    read = word(stage.ring, LAYOUT["CONSUMERS_OFFSET"] + 8)
    claim = LAYOUT["CLAIMS_OFFSET"]
    word(stage.ring, claim + 8, read)
    word(stage.ring, claim + 16, read + 136)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 16, 99)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 24, 0)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 32, read)
    forget_owner(stage.ring, "consumers")
    return stage


def reserve_and_commit(ring: Ring) -> None:
    with ring.reserve(100) as view:
        view[:] = message(99)


def reserve_and_abort(ring: Ring) -> None:
    with contextlib.suppress(ZeroDivisionError), ring.reserve(100) as view:
        view[:] = message(99)
        raise ZeroDivisionError


def peek_and_consume(ring: Ring) -> None:
    with ring.peek() as view:
        assert len(view) == 100


def peek_and_leave(ring: Ring) -> None:
    with contextlib.suppress(ZeroDivisionError), ring.peek():
        raise ZeroDivisionError


def get_in_vain(ring: Ring) -> None:
    with contextlib.suppress(Empty):
        ring.get(timeout=0.09)


def put_in_vain(ring: Ring) -> None:
    with contextlib.suppress(Full):
        ring.put(message(99, 500), timeout=0.02)


BATCH = [message(99 + i, 60 + 40 * i) for i in range(5)]
LARGE_BATCH = [message(99 + i, 500) for i in range(2 * ALL_OF_ONE)]

OPERATIONS = [
    Operation("put", lambda: ring_with(3), lambda r: r.put(message(99)), [message(99)]),
    Operation("put over the end", wrapped, lambda r: r.put(message(99, 300)), [message(99, 300)]),
    Operation(
        "put_nowait",
        lambda: ring_with(3),
        lambda r: r.put_nowait(message(99)),
        [message(99)],
    ),
    Operation("get", lambda: ring_with(3), lambda r: r.get(), gets=1),
    Operation(
        "get over the end", lambda: wrapped().fill(1, 300).take(3), lambda r: r.get(), gets=1
    ),
    Operation(
        "put with growth",
        lambda: ring_with(ALL_OF_ONE, 500, **GROWING),
        lambda r: r.put(message(99, 500)),
        [message(99, 500)],
    ),
    Operation(
        "put_nowait with growth",
        lambda: ring_with(ALL_OF_ONE, 500, **GROWING),
        lambda r: r.put_nowait(message(99, 9000)),
        [message(99, 9000)],
    ),
    Operation(
        "put to an area grown by another",
        lambda: grown_behind(ring_with(ALL_OF_ONE, 500, **GROWING)),
        lambda r: r.put(message(99, 500)),
        [message(99, 500)],
    ),
    Operation("get that moves on", two_areas, lambda r: r.get(), gets=1),
    Operation(
        "reserve, commit",
        lambda: ring_with(3),
        reserve_and_commit,
        [message(99)],
        may_abort=True,
        warm=peek_and_leave,
    ),
    Operation(
        "reserve, abort",
        lambda: ring_with(3),
        reserve_and_abort,
        may_abort=True,
        warm=peek_and_leave,
    ),
    Operation("peek, consume", lambda: ring_with(3), peek_and_consume, gets=1, warm=peek_and_leave),
    Operation("peek, leave", lambda: ring_with(3), peek_and_leave, warm=peek_and_leave),
    Operation(
        "peek that moves on",
        two_areas,
        lambda r: r.peek().__enter__(),
        step=3,
    ),
    Operation(
        "put_many", lambda: ring_with(3), lambda r: r.put_many(BATCH), BATCH, one_by_one=False
    ),
    Operation(
        "put_many with growth",
        lambda: ring_with(3, 500, **GROWING),
        lambda r: r.put_many(LARGE_BATCH),
        LARGE_BATCH,
        step=3,
    ),
    Operation("get_many", lambda: ring_with(8), lambda r: r.get_many(), gets=8),
    Operation("get_many that moves on", two_areas, lambda r: r.get_many(), gets=4),
    Operation(
        "get of 9000 bytes", lambda: ring_with(2, 9000, capacity=1 << 16), lambda r: r.get(), gets=1
    ),
    Operation(
        "put, lock of a dead one",
        died_locked("producers", lambda: ring_with(3)),
        lambda r: r.put(message(99)),
        [message(99)],
    ),
    Operation(
        "get, lock of a dead one",
        died_locked("consumers", lambda: ring_with(3)),
        lambda r: r.get(),
        gets=1,
    ),
    Operation(
        "put, growth of a dead one", growth_cut_short, lambda r: r.put(message(99)), [message(99)]
    ),
    Operation("get, move of a dead one", moving_cut_short, lambda r: r.get(), gets=1),
    Operation("shrink", grown_and_empty, get_in_vain, step=7),
    Operation("get in vain", lambda: ring_with(0), get_in_vain, step=7),
    Operation("put in vain", lambda: ring_with(ALL_OF_ONE, 500), put_in_vain, step=7),
]

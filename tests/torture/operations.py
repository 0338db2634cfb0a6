"""Operations on a ring of bytes, and what may be left when they are killed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from looking import (
    OWNER_DIED,
    READ_GENERATION,
    READ_POSITION,
    Account,
    Finding,
    lock_word,
    message,
    opened_afresh,
    settle,
    word,
)
from shmring import Ring
from shmring._core.ring import LAYOUT
from shmring.errors import Empty, Full
from shmring.queues.handle import SharedHandle
from trials import Operation, Stage

__all__ = [
    "AREAS",
    "BATCH",
    "GETS",
    "GROWING",
    "IN_PLACE",
    "MIDDLE",
    "OPERATIONS",
    "PUTS",
    "RECOVERIES",
    "RingStage",
    "forget_owner",
    "full_of_one",
    "outcome_of",
    "peek_and_leave",
    "ring_with",
]

SMALL = {"capacity": 4096}
GROWING = {"capacity": 4096, "max_capacity": 1 << 20}
ALL_OF_ONE = 7  # a ring of one page holds so many messages of 500 bytes


@dataclass
class RingStage(Stage):
    """One ring, prepared.

    Args:
        ring: the handle that the victim uses.
        held: what is in it.
        ever: how many were ever put.
        puts: what the victim puts: any number, from the first.
        more: what a second victim puts.
        gets: how many it takes at most.
        batch: it puts all or nothing.
        may_abort: what it put may be counted and never delivered.
    """

    ring: Any  # a Ring, or a Queue of bytes
    held: list[bytes] = field(default_factory=list)
    ever: int = 0
    puts: Sequence[bytes] = ()
    more: Sequence[bytes] = ()
    gets: int = 0
    batch: bool = False
    may_abort: bool = False

    def fill(self, count: int, length: int = 100) -> RingStage:
        for _ in range(count):
            self.held.append(message(self.ever, length))
            self.ring.put_nowait(self.held[-1])
            self.ever += 1
        return self

    def take(self, count: int) -> RingStage:
        for _ in range(count):
            assert self.ring.get_nowait() == self.held.pop(0)
        return self

    def afresh(self) -> None:
        self.ring = opened_afresh(self.ring)

    def settle(self, thorough: bool) -> Finding:
        account = self.account(thorough)
        puts = len(self.puts) + len(self.more)
        said = outcome_of(sum(account.put), puts, account.gone, self.gets)
        return Finding(said, account.locked)

    def account(self, thorough: bool) -> Account:
        return settle(
            self.ring,
            self.held,
            self.ever,
            self.puts,
            self.more,
            gets=self.gets,
            batch=self.batch,
            may_abort=self.may_abort,
            thorough=thorough,
        )

    def close(self) -> None:
        self.ring.close()


def outcome_of(put: int, puts: int, gone: int, gets: int) -> str:
    """In words: what of that which was put is there, and what was taken is gone."""
    said = []
    if puts == 1:
        said.append("there" if put else "not there")
    elif puts:
        said.append(f"with {put} of {puts} there")
    if gets == 1:
        said.append("taken" if gone else "still there")
    elif gets:
        said.append(f"with {gone} of {gets} taken")
    return " and ".join(said) or "as before"


# ---- the rings -----------------------------------------------------------------------------------


def ring_with(count: int, length: int = 100, **shape: int) -> RingStage:
    return RingStage(Ring.create(**(shape or SMALL))).fill(count, length)


def wrapped() -> RingStage:
    """The next frame goes over the end of the area."""
    return ring_with(ALL_OF_ONE, 500).take(ALL_OF_ONE - 1).fill(2, 80)


def full_of_one(**shape: int) -> RingStage:
    return ring_with(ALL_OF_ONE, 500, **(shape or GROWING))


def two_areas() -> RingStage:
    """All of the first area was taken; the next message lies in the second."""
    return full_of_one().fill(4, 500).take(ALL_OF_ONE)


def grown_and_empty() -> RingStage:
    return full_of_one().fill(2 * ALL_OF_ONE, 500).take(3 * ALL_OF_ONE)


def grown_with_one_left() -> RingStage:
    """Large, and used so little since it was last empty that the next get gives memory back."""
    stage = full_of_one().fill(6 * ALL_OF_ONE, 500)
    return stage.take(7 * ALL_OF_ONE).fill(1, 100)


def grown_behind(stage: RingStage) -> RingStage:
    """The victim's handle has not seen that the ring grew."""
    other = opened_afresh(stage.ring)
    while other.statistics().growths == 0:
        stage.held.append(message(stage.ever, 500))
        other.put_nowait(stage.held[-1])
        stage.ever += 1
    other.close()
    return stage


def forget_owner(ring: SharedHandle, *sides: str) -> None:
    """Leave locks as the kernel leaves them when their owner dies."""
    for side in sides:
        lock_word(ring, side, OWNER_DIED)


def left_locked(side: str) -> RingStage:
    stage = ring_with(3)
    forget_owner(stage.ring, side)
    return stage


def growth_cut_short() -> RingStage:
    """A producer died while it grew: pages that no record names, a front, a half-written record."""
    stage = ring_with(3, **GROWING)
    os.posix_fallocate(stage.ring._fileno(), 1 << 16, 1 << 15)
    word(stage.ring, LAYOUT["AREAS_OFFSET"] + 32, 12345)
    for i, value in enumerate((7, 4096, time.monotonic_ns() + 10**9)):
        word(stage.ring, LAYOUT["PRODUCERS_OFFSET"] + 48 + 8 * i, value)
    forget_owner(stage.ring, "producers")
    return stage


def moving_cut_short() -> RingStage:
    """A consumer died after moving on, before giving back; a lease and a claim lie about."""
    stage = two_areas()
    word(stage.ring, READ_GENERATION, 1)
    read = word(stage.ring, READ_POSITION)
    claim = LAYOUT["CLAIMS_OFFSET"]
    word(stage.ring, claim + 8, read)
    word(stage.ring, claim + 16, read + 136)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 16, 99)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 24, 0)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 32, read)
    forget_owner(stage.ring, "consumers")
    return stage


# ---- the operations ------------------------------------------------------------------------------

BATCH = [message(99 + i, 60 + 40 * i) for i in range(5)]
LARGE_BATCH = [message(99 + i, 500) for i in range(2 * ALL_OF_ONE)]
SHORT, MIDDLE, LONG = message(99), message(99, 500), message(99, 9000)
OVER_END = message(99, 300)


def putting(
    name: str,
    prepare: Callable[[], RingStage],
    act: Callable[[Ring], object],
    *puts: bytes,
    batch: bool = False,
) -> Operation:
    def staged() -> RingStage:
        stage = prepare()
        stage.puts, stage.batch = puts, batch
        return stage

    return Operation(name, staged, lambda stage: act(stage.ring))


def getting(
    name: str,
    prepare: Callable[[], RingStage],
    act: Callable[[Ring], object] = Ring.get,
    gets: int = 1,
) -> Operation:
    def staged() -> RingStage:
        stage = prepare()
        stage.gets = gets
        return stage

    return Operation(name, staged, lambda stage: act(stage.ring))


def in_place(
    name: str,
    prepare: Callable[[], RingStage],
    act: Callable[[Ring], object],
    **promise: Any,
) -> Operation:
    def staged() -> RingStage:
        stage = prepare()
        for what, value in promise.items():
            setattr(stage, what, value)
        return stage

    return Operation(
        name,
        staged,
        lambda stage: act(stage.ring),
        warm=lambda stage: peek_and_leave(stage.ring),
    )


def reserve_and_commit(ring: Ring) -> None:
    with ring.reserve(100) as view:
        view[:] = SHORT


def reserve_and_abort(ring: Ring) -> None:
    with contextlib.suppress(ZeroDivisionError), ring.reserve(100) as view:
        view[:] = SHORT
        raise ZeroDivisionError


def peek_and_consume(ring: Ring) -> None:
    with ring.peek() as view:
        assert len(view) in (100, 500)


def peek_and_leave(ring: Ring) -> None:
    with contextlib.suppress(ZeroDivisionError), ring.peek():
        raise ZeroDivisionError


def get_in_vain(ring: Ring) -> None:
    """For a part of one slice."""
    with contextlib.suppress(Empty):
        ring.get(timeout=0.05)


def get_in_vain_for_long(ring: Ring) -> None:
    """For a slice, after which memory is given back, and a part of another."""
    with contextlib.suppress(Empty):
        ring.get(timeout=0.13)


def put_in_vain(ring: Ring) -> None:
    with contextlib.suppress(Full):
        ring.put(MIDDLE, timeout=0.05)


def idle(name: str, prepare: Callable[[], RingStage], act: Callable[[Ring], object]) -> Operation:
    """It waits, and in the end it neither put nor took anything."""
    return Operation(name, prepare, lambda stage: act(stage.ring), sleeps=True)


PUTS = [
    putting("put", lambda: ring_with(3), lambda r: r.put(SHORT), SHORT),
    putting(
        "put, the general way", lambda: ring_with(3), lambda r: r.put(SHORT, timeout=10), SHORT
    ),
    putting("put over the end", wrapped, lambda r: r.put(OVER_END), OVER_END),
    putting("put_nowait", lambda: ring_with(3), lambda r: r.put_nowait(SHORT), SHORT),
    putting("put_many", lambda: ring_with(3), lambda r: r.put_many(BATCH), *BATCH, batch=True),
    idle("put in vain", lambda: ring_with(ALL_OF_ONE, 500), put_in_vain),
]

GETS = [
    getting("get", lambda: ring_with(3)),
    getting("get, the general way", lambda: ring_with(3), lambda r: r.get(timeout=10)),
    getting("get over the end", lambda: wrapped().fill(1, 300).take(3)),
    getting("get of 9000 bytes", lambda: ring_with(2, 9000, capacity=1 << 16)),
    getting("get_many", lambda: ring_with(8), Ring.get_many, 8),
    idle("get in vain", lambda: ring_with(0), get_in_vain),
]

IN_PLACE = [
    in_place(
        "reserve, commit", lambda: ring_with(3), reserve_and_commit, puts=[SHORT], may_abort=True
    ),
    in_place("reserve, abort", lambda: ring_with(3), reserve_and_abort, may_abort=True),
    in_place("peek, consume", lambda: ring_with(3), peek_and_consume, gets=1),
    in_place("peek, leave", lambda: ring_with(3), peek_and_leave),
]

# To the next area and back: growing, moving on and giving back, shrinking.
AREAS = [
    putting("put with growth", full_of_one, lambda r: r.put(MIDDLE), MIDDLE),
    putting("put_nowait with growth", full_of_one, lambda r: r.put_nowait(LONG), LONG),
    putting(
        "put_many with growth",
        lambda: ring_with(3, 500, **GROWING),
        lambda r: r.put_many(LARGE_BATCH),
        *LARGE_BATCH,
    ),
    putting(
        "put to an area grown by another",
        lambda: grown_behind(full_of_one()),
        lambda r: r.put(MIDDLE),
        MIDDLE,
    ),
    getting("get that moves on", two_areas),
    getting("get_many that moves on", two_areas, Ring.get_many, 4),
    getting("peek that moves on", two_areas, peek_and_consume),
    getting("get that gives memory back", grown_with_one_left),
    idle("shrink", grown_and_empty, get_in_vain_for_long),
]

RECOVERIES = [
    putting(
        "put, lock of a dead one", lambda: left_locked("producers"), lambda r: r.put(SHORT), SHORT
    ),
    putting("put, growth of a dead one", growth_cut_short, lambda r: r.put(SHORT), SHORT),
    getting("get, lock of a dead one", lambda: left_locked("consumers")),
    getting("get, move of a dead one", moving_cut_short),
]

OPERATIONS = [*PUTS, *GETS, *IN_PLACE, *AREAS, *RECOVERIES]

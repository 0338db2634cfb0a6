"""What no process of shmring wrote, in shared memory: an error in time, never a crash.

Written into the file past all locks, as a stray pointer or a hostile peer of the same user would.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import random
import time
from collections.abc import Callable

import numpy as np
import pytest

from header import (
    BLOCKS_AT,
    LAYOUT,
    LOCKS,
    MEMORY_LOCK,
    OWNER_DIED,
    READ_GENERATION,
    READ_POSITION,
    WAITERS,
    WRITE_GENERATION,
    WRITE_POSITION,
    area,
    first_frame,
    lock_word,
    word,
)
from shmring import LayoutMismatch, Queue, Ring, RingCorrupted, SharedMemoryManager, ShmringError
from shmring.errors import Empty, Full, ShutDown
from support import at_least, own_name, run_in_process, wait_for

FRAME = LAYOUT["FRAME_BYTES"]
AREAS = LAYOUT["AREAS_OFFSET"]


def refused_everywhere(ring: Ring, match: str, *, attaching: bool = True) -> None:
    """Every call on this handle, in a child, and on a handle made afterwards."""

    def in_a_child() -> None:
        for call in (lambda: ring.put(b"x", timeout=5), lambda: ring.get(timeout=5)):
            with pytest.raises(RingCorrupted, match=match):
                call()

    in_a_child()
    with run_in_process(in_a_child) as child:
        child.join(30)
        assert child.exitcode == 0
    if attaching:
        with Ring.attach(ring.name) as other, pytest.raises(RingCorrupted, match=match):
            other.get(timeout=5)
    assert ring.statistics().poisoned


def drain(ring: Ring, timeout: float = 5) -> None:
    """Take what is there, to the error that must come; each must be the next one of `numbered`."""
    for message in numbered(1000):
        assert ring.get(timeout=timeout) == message


def numbered(count: int) -> list[bytes]:
    return [b"%03d" % number * 100 for number in range(count)]


# ---- locks -----------------------------------------------------------------------------------


NO_THREAD = (1 << 22) + 1  # a TID beyond any that Linux gives out
GARBAGE = {
    "no thread": NO_THREAD,
    "no thread, with waiters": NO_THREAD | WAITERS,
    "no thread, which died": NO_THREAD | OWNER_DIED,
    "all bits": 0xFFFFFFFF,
    "the caller": None,
}


@pytest.mark.fault(24)
@pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("side", LOCKS)
def test_a_lock_word_that_names_no_thread(side, value):
    with Ring.create() as ring:
        ring.put(b"x")
        lock_word(ring, side, os.getpid() if value is None else value)
        with pytest.raises(RingCorrupted, match="lock word"):
            ring.put(b"y", timeout=5) if side == "producers" else ring.get(timeout=5)
        lock_word(ring, side, 0)  # it was an error of this call, and the ring is what it was
        ring.put(b"y")
        assert ring.get_many() == [b"x", b"y"]


@pytest.mark.fault(24)
@pytest.mark.parametrize("side", LOCKS)
def test_a_lock_word_that_names_somebody_else(side):
    """It may hold it, for all that can be known: the time-out ends the wait."""
    with Ring.create() as ring:
        ring.put(b"x")
        lock_word(ring, side, os.getppid())
        if side == "producers":
            with pytest.raises(Full):
                ring.put_nowait(b"y")
            with at_least(0.2), pytest.raises(Full):
                ring.put(b"y", timeout=0.2)
        else:
            with pytest.raises(Empty):
                ring.get_nowait()
            with at_least(0.2), pytest.raises(Empty):
                ring.get(timeout=0.2)
        lock_word(ring, side, OWNER_DIED)
        ring.put(b"y", timeout=5)
        assert ring.get_many(timeout=5) == [b"x", b"y"]


@pytest.mark.fault(24)
def test_the_lock_word_of_plain_memory_that_names_no_thread():
    name = own_name("poked-memory")
    with SharedMemoryManager(name, 100) as memory:
        assert memory.create()
        with open(f"/dev/shm/{name}", "r+b") as file:
            word(file.fileno(), MEMORY_LOCK, NO_THREAD, size=4)
            with pytest.raises(RingCorrupted, match="lock word"):
                memory.read_data(10)
            word(file.fileno(), MEMORY_LOCK, 0, size=4)
        memory.write_data(b"again")
        assert memory.read_data(5) == b"again"


# ---- areas -----------------------------------------------------------------------------------


def grown() -> Ring:
    """Two areas: 12 messages of 300 bytes in the first, 8 in the second, which is larger."""
    ring = Ring.create(4096, max_capacity=1 << 20)
    ring.put_many(numbered(20))
    assert ring.statistics().growths == 1
    return ring


def record_of(ring: Ring, wrong: str) -> tuple[int, int, int]:
    base, capacity, offset = area(ring, 1)
    return {
        "outside": (base, capacity, 1 << 40),
        "past the end": (base, capacity, os.fstat(ring._fileno()).st_size - 4096),
        "in the header": (base, capacity, 4096),
        "overflowing": (base, capacity, (1 << 64) - 4096),
        "in an area in use": (base, capacity, LAYOUT["HEADER_BYTES"]),
        "between pages": (base, capacity, offset + 8),
        "too large": (base, 1 << 40, offset),
        "of a size that is no power of two": (base, capacity - 4096 + 512, offset),
        "of no size": (base, 0, offset),
        "of all bits": ((1 << 64) - 1,) * 3,
    }[wrong]


WRONG = [
    "outside",
    "past the end",
    "in the header",
    "overflowing",
    "in an area in use",
    "between pages",
    "too large",
    "of a size that is no power of two",
    "of no size",
    "of all bits",
]


@pytest.mark.fault(25)
@pytest.mark.parametrize("wrong", WRONG)
def test_an_attaching_process_meets_the_record_of_a_wrong_area(wrong):
    with grown() as ring:
        area(ring, 1, record_of(ring, wrong))
        with pytest.raises(RingCorrupted), Ring.attach(ring.name) as third:
            drain(third)


@pytest.mark.fault(25)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_consumer_that_moves_on_meets_the_record_of_a_wrong_area(wrong):
    ring = Ring.create(4096, max_capacity=1 << 20)
    with ring, Ring.attach(ring.name) as producer:
        producer.put_many(numbered(20))
        area(ring, 1, record_of(ring, wrong))
        with pytest.raises(RingCorrupted):
            drain(ring)
        refused_everywhere(ring, "area|position", attaching=False)


@pytest.mark.fault(25)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_producer_that_moves_on_meets_the_record_of_a_wrong_area(wrong):
    ring = Ring.create(4096, max_capacity=1 << 20)
    with ring, Ring.attach(ring.name) as grower:
        grower.put_many(numbered(20))
        area(ring, 1, record_of(ring, wrong))
        held = os.pread(ring._fileno(), 4096, LAYOUT["HEADER_BYTES"])
        with pytest.raises(RingCorrupted, match="area"):
            ring.put(b"written where?" * 20, timeout=5)
        assert os.pread(ring._fileno(), 4096, LAYOUT["HEADER_BYTES"]) == held
        refused_everywhere(ring, "area", attaching=False)


@pytest.mark.fault(25)
def test_an_area_to_be_given_back_that_lies_over_one_in_use_is_not_punched():
    with grown() as ring:
        base, capacity, _ = area(ring, 0)
        _, _, offset = area(ring, 1)
        area(ring, 0, (base, capacity, offset))  # as if the drained one lay there
        held = os.pread(ring._fileno(), 4096, offset)
        assert held.strip(b"\0")
        with pytest.raises(RingCorrupted, match="area"):
            drain(ring)
        assert os.pread(ring._fileno(), 4096, offset) == held


@pytest.mark.fault(25, 26)
@pytest.mark.parametrize("ahead", [1, 2, 63, 64, 1 << 32, (1 << 64) - 2])
@pytest.mark.parametrize("side", [WRITE_GENERATION, READ_GENERATION], ids=["write", "read"])
def test_a_generation_that_was_never_made(side, ahead):
    with grown() as ring:
        word(ring, side, word(ring, WRITE_GENERATION) + ahead)
        with pytest.raises((RingCorrupted, Empty)):
            drain(ring, timeout=0.1)
        with contextlib.suppress(RingCorrupted, Full):
            ring.put(b"x", timeout=0.1)


# ---- positions -------------------------------------------------------------------------------


POSITIONS = {
    "read beyond written": (READ_POSITION, lambda at: at + 8),
    "read far beyond written": (READ_POSITION, lambda at: 1 << 63),
    "read between frames": (READ_POSITION, lambda at: 4),
    "written between frames": (WRITE_POSITION, lambda at: at + 4),
    "written more than there is room for": (WRITE_POSITION, lambda at: at + (1 << 16) + 8),
    "written far ahead": (WRITE_POSITION, lambda at: 1 << 63),
    "written before read": (WRITE_POSITION, lambda at: 0),
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("wrong", POSITIONS)
def test_impossible_positions_poison_the_ring_for_every_process(wrong):
    offset, change = POSITIONS[wrong]
    with Ring.create() as ring:
        ring.put_many(numbered(10))
        if wrong == "written before read":
            assert ring.get_many() == numbered(10)
        word(ring, offset, change(word(ring, WRITE_POSITION)))
        with pytest.raises(RingCorrupted, match="position"):
            drain(ring)
        refused_everywhere(ring, "position")


@pytest.mark.fault(26)
def test_a_write_position_that_went_back_does_not_make_room_for_more_than_there_is():
    def scene() -> None:
        with Ring.create(1 << 16, max_capacity=1 << 24) as ring:
            for _ in range(20):
                ring.put_many([bytes(10_000)] * 6)
                ring.get_many()
            word(ring, WRITE_POSITION, word(ring, WRITE_POSITION) - 500_000)
            with pytest.raises(RingCorrupted, match="position"):
                ring.put(bytes(500_000 - FRAME), timeout=5)

    with run_in_process(scene) as child:
        child.join(30)
        assert child.exitcode == 0


@pytest.mark.fault(26)
@pytest.mark.parametrize("side", LOCKS)
def test_impossible_positions_are_seen_by_the_process_that_recovers_a_lock(side):
    with Ring.create() as ring:
        ring.put(b"x")
        word(ring, READ_POSITION, 1 << 20)
        lock_word(ring, side, OWNER_DIED)
        with pytest.raises(RingCorrupted, match="impossible positions"):
            ring.put(b"y", timeout=5) if side == "producers" else ring.get(timeout=5)
        refused_everywhere(ring, "impossible positions")


@pytest.mark.fault(26)
def test_every_process_that_waits_is_told():
    with Ring.create() as ring:

        def told() -> None:
            with pytest.raises(RingCorrupted):
                ring.get(timeout=60)

        with run_in_process(told) as one, run_in_process(told) as two:
            wait_for(lambda: ring.statistics().consumers_waiting)
            word(ring, READ_POSITION, 8)
            with pytest.raises(RingCorrupted):
                ring.get(timeout=5)
            for child in (one, two):
                child.join(30)
                assert child.exitcode == 0


# ---- layout ----------------------------------------------------------------------------------


@pytest.mark.fault(35)
@pytest.mark.parametrize("version", [0, LAYOUT["VERSION"] - 1, LAYOUT["VERSION"] + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [Ring, Queue])
def test_another_version_is_named_beside_ours(kind, version):
    name = own_name("poked-version")
    with kind(name=name) if kind is Queue else kind.create(name=name) as ring:
        word(ring, 8, version, size=4)
        ours = LAYOUT["VERSION"]
        with pytest.raises(LayoutMismatch, match=rf"version {version} .* version {ours} "):
            kind.attach(name)


@pytest.mark.fault(35)
def test_a_header_of_another_size_is_another_layout():
    with Ring.create() as ring:
        word(ring, 12, 4096, size=4)
        with pytest.raises(LayoutMismatch, match=r"header of 4096 bytes.*\(8192 bytes"):
            Ring.attach(ring.name)


# ---- anything --------------------------------------------------------------------------------


ALLOWED = (RingCorrupted, Empty, Full, ShutDown, ShmringError, OSError)


def use(ring: Ring | Queue[bytes], dice: random.Random) -> None:
    """A few calls, none of which waits; whatever the ring is, they end."""
    calls: list[Callable[[], object]] = [
        ring.get_nowait,
        lambda: ring.get_many(block=False),
        lambda: ring.put_nowait(b"x" * dice.choice([10, 1000, 4000, 20_000, 60_000])),
        lambda: ring.put_many([b"y" * 500] * 5, block=False),
        lambda: ring.get(timeout=0.001),
        ring.qsize,
        ring.statistics,
    ]
    for call in dice.choices(calls, k=6):
        with contextlib.suppress(*ALLOWED):
            call()
    if isinstance(ring, Ring):
        with contextlib.suppress(*ALLOWED), ring.peek(block=False) as view:
            bytes(view)
        with contextlib.suppress(*ALLOWED), ring.reserve(40, block=False) as view:
            view[:] = bytes(40)


def mutate(ring: Ring | Queue[bytes], dice: random.Random) -> None:
    """One to three stray writes, into the header or into frames."""
    for _ in range(dice.randrange(1, 4)):
        capacity = 4096 if isinstance(ring, Ring) else 1 << 16
        first = LAYOUT["HEADER_BYTES"] + word(ring, READ_POSITION) % capacity
        at = dice.choice(
            [
                dice.randrange(0, 1024 // 8) * 8,
                dice.randrange(128, 1024 // 4) * 4,
                AREAS + dice.randrange(12) * 8,
                first + dice.randrange(FRAME // 4) * 4,
                LAYOUT["HEADER_BYTES"] + dice.randrange(4096 // 8) * 8,
            ]
        )
        old = word(ring, at)
        new = dice.choice(
            [
                dice.getrandbits(64),
                dice.getrandbits(32),
                dice.randrange(1 << 14),
                old ^ 1 << dice.randrange(64),
                old + dice.choice([-4096, -8, -1, 1, 8, 336, 4096]),
                0,
                (1 << 64) - 1,
            ]
        )
        word(ring, at, new % (1 << 64))


def opened_twice(dice: random.Random) -> None:
    """A ring that was mutated, used by the handle that made it and by one that attaches."""
    limit = dice.choice([4096, 1 << 16, 1 << 17])
    made = Queue(codec="bytes", max_capacity=limit) if dice.random() < 0.3 else None
    with made or Ring.create(4096, max_capacity=limit) as ring:
        name = ring.name
        with contextlib.suppress(Full):
            ring.put_many(numbered(dice.randrange(20)), block=False)
        if dice.random() < 0.3:
            with contextlib.suppress(Empty):
                ring.get_many(dice.randrange(1, 12), block=False)
        mutate(ring, dice)
        try:
            attach = Ring.attach if made is None else functools.partial(Queue.attach, codec="bytes")
            with contextlib.suppress(*ALLOWED), attach(name) as other:
                mutate(ring, dice)
                use(other, dice)
            use(ring, dice)
        finally:
            with contextlib.suppress(FileNotFoundError):  # its name in the header may be another
                os.unlink(f"/dev/shm/{name}")


@pytest.mark.fault(23)
@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_mutated_rings_crash_no_process(seed):
    def scene() -> None:
        dice = random.Random(seed)
        for _ in range(500):
            opened_twice(dice)

    with run_in_process(scene) as child:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.fault(23)
@pytest.mark.parametrize("kind", [Ring, Queue])
def test_lengths_that_change_while_they_are_read_crash_no_process(kind):
    """Another process writes lengths into the frames all the while."""
    make = Ring.create if kind is Ring else lambda: Queue(codec="bytes", max_capacity=1 << 16)
    with make() as ring:
        ring.put_many([b"%03d" % number * 20 for number in range(100)])
        size = LAYOUT["HEADER_BYTES"] + (1 << 16)
        clean = os.pread(ring._fileno(), size, 0)
        at = [LAYOUT["HEADER_BYTES"] + 96 * number + 8 for number in range(100)]

        def flip() -> None:
            dice = random.Random(1)
            lengths = [dice.getrandbits(bits).to_bytes(8, "little") for bits in range(1, 64)]
            with mmap.mmap(ring._fileno(), size) as mapped:
                while True:
                    mapped_at, length = dice.choice(at), dice.choice(lengths)
                    mapped[mapped_at : mapped_at + 8] = length
                    mapped[mapped_at : mapped_at + 8] = (60).to_bytes(8, "little")

        def read() -> None:
            until = time.monotonic() + 1.5
            whole = 0
            while time.monotonic() < until:
                os.pwrite(ring._fileno(), clean[256:], 256)
                os.pwrite(ring._fileno(), clean[128:256], 128)
                with contextlib.suppress(RingCorrupted, Empty):
                    while True:
                        whole += len(ring.get_many(block=False)) == 100
            assert whole

        with run_in_process(flip), run_in_process(read) as reader:
            reader.join(60)
            assert reader.exitcode == 0


# ---- records of lent blocks ------------------------------------------------------------------

MIB = 1 << 20  # the smallest buffer that is lent


def array(number: int) -> np.ndarray:
    return np.full(MIB // 4, number, np.int32)


def _forge_index(queue: Queue) -> None:
    at = first_frame(queue) + LAYOUT["FRAME_BYTES"] + 16
    word(queue, at, word(queue, at) | 77 << 48)


def _forge_length(queue: Queue) -> None:
    at = first_frame(queue) + LAYOUT["FRAME_BYTES"] + 16
    word(queue, at, word(queue, at) + MIB)


def _forge_position(queue: Queue) -> None:
    word(queue, word(queue, BLOCKS_AT) + 8, word(queue, READ_POSITION) + 8)


def _forge_offset(queue: Queue) -> None:
    word(queue, word(queue, BLOCKS_AT) + 16, 1 << 40)
    word(queue, word(queue, BLOCKS_AT) + 32, 99)


def _forge_place(queue: Queue) -> None:
    """Over an area that is in use."""
    word(queue, word(queue, BLOCKS_AT) + 16, LAYOUT["HEADER_BYTES"])
    word(queue, word(queue, BLOCKS_AT) + 32, 99)


def _forge_records(queue: Queue) -> None:
    word(queue, BLOCKS_AT, 4097)


@pytest.mark.parametrize(
    "forge",
    [
        _forge_index,
        _forge_length,
        _forge_position,
        _forge_offset,
        _forge_place,
        _forge_records,
    ],
)
def test_a_record_that_lies_is_found_out(forge):
    with Queue() as queue:
        queue.put(array(1))
        other = Queue.attach(queue.name)
        forge(queue)
        with pytest.raises(RingCorrupted):
            other.get(timeout=30)
        other.close()


def test_a_lock_taken_from_a_dead_producer_leaves_no_block_in_a_message_that_was_never_put():
    with Queue() as queue:
        queue.put(array(1))
        queue.put(array(2))
        got = queue.get(timeout=30)
        at = word(queue, BLOCKS_AT)
        word(queue, at + 8, 1 << 40)  # stored, and its holder died before the commit
        lock_word(queue, "producers", OWNER_DIED)
        queue.put(b"recovers")
        assert word(queue, at + 8) == (1 << 64) - 1
        assert (got == 1).all()
        assert (queue.get(timeout=30) == 2).all()
        assert queue.get(timeout=30) == b"recovers"

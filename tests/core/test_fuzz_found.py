"""What the fuzz drivers found, each in its smallest form."""

from __future__ import annotations

import os
import time

import pytest

from header import LOCKS, OWNER_DIED, READ_POSITION, WAITERS, area, lock_word, word
from shmring import Ring, RingCorrupted
from shmring._core.ring import LAYOUT
from shmring.errors import Empty

FIRST_CAPACITY = 16
LEASE_HIGH = LAYOUT["WAITING_OFFSET"] + 32
FRONT_TID, FRONT_NEED, FRONT_UNTIL_NS = (LAYOUT["PRODUCERS_OFFSET"] + at for at in (48, 56, 64))
PATIENCE = LAYOUT["PRODUCERS_OFFSET"] + 80
NEEDED_NS = LAYOUT["CONSUMERS_OFFSET"] + 64


def idle(ring: Ring) -> None:
    """A get that sleeps for more than a slice: it gives memory back."""
    with pytest.raises(Empty):
        ring.get(timeout=0.2)


def grown_and_drained() -> Ring:
    ring = Ring.create(4096, max_capacity=1 << 20)
    ring.put_many([bytes(300)] * 100)
    assert ring.capacity > 4096
    for _ in range(100):
        ring.get(timeout=5)
    return ring


@pytest.mark.fault(26)
def test_a_read_position_between_frames_that_this_handle_was_past_already():
    with Ring.create() as ring:
        ring.put_many([b"one", b"two"])
        assert ring.get() == b"one"
        word(ring, READ_POSITION, 4)
        with pytest.raises(RingCorrupted, match="impossible positions"):
            ring.get(timeout=5)


@pytest.mark.fault(23)
@pytest.mark.parametrize("wrong", [0, 8, 1 << 40, (1 << 64) - 1])
def test_the_end_of_a_lease_is_where_its_message_ends(wrong):
    with Ring.create() as ring:
        ring.put_many([b"one", b"two", b"three"])
        with ring.peek() as view:
            assert bytes(view) == b"one"
            word(ring, LEASE_HIGH, wrong)
        assert ring.get_many() == [b"two", b"three"]


@pytest.mark.fault(23)
@pytest.mark.parametrize("wrong", [0, 1, 4096 + 8, 3 * 4096, 1 << 50, (1 << 64) - 1])
def test_a_ring_never_shrinks_to_a_first_capacity_that_is_none(wrong):
    with grown_and_drained() as ring:
        word(ring, PATIENCE, 0, size=4)
        word(ring, FIRST_CAPACITY, wrong)
        idle(ring)
        assert ring.capacity & (ring.capacity - 1) == 0
        messages = [b"%03d" % number * 30 for number in range(100)]
        ring.put_many(messages)
        assert ring.get_many() == messages


@pytest.mark.fault(23)
def test_a_producer_said_to_wait_for_ever_keeps_no_room():
    with Ring.create(4096) as ring:
        ring.put(b"x")
        word(ring, FRONT_TID, 12345)
        word(ring, FRONT_NEED, 4096)
        word(ring, FRONT_UNTIL_NS, (1 << 64) - 1)
        ring.put_nowait(b"y")
        assert word(ring, FRONT_UNTIL_NS) == 0
        word(ring, FRONT_UNTIL_NS, time.monotonic_ns() + 60 * 10**9)
        ring.put_nowait(b"z")
        assert ring.get_many() == [b"x", b"y", b"z"]


@pytest.mark.fault(23)
@pytest.mark.parametrize("wrong", [1 << 63, (1 << 63) + 1, (1 << 64) - 1])
def test_a_moment_that_is_none_does_not_keep_memory(wrong):
    with grown_and_drained() as ring:
        word(ring, PATIENCE, 4, size=4)
        word(ring, NEEDED_NS, wrong)
        idle(ring)
        idle(ring)
        assert ring.capacity == 4096


@pytest.mark.fault(24)
@pytest.mark.parametrize("side", LOCKS)
def test_a_lock_word_of_the_dead_that_names_the_living(side):
    """The kernel takes the name out when it says so; no process need be waited for."""
    with Ring.create() as ring:
        ring.put(b"x")
        lock_word(ring, side, os.getppid() | OWNER_DIED | WAITERS)
        with pytest.raises(RingCorrupted, match="lock word"):
            ring.put_nowait(b"y") if side == "producers" else ring.get_nowait()
        lock_word(ring, side, 0)
        ring.put(b"y")
        assert ring.get_many() == [b"x", b"y"]


@pytest.mark.fault(25)
def test_a_ring_does_not_grow_over_an_area_whose_record_points_elsewhere():
    with Ring.create(4096, max_capacity=1 << 20) as ring:
        ring.put_many([b"held"] * 100)
        base, capacity, _ = area(ring, 0)
        area(ring, 0, (base, capacity, 1 << 40))
        held = os.pread(ring._fileno(), 3000, LAYOUT["HEADER_BYTES"])
        with pytest.raises(RingCorrupted, match="area"):
            ring.put(bytes(3000), timeout=5)
        assert os.pread(ring._fileno(), 3000, LAYOUT["HEADER_BYTES"]) == held

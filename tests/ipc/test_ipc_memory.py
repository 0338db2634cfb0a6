"""HighPerformanceIPC's shared memory, over both back ends."""

from __future__ import annotations

import pytest

from shmring.errors import InvalidArgument, RingClosed, RingNotFound
from shmring.ipc.high_performance_ipc import HighPerformanceIPC

pytestmark = pytest.mark.both_backends


def test_shared_memory_is_shared(ipc: HighPerformanceIPC, other: HighPerformanceIPC) -> None:
    ipc.create_shared_memory("m", 4096)
    other.connect_shared_memory("m", 4096)
    ipc.write_shared_data("m", b"hello", offset=100)
    assert other.read_shared_data("m", 5, offset=100) == b"hello"
    assert other.read_shared_data("m", 2) == b"\0\0"
    other.write_shared_data("m", bytearray(b"J"), offset=100)
    assert ipc.read_shared_data("m", 5, 100) == b"Jello"
    ipc.write_shared_data("m", b"x" * 4096)
    assert other.read_shared_data("m", 4096) == b"x" * 4096


def test_shared_memory_exists_or_not(ipc: HighPerformanceIPC, other: HighPerformanceIPC) -> None:
    with pytest.raises(RuntimeError, match="'m' does not exist"):
        other.connect_shared_memory("m", 10)
    ipc.create_shared_memory("m", 10)
    for instance in (ipc, other):
        with pytest.raises(RuntimeError, match="'m' exists"):
            instance.create_shared_memory("m", 10)
    ipc.connect_shared_memory("m", 10)


def test_connecting_again_finds_the_memory_of_today(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC
) -> None:
    ipc.create_shared_memory("m", 10)
    other.connect_shared_memory("m", 10)
    ipc.close_shared_memory("m")
    ipc.create_shared_memory("m", 20)
    ipc.write_shared_data("m", b"of today", offset=12)
    other.connect_shared_memory("m", 20)
    assert other.read_shared_data("m", 8, offset=12) == b"of today"
    ipc.close_shared_memory("m")
    with pytest.raises(RingNotFound, match="'m' does not exist"):
        other.connect_shared_memory("m", 20)
    assert other.shared_memories == {}


def test_creating_closes_the_memory_that_has_gone(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC
) -> None:
    ipc.create_shared_memory("m", 10)
    other.connect_shared_memory("m", 10)
    gone = other.shared_memories["m"]
    ipc.close_shared_memory("m")
    other.create_shared_memory("m", 10)
    with pytest.raises(RingClosed):
        gone.read_data(1)
    other.write_shared_data("m", b"x")
    ipc.connect_shared_memory("m", 10)
    assert ipc.read_shared_data("m", 1) == b"x"


@pytest.mark.parametrize(("length", "offset"), [(11, 0), (1, 10), (5, 6), (-1, 0), (1, -1)])
def test_memory_ends_where_it_ends(ipc: HighPerformanceIPC, length: int, offset: int) -> None:
    ipc.create_shared_memory("m", 10)
    with pytest.raises(ValueError, match="offset"):
        ipc.read_shared_data("m", length, offset)
    if length >= 0:
        with pytest.raises(ValueError, match="offset"):
            ipc.write_shared_data("m", b"x" * length, offset)
    assert ipc.read_shared_data("m", 10) == bytes(10)


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_sizes_are_refused(ipc: HighPerformanceIPC, size: int) -> None:
    with pytest.raises(InvalidArgument, match="size"):
        ipc.create_shared_memory("m", size)

"""SharedMemoryManager: one block, the lock inside it, and its clean-up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from header import MEMORY_LOCK, OWNER, word
from shmring import (
    InvalidArgument,
    LayoutMismatch,
    Ring,
    RingClosed,
    RingExists,
    SharedMemoryManager,
)
from support import own_name, run_in_process, wait_for
from traced import Traced, stop_to_be_traced

NAME = own_name("memory")


@pytest.fixture
def memory():
    with SharedMemoryManager(NAME, 1000) as made:
        assert made.create()
        yield made


def test_create_connect_write_read(memory):
    other = SharedMemoryManager(NAME, 1000)
    assert other.connect()
    memory.write_data(b"hello", 3)
    assert other.read_data(5, 3) == b"hello"
    assert other.read_data(3) == bytes(3)
    assert other.read_data(0, 1000) == b""
    other.write_data(bytearray(1000))
    assert memory.read_data(1000) == bytes(1000)
    other.cleanup()
    assert os.path.exists(f"/dev/shm/{NAME}")  # an attacher only closes


def test_the_creators_cleanup_removes_the_name(memory):
    other = SharedMemoryManager(NAME, 1000)
    assert other.connect()
    memory.cleanup()
    assert not os.path.exists(f"/dev/shm/{NAME}")
    other.write_data(b"those that have it go on")
    assert other.read_data(5) == b"those"
    other.cleanup()
    assert not SharedMemoryManager(NAME, 1000).connect()


def test_create_says_false_when_the_name_is_taken(memory):
    assert not SharedMemoryManager(NAME, 1000).create()
    assert not SharedMemoryManager(NAME + "-nothing", 10).connect()


@pytest.mark.parametrize(("length", "offset"), [(1, 1000), (1001, 0), (10, 995), (-1, 0), (1, -1)])
def test_outside_the_block(memory, length, offset):
    with pytest.raises(ValueError, match=f"offset={offset}, length={length}"):
        memory.read_data(length, offset)
    if length > 0:
        with pytest.raises(InvalidArgument, match=f"offset={offset}"):
            memory.write_data(bytes(length), offset)
    assert memory.read_data(1000) == bytes(1000)


def test_as_array_is_a_view(memory):
    array = memory.as_array("f4", (10, 20), offset=200)
    array[:] = np.arange(200).reshape(10, 20)
    assert memory.read_data(800, 200) == np.arange(200, dtype="f4").tobytes()
    memory.write_data(np.float32(7).tobytes(), 200)
    assert array[0, 0] == 7
    for dtype, shape, offset in [
        ("f8", 126, 0),
        ("u1", 1, 1000),
        ("u1", 1, -1),
        ("u1", (2, -1), 0),
    ]:
        with pytest.raises(InvalidArgument, match="inside"):
            memory.as_array(dtype, shape, offset)
    with pytest.raises(InvalidArgument, match="pointers"):
        memory.as_array(object, 4)
    assert memory.as_array("u1", np.int64(4)).shape == (4,)
    memory.cleanup()
    assert array[9, 19] == 199  # the view keeps the memory


@pytest.mark.parametrize(
    ("name", "size"), [("a/b", 10), ("", 10), ("x", 0), ("x", -5), ("x", 1 << 70)]
)
def test_impossible_arguments(name, size):
    with pytest.raises(InvalidArgument):
        SharedMemoryManager(name, size)


def test_use_before_and_after():
    memory = SharedMemoryManager(NAME, 10)
    for _ in range(2):
        with pytest.raises(RingClosed, match="closed"):
            memory.read_data(1)
        assert memory.create()
        memory.cleanup()
        memory.cleanup()


def test_connecting_again_finds_the_block_of_today(memory):
    other = SharedMemoryManager(NAME, 1000)
    assert other.connect()
    with pytest.raises(RingExists, match="attached already"):
        other.connect()
    memory.cleanup()
    assert memory.create()
    memory.write_data(b"of today")
    assert not other.is_current()
    assert other.connect()
    assert other.is_current()
    assert other.read_data(8) == b"of today"
    os.unlink(f"/dev/shm/{NAME}")  # a stranger does, so that nothing bears the name
    assert not other.connect()
    with pytest.raises(RingClosed):
        other.read_data(1)
    assert memory.create()
    assert memory.read_data(8) == bytes(8)


def test_a_former_creator_does_not_remove_what_it_connects_to(memory):
    memory.cleanup()
    with SharedMemoryManager(NAME, 1000) as other:
        assert other.create()
        assert memory.connect()
        memory.cleanup()
        assert other.is_current()


@pytest.mark.fault(35)
def test_attach_to_what_is_not_a_block_or_too_small(memory):
    with Ring.create(name=NAME + "-ring"), pytest.raises(LayoutMismatch):
        SharedMemoryManager(NAME + "-ring", 10).connect()
    with pytest.raises(InvalidArgument, match="1000 bytes"):
        SharedMemoryManager(NAME, 2000).connect()


def _write_patterns(memory: SharedMemoryManager, seed: int) -> None:
    for i in range(100_000):
        memory.write_data(bytes([(seed + i) % 256]) * 1000)


def test_reads_and_writes_exclude_each_other_in_all_processes(memory, start_method):
    with (
        run_in_process(_write_patterns, memory, 0, method=start_method),
        run_in_process(_write_patterns, memory, 1, method=start_method),
    ):
        wait_for(lambda: memory.read_data(1) != b"\0", timeout=60)
        for _ in range(2000):
            assert len(set(memory.read_data(1000))) == 1


@pytest.mark.parametrize("deep", [0, 1000])
def test_a_writer_killed_under_the_lock_blocks_no_other(deep):
    name = NAME + "-large"
    with SharedMemoryManager(name, 8_000_000) as memory:
        assert memory.create()
        with open(f"/dev/shm/{name}", "rb") as file, run_in_process(_write_large, memory) as victim:

            def holds_it() -> bool:
                return word(file.fileno(), MEMORY_LOCK, size=4) & OWNER == victim.pid

            Traced(victim.pid).step_under(holds_it, deep)
            victim.kill()
            memory.write_data(b"y" * 8_000_000)
            assert memory.read_data(10) == b"y" * 10


def _write_large(memory: SharedMemoryManager) -> None:
    data = b"x" * 8_000_000
    stop_to_be_traced()
    memory.write_data(data)


ATTACHER = """
import os, signal, sys
from shmring import SharedMemoryManager
memory = SharedMemoryManager(sys.argv[1], 1000)
assert memory.connect()
memory.write_data(b"seen")
"""


@pytest.mark.parametrize("end", ["", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_an_attacher_that_ends_never_removes_the_block(memory, end):
    done = subprocess.run(
        [sys.executable, "-c", ATTACHER + end, NAME],
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL)
    assert "leaked" not in done.stderr  # no resource tracker had a hand in it
    assert Path(f"/dev/shm/{NAME}").exists()
    assert memory.read_data(4) == b"seen"


def test_the_block_of_a_creator_that_forgot_goes_with_it():
    program = f"import shmring; m = shmring.SharedMemoryManager({NAME!r}, 10); m.create()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert not Path(f"/dev/shm/{NAME}").exists()


def test_children_attach_through_arguments(memory, start_method):
    context = multiprocessing.get_context(start_method)
    child = context.Process(target=memory.write_data, args=(b"from a child",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert memory.read_data(12) == b"from a child"
    assert Path(f"/dev/shm/{NAME}").exists()

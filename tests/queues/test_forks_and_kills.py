"""Processes are killed, stopped and forked in the middle; the others go on.

`recoveries` in the ring's statistics counts the lock owners that were found dead, so each test
knows that it killed what it meant to kill.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from header import LARGE as WHOLE
from header import LOCKS, OWNER, lock_word, stopped_under_lock
from shmring import Queue, Ring
from shmring.errors import Empty, Full
from support import (
    at_least,
    left_since,
    run_in_process,
    run_with_mounts,
    shared_memory_names,
    wait_for,
)

LARGE = 4_000_000  # copying this takes most of a call, under the lock
DEPTHS = [0, 30, 100, 300, 3000]  # instructions under the lock; the last is inside the copying


def _stamped(number: int) -> bytes:
    return number.to_bytes(8, "little") * (LARGE // 8)


def _whole(message: bytes) -> bool:
    return len(message) == LARGE and message == message[:8] * (LARGE // 8)


def _put_for_ever(ring: Ring) -> None:
    number = 0
    while True:
        ring.put(_stamped(number))
        number += 1


@pytest.mark.fault(1)
@pytest.mark.parametrize("deep", DEPTHS)
def test_producers_killed_inside_put_leave_whole_messages_and_block_no_other(deep):
    with Ring.create(1 << 24) as ring:
        with stopped_under_lock(ring, "producers", deep) as victim:
            victim.kill()
            ring.put(b"still alive", timeout=10)
            left = [ring.get(timeout=10) for _ in range(ring.qsize())]
        assert left in ([b"still alive"], [WHOLE, b"still alive"])
        assert ring.statistics().recoveries == 1


@pytest.mark.fault(2)
@pytest.mark.parametrize("deep", DEPTHS)
def test_consumers_killed_inside_get_lose_at_most_what_they_took(deep):
    with Ring.create(1 << 24) as ring:
        with stopped_under_lock(ring, "consumers", deep) as victim:
            ring.put_many([b"behind", b"it"], timeout=10)
            victim.kill()
            left = [ring.get(timeout=10) for _ in range(ring.qsize())]
        assert left in ([b"behind", b"it"], [WHOLE, b"behind", b"it"])
        statistics = ring.statistics()
        assert statistics.messages_put == statistics.messages_taken
        assert statistics.recoveries == 1


@pytest.mark.fault(8)
def test_growing_producers_killed_leave_memory_accounted_for():
    moments = random.Random(5)
    with Ring.create(1 << 16, max_capacity=1 << 27) as ring:
        for _ in range(20):
            with run_in_process(_put_for_ever, ring) as child:
                target = ring.statistics().messages_put + moments.randrange(1, 20)
                wait_for(
                    lambda: ring.statistics().messages_put >= target or not child.is_alive()  # noqa: B023
                )
            while ring.qsize():
                assert _whole(ring.get(timeout=10))
        with pytest.raises(Empty):
            ring.get(timeout=0.3)  # an idle slice gives back what is not needed
        ring.put(b"x")
        assert ring.get() == b"x"
        held = os.fstat(ring._fileno()).st_blocks * 512
        assert held <= 4 * ring.capacity + 8192, f"{held} bytes for a capacity of {ring.capacity}"


@pytest.mark.fault(6)
def test_a_sleeping_consumer_killed_takes_no_wake_with_it():
    with Ring.create() as ring:
        for _ in range(20):
            with (
                run_in_process(ring.get) as victim,
                run_in_process(_take, ring, os.getpid()) as other,
            ):
                both = {victim.pid, other.pid}
                wait_for(lambda: {each["pid"] for each in ring.statistics().waiters} == both)  # noqa: B023
                victim.kill()
                victim.join()
                ring.put(b"for the other one")
                wait_for(lambda: ring.qsize() == 0, what="the living consumer to take it")


def _take(ring: Ring, parent: int) -> None:
    while os.getppid() == parent:
        ring.get(timeout=30)


@pytest.mark.fault(9)
@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_killed_inside_a_block(side):
    with Ring.create() as ring:
        ring.put(b"front")
        with run_in_process(_hold, ring, side):
            wait_for(lambda: ring.statistics().messages == (3 if side == "reserve" else 2))
            with pytest.raises(Empty):
                (ring.get(timeout=0.05), ring.get(timeout=0.05))
        left = [ring.get(timeout=10) for _ in range(ring.qsize() - (side == "reserve"))]
        assert left == ([b"behind"] if side == "reserve" else [b"front", b"behind"])


def _hold(ring: Ring, side: str) -> None:
    with ring.reserve(10) if side == "reserve" else ring.peek():
        ring.put(b"behind")
        signal.pause()


@pytest.mark.fault(13)
@pytest.mark.parametrize("side", LOCKS)
def test_a_stopped_lock_holder_is_waited_for_and_never_robbed(side):
    def blocked(block: bool, timeout: float | None) -> None:
        if side == "producers":
            with pytest.raises(Full):
                ring.put(b"", block, timeout)
        else:
            with pytest.raises(Empty):
                ring.get(block, timeout)

    with Ring.create(1 << 24) as ring, stopped_under_lock(ring, side) as holder:
        blocked(False, None)
        with at_least(0.3):
            blocked(True, 0.3)  # several slices
        assert lock_word(ring, side) & OWNER == holder.pid
        before = ring.statistics().messages_taken
        os.kill(holder.pid, signal.SIGCONT)
        wait_for(lambda: ring.statistics().messages_taken > before + 5, what="it to go on")
        ring.put(b"", timeout=10)
        assert ring.get(timeout=10) is not None
        assert ring.statistics().recoveries == 0


def _hold_and_run(ring: Ring, side: str, seconds: float, seen: Any) -> None:
    lock_word(ring, side, os.getpid())
    while not seen.value:
        pass
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    lock_word(ring, side, 0)
    signal.pause()


@pytest.mark.fault(13)
@pytest.mark.parametrize("side", LOCKS)
@pytest.mark.parametrize("seconds", [0.05, 600])
def test_a_lock_holder_that_needs_a_cpu_is_waited_for_even_by_nowait(side, seconds):
    """Or a busy machine would now and then make an unbounded queue full; not for ever."""
    ends = contextlib.nullcontext() if seconds < 1 else pytest.raises((Full, Empty))
    with Ring.create() as ring:
        ring.put(b"there")
        seen = multiprocessing.RawValue("b", 0)
        with run_in_process(_hold_and_run, ring, side, seconds, seen):
            wait_for(lambda: lock_word(ring, side) & OWNER)
            seen.value = 1
            with ends:
                _ = ring.put_nowait(b"") if side == "producers" else ring.get_nowait()


@pytest.mark.fault(18)
def test_a_process_is_started_while_another_thread_is_inside_put(start_method):
    with Ring.create(1 << 24) as ring:
        stop = threading.Event()

        def produce() -> None:
            while not stop.is_set():
                ring.put(_stamped(1), timeout=30)
                ring.get_many(timeout=30)

        thread = threading.Thread(target=produce)
        thread.start()
        try:
            for _ in range(30 if start_method == "fork" else 2):
                with run_in_process(ring.put, b"child", True, 30, method=start_method) as child:
                    child.join(60)
                    assert child.exitcode == 0
        finally:
            stop.set()
            thread.join(30)


def test_a_producer_exits_at_once_and_everything_arrives():
    queue = Queue()
    with queue, run_in_process(_put_many_objects, queue, 20_000) as child:
        child.join(30)  # before a get: the classic deadlock of the standard library
        assert child.exitcode == 0
        assert [queue.get()["i"] for _ in range(20_000)] == list(range(20_000))


def _put_many_objects(queue: Queue[dict[str, int]], count: int) -> None:
    for i in range(count):
        queue.put({"i": i})


PROGRAM = r"""
import os, sys
from shmring import Queue
queue = Queue()
queue.put_many([bytes(100_000)] * 50)
if os.fork() == 0:
    queue.get()
os.write(1, b"ready\n")
queue.get_many()
while True:
    queue.get()
"""


@pytest.mark.fault(37)
def test_all_processes_killed_leave_nothing_of_anonymous_queues():
    before = shared_memory_names()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        program.stdout.close()
    assert left_since(before) == []


@pytest.mark.fault(21)
def test_a_full_file_system_fails_by_name_and_leaves_nothing():
    program = (
        "import os, shmring\n"
        "queue = shmring.Queue(max_capacity=64 << 20)\n"
        "try:\n"
        "    shmring.Ring.create(8 << 20)\n"
        "except shmring.SharedMemoryFull as error:\n"
        "    print(error)\n"
        "try:\n"
        "    queue.put(bytes(4 << 20))\n"
        "except shmring.SharedMemoryFull as error:\n"
        "    print(error)\n"
        "try:\n"
        "    queue.put_many([bytes(1000)] * 5000, timeout=0.3)\n"
        "except shmring.errors.Full as error:\n"
        "    taken = queue.get_many()\n"
        "    assert len(taken) == error.count > 100, (len(taken), error.count)\n"
        "queue.put(1)\n"
        "assert queue.get() == 1\n"
        "queue.close()\n"
        "assert os.listdir('/dev/shm') == []\n"
    )
    done = run_with_mounts("mount -t tmpfs -o size=1m none /dev/shm", program)
    assert done.returncode == 0, done.stderr
    assert "8388608 bytes" in done.stdout
    assert "no room to grow" in done.stdout
    assert "shared memory is full" in done.stderr  # the log line that names the remedy

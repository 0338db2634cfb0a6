"""Closing in the wrong moment: while other threads wait, decode, shut down, or hold views.

Most of these crashed the process once, so each runs in a child whose exit status tells.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from header import LAYOUT
from shmring import Queue, Ring, RingClosed, RingNotFound
from support import own_name, run_in_process, wait_for

CONSUMERS = LAYOUT["CONSUMERS_OFFSET"]
PRODUCERS = LAYOUT["PRODUCERS_OFFSET"]
OWNER_DIED = 0x40000000


def hold(fd: int, offset: int, owner: int) -> None:
    """Write a lock word as if `owner` held it (0: nobody)."""
    os.pwrite(fd, struct.pack("<I", owner), offset)


def in_a_child(scene: Callable[[], None]) -> None:
    with run_in_process(scene) as child:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.fault(33)
@pytest.mark.parametrize("side", ["peek", "reserve"])
def test_while_a_block_is_being_entered(side):
    """The lock is held by another; close begins; the lock is released; the block is entered."""

    def scene() -> None:
        ring = Ring.create()
        fd = os.dup(ring.fileno())
        ring.put(b"front")
        offset = CONSUMERS if side == "peek" else PRODUCERS
        hold(fd, offset, os.getppid())
        entered, leave, refused = threading.Event(), threading.Event(), threading.Event()

        def enter() -> None:
            try:
                with ring.peek() if side == "peek" else ring.reserve(8):
                    entered.set()
                    leave.wait(30)
            except RingClosed:
                refused.set()

        thread = threading.Thread(target=enter)
        thread.start()
        threading.Timer(0.02, hold, (fd, offset, 0)).start()
        try:
            ring.close()
        except BufferError:
            wait_for(entered.is_set)
        leave.set()
        thread.join(30)
        assert entered.is_set() or refused.is_set()
        ring.close()

    in_a_child(scene)


class Slow:
    """Unpickling it lets another thread close the queue."""

    unpickling = threading.Event()
    closed = threading.Event()

    def __init__(self) -> None:
        self.something = 1

    def __setstate__(self, state: object) -> None:
        Slow.unpickling.set()
        Slow.closed.wait(0.05)


@pytest.mark.fault(33)
def test_while_get_many_decodes():
    def scene() -> None:
        queue = Queue()
        queue.put_many([Slow() for _ in range(20)])
        taken: list[object] = []
        thread = threading.Thread(target=lambda: taken.extend(queue.get_many()))
        thread.start()
        wait_for(Slow.unpickling.is_set)
        queue.close()
        Slow.closed.set()
        thread.join(30)
        assert taken

    in_a_child(scene)


@pytest.mark.fault(33)
def test_while_shutdown_waits_for_the_lock():
    def scene() -> None:
        ring = Ring.create()
        fd = os.dup(ring.fileno())
        hold(fd, PRODUCERS, os.getppid())
        outcome: list[object] = []

        def shut_down() -> None:
            try:
                ring.shutdown()
            except RingClosed as error:
                outcome.append(error)

        thread = threading.Thread(target=shut_down)
        thread.start()
        threading.Timer(0.2, hold, (fd, PRODUCERS, 0)).start()
        ring.close()
        thread.join(30)
        assert not thread.is_alive()

    in_a_child(scene)


@pytest.mark.fault(18, 33)
def test_in_a_forked_child_whose_own_thread_waits():
    with Ring.create() as ring:

        def scene() -> None:
            raised = threading.Event()

            def wait() -> None:
                try:
                    ring.get()
                except RingClosed:
                    raised.set()

            thread = threading.Thread(target=wait)
            thread.start()
            wait_for(lambda: ring.statistics().consumers_waiting)
            ring.close()
            thread.join(30)
            assert raised.is_set()

        in_a_child(scene)


@pytest.mark.fault(18)
def test_a_child_forked_inside_a_block_can_get_and_close():
    with Ring.create() as ring:
        ring.put_many([b"1", b"2"])

        def scene() -> None:
            assert ring.get(timeout=30) == b"2"  # when the parent has consumed the first
            ring.close()

        with contextlib.ExitStack() as children:
            with ring.peek():
                child = children.enter_context(run_in_process(scene))
                wait_for(lambda: ring.statistics().consumers_waiting)
            child.join(60)
            assert child.exitcode == 0


@pytest.mark.parametrize("reused", [True, False])
def test_recovery_never_touches_a_file_that_took_our_descriptor(tmp_path, reused):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"precious" * 10_000)
    ring = Ring.create(4096, max_capacity=1 << 20)
    kept = os.dup(ring.fileno())
    hold(kept, PRODUCERS, OWNER_DIED)  # what the kernel leaves when an owner dies
    if reused:
        stranger = os.open(foreign, os.O_RDWR)
        os.dup2(stranger, ring.fileno())
        os.close(stranger)
    else:
        os.close(ring.fileno())
    ring.put(b"x")
    assert ring.get() == b"x"
    assert not ring.statistics().poisoned
    assert foreign.read_bytes() == b"precious" * 10_000
    os.dup2(kept, ring.fileno())
    os.close(kept)
    ring.close()


def test_get_many_takes_what_is_there_and_not_what_comes():
    with Ring.create(1 << 16) as ring, run_in_process(_flood, ring):
        wait_for(lambda: ring.statistics().producers_waiting)
        for _ in range(20):
            # a full ring, and one that was taken before the look at what is there
            assert len(ring.get_many(timeout=10)) <= (1 << 16) // 40 + 1


def _flood(ring: Ring) -> None:
    while True:
        ring.put(b"12345678")


def test_growing_twice_in_one_call_leaves_no_mapping():
    with Ring.create(4096, max_capacity=1 << 24, name=own_name("closing")) as ring:
        other = Ring.attach(ring.name)
        before = _mappings()
        for _ in range(10):
            ring.put_many([bytes(1000)] * 8)  # grows
            other.put(bytes(100_000), block=False)  # follows, and grows again, in one call
            ring.get_many()
            with pytest.raises(Exception, match=r"^$"):
                ring.get(timeout=0.2)  # shrinks
        assert _mappings() <= before + 6
        other.close()


def _mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


@pytest.mark.parametrize("make", ["Queue()", "Ring.create()"])
@pytest.mark.parametrize("call", ["get", "peek", "wait"])
def test_a_daemon_thread_that_waits_ends_silently_at_exit(make, call):
    if call == "wait":
        target = "lambda: shmring.wait([q])"
    elif call == "peek" and make == "Ring.create()":
        target = "lambda: q.peek().__enter__()"
    else:
        target = "q.get"
    program = (
        "import shmring, threading, time\n"
        f"q = shmring.{make}\n"
        "before = threading.Event()\n"
        f"call = {target}\n"
        "threading.Thread(target=lambda: (before.set(), call()), daemon=True).start()\n"
        "before.wait(10)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_unpickling_a_queue_that_is_gone_fails_at_the_first_call():
    with Queue() as queue:
        sent = pickle.dumps(queue)
    received = pickle.loads(sent)
    assert received.closed
    with pytest.raises(RingNotFound, match="keeps its handle open"):
        received.get_nowait()

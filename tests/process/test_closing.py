"""Closing in the wrong moment: while other threads wait, decode, shut down, or hold views.

Most of these crashed the process once, so each runs in a child whose exit status tells.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, Full
from typing import Any

import pytest

from header import LAYOUT
from shmring import HighPerformanceIPC, JoinableQueue, Queue, Ring, RingClosed, RingNotFound, wait
from support import own_name, run_in_process, wait_for, within

CONSUMERS = LAYOUT["CONSUMERS_OFFSET"]
PRODUCERS = LAYOUT["PRODUCERS_OFFSET"]
OWNER_DIED = 0x40000000


def hold(fd: int, offset: int, owner: int) -> None:
    """Write a lock word as if `owner` held it (0: it is free)."""
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
        fd = os.dup(ring._fileno())
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
        fd = os.dup(ring._fileno())
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
    fd = ring._fileno()
    kept = os.dup(fd)
    hold(kept, PRODUCERS, OWNER_DIED)  # what the kernel leaves when an owner dies
    if reused:
        stranger = os.open(foreign, os.O_RDWR)
        os.dup2(stranger, fd)
        os.close(stranger)
    else:
        os.close(fd)
    ring.put(b"x")
    assert ring.get() == b"x"
    assert not ring.statistics().poisoned
    assert foreign.read_bytes() == b"precious" * 10_000
    os.dup2(kept, fd)
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


def test_both_sides_share_a_mapping_until_one_is_in_another_area():
    with Ring.create(4096, max_capacity=1 << 20) as ring:
        inode = str(os.fstat(ring._fileno()).st_ino)
        assert _mappings(inode) == 3  # the header, and the area twice in a row
        ring.put_many([bytes(1000)] * 8)
        assert _mappings(inode) == 5
        assert ring.get_many() == [bytes(1000)] * 8


def _mappings(inode: str | None = None) -> int:
    """How many mappings this process has, or has of one file."""
    with open("/proc/self/maps") as maps:
        return sum(inode is None or line.split()[4] == inode for line in maps)


def test_unpickling_a_queue_that_is_gone_fails_at_the_first_call():
    with Queue() as queue:
        sent = pickle.dumps(queue)
    received = pickle.loads(sent)
    assert received.closed
    with pytest.raises(RingNotFound, match="keeps its handle open"):
        received.get_nowait()


# ---- many threads, signal handlers, descriptors that are not ours any more -----------------------

# What a thread may do with a handle while others close it; each ends in RingClosed.
USES: list[Callable[[Any], object]] = [
    lambda handle: handle.put_many([b"x" * 100] * 20, timeout=0.01),
    lambda handle: handle.get_many(timeout=0.01),
    lambda handle: handle.put(b"y", timeout=0.01),
    lambda handle: handle.get(timeout=0.01),
    lambda handle: handle.qsize(),
    lambda handle: handle.statistics(),
    repr,
    lambda handle: handle.capacity + handle.max_capacity,
]


def reserve_and_peek(ring: Any) -> None:
    with ring.reserve(100, timeout=0.01) as view:
        view[:1] = b"z"
    with ring.peek(timeout=0.01):
        pass


def rounds_in_time(count: int) -> Iterator[int]:
    """So many, or what fits into 20 seconds: threads get few turns on a busy machine."""
    until = time.monotonic() + 20
    for number in range(count):
        if time.monotonic() > until:
            return
        yield number


def use_at_once(make: Callable[[], Any], rounds: int) -> int:
    """Eight threads use one handle in every way while two of them close it; returns the calls."""
    calls = [0] * 8
    for _ in rounds_in_time(rounds):
        handle = make()
        errors: list[BaseException] = []
        begin = threading.Barrier(8)

        def run(
            number: int, handle: Any = handle, begin: Any = begin, errors: Any = errors
        ) -> None:
            mine = [*USES[number:], *USES[:number]]
            if isinstance(handle, Ring):
                mine.insert(1, reserve_and_peek)
            begin.wait(30)
            try:
                for turn in range(10 if number < 2 else 100_000):
                    with contextlib.suppress(Empty, Full):
                        mine[turn % len(mine)](handle)
                    calls[number] += 1
                while True:
                    with contextlib.suppress(BufferError):  # another thread is inside a view
                        handle.close()
                        return
            except RingClosed:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors, errors
        assert not any(thread.is_alive() for thread in threads)
    return sum(calls)


@pytest.mark.parametrize("make", [Queue, JoinableQueue, Ring.create])
@pytest.mark.fault(44)
def test_a_handle_that_eight_threads_use_is_closed_by_two_of_them(make):
    in_a_child(lambda: use_at_once(make, 40))


@pytest.mark.parametrize("make", [Queue, Ring.create])
@pytest.mark.fault(44)
def test_threads_that_close_one_handle_at_once_close_each_descriptor_once(make):
    def scene() -> None:
        for _ in rounds_in_time(300):
            handle, begin = make(), threading.Barrier(4)
            failed: list[BaseException] = []

            def close(handle: Any = handle, begin: Any = begin, failed: Any = failed) -> None:
                begin.wait(30)
                try:
                    handle.close()
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=close) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert not failed, failed

    in_a_child(scene)


@pytest.mark.fault(44)
def test_arrays_that_end_in_other_threads_give_the_place_back_once():
    def scene() -> None:
        with Ring.create() as ring:
            for turn in range(100):
                ring.put(b"front")
                block = ring.reserve(80) if turn % 2 == 0 else ring.peek()
                with pytest.raises(BufferError), block as view:
                    parts = [view[number : number + 1] for number in range(4)]
                begin = threading.Barrier(4)

                def drop(parts: Any = parts, begin: Any = begin) -> None:
                    begin.wait(30)
                    parts.pop().release()

                del view
                threads = [threading.Thread(target=drop) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(30)
                assert ring.get(timeout=30) == b"front"
                with pytest.raises(Empty):
                    ring.get_nowait()

    in_a_child(scene)


def full(queue: Any) -> Any:
    queue.put(b"x" * 50_000)
    return queue


def locked(handle: Any, offset: int) -> Any:
    hold(handle._fileno(), offset, os.getppid())
    return handle


# In which call of which handle the main thread is interrupted.
INSIDE: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "get": (Queue, lambda queue: queue.get()),
    "get_many": (Queue, lambda queue: queue.get_many()),
    "put": (lambda: full(Queue(max_capacity=1 << 16)), lambda queue: queue.put(b"x" * 50_000)),
    "join": (lambda: full(JoinableQueue()), lambda queue: queue.join()),
    "wait": (Queue, lambda queue: wait([queue])),
    "peek": (Ring.create, lambda ring: ring.peek().__enter__()),
    "reserve": (lambda: full(Ring.create()), lambda ring: ring.reserve(50_000).__enter__()),
    "a lock": (lambda: locked(Queue(), PRODUCERS), lambda queue: queue.put(1)),
}


@pytest.mark.parametrize("call", INSIDE)
@pytest.mark.fault(44)
def test_close_in_a_signal_handler_does_not_wait_for_the_call_that_it_interrupts(call):
    make, enter = INSIDE[call]

    def scene() -> None:
        handle = make()
        closed = []

        def close(*_: object) -> None:
            within(1.0, handle.close)
            closed.append(True)

        def interrupt() -> None:
            wait_for(lambda: handle.statistics().waiters)
            os.kill(os.getpid(), signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, close)
        threading.Thread(target=interrupt).start()
        with pytest.raises(RingClosed):
            enter(handle)
        assert closed

    in_a_child(scene)


@pytest.mark.fault(44)
def test_cleanup_in_a_signal_handler_does_not_wait_for_the_call_that_it_interrupts():
    def scene() -> None:
        with HighPerformanceIPC("a", namespace=own_name("closing")) as ipc:
            ipc.create_message_queue("q")
            queue = ipc.message_queues["q"]

            def interrupt() -> None:
                wait_for(lambda: queue.statistics().waiters)
                os.kill(os.getpid(), signal.SIGUSR1)

            signal.signal(signal.SIGUSR1, lambda *_: within(1.0, ipc.cleanup))
            threading.Thread(target=interrupt).start()
            with pytest.raises(RingClosed):
                ipc.receive_message("q")

    in_a_child(scene)

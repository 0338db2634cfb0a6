"""Large buffers, written once into a block of the queue and lent to the receiver."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from header import LAYOUT, blocks
from shmring import ProcessPoolExecutor, Queue, RingClosed, ShutDown
from shmring._core import bytes_ring
from shmring._core.bytes_ring import LentBuffer
from shmring.errors import DecodeError, Empty, Full
from shmring.observer.observer import Observer
from support import own_name, run_in_process, run_with_mounts, wait_for

np = pytest.importorskip("numpy")
resource = pytest.importorskip("resource")

MIB = 1 << 20
FREE, FORKED = 0, 1 << 63


@pytest.fixture(autouse=True)
def lend_more() -> Iterator[None]:
    """Smaller buffers than a program's are lent, which takes less memory."""
    before = bytes_ring._set_lend_bytes(MIB // 4)
    yield
    bytes_ring._set_lend_bytes(before)


def array(number: int, nbytes: int = MIB) -> Any:
    return np.full(nbytes // 4, number, np.int32)


def is_whole(got: Any, number: int) -> bool:
    return bool((got == number).all())


def owner_of(got: Any) -> Any:
    """What an array is a view of, in the end."""
    below = got.obj if isinstance(got, memoryview) else getattr(got, "base", None)
    return got if below is None else owner_of(below)


def is_lent(got: Any) -> bool:
    return isinstance(owner_of(got), LentBuffer)


def address(got: Any) -> int:
    return got.__array_interface__["data"][0]


def states(queue: Queue[Any]) -> list[int]:
    return [holder for holder, *_ in blocks(queue)]


def pass_through(queue: Queue[Any], numbers: range) -> None:
    """Send and receive one array at a time, and keep none."""
    for number in numbers:
        queue.put(array(number))
        assert is_whole(queue.get(timeout=30), number)


# ---- what arrives ------------------------------------------------------------


def test_a_large_array_is_lent_and_writable():
    with Queue() as queue:
        queue.put(array(7))
        got = queue.get(timeout=30)
        assert is_lent(got)
        assert is_whole(got, 7)
        got += 1
        assert is_whole(got, 8)


def test_a_small_array_is_copied():
    with Queue() as queue:
        queue.put(array(7, 1 << 16))
        got = queue.get(timeout=30)
        assert not is_lent(got)
        assert is_whole(got, 7)
        assert not blocks(queue)


def test_a_read_only_array_arrives_writable():
    with Queue() as queue:
        sent = array(3)
        sent.flags.writeable = False
        queue.put(sent)
        got = queue.get(timeout=30)
        assert is_lent(got)
        got[0] = 4


@pytest.mark.parametrize("head", [b"", b"h" * 10_000, b"h" * 300_000])
def test_an_object_with_many_buffers_arrives_whole(head):
    with Queue() as queue:
        sent = {"head": head, "small": array(1, 1 << 12)}
        sent |= {str(i): array(i, MIB // 2 + 4096 * i) for i in range(40)}
        queue.put(sent)
        got = queue.get(timeout=30)
        assert got["head"] == head
        assert is_whole(got["small"], 1)
        assert all(is_whole(got[str(i)], i) for i in range(40))
        assert sum(is_lent(got[str(i)]) for i in range(40)) == 16


class Buffers:
    """An object of a user's class that hands out its buffers."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffers, tuple(pickle.PickleBuffer(part) for part in self.parts)


def test_buffers_of_any_object_are_lent():
    with Queue() as queue:
        queue.put(Buffers(bytearray(b"a" * MIB), b"b" * MIB))
        first, second = queue.get(timeout=30).parts
        assert bytes(first) == b"a" * MIB
        assert bytes(second) == b"b" * MIB
        assert isinstance(owner_of(first), LentBuffer)
        first[0] = 66
        with pytest.raises(TypeError):
            second[0] = 66  # it was read-only where it came from


def test_every_way_to_put_and_get_lends():
    async def both(queue: Queue[Any]) -> Any:
        await queue.aput(array(5))
        return await queue.aget(timeout=30)

    with Queue() as queue:
        got = [asyncio.run(both(queue))]
        queue.put_nowait(array(6))
        got.append(queue.get_nowait())
        queue.put_many([array(7), array(8), b"small"])
        got += queue.get_many(3, timeout=30)
        while len(got) < 5:
            got += queue.get_many(timeout=30)
        assert all(is_lent(one) and is_whole(one, 5 + i) for i, one in enumerate(got[:4]))
        assert got[4] == b"small"


def _doubled(given: Any) -> Any:
    return given * 2, is_lent(given)


def test_a_pool_lends_both_ways():
    with ProcessPoolExecutor(1) as pool:
        got, was_lent = pool.submit(_doubled, array(4)).result(60)
        assert was_lent
        assert is_lent(got)
        assert is_whole(got, 8)


# ---- blocks come back ------------------------------------------------------------


def test_the_block_that_came_back_last_is_used_first():
    with Queue() as queue:
        queue.put_many([array(i) for i in range(4)])
        held = queue.get_many(4, timeout=30)
        while len(held) < 4:
            held += queue.get_many(timeout=30)
        places = [address(one) for one in held]
        for i in (2, 0, 3, 1):
            held[i] = None
        for i in (1, 3, 0):
            queue.put(array(9))
            held[i] = queue.get(timeout=30)
            assert address(held[i]) == places[i]
        assert len(blocks(queue)) == 4


def test_a_view_of_a_view_keeps_the_block():
    with Queue() as queue:
        queue.put(array(1))
        part = queue.get(timeout=30)[1000:2000].reshape(10, 100).T
        pass_through(queue, range(10, 30))
        assert is_whole(part, 1)
        assert states(queue).count(FREE) == len(states(queue)) - 1
        del part
        assert set(states(queue)) == {FREE}


def test_a_put_in_vain_keeps_no_block():
    with Queue(maxsize=1) as queue:
        queue.put(array(1))
        for _ in range(5):
            with pytest.raises(Full):
                queue.put_nowait(array(2))
        assert len(blocks(queue)) == 2
        with pytest.raises(Full) as full:
            queue.put_many([array(3), array(4)], block=False)
        assert full.value.count == 0
        assert is_whole(queue.get(timeout=30), 1)
        assert set(states(queue)) == {FREE}


def test_a_message_that_cannot_be_decoded_keeps_no_block():
    with Queue() as queue:
        queue.put(Undecodable(array(1)))
        with pytest.raises(DecodeError) as failed:
            queue.get(timeout=30)
        del failed
        gc.collect()
        assert set(states(queue)) == {FREE}


class Undecodable:
    def __init__(self, part: Any) -> None:
        self.part = part

    def __setstate__(self, state: Any) -> None:
        raise ZeroDivisionError


def test_one_that_keeps_everything_gets_copies_when_the_blocks_run_out():
    with Queue() as queue:
        kept = []
        for number in range(200):
            queue.put(array(number, MIB // 2))
            kept.append(queue.get(timeout=30))
        lent = [is_lent(one) for one in kept]
        assert lent == [True] * LAYOUT["BLOCK_COUNT"] + [False] * (200 - LAYOUT["BLOCK_COUNT"])
        assert all(is_whole(one, number) for number, one in enumerate(kept))


def test_blocks_take_half_of_max_capacity_at_most():
    with Queue(max_capacity=8 * MIB) as queue:
        kept = []
        for number in range(20):
            queue.put(array(number))
            kept.append(queue.get(timeout=30))
        assert sum(is_lent(one) for one in kept) == 4
        queue.put(array(1, 4 * MIB + 4096))  # may never have one
        assert not is_lent(queue.get(timeout=30))


def test_blocks_of_a_size_that_is_no_longer_sent_make_room():
    with Queue(max_capacity=8 * MIB) as queue:
        pass_through(queue, range(8))
        queue.put(array(1, 4 * MIB))
        got = queue.get(timeout=30)
        assert is_lent(got)
        assert is_whole(got, 1)
        assert sum(capacity for *_, capacity in blocks(queue)) == 4 * MIB


def test_memory_goes_back_while_nothing_comes():
    with Queue() as queue:
        pass_through(queue, range(5))
        held = os.fstat(queue._fileno()).st_blocks

        def idle() -> bool:
            with pytest.raises(Empty):
                queue.get(timeout=0.2)
            return not blocks(queue)

        wait_for(idle, 60)
        assert os.fstat(queue._fileno()).st_blocks * 512 <= held * 512 - MIB
        pass_through(queue, range(3))


# ---- the end of a handle ------------------------------------------------------------


@pytest.mark.fault(51)
def test_views_outlive_the_handle():
    queue: Queue[Any] = Queue()
    queue.put(array(1))
    queue.put(array(2))
    first, second = queue.get(timeout=30), queue.get(timeout=30)
    descriptors = len(os.listdir("/proc/self/fd"))
    queue.close()
    with pytest.raises(RingClosed):
        queue.get()
    first += 4
    assert is_whole(first, 5)
    assert is_whole(second, 2)
    del first, second
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2


def test_views_survive_a_close_beside_the_get():
    def take(handle: Queue[Any], got: list[Any]) -> None:
        with contextlib.suppress(RingClosed):
            while True:
                got.append(handle.get(timeout=30))

    for _ in range(20):
        with Queue() as queue:
            handle, got = Queue.attach(queue.name), []
            thread = threading.Thread(target=take, args=(handle, got))
            thread.start()
            for number in range(4):
                queue.put(array(number))
            handle.close()
            thread.join(60)
            assert not thread.is_alive()
            assert all(is_whole(one, number) for number, one in enumerate(got))


def test_a_closed_handle_gives_its_blocks_back_to_the_others():
    with Queue() as queue:
        other = Queue.attach(queue.name)
        queue.put(array(1))
        got = other.get(timeout=30)
        other.close()
        pass_through(queue, range(2, 6))
        assert is_whole(got, 1)
        del got
        assert set(states(queue)) == {FREE}


def test_an_immediate_shutdown_spares_what_is_lent():
    with Queue() as queue:
        queue.put_many([array(i) for i in range(4)])
        got = queue.get(timeout=30)
        queue.shutdown(immediate=True)
        assert os.fstat(queue._fileno()).st_blocks * 512 < 2 * MIB
        assert is_whole(got, 0)
        with pytest.raises(ShutDown):
            queue.put(array(1))
        got += 1
        assert is_whole(got, 1)


@pytest.mark.fault(51)
def test_sent_on_through_another_queue_it_is_a_copy():
    with Queue() as queue, Queue() as other:
        queue.put(array(1))
        got = queue.get(timeout=30)
        other.put(got)
        got += 1
        again = other.get(timeout=30)
        del got
        pass_through(queue, range(5, 15))
        assert is_whole(again, 1)


# ---- death ------------------------------------------------------------


def _hold(queue: Queue[Any], ready: Any) -> None:
    got = [queue.get(timeout=30) for _ in range(3)]
    ready.put(all(is_lent(one) for one in got))
    signal.pause()


def _hold_until_full(queue: Queue[Any], ready: Any) -> None:
    ready.put(True)
    queue.put(array(1))  # waits for room, with its block filled


@pytest.mark.fault(51)
def test_the_blocks_of_a_dead_receiver_come_back():
    with Queue(max_capacity=8 * MIB) as queue, Queue() as ready:
        queue.put_many([array(i) for i in range(3)])
        with run_in_process(_hold, queue, ready):
            assert ready.get(timeout=60)
        assert states(queue).count(FREE) == 0

        def comes_back() -> bool:
            pass_through(queue, range(2))
            queue.put_many([array(i) for i in range(4)])
            got = queue.get_many(4, timeout=30)
            while len(got) < 4:
                got += queue.get_many(timeout=30)
            return all(is_lent(one) for one in got)

        wait_for(comes_back, 30)


@pytest.mark.fault(51)
def test_a_sender_that_dies_before_its_message_leaves_nothing():
    with Queue(maxsize=1, max_capacity=4 * MIB) as queue, Queue() as ready:
        queue.put(b"full")
        with run_in_process(_hold_until_full, queue, ready) as sender:
            assert ready.get(timeout=60)
            wait_for(lambda: len(states(queue)) == 1 and queue.statistics().producers_waiting)
            assert sender.is_alive()
        assert queue.get(timeout=30) == b"full"
        with pytest.raises(Empty):
            queue.get_nowait()

        def comes_back() -> bool:
            queue.put(array(3))
            one = queue.get(timeout=30)
            queue.put(array(4))
            return is_lent(one) and is_lent(queue.get(timeout=30))

        wait_for(comes_back, 30)
        assert set(states(queue)) == {FREE}


def _send(queue: Queue[Any], numbers: range) -> None:
    for number in numbers:
        queue.put(array(number))


@pytest.mark.fault(51)
def test_what_a_dead_sender_has_put_arrives():
    with Queue() as queue:
        with run_in_process(_send, queue, range(5)) as sender:
            sender.join(60)
        time.sleep(0.15)  # long enough that the dead would be looked for
        pass_order = []
        for number in range(5):
            _send(queue, range(10 + number, 11 + number))
            pass_order.append(int(queue.get(timeout=30)[0]))
        assert pass_order == list(range(5))


# ---- fork ------------------------------------------------------------


def fork(body: Callable[..., bool], *args: Any) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if body(*args) else 1)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.fault(51)
def test_a_forked_copy_of_a_view_stays_valid():
    with Queue(max_capacity=8 * MIB) as queue:
        reader, writer = os.pipe()
        queue.put(array(1))
        got = queue.get(timeout=30)

        def child(kept: Any) -> bool:
            os.close(writer)
            os.read(reader, 1)
            return is_whole(kept, 1)

        pid = fork(child, got)
        del got
        assert states(queue) == [FORKED]
        deadline = time.monotonic() + 0.3  # until the blocks of the dead were looked for
        while time.monotonic() < deadline:
            pass_through(queue, range(10, 20))
        assert states(queue).count(FORKED) == 1
        os.close(writer)
        assert code_of(pid) == 0

        def comes_back() -> bool:
            kept = []
            for number in range(5):
                queue.put(array(number))
                kept.append(queue.get(timeout=30))
            return FORKED not in states(queue)

        wait_for(comes_back, 30)
        os.close(reader)


@pytest.mark.fault(51)
def test_a_forked_copy_outlives_the_process_it_was_lent_to():
    with Queue(max_capacity=8 * MIB) as queue, Queue() as said:
        queue.put(array(1))
        reader, writer = os.pipe()

        def receiver() -> bool:
            got = queue.get(timeout=30)

            def child() -> bool:
                os.close(writer)
                os.read(reader, 1)
                said.put(is_whole(got, 1))
                return True

            fork(child)
            os.kill(os.getpid(), signal.SIGKILL)
            return False

        assert code_of(fork(receiver)) == -signal.SIGKILL
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            queue.put_many([array(9), array(9), array(9)])
            for _ in range(3):
                queue.get(timeout=30)
        os.close(writer)
        assert said.get(timeout=30)
        os.close(reader)


@pytest.mark.fault(51)
def test_a_child_frees_no_block_of_its_parent():
    with Queue() as queue:
        queue.put(array(1))
        got = queue.get(timeout=30)
        holder = states(queue)

        def child() -> bool:
            nonlocal got
            del got
            gc.collect()
            pass_through(queue, range(5))
            return True

        assert code_of(fork(child)) == 0
        assert states(queue)[:1] == holder
        assert is_whole(got, 1)


def test_a_child_receives_into_the_block_that_its_parent_had_at_the_fork():
    with Queue() as queue:
        queue.put(array(1))
        got = queue.get(timeout=30)

        def child(kept: Any) -> bool:
            ok = True
            for number in range(20):
                queue.put(array(number))
                ok &= is_whole(queue.get(timeout=30), number)
                ok &= is_whole(kept, 1)
            return ok

        pid = fork(child, got)
        del got
        assert code_of(pid) == 0


# ---- no view shows memory that was lent anew -------------------------------------------


def _churn(queue: Queue[Any], seed: int, count: int) -> None:
    """Receive, keep some for a while, and check that nothing changed in what is kept."""
    dice = random.Random(seed)
    kept: list[tuple[int, Any]] = []
    for _ in range(count):
        got = queue.get(timeout=60)
        number = int(got[0])
        assert is_whole(got, number)
        got[:] = -number - seed  # what is lent is this process's alone
        kept.append((-number - seed, got))
        if len(kept) > dice.randrange(12):
            dice.shuffle(kept)
            for value, one in kept:
                assert is_whole(one, value)
            del kept[: dice.randrange(1, len(kept) + 1)]
    assert all(is_whole(one, value) for value, one in kept)


def _supply(queue: Queue[Any], base: int, count: int) -> None:
    dice = random.Random(base)
    for number in range(base, base + count):
        queue.put(array(number, dice.choice([MIB // 4, MIB // 2, MIB])))


@pytest.mark.fault(51)
def test_no_view_shows_memory_that_was_lent_anew():
    each = 60
    with Queue() as queue:
        with (
            run_in_process(_churn, queue, 1, each) as one,
            run_in_process(_churn, queue, 2, each) as two,
            run_in_process(_supply, queue, 1000, each) as sender,
        ):
            threads = [threading.Thread(target=_supply, args=(queue, 5000, 2 * each))]
            taker = threading.Thread(target=_churn, args=(queue, 3, each))
            for thread in (*threads, taker):
                thread.start()
            for thread in (*threads, taker):
                thread.join(120)
            processes: list[BaseProcess] = [one, two, sender]
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0, 0, 0]
        assert queue.empty()
        assert set(states(queue)) == {FREE}


@pytest.mark.fault(51)
def test_receivers_killed_at_random_leave_the_queue_whole():
    with Queue(max_capacity=16 * MIB) as queue:
        for turn in range(8):
            with run_in_process(_churn, queue, turn, 1000) as receiver:
                for number in range(turn * 100, turn * 100 + 20):
                    queue.put(array(number))
                wait_for(lambda: queue.qsize() < 10, 60)
                receiver.kill()
        got = None
        while not queue.empty():
            got = queue.get(timeout=30)
            assert is_whole(got, int(got[0]))
        got = None  # its block is free now

        def all_free() -> bool:
            kept = []
            for number in range(9):
                queue.put(array(number))
                kept.append(queue.get(timeout=30))
            return sum(is_lent(one) for one in kept) >= 8

        wait_for(all_free, 30)


# ---- no memory ------------------------------------------------------------


@pytest.mark.fault(51)
def test_where_dev_shm_is_full_buffers_are_copied():
    program = """
import os, sys
import numpy as np
from shmring import Queue
queue = Queue()
kept = []
for number in range(40):
    queue.put(np.full(1 << 18, number, np.int32), timeout=30)
    kept.append(queue.get(timeout=30))
assert all((one == number).all() for number, one in enumerate(kept))
kinds = [type(one.base).__name__ for one in kept]
assert kinds[0] == "LentBuffer" and kinds[-1] == "bytearray", kinds
for one in kept:
    one += 1
print("whole")
"""
    done = run_with_mounts("mount -t tmpfs -o size=8m none /dev/shm", program)
    assert done.stdout == "whole\n", done.stderr


def test_past_the_limit_of_file_sizes_buffers_are_copied():
    with Queue() as queue:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, hard))
        try:
            queue.put(array(1))
            first = queue.get(timeout=30)
            queue.put(array(2))
            queue.put(array(3, MIB // 2))
            assert is_lent(first)
            assert is_whole(queue.get(timeout=30), 2)
            assert is_whole(queue.get(timeout=30), 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fault(40)
def test_without_descriptors_a_lent_message_stays_and_the_queue_grows():
    with Queue() as queue:
        other = Queue.attach(queue.name)
        queue.put(array(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(OSError, match=r"descriptor|open files"):
                other.get(timeout=1)
            other.put(bytes(MIB))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert is_whole(other.get(timeout=30), 1)
        assert other.get(timeout=30) == bytes(MIB)
        other.close()


def test_statistics_and_observers_count_the_blocks() -> None:
    def counted() -> tuple[int, ...]:
        with Observer() as observer:
            (found,) = (each for each in observer.look() if each["name"] == queue.name)
        names = ("blocks", "block_bytes", "lent_bytes")
        ours = tuple(getattr(queue.statistics(), each) for each in names)
        assert ours == tuple(found[each] for each in names)
        return ours

    with Queue[Any](name=own_name("blocks")) as queue:
        assert counted() == (0, 0, 0)
        queue.put(array(1))
        _, nbytes, _ = counted()
        assert nbytes >= MIB
        assert counted() == (1, nbytes, nbytes)
        got = queue.get()
        assert counted() == (1, nbytes, nbytes)
        del got
        assert counted() == (1, nbytes, 0)

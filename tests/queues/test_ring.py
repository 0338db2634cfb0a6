"""Ring: bytes in, bytes out, in place, with waiting, growth, and bad input."""

from __future__ import annotations

import gc
import os
import signal
import threading
from multiprocessing import shared_memory

import numpy as np
import pytest

import shmring
from shmring import (
    InvalidArgument,
    LayoutMismatch,
    MessageTooLarge,
    Ring,
    RingClosed,
    RingCorrupted,
    RingExists,
    RingNotFound,
    ShutDown,
    cleanup_stale,
)
from shmring.errors import Empty, Full
from support import asleep, at_least, own_name, run_in_process, taken_from, wait_for

if shmring.backend == "ring":
    from header import lock_word

NAME = own_name("ring")


@pytest.fixture
def ring():
    with Ring.create() as made:
        yield made


# ---- messages ----------------------------------------------------------------------------


def test_full_and_empty(ring):
    with pytest.raises(Empty):
        ring.get_nowait()
    with pytest.raises(Empty):
        ring.get(timeout=0.01)
    with pytest.raises(Full) as caught:
        ring.put_many([bytes(968)] * 100, block=False)
    assert caught.value.count == 65  # of 1000 bytes each, the header included
    assert ring.qsize() == 65
    with pytest.raises(Full):
        ring.put(bytes(968), timeout=0.01)
    assert ring.get() == bytes(968)
    ring.put_nowait(bytes(968))


def test_a_blocked_put_wakes_for_a_get(ring):
    with pytest.raises(Full):
        ring.put_many([bytes(1000)] * 1000, block=False)
    thread = threading.Thread(target=lambda: ring.put(b"l" * 1000, timeout=30))
    thread.start()
    wait_for(lambda: ring.statistics().producers_waiting, what="the producer to sleep")
    taken = ring.get_many()
    thread.join(10)
    assert not thread.is_alive()
    while ring.qsize():
        taken += ring.get_many()
    assert taken[-1] == b"l" * 1000


def _count_up(ring: Ring, count: int) -> None:
    for i in range(count):
        ring.put(i.to_bytes(8, "little"), timeout=60)


# ---- growth --------------------------------------------------------------------------------


def allocated(ring: Ring) -> int:
    return os.fstat(ring._fileno()).st_blocks * 512


def test_grows_without_a_reader_and_gives_memory_back():
    with Ring.create(1 << 16, max_capacity=1 << 26) as ring:
        messages = [bytes([i % 256]) * 100_000 for i in range(300)]
        for message in messages:
            ring.put(message, timeout=10)
        assert allocated(ring) > 30_000_000
        assert [ring.get() for _ in messages] == messages

        def gives_back() -> bool:
            ring.put(b"x")
            assert ring.get() == b"x"
            return allocated(ring) < 200_000

        wait_for(gives_back, what="the pause after the last growth to pass")


def test_an_idle_consumer_gives_memory_back():
    with Ring.create(1 << 16, max_capacity=1 << 24) as ring:
        ring.put(bytes(5_000_000))
        assert len(ring.get()) == 5_000_000
        with pytest.raises(Empty):
            ring.get(timeout=0.2)
        assert allocated(ring) < 200_000


def test_max_capacity_bounds_the_memory():
    with Ring.create(1 << 16, max_capacity=1 << 20) as ring:
        with pytest.raises(Full) as caught:
            ring.put_many([bytes(10_000)] * 1000, block=False)
        assert 50 < caught.value.count < 110
        assert allocated(ring) <= (1 << 20) + 8192
        assert len(ring.get_many()) == caught.value.count


def test_other_handles_follow_growth_and_shrinking(start_method):
    with Ring.create(1 << 16, max_capacity=1 << 24) as ring:
        with run_in_process(_put_growing, ring, method=start_method) as child:
            sizes = [len(ring.get(timeout=60)) for _ in range(60)]
            child.join(60)
        assert sizes == [1 << (i % 20) for i in range(60)]


def _put_growing(ring: Ring) -> None:
    for i in range(60):
        ring.put(bytes(1 << (i % 20)), timeout=60)


# ---- in place -------------------------------------------------------------------------------


def test_reserve_publishes_on_a_clean_exit(ring):
    with ring.reserve(8) as view:
        np.frombuffer(view, "u1")[:] = range(8)
        assert ring.statistics().messages == 1
        with pytest.raises(Empty):
            ring.get(timeout=0.01)
    assert ring.get() == bytes(range(8))


def test_reserve_publishes_nothing_on_an_exception(ring):
    with pytest.raises(ZeroDivisionError), ring.reserve(8):
        raise ZeroDivisionError
    ring.put(b"next")
    assert ring.get(timeout=1) == b"next"


def test_others_produce_beside_a_reservation_and_order_is_kept(ring):
    with ring.reserve(5) as view:
        ring.put(b"second")
        view[:] = b"first"
    assert ring.get_many() == [b"first", b"second"]


def test_peek_consumes_on_a_clean_exit_and_leaves_on_an_exception(ring):
    ring.put(b"message")
    with pytest.raises(ZeroDivisionError), ring.peek():
        raise ZeroDivisionError
    with ring.peek() as view:
        assert view == b"message"
        assert view.readonly
    assert ring.qsize() == 0


def test_other_consumers_wait_behind_a_peek(ring):
    ring.put_many([b"first", b"second"])
    taken = []
    thread = threading.Thread(target=lambda: taken.append(ring.get(timeout=30)))
    with ring.peek() as view:
        thread.start()
        wait_for(lambda: ring.statistics().consumers_waiting, what="the consumer to sleep")
        assert view == b"first"
    thread.join(10)
    assert taken == [b"second"]


@pytest.mark.fault(33)
@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_leaving_with_a_living_array_is_refused_and_loses_nothing(ring, side):
    ring.put(b"whole")
    block = ring.reserve(5) if side == "reserve" else ring.peek()
    with pytest.raises(BufferError, match="alive"), block as view:
        kept = np.frombuffer(view, "u1")
    with pytest.raises(BufferError):
        ring.close()
    if side == "peek":
        with pytest.raises(Empty):
            ring.get_nowait()  # the lease goes on
        assert bytes(kept) == b"whole"
    del kept, view
    assert ring.get(timeout=1) == b"whole"
    ring.put(b"more")
    assert ring.get(timeout=1) == b"more"


def test_a_slice_counts_as_an_export(ring):
    with pytest.raises(BufferError), ring.reserve(8) as view:
        kept = view[2:4]
    kept.release()
    ring.put(b"next")
    assert ring.get(timeout=1) == b"next"


@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_the_same_side_twice_in_one_thread_raises(ring, side):
    ring.put_many([b"1", b"2"])
    enter = (lambda: ring.reserve(1)) if side == "reserve" else ring.peek
    with enter(), pytest.raises(RuntimeError, match="same thread"), enter():
        pass


def test_the_same_side_twice_through_two_handles_raises_too(ring):
    ring.put_many([b"1", b"2"])
    with (
        Ring.attach(ring.name) as other,
        ring.peek(),
        pytest.raises(RuntimeError, match="same thread"),
        other.peek(),
    ):
        pass
    assert ring.qsize() == 1


def test_a_block_cannot_be_entered_twice(ring):
    block = ring.reserve(2)
    with block as view:
        view[:] = b"ab"
    with pytest.raises(RuntimeError, match="anew"), block:
        pass
    assert ring.get_many() == [b"ab"]


def test_a_block_that_was_dropped_lets_its_thread_go(ring):
    block = ring.reserve(8)
    block.__enter__()
    del block
    gc.collect()
    with ring.reserve(2) as view:
        view[:] = b"ok"
    assert ring.get(timeout=10) == b"ok"


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("how", ["dropped", "left"])
def test_a_view_that_ends_while_the_lock_is_held_gives_its_message_back_later(how, closed):
    with (
        Ring.create() as ring,
        Ring.attach(ring.name) as other,
        run_in_process(signal.pause) as holder,
    ):
        ring.put(b"peeked")
        block = ring.peek()
        exported = [np.frombuffer(block.__enter__(), "u1")]
        if how == "left":
            with pytest.raises(BufferError):
                block.__exit__(None, None, None)
        del block
        lock_word(ring, "consumers", holder.pid)

        def end() -> None:
            exported.clear()
            gc.collect()
            if closed:
                ring.close()

        thread = threading.Thread(target=end)
        try:
            thread.start()
            if not closed:
                thread.join(10)
                assert not thread.is_alive()
                with pytest.raises(Empty):
                    other.get(timeout=0.1)
            else:
                wait_for(lambda: ring.closed)
        finally:
            lock_word(other, "consumers", 0)
        assert other.get(timeout=10) == b"peeked"
        thread.join(10)


def test_get_inside_ones_own_peek_raises_instead_of_waiting_for_ever(ring):
    ring.put(b"1")
    with ring.peek(), pytest.raises(RuntimeError, match="inside peek"):
        ring.get()


def test_a_view_survives_the_growth_of_its_ring():
    with Ring.create(1 << 14, max_capacity=1 << 22) as ring:
        with ring.reserve(1000) as view:
            for _ in range(20):
                ring.put(bytes(100_000))
            view[:] = b"r" * 1000
        assert ring.get() == b"r" * 1000
        assert [len(m) for m in ring.get_many()] == [100_000] * 20


@pytest.mark.fault(18)
@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_a_forked_child_cannot_end_its_parents_block(ring, side):
    ring.put(b"front")
    block = ring.reserve(4) if side == "reserve" else ring.peek()
    with block as view:
        pid = os.fork()
        if pid == 0:  # the child leaves the inherited block and must not commit it
            code = 1
            try:
                block.__exit__(None, None, None)
            except RuntimeError:
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        if side == "reserve":
            view[:] = b"mine"
    left = [ring.get() for _ in range(ring.qsize())]
    assert left == ([b"front", b"mine"] if side == "reserve" else [])


# ---- names -----------------------------------------------------------------------------------


def _echo(name: str) -> None:
    with Ring.attach(name, timeout=30) as ring:
        ring.put(b"from the child")


def test_attach_by_name(start_method):
    with Ring.create(name=NAME) as ring:
        with run_in_process(_echo, NAME, method=start_method) as child:
            assert ring.get(timeout=60) == b"from the child"
            child.join(60)
        assert child.exitcode == 0
    assert not os.path.exists(f"/dev/shm/{NAME}")


@pytest.mark.fault(27)
def test_attach_waits_for_the_creator():
    made: list[Ring] = []
    timer = threading.Timer(0.05, lambda: made.append(Ring.create(name=NAME)))
    timer.start()
    with Ring.attach(NAME, timeout=30) as ring:
        wait_for(lambda: made)
        made[0].put(b"x")
        assert ring.get(timeout=10) == b"x"
    made[0].close()


def test_the_last_one_out_removes_the_name():
    ring = Ring.create(name=NAME)
    other = Ring.attach(NAME)
    ring.close()
    assert os.path.exists(f"/dev/shm/{NAME}")
    other.close()
    assert not os.path.exists(f"/dev/shm/{NAME}")


def test_unlink_removes_the_name_and_leaves_the_ring():
    with Ring.create(name=NAME) as ring:
        ring.unlink()
        with pytest.raises(RingNotFound):
            Ring.attach(NAME)
        ring.put(b"x")
        assert ring.get() == b"x"
        with pytest.raises(RingNotFound):
            ring.unlink()


def test_shared_memory_opens_a_named_ring():
    with Ring.create(name=NAME) as ring:
        block = shared_memory.SharedMemory(NAME)
        from multiprocessing import resource_tracker

        resource_tracker.unregister(block._name, "shared_memory")
        assert bytes(block.buf[:8]) == b"SHM RING"
        block.close()
        assert ring.qsize() == 0


@pytest.mark.usefixtures("only_cleaner")
def test_inside_a_block_of_the_user():
    block = shared_memory.SharedMemory(create=True, size=1 << 16)
    try:
        with Ring.create(buffer=block) as ring, Ring.attach(buffer=block) as other:
            assert ring.capacity == 1 << 15
            assert block.name not in cleanup_stale()  # it is the user's
            with pytest.raises(RingExists, match="holds a ring"):
                Ring.create(buffer=block)
            ring.put(bytes(30_000))
            assert len(other.get()) == 30_000
            for i in range(100):
                ring.put(b"%d" % i * 1000)
                assert other.get() == b"%d" % i * 1000
    finally:
        block.close()
        block.unlink()


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, -1, 1 << 60])
def test_impossible_capacities(capacity):
    with pytest.raises(InvalidArgument, match=f"capacity={capacity}"):
        Ring.create(capacity)


@pytest.mark.parametrize("capacity", ["64k", 1.5, None])
def test_capacities_of_the_wrong_type(capacity):
    with pytest.raises(TypeError, match=type(capacity).__name__):
        Ring.create(capacity)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256])
def test_impossible_names(name):
    with pytest.raises(InvalidArgument, match="name"):
        Ring.create(name=name)
    with pytest.raises(InvalidArgument, match="name"):
        Ring.attach(name)


CALLS = {
    "get": lambda ring, timeout: ring.get(timeout=timeout),
    "get_many": lambda ring, timeout: ring.get_many(timeout=timeout),
    "put": lambda ring, timeout: ring.put(b"x", timeout=timeout),
    "put_many": lambda ring, timeout: ring.put_many([b"x"], timeout=timeout),
    "peek": lambda ring, timeout: ring.peek(timeout=timeout).__enter__(),
    "reserve": lambda ring, timeout: ring.reserve(1, timeout=timeout).__enter__(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_timeout_that_is_no_number(ring, call):
    ring.put(b"here")
    with pytest.raises(InvalidArgument, match="timeout=nan"):
        call(ring, float("nan"))
    assert ring.get_many() == [b"here"]


def test_what_is_not_bytes(ring):
    for bad in ("text", 5, None, [b"list"]):
        with pytest.raises(TypeError, match=type(bad).__name__):
            ring.put(bad)
    with pytest.raises(TypeError, match="str"):
        ring.put_many([b"ok", "text"])
    with pytest.raises((BufferError, ValueError)):
        ring.put(np.zeros((4, 4))[:, ::2])
    with pytest.raises(InvalidArgument):
        ring.reserve(-1)
    with pytest.raises(MessageTooLarge):
        ring.reserve(1 << 70)
    with pytest.raises(Empty):
        ring.get_many(1 << 70, block=False)
    with pytest.raises(InvalidArgument):
        ring.get_many(0)
    assert ring.qsize() == 0


def test_a_message_that_can_never_fit(ring):
    for call in (
        lambda: ring.put(bytes(65_536)),
        lambda: ring.put_many([bytes(65_536)]),
        lambda: ring.reserve(65_536),
    ):
        with pytest.raises(MessageTooLarge, match=r"65536 bytes.* 65504; .*max_capacity="):
            call()
    with pytest.raises(MessageTooLarge) as caught:
        ring.put_many([b"fits", bytes(65_536)])
    assert caught.value.count == 0
    ring.put(bytes(65_536 - 32))
    assert len(ring.get()) == 65_536 - 32


def test_names_in_use_and_names_of_nothing():
    with Ring.create(name=NAME), pytest.raises(RingExists, match="in use"):
        Ring.create(name=NAME)
    with at_least(0.05), pytest.raises(RingNotFound, match="does not exist"):
        Ring.attach(NAME, timeout=0.05)


@pytest.mark.fault(30, 35)
@pytest.mark.parametrize("content", [b"", b"hello", bytes(20_000), b"x" * 20_000])
def test_attach_to_a_file_that_is_no_ring(content, tmp_path):
    path = f"/dev/shm/{NAME}"
    with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
    try:
        with pytest.raises(LayoutMismatch, match="not a ring"):
            Ring.attach(NAME)
        with pytest.raises(RingExists):  # and it is not ours to remove
            Ring.create(name=NAME)
        assert os.path.exists(path)
    finally:
        os.unlink(path)


@pytest.mark.fault(23)
def test_a_frame_that_shmring_did_not_write_poisons_the_ring(ring):
    ring.put(b"x" * 100)
    with open(f"/proc/self/fd/{ring._fileno()}", "r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 32)
    for _ in range(2):
        with pytest.raises(RingCorrupted, match="position 0"):
            ring.get()
    with pytest.raises(RingCorrupted):
        ring.put(b"y")
    assert ring.statistics().poisoned


def test_a_put_that_gave_up_keeps_no_room_from_others():
    with Ring.create(4096) as ring, Ring.attach(ring.name) as other:
        ring.put(bytes(1000))
        with pytest.raises(Full):
            ring.put(bytes(4000), timeout=0.01)
        other.put_nowait(b"there is room for this")
        assert other.qsize() == 2


@pytest.mark.fault(33)
def test_closing_wakes_a_thread_that_waits(ring):
    raised = []

    def wait() -> None:
        try:
            ring.get()
        except RingClosed as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(asleep(thread), what="the consumer to sleep")
    ring.close()
    thread.join(10)
    assert raised


def test_use_of_what_only_a_ring_has_after_close(ring):
    ring.close()
    for call in (ring.statistics, lambda: ring.peek().__enter__(), lambda: ring.name):
        with pytest.raises(RingClosed, match="closed"):
            call()


# ---- on either back end ---------------------------------------------------------------------


class TestMessages:
    """Bytes in, bytes out: a Ring, and what the fallback has in its place."""

    @pytest.fixture
    def make(self, backend):
        """A pipe has a capacity of its own, and carries bytes as a Queue does."""
        if backend.__name__ == "shmring.fallback.queues":
            return lambda capacity=0: backend.Queue(codec="bytes")
        return Ring.create

    @pytest.fixture
    def ring(self, make):
        with make() as made:
            yield made

    @pytest.mark.parametrize("length", [0, 1, 7, 8, 64, 4095, 4096, 4097, 60_000])
    def test_what_goes_in_comes_out(self, ring, length):
        message = os.urandom(length)
        for _ in range(5):  # past the end of the area, where frames wrap in the second mapping
            ring.put(message)
            assert ring.get(timeout=10) == message

    @pytest.mark.parametrize(
        "kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, "u1")]
    )
    def test_any_contiguous_buffer_can_be_put(self, ring, kind):
        ring.put(kind(b"abcdefgh"))
        ring.put_many([kind(b"ij"), kind(b"")])
        assert taken_from(ring, 3) == [b"abcdefgh", b"ij", b""]

    def test_first_in_first_out(self, ring):
        messages = [b"%d" % i for i in range(1000)]
        ring.put_many(messages)
        assert ring.qsize() == 1000
        assert taken_from(ring, 10) == messages[:10]
        assert ring.get(timeout=10) == messages[10]
        assert taken_from(ring, 989) == messages[11:]
        assert ring.qsize() == 0

    def test_get_many_takes_large_and_small_in_order(self, make):
        with make(1 << 20) as ring:
            messages = [os.urandom(n) for n in (10, 70_000, 5, 5_000, 200_000, 1, 1)]
            ring.put_many(messages)
            assert taken_from(ring, 7) == messages

    def test_a_blocked_get_wakes_for_a_put(self, ring):
        taken = []
        thread = threading.Thread(target=lambda: taken.append(ring.get(timeout=30)))
        thread.start()
        wait_for(asleep(thread), what="the consumer to sleep")
        ring.put(b"wake")
        wait_for(lambda: taken, what="the consumer to wake")
        thread.join(10)
        assert taken == [b"wake"]

    def test_many_threads_lose_and_double_nothing(self, make):
        with make(1 << 14) as ring:
            taken: list[bytes] = []

            def produce(number: int) -> None:
                for i in range(2000):
                    ring.put(b"%d:%d" % (number, i), timeout=60)

            def consume() -> None:
                while (message := ring.get(timeout=60)) != b"end":
                    taken.append(message)

            producers = [threading.Thread(target=produce, args=(i,)) for i in range(3)]
            consumers = [threading.Thread(target=consume) for _ in range(3)]
            for thread in producers + consumers:
                thread.start()
            for thread in producers:
                thread.join(60)
            for _ in consumers:
                ring.put(b"end", timeout=60)
            for thread in consumers:
                thread.join(60)
            assert sorted(taken) == sorted(b"%d:%d" % (w, i) for w in range(3) for i in range(2000))

    def test_many_processes_lose_and_double_nothing(self, make):
        with make(1 << 14) as ring:
            with run_in_process(_count_up, ring, 20_000), run_in_process(_count_up, ring, 20_000):
                taken = [int.from_bytes(ring.get(timeout=60), "little") for _ in range(40_000)]
            assert sorted(taken) == sorted([*range(20_000)] * 2)

    def test_use_after_close(self, ring):
        ring.close()
        ring.close()
        for call in (
            lambda: ring.put(b""),
            ring.get,
            ring.get_many,
            lambda: ring.put_many([]),
            ring.qsize,
        ):
            with pytest.raises(RingClosed, match="closed"):
                call()
        assert issubclass(RingClosed, ValueError)

    def test_shutdown_refuses_puts_and_drains(self, ring):
        ring.put_many([b"1", b"2"])
        ring.shutdown()
        with pytest.raises(ShutDown):
            ring.put(b"3")
        assert taken_from(ring, 2) == [b"1", b"2"]
        with pytest.raises(ShutDown):
            ring.get()

    def test_immediate_shutdown_refuses_gets_too(self, ring):
        ring.put(b"1")
        ring.shutdown(immediate=True)
        with pytest.raises(ShutDown):
            ring.get()

    def test_dropping_it_open_warns(self, make):
        ring = make()
        with pytest.warns(ResourceWarning, match="dropped open"):
            del ring

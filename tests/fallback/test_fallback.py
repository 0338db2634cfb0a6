"""The fallback by itself: what it can, and what it says that it cannot.

What it has in common with the ring is tested over both: test_queue, test_codecs, test_ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import managers
from typing import Any

import pytest

from shmring.errors import (
    InvalidArgument,
    NotSupportedByFallback,
    RingClosed,
    RingExists,
    RingNotFound,
    ShutDown,
)
from shmring.fallback import files
from shmring.fallback.files import (
    SharedFile,
    SharedMemoryManager,
    cleanup_stale,
    fallback_folder,
)
from shmring.fallback.queues import JoinableQueue, Queue, Ring
from shmring.fallback.server import ServedQueue
from shmring.ipc.message import Message, MessageCodec, MessageType
from shmring.process.liveness import is_process_dead
from support import run_in_process, wait_for

pytestmark = pytest.mark.both_backends


@pytest.fixture
def name(namespace: str) -> Iterator[str]:
    yield namespace
    assert [each for each in os.listdir(fallback_folder()) if namespace in each] == []


@pytest.fixture
def plain() -> Iterator[Queue[Any]]:
    with Queue[Any]() as opened:
        yield opened
        opened.cancel_join_thread()


# -- Queue ----------------------------------------------------------------------------------


def test_order_batches_and_counts(plain: Queue[int]) -> None:
    plain.put_many([1, 2, 3])
    plain.put(4)
    got: list[int] = []
    while len(got) < 4:
        got += plain.get_many(timeout=10)
    assert got == [1, 2, 3, 4]
    with pytest.raises(queue.Empty):
        plain.get_many(block=False)
    with pytest.raises(queue.Empty):
        plain.get(timeout=0.01)
    with pytest.raises(queue.Empty):
        plain.get_nowait()


def test_get_many_takes_no_more_than_asked(plain: Queue[int]) -> None:
    plain.put_many(range(10))
    assert plain.get_many(1, timeout=10) == [0]
    assert len(plain.get_many(3, timeout=10)) <= 3
    with pytest.raises(InvalidArgument, match="max_items=0"):
        plain.get_many(0)


def test_a_full_queue_says_how_many_went_in() -> None:
    with Queue[int](2) as bounded:
        with pytest.raises(queue.Full) as caught:
            bounded.put_many([1, 2, 3], timeout=0.05)
        assert caught.value.count == 2  # type: ignore[attr-defined]
        assert str(caught.value) == "2 of 3 objects went in"
        assert bounded.full()
        with pytest.raises(queue.Full):
            bounded.put_nowait(3)
        assert bounded.get(timeout=10) == 1
        assert bounded.get(timeout=10) == 2


def test_an_interrupted_put_many_says_how_many_went_in(
    plain: Queue[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = plain._put_encoded
    messages = []

    def interrupted(message: Any, waiting: Any) -> None:
        messages.append(message)
        if len(messages) == 3:
            raise KeyboardInterrupt
        put(message, waiting)

    monkeypatch.setattr(plain, "_put_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        plain.put_many([1, 2, 3])
    assert caught.value.count == 2  # type: ignore[attr-defined]
    assert [plain.get(timeout=10), plain.get(timeout=10)] == [1, 2]


def test_the_codec_of_messages() -> None:
    with Queue[Message](codec=MessageCodec()) as messages:
        messages.put(Message(MessageType.DATA, "a", 1.0, [1]))
        assert messages.get(timeout=10).data == [1]


def test_attaching_takes_a_deadline_that_has_passed(name: str) -> None:
    for attach in (SharedFile.attach, lambda *a: ServedQueue.attach(*a, MessageCodec())):
        with pytest.raises(RingNotFound):
            attach(name, -1)
        with pytest.raises(InvalidArgument, match="timeout=nan"):
            attach(name, float("nan"))


def test_get_many_takes_what_was_there_and_no_more(
    plain: Queue[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.put_many([1, 2, 3])
    wait_for(lambda: not plain.empty(), what="the feeder thread")
    take = plain._get

    def take_and_put_another(waiting: Any) -> int:
        taken = take(waiting)
        if taken < 100:
            plain.put(taken + 3)
        return taken

    monkeypatch.setattr(plain, "_get", take_and_put_another)
    assert len(plain.get_many()) < 10
    monkeypatch.undo()
    while plain._count_left():
        plain.get(timeout=10)


def test_stale_files_are_cleaned_up_by_the_package() -> None:
    from shmring import _backend

    if _backend.backend == "queue":
        assert _backend.cleanup_stale is files.cleanup_stale


def test_what_a_pipe_cannot_do_is_named(plain: Queue[int]) -> None:
    for call in (
        lambda: Queue(name="x"),
        lambda: Queue.attach("x"),
        lambda: plain.name,
        plain.unlink,
        plain.fileno,
        plain.statistics,
        lambda: plain.capacity,
        lambda: plain.max_capacity,
        lambda: plain.largest,
        lambda: asyncio.run(plain.aget(timeout=1)),
        lambda: asyncio.run(plain.aput(1, timeout=1)),
        lambda: asyncio.run(anext(plain)),
        Ring,
        Ring.create,
        lambda: Ring.attach("x"),
    ):
        with pytest.raises(NotSupportedByFallback, match="needs the compiled ring"):
            call()


class Labelled(Queue[Any]):
    """As programs write them for multiprocessing.Queue."""

    def __init__(self, name: str) -> None:
        super().__init__(ctx=multiprocessing.get_context("spawn"))
        self.name = name


def test_a_subclass_keeps_attributes_of_names_that_only_the_ring_has() -> None:
    with Labelled("jobs") as labelled:
        labelled.put(1)
        assert (labelled.name, labelled.get(timeout=10)) == ("jobs", 1)


def test_an_immediate_shutdown_counts_what_it_drops_as_worked_off() -> None:
    with JoinableQueue[int]() as joinable:
        joinable.put_many(range(3))
        wait_for(lambda: not joinable.empty(), what="the feeder thread")
        assert joinable.get(timeout=10) == 0
        joinable.shutdown(immediate=True)

        def all_dropped() -> bool:
            with pytest.raises(ShutDown):
                joinable.get()
            return joinable._count_left() == 0

        wait_for(all_dropped, what="the messages of the feeder thread")
        assert not joinable.join(timeout=0.01), "the one that was taken is unfinished"
        joinable.task_done()
        assert joinable.join(timeout=0)


# -- ServedQueue ----------------------------------------------------------------------------


def put_served(served: ServedQueue) -> None:
    served.put(Message(MessageType.DATA, "child", 1.0, os.getpid()))


def serve_and_wait(name: str) -> None:
    ServedQueue.create(name, 0, MessageCodec())
    signal.pause()


class InterruptedCondition(threading.Condition):
    """Ctrl-C where it hurts most: the lock is taken, and its block not yet entered."""

    def __enter__(self) -> bool:
        super().__enter__()
        raise KeyboardInterrupt


def test_ctrl_c_does_not_leave_a_served_queue_locked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedQueue.create(name, 0, MessageCodec())
    client = ServedQueue.attach(name, 1, MessageCodec())
    assert served._server is not None
    local = served._server.queue
    with monkeypatch.context() as patched:
        patched.setattr(local, "not_empty", InterruptedCondition(local.mutex))
        with pytest.raises(KeyboardInterrupt):
            served.get(timeout=1)
    putter = threading.Thread(
        target=client.put, args=(Message(MessageType.DATA, "a", 1.0, 5),), daemon=True
    )
    putter.start()
    putter.join(30)
    assert not putter.is_alive(), "the lock was not given back"
    assert served.get(timeout=5).data == 5
    client.close()
    served.close()


def test_a_served_queue_is_found_by_name(name: str, start_method: str) -> None:
    served = ServedQueue.create(name, 1, MessageCodec())
    with pytest.raises(RingExists):
        ServedQueue.create(name, 0, MessageCodec())
    client = ServedQueue.attach(name, 1, MessageCodec())
    client.put(Message(MessageType.DATA, "a", 1.0, 5))
    assert (client.qsize(), client.full(), served.empty()) == (1, True, False)
    with pytest.raises(queue.Full):
        client.put_nowait(Message(MessageType.DATA, "a"))
    assert served.get(timeout=5).data == 5
    with pytest.raises(queue.Empty):
        client.get(timeout=0.01)
    with pytest.raises(queue.Empty):
        client.get_nowait()
    with run_in_process(put_served, served, method=start_method) as process:
        assert served.get(timeout=30).data == process.pid
    client.close()
    with pytest.raises(RingClosed):
        client.get()
    served.close()
    served.close()


def test_a_served_queue_stays_when_its_last_client_goes(name: str) -> None:
    """Else a client that comes while another goes finds no queue."""
    served = ServedQueue.create(name, 0, MessageCodec())
    client = ServedQueue.attach(name, 1, MessageCodec())
    client.put(Message(MessageType.DATA, "a", 1.0, 5))
    client.close()
    assert served._server is not None
    assert served._server.number_of_objects(None) == 1  # type: ignore[attr-defined]
    assert served.get(timeout=5).data == 5
    served.close()


def tell_pid_and_wait(connection: Any) -> None:
    connection.send(os.getpid())
    signal.pause()


def serve_with_a_child(name: str, connection: Any) -> None:
    served = ServedQueue.create(name, 0, MessageCodec())
    with run_in_process(tell_pid_and_wait, connection, method="fork"):
        served.get()


@pytest.mark.skipif(sys.platform != "linux", reason="fork, and a process that is killed")
def test_a_forked_child_of_a_killed_server_does_not_hold_its_name(name: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs, run_in_process(serve_with_a_child, name, theirs, method="fork") as server:
        assert ours.poll(30)
        orphan = ours.recv()
        try:
            client = ServedQueue.attach(name, 30, MessageCodec())
            server.kill()
            with pytest.raises(RingClosed):
                client.get(timeout=30)
            served = ServedQueue.create(name, 0, MessageCodec())
            served.close()
            assert not is_process_dead(orphan)
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_no_process_serves(name: str) -> None:
    with pytest.raises(RingNotFound):
        ServedQueue.attach(name, 0.05, MessageCodec())


def test_a_server_that_has_served_a_client_hangs_up(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of multiprocessing would answer a request that it did not serve."""
    monkeypatch.setattr(managers.Server, "accept_connection", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    with contextlib.closing(ServedQueue.create(name, 0, MessageCodec())) as served, ours:
        assert served._server is not None
        served._server.accept_connection(theirs, "queue")
        with pytest.raises(EOFError):
            ours.recv()


def test_clients_notice_the_end_of_their_server(name: str) -> None:
    served = ServedQueue.create(name, 0, MessageCodec())
    client = ServedQueue.attach(name, 1, MessageCodec())
    outcome: list[BaseException] = []
    started = threading.Event()

    def wait() -> None:
        started.set()
        try:
            client.get()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert started.wait(10)
    served.close()
    thread.join(10)
    assert [type(each) for each in outcome] == [RingClosed]
    with pytest.raises(RingClosed):
        client.put(Message(MessageType.DATA, "a"))


def test_the_name_of_a_killed_server_can_be_used_again(name: str, start_method: str) -> None:
    with run_in_process(serve_and_wait, name, method=start_method):
        client = ServedQueue.attach(name, 30, MessageCodec())
    with pytest.raises(RingClosed):
        client.get(timeout=10)
    with pytest.raises(RingNotFound):
        ServedQueue.attach(name, 0, MessageCodec())
    served = ServedQueue.create(name, 0, MessageCodec())
    served.close()


# -- files and memory -------------------------------------------------------------------------


def hold(name: str) -> None:
    held = SharedFile.create(name, 100)
    held.buffer[0] = 1
    signal.pause()


def test_a_file_goes_with_its_last_holder(name: str) -> None:
    first = SharedFile.create(name, 100)
    with pytest.raises(RingExists):
        SharedFile.create(name, 100)
    second = SharedFile.attach(name)
    second.buffer[7] = 9
    first.close()
    assert second.buffer[7] == 9
    second.close()
    with pytest.raises(RingClosed):
        _ = second.buffer
    with pytest.raises(RingNotFound):
        SharedFile.attach(name)


def test_what_a_killed_process_left_is_reclaimed(name: str, start_method: str) -> None:
    path = fallback_folder() / name
    with run_in_process(hold, name, method=start_method):
        wait_for(path.exists, 30, "the file")
        assert name not in cleanup_stale(), "a process has it open"
    assert path.exists()
    assert name in cleanup_stale()
    assert not path.exists()


def add_often(name: str, times: int) -> None:
    shared = SharedFile.attach(name, 30)
    for _ in range(times):
        with shared.exclusive():
            shared.buffer[0:4] = (int.from_bytes(shared.buffer[0:4], "big") + 1).to_bytes(4, "big")
    shared.close()


def test_the_lock_excludes_processes_and_threads(name: str) -> None:
    shared = SharedFile.create(name, 100)
    with run_in_process(add_often, name, 200) as one, run_in_process(add_often, name, 200) as two:
        threads = [threading.Thread(target=add_often, args=(name, 200)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for each in (*threads, one, two):
            each.join(60)
    assert int.from_bytes(shared.buffer[0:4], "big") == 800
    shared.close()


def test_a_finalizer_that_runs_under_the_lock_does_not_wait_for_it(name: str) -> None:
    inner = SharedFile.create(f"{name}-inner", 100)
    outer = SharedFile.create(name, 100)
    with outer.exclusive():
        inner.close()
    assert not (fallback_folder() / f"{name}-inner").exists()
    outer.close()


@pytest.mark.parametrize("bad", ["", "a/b", "a\0b", "..", "x" * 201])
def test_impossible_names_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        SharedMemoryManager(bad, 10)


def test_memory(name: str) -> None:
    memory, other = SharedMemoryManager(name, 100), SharedMemoryManager(name, 100)
    assert not other.connect()
    with pytest.raises(RingClosed):
        other.read_data(1)
    with memory, other:
        assert memory.create()
        assert not SharedMemoryManager(name, 100).create()
        assert other.connect()
        memory.write_data(b"hello", 95)
        assert other.read_data(5, 95) == b"hello"
        for offset, length in ((96, 5), (-1, 1), (0, 101), (0, -1)):
            with pytest.raises(ValueError, match="offset"):
                other.read_data(length, offset)
        with pytest.raises(InvalidArgument, match="100 bytes"):
            SharedMemoryManager(name, 101).connect()
    memory.cleanup()


def test_connecting_again_finds_the_memory_of_today(name: str) -> None:
    memory, other = SharedMemoryManager(name, 100), SharedMemoryManager(name, 100)
    with memory, other:
        assert memory.create()
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
        memory.cleanup()
        assert not other.connect()
        assert other.create()
        assert memory.connect()
        memory.cleanup()
        assert other.is_current(), "a creator of one block is none of another that it connects to"


def test_arrays_over_memory(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    with SharedMemoryManager(name, 100) as memory:
        memory.create()
        array = memory.as_array("u2", (5, 2), offset=10)
        array[:] = numpy.arange(10).reshape(5, 2)
        assert memory.read_data(4, 12) == b"\1\0\2\0"
        for wrong in ((51, 0), ((-1, 5), 0), (1, 99), (1, -1)):
            with pytest.raises(InvalidArgument):
                memory.as_array("u2", *wrong)
    assert array.sum() == 45, "a view keeps its memory"


def read_and_double(memory: SharedMemoryManager) -> None:
    with memory:
        memory.write_data(memory.read_data(5) * 2)


def test_memory_goes_to_a_child(name: str, start_method: str) -> None:
    with SharedMemoryManager(name, 100) as memory:
        memory.create()
        memory.write_data(b"hello")
        with run_in_process(read_and_double, memory, method=start_method) as process:
            process.join(30)
        assert process.exitcode == 0
        assert memory.read_data(11) == b"hellohello\0"
        pickled = pickle.dumps(memory)
    late = pickle.loads(pickled)  # fails where it is used, not where it arrives
    with pytest.raises(RingNotFound, match="keeps its block"):
        late.read_data(1)


def test_memory_is_opened_once(name: str) -> None:
    with SharedMemoryManager(name, 100) as memory:
        memory.create()
        for again in (memory.create, memory.connect):
            with pytest.raises(RingExists, match="cleanup"):
                again()


def test_sizes_of_numpy(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    with SharedMemoryManager(name, numpy.int64(100)) as memory:
        assert memory.size == 100
        memory.create()
        assert memory.as_array("u1", numpy.int64(4)).shape == (4,)
        assert memory.as_array("S0", 3).shape == (3,)
        assert memory.as_array("u1", (0, 5), offset=100).size == 0
        assert memory.as_array("f8", ()).shape == ()
        with pytest.raises(InvalidArgument, match="dtype=object"):
            memory.as_array(object, 2)
    with pytest.raises(TypeError, match="size="):
        SharedMemoryManager(name, 1.5)  # type: ignore[arg-type]

"""Queue: objects in, objects out, through every way of starting a process."""

from __future__ import annotations

import collections
import gc
import json
import multiprocessing
import os
import pickle
import queue as standard_queue
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import shmring
from shmring import (
    DecodeError,
    EncodeError,
    InvalidArgument,
    LayoutMismatch,
    MessageTooLarge,
    Queue,
    Ring,
    RingClosed,
    RingCorrupted,
    RingNotFound,
    ShutDown,
)
from shmring.errors import Empty, Full
from shmring.queues.codec import PickleCodec
from support import asleep, own_name, run_in_process, taken_from, wait_for

NAME = own_name("queue")


@pytest.fixture
def queue():
    with Queue() as made:
        yield made


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return (
            left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
        )
    return left == right


Point = collections.namedtuple("Point", "x y")

OBJECTS = [
    None,
    0,
    1 << 100,
    1.5,
    "",
    "text \ud800 with a lone surrogate",
    b"",
    b"x" * 100_000,
    bytearray(b"mutable"),
    (1, [2, {3: {4}}]),
    {"key": ["value"] * 1000},
    Point(1, 2),
    "long" * 50_000,
]


ARRAYS = [
    np.arange(10),
    np.arange(1_000_000, dtype="f4"),
    np.zeros((0, 3)),
    np.asfortranarray(np.arange(600_000.0).reshape(600, 1000)),
    np.arange(100_000)[::2],
    np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    np.array([{"an": "object"}, None], dtype=object),
    np.array(7.0),
]


# ---- processes -----------------------------------------------------------------------------


def _square(tasks: Queue[int], results: Queue[tuple[int, int]]) -> None:
    while (number := tasks.get(timeout=60)) >= 0:
        results.put((number, number**2))


def _forward(queue: Queue[object]) -> None:
    inner = queue.get(timeout=60)
    assert isinstance(inner, Queue)
    inner.put(os.getpid())
    with pytest.raises(Empty):
        queue.get(timeout=0.01)


def test_through_another_queue(queue, start_method):
    with Queue() as inner:
        with run_in_process(_forward, queue, method=start_method) as child:
            queue.put(inner)
            assert inner.get(timeout=60) == child.pid
            child.join(60)
            assert child.exitcode == 0
        name = inner.name
    assert not os.path.exists(f"/dev/shm/{name}")


def _start_grandchild(queue: Queue[str]) -> None:
    with run_in_process(queue.put, "from a grandchild", method="spawn") as grandchild:
        grandchild.join(60)
        assert grandchild.exitcode == 0


def test_attach_by_name_from_an_unrelated_program():
    with Queue(name=NAME) as queue:
        program = f"import shmring; shmring.Queue.attach({NAME!r}).put({{'a': 1}})"
        done = subprocess.run(
            [sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=True
        )
        assert "leaked" not in done.stderr  # the resource tracker has nothing to say
        assert queue.get(timeout=10) == {"a": 1}
        assert queue.name == NAME
        with Queue.attach(queue.name) as other:
            other.put(2)
        assert queue.get() == 2


def test_the_name_of_an_anonymous_queue_comes_on_demand(queue):
    inode = os.fstat(queue._fileno()).st_ino
    assert os.fstat(queue._fileno()).st_nlink == 0
    name = queue.name
    assert os.stat(f"/dev/shm/{name}").st_ino == inode
    assert os.fstat(queue._fileno()).st_nlink == 1
    with Queue.attach(name) as other:
        other.put("by name")
    assert queue.get() == "by name"
    assert queue.name == name


def test_after_unlink_it_cannot_be_named_and_says_so(queue):
    assert os.path.exists(f"/dev/shm/{queue.name}")
    queue.unlink()
    with pytest.raises(RingNotFound, match="unlinked"):
        pickle.dumps(queue)
    with run_in_process(queue.put, "as an argument", method="spawn"):
        assert queue.get(timeout=60) == "as an argument"


def test_a_copy_by_pickle_is_the_same_queue(queue):
    copy = pickle.loads(pickle.dumps(queue))
    with copy:
        copy.put(1)
        assert queue.get() == 1


# ---- what it costs -------------------------------------------------------------------------


def test_an_unused_queue_costs_little():
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    children = len(multiprocessing.active_children())
    with Queue() as queue:
        found = os.fstat(queue._fileno())
        assert max(found.st_size, found.st_blocks * 512) < 128 << 10
        assert len(os.listdir("/proc/self/fd")) == descriptors + 1
        assert threading.active_count() == threads
        assert len(multiprocessing.active_children()) == children
        assert found.st_nlink == 0, "it has a name"
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_two_hundred_queues_fit_into_64_mib():
    queues = [Queue() for _ in range(200)]
    for each in queues:
        each.put(1)
    assert sum(os.fstat(each._fileno()).st_blocks * 512 for each in queues) < 64 << 20
    for each in queues:
        each.close()


def test_waiting_costs_next_to_nothing(queue):
    """One wakes up to look, eleven times a second; one that spins would not sleep once."""

    def slept_and_ticks() -> tuple[int, int]:
        status = Path(f"/proc/{waiter.pid}/status").read_text()
        fields = Path(f"/proc/{waiter.pid}/stat").read_text().rpartition(")")[2].split()
        slept = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return slept, int(fields[11]) + int(fields[12])

    with run_in_process(queue.get) as waiter:
        wait_for(lambda: queue.statistics().consumers_waiting)
        slept, ticks = slept_and_ticks()
        wait_for(lambda: slept_and_ticks()[0] >= slept + 10)
        assert slept_and_ticks()[1] - ticks < 10, "a tick is 10 ms, and ten slices are 90"


# ---- codecs --------------------------------------------------------------------------------


class Hostile:
    """Unpickling this would be seen."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (f"/dev/shm/{NAME}-was-unpickled",)


@pytest.mark.fault(38)
def test_bytes_codec_never_unpickles():
    with Queue(codec="bytes", name=NAME) as queue:
        with Queue.attach(NAME) as wrong:  # a sender that pickles
            wrong.put(Hostile())
            wrong.put(b"fine")
        with pytest.raises(DecodeError, match="kind"):
            queue.get()
        assert queue.get() == b"fine"
    assert not os.path.exists(f"/dev/shm/{NAME}-was-unpickled")


class Reversed:
    def dumps(self, obj: bytes) -> bytes:
        return obj[::-1]

    def loads(self, data: bytes) -> bytes:
        return data[::-1]


class Both(Reversed):
    """Has encode and decode as well, in a meaning of its own."""

    def encode(self, obj: object) -> str:
        raise AssertionError

    decode = encode


class Carried:
    """Something that a weak reference can watch."""


# ---- bad input -----------------------------------------------------------------------------


class Carrier:
    def __init__(self, part: object) -> None:
        self.good = 1
        self.part = part


class Grudging:
    def __reduce__(self) -> tuple[object, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise KeyError("not here")


class Raising:
    """A codec that raises the exceptions it carries."""

    def encode(self, obj: object) -> tuple[int, list[bytes]]:
        return 9, [pickle.dumps(obj)]

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> object:
        obj = pickle.loads(head)
        if isinstance(obj, BaseException):
            raise obj
        return obj


class Reserved(BaseException):
    """Its `items` cannot be assigned."""

    items = property()


@pytest.mark.parametrize("size", [1, 5000, 100_000], ids=lambda size: f"{size}_bytes")
@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt, SystemExit, MemoryError, RingCorrupted, DecodeError]
)
@pytest.mark.fault(48)
def test_get_many_hands_out_the_others_whatever_decoding_raises(raised, size):
    before, after = [[i, bytes(100)] for i in range(5)], [[i, bytes(100)] for i in range(5, 300)]
    with Queue(codec=Raising()) as queue:
        queue.put_many([*before, raised("x" * size), *after])
        taken = []
        batches = iter(lambda: queue.get_many(block=False), None)
        with pytest.raises(raised) as caught:
            taken.extend(each for batch in batches for each in batch)
        assert caught.value.args == ("x" * size,)
        taken += caught.value.items
        while not queue.empty():
            taken += queue.get_many()
        assert taken == before + after


def test_get_many_raises_an_interrupt_rather_than_an_earlier_failure():
    with Queue(codec=Raising()) as queue:
        queue.put_many([1, DecodeError(), 2, KeyboardInterrupt(), 3, DecodeError(), 4])
        with pytest.raises(KeyboardInterrupt) as caught:
            queue.get_many()
        assert caught.value.items == [1, 2, 3, 4]
        queue.put_many([1, Reserved(), 2])
        with pytest.raises(DecodeError, match="Reserved") as refused:
            queue.get_many()
        assert refused.value.items == [1, 2]
        assert isinstance(refused.value.__cause__, Reserved)
        assert queue.empty()


class _PutsItself:
    def __init__(self, queue: Queue[object]) -> None:
        self.queue = queue

    def __reduce__(self) -> tuple[object, ...]:
        self.queue.put("from __reduce__")
        return str, ("rebuilt",)


def test_a_message_larger_than_max_capacity():
    with Queue(max_capacity=1 << 16) as queue:
        with pytest.raises(MessageTooLarge, match="max_capacity"):
            queue.put(bytes(100_000))
        queue.put("small")
        assert queue.get() == "small"


def test_attach_to_what_is_not_a_queue():
    with pytest.raises(RingNotFound):
        Queue.attach(NAME)
    with Ring.create(name=NAME), pytest.raises(LayoutMismatch, match="class"):
        Queue.attach(NAME)


def test_a_descriptor_that_was_closed_behind_its_back():
    with Queue() as queue:
        stolen = os.open("/dev/null", os.O_RDWR)
        try:
            fd = queue._fileno()
            kept = os.dup(fd)
            os.dup2(stolen, fd)
            with pytest.raises(OSError, match="descriptor"):
                queue.put(bytes(1 << 20))
            os.dup2(kept, fd)
            os.close(kept)
            queue.put(bytes(1 << 20))
            assert len(queue.get()) == 1 << 20
        finally:
            os.close(stolen)


def test_it_says_what_it_is(queue):
    assert "Queue anonymous" in repr(queue)
    assert queue.statistics().messages == 0
    assert shmring.backend == "ring"
    assert Queue[int]


# ---- on either back end ---------------------------------------------------------------------


def _take_into(taken: list[object], queue: Queue[object]) -> None:
    while True:
        taken += queue.get_many(timeout=10)


def _say_back_end(queue: Queue[object]) -> None:
    queue.put((shmring.backend, type(queue).__module__))


class TestQueue:
    """What a queue does on either back end."""

    @pytest.fixture
    def queue(self, backend):
        with backend.Queue() as made:
            yield made
            made.cancel_join_thread()

    @pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: type(obj).__name__)
    def test_what_goes_in_comes_out(self, queue, obj):
        for _ in range(3):
            queue.put(obj)
            taken = queue.get(timeout=10)
            assert type(taken) is type(obj)
            assert taken == obj

    @pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
    def test_arrays_arrive_equal_and_writable(self, queue, array):
        queue.put(array)
        taken = queue.get(timeout=10)
        assert same(taken, array)
        assert taken.flags.writeable
        assert taken.flags.f_contiguous or not array.flags.f_contiguous or array.ndim < 2
        taken[...] = taken  # and no other copy changes
        queue.put({"several": [array, array[:1] if array.ndim else array], "name": "x"})
        assert same(queue.get(timeout=10)["several"][0], array)

    def test_identity_and_recursion_inside_one_object(self, queue):
        shared = [1]
        recursive: list[object] = [shared, shared]
        recursive.append(recursive)
        queue.put(recursive)
        taken = queue.get(timeout=10)
        assert taken[0] is taken[1]
        assert taken[2] is taken

    def test_more_buffers_than_the_stack_has_room_for(self, queue):
        arrays = [np.full(1000, i) for i in range(700)]
        queue.put(arrays)
        assert all(same(a, b) for a, b in zip(queue.get(timeout=10), arrays, strict=True))

    def test_put_many_and_get_many(self, queue):
        objects = [{"i": i, "data": np.full(i * 10, i)} for i in range(300)]
        queue.put_many(objects)
        assert queue.qsize() == 300
        taken = taken_from(queue, 300)
        assert [t["i"] for t in taken] == list(range(300))
        assert all(same(t["data"], o["data"]) for t, o in zip(taken, objects, strict=True))

    def test_what_is_mutated_after_put_was_sent_before(self, queue):
        data = {"state": "before", "array": np.zeros(100_000)}
        queue.put(data)
        data["state"] = "after"
        data["array"][:] = 1
        taken = queue.get(timeout=10)
        assert taken["state"] == "before"
        assert not taken["array"].any()

    def test_maxsize(self, backend):
        with backend.Queue(2) as queue:
            queue.put(1)
            assert not queue.full()
            queue.put(2)
            assert queue.full()
            with pytest.raises(Full):
                queue.put_nowait(3)
            with pytest.raises(Full):
                queue.put(3, timeout=0.05)
            with pytest.raises(Full) as caught:
                queue.put_many([3, 4], timeout=0.05)
            assert caught.value.count == 0
            assert queue.get(timeout=10) == 1
            with pytest.raises(Full) as caught:
                queue.put_many([3, 4], timeout=0.05)
            assert caught.value.count == 1
            assert taken_from(queue, 2) == [2, 3]
            assert queue.empty()
            assert Empty is standard_queue.Empty
            assert Full is standard_queue.Full

    def test_a_blocked_put_goes_on_when_there_is_room(self, backend):
        with backend.Queue(1) as queue:
            queue.put("first")
            thread = threading.Thread(target=queue.put, args=("second",))
            thread.start()
            wait_for(asleep(thread), what="the producer to sleep")
            assert queue.get(timeout=10) == "first"
            assert queue.get(timeout=10) == "second"
            thread.join(10)

    def test_unbounded_put_never_waits(self, backend):
        with backend.Queue() as queue:
            for _ in range(200):
                queue.put_nowait(bytes(100_000))  # which would raise, had it to wait
            assert queue.qsize() == 200
            for _ in range(200):  # or a thread of the fallback would hold the rest
                queue.get(timeout=60)

    def test_through_process_arguments(self, backend, start_method):
        context = multiprocessing.get_context(start_method)
        with backend.Queue(ctx=context) as tasks, backend.Queue(ctx=context) as results:
            with (
                run_in_process(_square, tasks, results, method=start_method) as one,
                run_in_process(_square, tasks, results, method=start_method) as two,
            ):
                tasks.put_many([*range(500), -1, -1])
                taken = dict(results.get(timeout=60) for _ in range(500))
                one.join(60)
                two.join(60)
                assert (one.exitcode, two.exitcode) == (0, 0)
            assert taken == {i: i * i for i in range(500)}

    def test_a_started_interpreter_has_the_back_end_of_its_parent(self, backend):
        context = multiprocessing.get_context("spawn")
        with (
            backend.Queue(ctx=context) as queue,
            run_in_process(_say_back_end, queue, method="spawn"),
        ):
            assert queue.get(timeout=60) == (os.environ["SHMRING_BACKEND"], backend.__name__)

    def test_to_a_grandchild(self, backend):
        context = multiprocessing.get_context("spawn")
        with (
            backend.Queue(ctx=context) as queue,
            run_in_process(_start_grandchild, queue, method="spawn") as child,
        ):
            assert queue.get(timeout=60) == "from a grandchild"
            child.join(60)
            assert child.exitcode == 0

    def test_bytes_codec_carries_bytes(self, backend):
        with backend.Queue(codec="bytes") as queue:
            for data in (b"x", bytearray(b"y"), memoryview(b"z"), np.arange(1000)):
                queue.put(data)
            assert taken_from(queue, 4) == [b"x", b"y", b"z", np.arange(1000).tobytes()]
            with pytest.raises(EncodeError, match="dict"):
                queue.put({})

    def test_msgpack_codec(self, backend):
        with backend.Queue(codec="msgpack") as queue:
            queue.put({"a": [1, 2.5, None, "ü"], "b": b"raw"})
            assert queue.get(timeout=10) == {"a": [1, 2.5, None, "ü"], "b": b"raw"}
            with pytest.raises(EncodeError, match="object"):
                queue.put(object())
            queue.put(b"bytes are encoded as well")
            assert queue.get(timeout=10) == b"bytes are encoded as well"

    def test_a_codec_of_ones_own(self, backend, start_method):
        with (
            backend.Queue(codec=Reversed(), ctx=multiprocessing.get_context(start_method)) as queue,
            run_in_process(queue.put, b"abc", method=start_method),
        ):
            assert queue.get(timeout=60) == b"abc"

    def test_a_codec_with_more_methods_than_asked_for(self, backend):
        with backend.Queue(codec=Both()) as queue:
            queue.put(b"abc")
            assert queue.get(timeout=10) == b"abc"

    def test_a_codec_that_returns_text(self, backend):
        with backend.Queue(codec=json) as queue, pytest.raises(EncodeError, match="returned a str"):
            queue.put({"a": 1})

    def test_an_unknown_codec(self, backend):
        for bad in ("json", 5, None):
            with pytest.raises(InvalidArgument, match="codec"):
                backend.Queue(codec=bad)

    @pytest.mark.parametrize("many", [False, True])
    def test_what_was_put_is_not_kept_alive(self, queue, many):
        gc.disable()  # reference counts alone must free it
        try:
            carried = Carried()
            watched = weakref.ref(carried)
            if many:
                queue.put_many([carried])
            else:
                queue.put(carried)
            PickleCodec().encode(carried)
            del carried
            assert watched() is None
        finally:
            gc.enable()

    def test_what_cannot_be_pickled_raises_in_put_and_names_the_part(self, queue):
        with pytest.raises(EncodeError, match=r"Carrier.*\.part \(a lock\)"):
            queue.put(Carrier(threading.Lock()))
        with pytest.raises(EncodeError, match="function"):
            queue.put_many([1, lambda: None])
        assert queue.empty()
        queue.put("still works")
        assert queue.get(timeout=10) == "still works"
        assert issubclass(EncodeError, pickle.PicklingError)

    def test_what_cannot_be_unpickled_raises_in_get_and_takes_only_itself(self, queue):
        queue.put_many([1, Grudging(), 2])
        assert queue.get(timeout=10) == 1
        with pytest.raises(DecodeError, match=r"bytes was taken.*KeyError") as caught:
            queue.get()
        assert isinstance(caught.value.__cause__, KeyError)
        assert queue.get(timeout=10) == 2
        queue.put_many([1, Grudging(), 2])
        taken = []
        with pytest.raises(DecodeError) as caught:
            _take_into(taken, queue)
        taken += caught.value.items
        taken += taken_from(queue, 2 - len(taken))  # what it left there
        assert taken == [1, 2]
        assert queue.empty()

    def test_an_object_that_puts_while_it_is_being_pickled(self, queue):
        queue.put(_PutsItself(queue))
        assert sorted(taken_from(queue, 2), key=str) == ["from __reduce__", "rebuilt"]

    @pytest.mark.parametrize("maxsize", ["3", 1.5, None])
    def test_maxsize_of_the_wrong_type(self, backend, maxsize):
        with pytest.raises(TypeError, match="maxsize"):
            backend.Queue(maxsize)

    def test_impossible_sizes(self, backend):
        with pytest.raises(InvalidArgument, match="maxsize=1180591620717411303424"):
            backend.Queue(1 << 70)
        with backend.Queue(-5) as unbounded:
            unbounded.put(1)
            assert unbounded.get(timeout=10) == 1

    @pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
    def test_one_that_is_dropped_open_says_so(self, backend, kind):
        dropped = [getattr(backend, kind)()]
        dropped[0].put(1)
        with pytest.warns(ResourceWarning, match="dropped open"):
            dropped.clear()

    def test_use_after_close(self, queue):
        queue.put(1)
        queue.close()
        queue.close()
        queue.join_thread()
        for call in (lambda: queue.put(1), queue.get, queue.qsize, queue.empty, queue.full):
            for kind in (ValueError, OSError):  # the standard library has the one or the other
                with pytest.raises(kind, match="closed"):
                    call()

    def test_shutdown(self, queue):
        queue.put(1)
        queue.shutdown()
        with pytest.raises(ShutDown):
            queue.put(2)
        assert queue.get(timeout=10) == 1
        with pytest.raises(ShutDown):
            queue.get()
        if hasattr(standard_queue, "ShutDown"):
            assert ShutDown is standard_queue.ShutDown

    def test_shutdown_wakes_waiters(self, queue):
        told = []

        def wait():
            try:
                queue.get()
            except ShutDown as error:
                told.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        wait_for(asleep(thread), what="the consumer to sleep")
        queue.shutdown(immediate=True)
        thread.join(10)
        assert told

    def test_joinable(self, backend):
        with backend.JoinableQueue() as queue:
            queue.put_many(range(3))
            assert not queue.join(timeout=0.01)
            worker = threading.Thread(
                target=lambda: [(queue.get(), queue.task_done()) for _ in range(3)]
            )
            worker.start()
            queue.join()
            worker.join(10)
            with pytest.raises(ValueError, match="too many"):
                queue.task_done()

    def test_simple(self, backend):
        with backend.SimpleQueue() as queue:
            assert queue.empty()
            queue.put([1])
            wait_for(lambda: not queue.empty())
            assert queue.get() == [1]
            with pytest.raises(EncodeError):
                queue.put(lambda: None)
        with pytest.raises(RingClosed):
            queue.get()

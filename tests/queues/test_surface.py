"""The surface of the standard library's queues, beyond what CPython's own tests ask for."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import pickle
import queue as standard_queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shmring import (
    HighPerformanceIPC,
    InvalidArgument,
    JoinableQueue,
    Queue,
    Ring,
    RingNotFound,
    SharedMemoryManager,
    ShutDown,
    SimpleQueue,
    get_context,
    wait,
)
from shmring.errors import Empty, Full
from support import own_name, run_in_process, wait_for

# ---- types ---------------------------------------------------------------------------------


def test_is_an_instance_of_what_it_replaces() -> None:
    with Queue[Any]() as plain, JoinableQueue[Any]() as joinable, SimpleQueue[Any]() as simple:
        stock = multiprocessing.queues
        kinds = (stock.Queue, stock.JoinableQueue, stock.SimpleQueue)
        assert [isinstance(plain, kind) for kind in kinds] == [True, False, False]
        assert [isinstance(joinable, kind) for kind in kinds] == [True, True, False]
        assert [isinstance(simple, kind) for kind in kinds] == [False, False, True]
        assert isinstance(joinable, Queue)
        for each in (plain, joinable, simple):
            assert not hasattr(each, "_reader")  # no program is led to a pipe


@pytest.mark.parametrize("name", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_has_every_public_name_of_what_it_replaces(name: str) -> None:
    stock, ours = getattr(multiprocessing.queues, name), globals()[name]
    for each in vars(stock) | vars(stock.__mro__[1]):
        if not each.startswith("_"):
            implemented = next(cls for cls in ours.__mro__ if each in vars(cls))
            assert not implemented.__module__.startswith("multiprocessing"), each


def test_constructor_arguments() -> None:
    ctx = multiprocessing.get_context("spawn")
    for made in (
        Queue(),
        Queue(3),
        Queue(maxsize=3, ctx=ctx),
        Queue(-1),
        JoinableQueue(3, ctx=ctx),
        SimpleQueue(ctx=ctx),
    ):
        made.put(1)
        assert made.get() == 1
        made.close()
    with pytest.raises(TypeError):
        Queue(3, ctx)  # keyword only, as theirs
    with pytest.raises(TypeError):
        SimpleQueue(3)


class Counting(Queue[Any]):
    """As programs extend multiprocessing.Queue: something of their own travels along."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, ctx=multiprocessing.get_context(), **kwargs)
        self.counts: Queue[int] = Queue()
        self.local = threading.Lock()  # cannot travel

    def __getstate__(self) -> Any:
        return {"parent": super().__getstate__(), "counts": self.counts}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state["parent"])
        self.counts = state["counts"]

    def put(self, *args: Any, **kwargs: Any) -> None:
        super().put(*args, **kwargs)
        self.counts.put(1)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self.counts.get()
        return super().get(*args, **kwargs)


class Labelled(JoinableQueue[Any]):
    """Attributes, and nothing said about pickling."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label
        self.unpicklable = threading.Lock()


def _put_two(queue: Queue[Any]) -> None:
    queue.put(type(queue).__name__)
    queue.put_nowait(2)


def test_a_subclass_that_extends_what_travels(start_method: str) -> None:
    with Counting(5) as queue:
        with run_in_process(_put_two, queue, method=start_method) as child:
            child.join(60)
        assert queue.counts.qsize() == 2  # put_nowait goes through an overridden put,
        assert queue.get() == "Counting"
        assert queue.get_nowait() == 2
        assert queue.counts.empty()  # and get_nowait through an overridden get
        queue.counts.close()


def test_a_subclass_with_attributes_of_its_own(start_method: str) -> None:
    with Labelled("mine") as queue:
        with run_in_process(_put_two, queue, method=start_method) as child:
            assert queue.get(timeout=60) == "Labelled"
            child.join(60)
        assert queue.get(timeout=10) == 2
        assert queue.label == "mine"
        copy = pickle.loads(pickle.dumps(queue))
        assert type(copy) is Labelled
        assert not hasattr(copy, "label")  # as in the standard library
        copy.close()


class Shadowing(JoinableQueue[Any]):
    """With attributes whose names ours have, and theirs have not."""

    def __init__(self) -> None:
        super().__init__(5)
        self.name = "shadowing"
        self.capacity = self.max_capacity = self.largest = 5
        self.closed = True

    def fileno(self) -> int:
        raise OSError("no pipe")

    def __getstate__(self) -> Any:
        return vars(self)["name"], super().__getstate__()

    def __setstate__(self, state: Any) -> None:
        name, ours = state
        super().__setstate__(ours)
        self.name = name


def _put_name(queue: Queue[Any]) -> None:
    queue.put(queue.name)


def test_a_subclass_may_use_names_of_ours(start_method: str) -> None:
    with Shadowing() as queue:
        with run_in_process(_put_name, queue, method=start_method) as child:
            assert queue.get(timeout=60) == "shadowing"
            child.join(60)
        queue.task_done()
        copy = pickle.loads(pickle.dumps(queue))
        copy.put(copy.name)
        copy.closed = False
        copy.close()
        assert queue.get_nowait() == "shadowing"
        assert queue.capacity == 5
        assert "anonymous" not in repr(queue)
    with pytest.raises(ValueError, match="is closed"):
        queue.put(1)
    name = own_name("surface")
    with Queue[int](name=name) as plain:
        assert plain.name == name
        assert plain.capacity <= plain.max_capacity
        assert not plain.closed
    assert plain.closed


# ---- arguments -----------------------------------------------------------------------------


def test_the_exceptions_are_those_of_the_queue_module() -> None:
    assert (Empty, Full) == (standard_queue.Empty, standard_queue.Full)
    assert getattr(standard_queue, "ShutDown", ShutDown) is ShutDown


def _timed_calls(queue: Any, timeout: float) -> dict[str, Callable[[], object]]:
    """Every way of waiting, on a queue that is full, or was and has a task unfinished."""
    me = [os.getppid()]
    return {
        "get": lambda: queue.get(timeout=timeout),
        "get, peers": lambda: queue.get(timeout=timeout, peers=me),
        "get_many": lambda: queue.get_many(timeout=timeout),
        "put": lambda: queue.put(1, True, timeout),
        "put, peers": lambda: queue.put(1, True, timeout, peers=me),
        "put_many": lambda: queue.put_many([2], timeout=timeout),
        "join": lambda: queue.join(timeout),
        "join, peers": lambda: queue.join(timeout, peers=me),
        "wait": lambda: wait([queue], timeout),
        "wait, pipe": lambda: wait([queue, *multiprocessing.Pipe()], timeout),
    }


@pytest.mark.both_backends
@pytest.mark.parametrize("timeout", [-1, -0.001, float("-inf"), -(10**12)])
def test_a_deadline_that_has_passed_is_a_timeout_of_0(timeout: float) -> None:
    """As multiprocessing.Queue has it: ``get(timeout=deadline - time.monotonic())``."""
    with JoinableQueue[int](1) as queue:
        calls = _timed_calls(queue, timeout)
        for name in ("get", "get, peers", "get_many"):
            with pytest.raises(Empty):
                calls[name]()
        assert calls["wait"]() == calls["wait, pipe"]() == []
        calls["put"]()
        for name in ("put", "put, peers", "put_many"):
            with pytest.raises(Full):
                calls[name]()
        assert calls["join"]() is calls["join, peers"]() is False
        wait_for(lambda: calls["wait"]() == [queue])
        assert calls["get"]() == 1
        queue.task_done()
        assert calls["join"]() is True


@pytest.mark.both_backends
@pytest.mark.parametrize("name", sorted(_timed_calls(None, 0)))
def test_a_timeout_that_is_no_number_is_an_error(name: str) -> None:
    with JoinableQueue[int]() as queue:
        with pytest.raises(InvalidArgument, match="timeout=nan"):
            _timed_calls(queue, float("nan"))[name]()
        assert queue.empty()


@pytest.mark.parametrize("kind", [Queue, Ring])
def test_attaching_takes_a_deadline_that_has_passed(kind: Any) -> None:
    with pytest.raises(RingNotFound):
        kind.attach(own_name("nothing"), -1)
    with pytest.raises(InvalidArgument, match="timeout=nan"):
        kind.attach(own_name("nothing"), float("nan"))


class Fickle:
    """An integer that answers 1 when asked first, and 64 from then on."""

    asked = 0

    def __index__(self) -> int:
        self.asked += 1
        return 1 if self.asked == 1 else 64


def _with_queue(call: Callable[[Queue[int]], object]) -> None:
    with Queue[int]() as queue:
        queue.put_many([0] * 3)
        wait_for(lambda: not queue.empty())
        call(queue)
        while not queue.empty():
            queue.get()


def _with_memory(call: Callable[[SharedMemoryManager], object]) -> None:
    with SharedMemoryManager(own_name("fickle"), 1) as memory:
        assert memory.create()
        call(memory)


def _create_memory(size: Any) -> None:
    with SharedMemoryManager(own_name("fickle"), size) as memory:
        assert memory.create()
        assert memory.size == 1
        with pytest.raises(InvalidArgument):
            memory.read_data(2)


def _make_queue(**arguments: Any) -> None:
    Queue[int](**arguments).close()


def _make_ring(**arguments: Any) -> None:
    with Ring.create(**arguments) as ring:
        assert ring.capacity == 4096


def _take_one(queue: Queue[int], max_items: Any) -> None:
    assert queue.get_many(max_items) == [0]


def _reserve(nbytes: Any) -> None:
    with Ring.create(4096) as ring:
        with ring.reserve(nbytes) as view:
            assert len(memoryview(view)) == 1
        assert len(ring.get()) == 1


def _take_one_message(max_items: Any) -> None:
    with Ring.create() as ring:
        ring.put_many([b"a", b"b"])
        assert ring.get_many(max_items) == [b"a"]


def _fill(queue_of_one: Queue[int]) -> None:
    with queue_of_one as queue:
        queue.put(1)
        with pytest.raises(Full):
            queue.put(2, timeout=0)
        assert queue.get(timeout=10) == 1


def _with_ipc(call: Callable[[HighPerformanceIPC], object]) -> None:
    with HighPerformanceIPC("fickle", namespace=own_name("fickle")) as ipc:
        ipc.create_shared_memory("m", 1)
        call(ipc)


def _past_the_end(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        call()


@pytest.mark.parametrize(
    "use",
    [
        *(
            pytest.param(use, id=name, marks=pytest.mark.both_backends)
            for name, use in {
                "Queue.maxsize": lambda n: _fill(Queue(n)),
                "Queue.max_capacity": lambda n: _make_queue(max_capacity=n),
                "JoinableQueue.maxsize": lambda n: _fill(JoinableQueue(n)),
                "context.Queue.maxsize": lambda n: _fill(get_context().Queue(n)),
                "Queue.get_many": lambda n: _with_queue(lambda q: _take_one(q, n)),
                "memory.size": _create_memory,
                "read_data.length": lambda n: _with_memory(
                    lambda m: m.read_data(n) == bytes(1) or pytest.fail("not the byte")
                ),
                "read_data.offset": lambda n: _with_memory(lambda m: m.read_data(0, n)),
                "write_data.offset": lambda n: _with_memory(
                    lambda m: _past_the_end(lambda: m.write_data(b"x", n))
                ),
                "as_array.offset": lambda n: _with_memory(lambda m: m.as_array("u1", 0, n)),
                "as_array.shape": lambda n: _with_memory(
                    lambda m: m.as_array("u1", n).shape == (1,) or pytest.fail("not the shape")
                ),
                "as_array.side": lambda n: _with_memory(lambda m: m.as_array("u1", (n, 0))),
                "ipc.maxsize": lambda n: _with_ipc(lambda i: i.create_message_queue("q", n)),
                "ipc.size": lambda n: _with_ipc(lambda i: i.create_shared_memory("n", n)),
                "ipc.connect.size": lambda n: _with_ipc(lambda i: i.connect_shared_memory("m", n)),
                "ipc.length": lambda n: _with_ipc(lambda i: i.read_shared_data("m", n)),
                "ipc.read.offset": lambda n: _with_ipc(lambda i: i.read_shared_data("m", 0, n)),
                "ipc.write.offset": lambda n: _with_ipc(
                    lambda i: _past_the_end(lambda: i.write_shared_data("m", b"x", n))
                ),
            }.items()
        ),
        *(
            pytest.param(use, id=name)
            for name, use in {
                "Ring.capacity": lambda n: _make_ring(capacity=n),
                "Ring.max_capacity": lambda n: _past_the_end(lambda: Ring.create(max_capacity=n)),
                "Ring.get_many": _take_one_message,
                "Ring.reserve": _reserve,
            }.items()
        ),
    ],
)
@pytest.mark.fault(50)
def test_an_integer_is_asked_for_its_value_once(use: Callable[[Any], object]) -> None:
    number = Fickle()
    use(number)
    assert number.asked == 1


@pytest.mark.parametrize("kind", [Queue, JoinableQueue])
def test_a_queue_closed_before_use_is_empty(kind: type[Queue[Any]]) -> None:
    queue = kind()
    queue.close()
    assert queue.empty()
    for call in (queue.get, lambda: queue.put(1)):
        with pytest.raises(ValueError, match="is closed"):
            call()
    queue.join_thread()
    queue.cancel_join_thread()


def test_a_closed_simple_queue_raises_os_error() -> None:
    queue: SimpleQueue[int] = SimpleQueue()
    queue.close()
    queue.close()
    for call in (queue.get, lambda: queue.put(1), queue.empty):
        with pytest.raises(OSError, match="is closed"):
            call()


def test_close_affects_this_handle_only() -> None:
    with Queue[int]() as queue:
        copy = pickle.loads(pickle.dumps(queue))
        copy.put(1)
        copy.close()
        assert queue.get() == 1


# ---- shutdown ------------------------------------------------------------------------------


def _outcome(call: Callable[[], object], outcomes: Queue[str]) -> None:
    try:
        outcomes.put(f"returned {call()}")
    except BaseException as error:
        outcomes.put(type(error).__name__)


def _outcome_of_get(queue: Queue[Any], outcomes: Queue[str]) -> None:
    _outcome(queue.get, outcomes)


def _outcome_of_put(queue: Queue[Any], outcomes: Queue[str]) -> None:
    _outcome(lambda: queue.put("late"), outcomes)


@pytest.mark.parametrize("immediate", [False, True])
def test_shutdown_wakes_the_waiting_of_other_processes(immediate: bool) -> None:
    with Queue[str]() as outcomes:
        with Queue[Any]() as queue, run_in_process(_outcome_of_get, queue, outcomes):
            wait_for(lambda: queue.statistics().consumers_waiting)
            queue.shutdown(immediate)
            assert outcomes.get(timeout=30) == "ShutDown"
        with Queue[Any](1) as queue:
            queue.put("first")
            with run_in_process(_outcome_of_put, queue, outcomes):
                wait_for(lambda: queue.statistics().producers_waiting)
                queue.shutdown(immediate)
                assert outcomes.get(timeout=30) == "ShutDown"
                if not immediate:
                    assert queue.get() == "first"
            for call in (queue.get, queue.get_nowait, lambda: queue.get(timeout=1)):
                with pytest.raises(ShutDown):
                    call()


def test_shutdown_lets_every_object_be_taken_and_worked_off() -> None:
    with JoinableQueue[int]() as queue:
        queue.put_many([1, 2])
        queue.shutdown()
        queue.shutdown()
        assert queue.qsize() == 2
        assert not queue.join(timeout=0.01)
        assert queue.get_many() == [1, 2]
        queue.task_done()
        assert not queue.join(timeout=0.01)
        queue.task_done()
        assert queue.join(timeout=10)
        with pytest.raises(ShutDown):
            queue.put(3)


def test_immediate_shutdown_counts_the_rest_as_worked_off_but_not_what_was_taken() -> None:
    with JoinableQueue[int](4) as queue, Queue[str]() as outcomes:
        queue.put_many([1, 2, 3, 4])
        assert queue.get() == 1
        assert queue.get() == 2
        joiner = threading.Thread(target=_outcome, args=(queue.join, outcomes))
        joiner.start()
        queue.shutdown(immediate=True)
        queue.shutdown(immediate=False)  # is no way back
        assert (queue.qsize(), queue.empty(), queue.full()) == (0, True, False)
        with pytest.raises(ShutDown):
            queue.get()
        queue.task_done()
        assert not queue.join(timeout=0.01)
        assert outcomes.empty()
        queue.task_done()
        assert outcomes.get(timeout=10) == "returned True"
        joiner.join(10)
        with pytest.raises(ValueError, match="too many"):
            queue.task_done()


def test_immediate_shutdown_frees_a_joiner_with_nothing_taken(start_method: str) -> None:
    with JoinableQueue[int]() as queue, Queue[str]() as outcomes:
        queue.put_many(range(10))
        with run_in_process(_join, queue, outcomes, method=start_method) as child:
            assert outcomes.get(timeout=60) == "here"
            queue.shutdown(immediate=True)
            assert outcomes.get(timeout=30) == "returned True"
            child.join(30)


def _join(queue: JoinableQueue[int], outcomes: Queue[str]) -> None:
    outcomes.put("here")
    _outcome(queue.join, outcomes)


# ---- pickling ------------------------------------------------------------------------------


def test_a_queue_that_is_gone_before_it_arrives() -> None:
    with Queue[Any]() as outer:
        with Queue[Any]() as inner:
            outer.put(inner)
        with pytest.raises(RingNotFound, match="keeps its handle open"):
            outer.get().get_nowait()
        outer.put("goes on")
        assert outer.get() == "goes on"

"""The surface of the standard library's queues, beyond what CPython's own tests ask for."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import pickle
import queue as standard_queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shmring import InvalidArgument, JoinableQueue, Queue, RingNotFound, ShutDown, SimpleQueue
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
            assert not hasattr(each, "_reader")  # nobody is led to a pipe


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


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_an_impossible_timeout_is_an_error_as_in_queue_dot_queue(timeout: float) -> None:
    """multiprocessing.Queue takes what is below 0 for 0, which hides mistakes."""
    with Queue[int]() as queue:
        queue.put(1)
        for call in (
            lambda: queue.get(timeout=timeout),
            lambda: queue.get_many(timeout=timeout),
            lambda: queue.put(1, True, timeout),
            lambda: queue.put_many([2], timeout=timeout),
        ):
            with pytest.raises(InvalidArgument, match="timeout"):
                call()
        assert queue.get_many() == [1]


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


def test_immediate_shutdown_frees_who_joins_with_nothing_taken(start_method: str) -> None:
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

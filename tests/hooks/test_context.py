"""A context with our queues, and our queues beside what keeps the standard library's."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.context
import multiprocessing.managers
import multiprocessing.pool
import multiprocessing.queues
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

import shmring
from shmring import JoinableQueue, Queue, SimpleQueue


@pytest.fixture
def ctx(start_method: str) -> Any:
    return shmring.get_context(start_method)


@pytest.fixture
def queue(ctx: Any) -> Iterator[Queue[Any]]:
    with ctx.Queue() as made:
        yield made


# ---- what it is ----------------------------------------------------------------------------


@pytest.mark.both_backends
def test_the_queues_are_ours_and_the_rest_is_multiprocessings(ctx: Any) -> None:
    stock = multiprocessing.get_context(ctx.get_start_method())
    with (
        ctx.Queue(3) as queue,
        ctx.JoinableQueue(maxsize=3) as joinable,
        ctx.SimpleQueue() as simple,
    ):
        assert [type(each) for each in (queue, joinable, simple)] == [
            Queue,
            JoinableQueue,
            SimpleQueue,
        ]
        queue.put_many([1, 2, 3])
        assert queue.full()
    assert isinstance(ctx, type(stock))
    assert isinstance(ctx, multiprocessing.context.BaseContext)
    assert ctx.Process is stock.Process
    assert type(ctx.Lock()) is type(stock.Lock())
    replaced = {"Queue", "JoinableQueue", "SimpleQueue", "Pool", "get_context", "stock"}
    for name in set(dir(stock)) - replaced:
        if not name.startswith("_"):
            found, expected = getattr(ctx, name), getattr(stock, name)
            assert getattr(found, "__func__", found) == getattr(expected, "__func__", expected)


def test_options_of_ours_are_taken(ctx: Any) -> None:
    with ctx.Queue(codec="bytes") as queue:
        queue.put(bytearray(b"raw"))
        assert queue.get() == b"raw"


@pytest.mark.both_backends
def test_there_is_one_for_each_start_method(ctx: Any) -> None:
    assert shmring.get_context(ctx.get_start_method()) is ctx
    assert ctx.get_context() is ctx
    assert ctx.get_context("spawn") is shmring.get_context("spawn")
    assert pickle.loads(pickle.dumps(ctx)) is ctx
    assert shmring.get_context().get_start_method() == multiprocessing.get_start_method()
    with pytest.raises(ValueError, match="threads"):
        shmring.get_context("threads")
    with pytest.raises(ValueError, match="start method"):
        ctx.set_start_method("spawn")


def _double(inbox: Queue[int], outbox: JoinableQueue[int]) -> None:
    for number in iter(inbox.get, None):
        outbox.put(2 * number)


@pytest.mark.both_backends
def test_processes_of_the_context_use_them(ctx: Any) -> None:
    with ctx.Queue() as inbox, ctx.JoinableQueue() as outbox:
        worker = ctx.Process(target=_double, args=(inbox, outbox))
        worker.start()
        inbox.put_many([1, 2, 3, None])
        assert sorted(outbox.get(timeout=60) for _ in range(3)) == [2, 4, 6]
        for _ in range(3):
            outbox.task_done()
        outbox.join()
        worker.join(60)
        assert worker.exitcode == 0


# ---- pools ---------------------------------------------------------------------------------

_given: Any = None


def _keep(queue: Queue[Any]) -> None:
    global _given
    _given = queue


def _put_in_given(number: int) -> int:
    _given.put(number)
    return -number


def _put_in(queue: Queue[Any], number: int) -> int:
    queue.put(number)
    return -number


def _made_with_new(ctx: Any) -> str:
    with ctx.Queue() as queue:
        queue.put(os.getpid())
        assert queue.get() == os.getpid()
        return type(queue).__module__


def test_a_pool(ctx: Any, queue: Queue[Any]) -> None:
    with ctx.Pool(2, initializer=_keep, initargs=(queue,)) as pool:
        assert pool.map(_put_in_given, range(20)) == [-number for number in range(20)]
        assert sorted(queue.get(timeout=60) for _ in range(20)) == list(range(20))
        assert pool.apply(_put_in, (queue, 7)) == -7
        assert queue.get(timeout=60) == 7
        assert pool.apply(_made_with_new, (ctx,)) == "shmring.queues.queue"
        pool.close()
        pool.join()


def test_a_pool_that_is_given_the_context(ctx: Any, queue: Queue[Any]) -> None:
    with multiprocessing.pool.Pool(1, context=ctx) as pool:
        assert type(pool._inqueue) is multiprocessing.queues.SimpleQueue
        assert pool.starmap(_put_in, [(queue, 1), (queue, 2)]) == [-1, -2]
        pool.close()
        pool.join()
    assert [queue.get(timeout=10), queue.get(timeout=10)] == [1, 2]


def test_concurrent_futures(ctx: Any, queue: Queue[Any]) -> None:
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=ctx, initializer=_keep, initargs=(queue,)
    ) as pool:
        assert list(pool.map(_put_in_given, range(20))) == [-number for number in range(20)]
        assert sorted(queue.get(timeout=60) for _ in range(20)) == list(range(20))
        assert pool.submit(_put_in, queue, 7).result(60) == -7
        assert queue.get(timeout=60) == 7


def test_a_manager(ctx: Any, queue: Queue[Any]) -> None:
    with ctx.Manager() as manager:
        theirs = manager.Queue()
        theirs.put(queue)
        shared = manager.dict(queue=queue)
        for through in (theirs.get(), shared["queue"]):
            through.put("through the manager")
            through.close()
            assert queue.get(timeout=60) == "through the manager"


def _answer_in_what_comes(stock: Any) -> None:
    with stock.get() as queue:
        queue.put(os.getpid())


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue", "ours"])
def test_through_another_queue(ctx: Any, queue: Queue[Any], kind: str) -> None:
    carrier = ctx.Queue() if kind == "ours" else getattr(ctx.stock, kind)()
    child = ctx.Process(target=_answer_in_what_comes, args=(carrier,))
    child.start()
    carrier.put(queue)
    assert queue.get(timeout=60) == child.pid
    child.join(60)
    assert child.exitcode == 0
    carrier.close()

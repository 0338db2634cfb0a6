"""Programs written for faster-fifo: what its documents show, run on both packages."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import time
from types import ModuleType
from typing import Any

import pytest

import shmring
from support import at_least, run_in_process

CONTENT = {"a": 42, "b": 33, "c": (1, 2, 3), "d": [1, 2, 3], "e": "123", "f": b"kkk"}


@pytest.fixture(params=["shmring.faster_fifo", "faster_fifo"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = pytest.importorskip(request.param)
    return module


def test_an_object_comes_back(package: ModuleType) -> None:
    queue = package.Queue(1000 * 1000)
    queue.put(CONTENT)
    assert queue.qsize() == 1
    assert queue.get() == CONTENT
    assert queue.empty()
    queue.put_nowait(CONTENT)
    assert queue.get_nowait() == CONTENT


def test_many_go_and_come_together(package: ModuleType) -> None:
    queue = package.Queue(max_size_bytes=100_000)
    queue.put_many([CONTENT] * 60, timeout=1)
    queue.put_many_nowait([CONTENT] * 40)
    received = queue.get_many(max_messages_to_get=7)
    assert 1 <= len(received) <= 7
    while len(received) < 99:
        received += queue.get_many(max_messages_to_get=99 - len(received), timeout=1)
    received += queue.get_many_nowait(max_messages_to_get=100)
    assert received == [CONTENT] * 100


def fill(queue: Any) -> None:
    for _ in range(1000):
        queue.put(CONTENT, timeout=0.05)


def test_full_and_empty_are_those_of_queue(package: ModuleType) -> None:
    queue = package.Queue(max_size_bytes=5000)
    assert not queue.full()
    with pytest.raises(package.Full), at_least(0.05):
        fill(queue)
    with pytest.raises(package.Full):
        queue.put_nowait(CONTENT)
    with pytest.raises(package.Full):
        queue.put_many([CONTENT], block=False)
    assert queue.full() or package.__name__ == "faster_fifo"  # which counts otherwise
    while not queue.empty():
        queue.get_many()
    with pytest.raises(package.Empty), at_least(0.05):
        queue.get(timeout=0.05)
    for get in (queue.get_nowait, queue.get_many_nowait):
        with pytest.raises(package.Empty):
            get()


def as_json(obj: Any) -> bytes:
    return json.dumps(obj).encode()


def from_json(data: Any) -> Any:
    return json.loads(bytes(data))


def test_a_serializer_of_the_program(package: ModuleType) -> None:
    class Lines(package.Queue):  # type: ignore[misc, name-defined]
        def dumps(self, obj: Any) -> bytes:
            return as_json([obj])

        def loads(self, data: Any) -> Any:
            return from_json(data)[0]

    for queue in (package.Queue(100_000, loads=from_json, dumps=as_json), Lines(100_000)):
        queue.put({"a": (1, 2)})
        assert queue.get() == {"a": [1, 2]}


def produce(queue: Any, count: int) -> None:
    for number in range(count):
        queue.put((number,) * 5, timeout=10)


def consume(package: str, queue: Any, total: Any) -> None:
    """Until the queue is closed and empty, as its documents recommend."""
    empty = importlib.import_module(package).Empty
    while True:
        try:
            received = queue.get_many(timeout=0.05, max_messages_to_get=100)
        except empty:
            if queue.is_closed():
                return
            continue
        with total.get_lock():
            total.value += len(received)


def test_processes_share_a_queue_until_it_is_closed(package: ModuleType, start_method: str) -> None:
    context = multiprocessing.get_context(start_method)
    queue, total = package.Queue(100_000), context.Value("i", 0)
    producers = [context.Process(target=produce, args=(queue, 500)) for _ in range(3)]
    consumers = [
        context.Process(target=consume, args=(package.__name__, queue, total)) for _ in range(2)
    ]
    for process in producers + consumers:
        process.start()
    for process in producers:
        process.join()
    queue.close()
    assert queue.is_closed()
    for process in consumers:
        process.join()
    assert total.value == 1500
    queue.join_thread()
    queue.cancel_join_thread()


# ---- what faster-fifo does not promise ---------------------------------------------------


def put_for_ever(queue: Any) -> None:
    while True:
        queue.put(CONTENT)


@pytest.mark.skipif(shmring.backend != "ring", reason="a killed process blocks a pipe")
def test_a_killed_producer_does_not_block_the_others() -> None:
    from shmring.faster_fifo import Queue

    queue = Queue(10_000)
    for _ in range(5):
        with run_in_process(put_for_ever, queue) as child:
            assert queue.get() == CONTENT
            os.kill(child.pid or 0, signal.SIGKILL)
        while not queue.empty():
            queue.get_many()
    began = time.monotonic()
    queue.put("last")
    assert queue.get() == "last"
    assert time.monotonic() - began < 5


@pytest.mark.skipif(shmring.backend != "ring", reason="a pipe has no bound in bytes")
def test_what_can_never_fit_is_said_at_once() -> None:
    from shmring.faster_fifo import Queue

    with pytest.raises(shmring.MessageTooLarge):
        Queue(5000).put(bytes(100_000))

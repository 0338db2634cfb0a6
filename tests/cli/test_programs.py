"""Programs as people write them around a queue, with ours in its place."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from shmring import JoinableQueue, Queue, SimpleQueue
from support import left_since, run_in_process, shared_memory_names, wait_for

PATIENCE = 60  # seconds, for whatever a spawned child has to do first


@contextlib.contextmanager
def running(
    method: str, count: int, target: Callable[..., object], *args: object
) -> Iterator[list[BaseProcess]]:
    """So many children, told their number; all must have ended well at the end."""
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(run_in_process(target, number, *args, method=method))
            for number in range(count)
        ]
        yield children
        for child in children:
            child.join(PATIENCE)
        assert [child.exitcode for child in children] == [0] * count


# ---- logging: the cookbook's "logging to a single file from multiple processes" -------------


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _log(number: int, queue: Queue[object], lines: int) -> None:
    logger = logging.getLogger(f"worker.{number}")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    logger.addHandler(logging.handlers.QueueHandler(queue))
    for line in range(lines):
        logger.log(random.choice([logging.INFO, logging.ERROR]), "line %d of %s", line, {"a": 1})
    try:
        raise KeyError(number)
    except KeyError:
        logger.exception("caught, with something that cannot travel: %s", lambda: None)


def test_logging_through_queue_handler_and_listener(start_method):
    kept = Kept()
    with Queue() as queue:
        listener = logging.handlers.QueueListener(queue, kept)
        listener.start()
        with running(start_method, 3, _log, queue, 200):
            pass
        listener.stop()
    assert len(kept.records) == 3 * 201
    for number in range(3):
        mine = [r for r in kept.records if r.name == f"worker.{number}"]
        assert [r.getMessage() for r in mine[:-1]] == [
            f"line {i} of {{'a': 1}}" for i in range(200)
        ]
        assert "caught" in mine[-1].getMessage()
        assert f"KeyError: {number}" in mine[-1].getMessage()
        assert len({r.process for r in mine}) == 1


# ---- a pool of workers: the documentation's example -----------------------------------------


def _worker(_: int, tasks: Queue[object], done: Queue[object]) -> None:
    for function, args in iter(tasks.get, "STOP"):
        done.put(_calculate(function, args))


def _calculate(function: Callable[..., int], args: tuple[int, int]) -> str:
    name = multiprocessing.current_process().name
    return f"{name} says that {function.__name__}{args} = {function(*args)}"


def _mul(a: int, b: int) -> int:
    return a * b


def _plus(a: int, b: int) -> int:
    return a + b


def test_the_pool_of_the_documentation(start_method):
    tasks_1 = [(_mul, (i, 7)) for i in range(20)]
    tasks_2 = [(_plus, (i, 8)) for i in range(10)]
    with Queue() as tasks, Queue() as done:
        for task in tasks_1:
            tasks.put(task)
        with running(start_method, 4, _worker, tasks, done):
            answers = [done.get(timeout=PATIENCE) for _ in tasks_1]
            for task in tasks_2:
                tasks.put(task)
            answers += [done.get(timeout=PATIENCE) for _ in tasks_2]
            for _ in range(4):
                tasks.put("STOP")
        assert done.empty()
    said = sorted(answer.split(" says that ")[1] for answer in answers)
    assert said == sorted(f"{f.__name__}{a} = {f(*a)}" for f, a in tasks_1 + tasks_2)


class Consumer(multiprocessing.Process):
    """A Process that carries its queues as attributes."""

    def __init__(self, tasks: JoinableQueue[object], results: SimpleQueue[object]) -> None:
        super().__init__()
        self.tasks = tasks
        self.results = results

    def run(self) -> None:
        while (task := self.tasks.get()) is not None:
            self.results.put(task * task)
            self.tasks.task_done()
        self.tasks.task_done()


def test_processes_that_own_their_queues():
    with JoinableQueue() as tasks, SimpleQueue() as results:
        consumers = [Consumer(tasks, results) for _ in range(2)]
        for consumer in consumers:
            consumer.start()
        try:
            for number in range(100):
                tasks.put(number)
            for _ in consumers:
                tasks.put(None)
            assert tasks.join(timeout=PATIENCE)
            assert sorted(results.get() for _ in range(100)) == [i * i for i in range(100)]
            assert results.empty()
        finally:
            for consumer in consumers:
                consumer.join(PATIENCE)
                consumer.kill()
        assert [consumer.exitcode for consumer in consumers] == [0, 0]


# ---- a pipeline -----------------------------------------------------------------------------


def _read(_: int, lines: JoinableQueue[object], count: int, readers: int) -> None:
    for number in range(count):
        lines.put(f"line {number} " * (number % 50))
    for _each in range(readers):
        lines.put(None)


def _parse(_: int, lines: JoinableQueue[object], words: JoinableQueue[object]) -> None:
    for line in iter(lines.get, None):
        words.put(line.split())
        lines.task_done()
    lines.task_done()
    words.put(None)


def _count(_: int, words: JoinableQueue[object], total: Queue[object], parsers: int) -> None:
    counted = 0
    while parsers:
        found = words.get()
        if found is None:
            parsers -= 1
        else:
            counted += len(found)
        words.task_done()
    total.put(counted)


@pytest.mark.parametrize("maxsize", [0, 3])
def test_a_pipeline_of_three_stages(start_method, maxsize):
    count, parsers = 2000, 2
    with JoinableQueue(maxsize) as lines, JoinableQueue(maxsize) as words, Queue() as total:
        with (
            running(start_method, 1, _read, lines, count, parsers),
            running(start_method, parsers, _parse, lines, words),
            running(start_method, 1, _count, words, total, parsers),
        ):
            assert total.get(timeout=PATIENCE) == sum(2 * (i % 50) for i in range(count))
        assert lines.join(timeout=1)
        assert words.join(timeout=1)
        assert lines.empty()
        assert words.empty()


# ---- a data loader --------------------------------------------------------------------------


def _sample(index: int) -> dict[str, object]:
    made = np.random.default_rng(index)
    return {
        "image": made.integers(0, 256, (256, 1024, 4), dtype="u1").view("f4")[..., 0],
        "boxes": made.random((index % 5, 4)),
        "label": index,
        "path": f"images/{index:06}.jpg",
    }


def _collate(samples: list[dict[str, object]]) -> dict[str, object]:
    return {
        "image": np.stack([sample["image"] for sample in samples]),
        "boxes": [sample["boxes"] for sample in samples],
        "label": np.array([sample["label"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
    }


def _load(_: int, indices: Queue[object], batches: Queue[object]) -> None:
    for number, chosen in iter(indices.get, None):
        batches.put((number, _collate([_sample(index) for index in chosen])))


def test_a_data_loader_with_batches_of_8_mib(start_method):
    workers, ahead, batch_size, count = 2, 4, 8, 8
    order = random.Random(1).sample(range(count * batch_size), count * batch_size)
    chosen = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with Queue() as indices, Queue(ahead) as batches:
        with running(start_method, workers, _load, indices, batches):
            for number in range(ahead):
                indices.put((number, chosen[number]))
            early: dict[int, dict[str, object]] = {}
            for number in range(count):  # in order, whichever worker was first
                while number not in early:
                    at, batch = batches.get(timeout=PATIENCE)
                    early[at] = batch
                if number + ahead < count:
                    indices.put((number + ahead, chosen[number + ahead]))
                batch = early.pop(number)
                expected = _collate([_sample(index) for index in chosen[number]])
                assert batch["image"].nbytes == 8 << 20
                assert batch["image"].tobytes() == expected["image"].tobytes()
                assert batch["label"].tolist() == chosen[number]
                assert batch["path"] == expected["path"]
                assert all(map(np.array_equal, batch["boxes"], expected["boxes"]))
                for array in (batch["image"], batch["label"], *batch["boxes"]):
                    assert array.flags.writeable
                batch["image"][:] = 0  # augmented in place
            for _ in range(workers):
                indices.put(None)
        assert batches.empty()


# ---- where queues are made, and how far they go ---------------------------------------------

AT_IMPORT = """
import multiprocessing, sys
from shmring import JoinableQueue, Queue, SimpleQueue

tasks = JoinableQueue()  # a spawned child makes its own on import, and is given these
answers = Queue()
simple = SimpleQueue()

class Service:
    queue = Queue(5)  # in the body of a class

def work(tasks, answers, simple, inner):
    for task in iter(tasks.get, None):
        answers.put(task + 1)
        tasks.task_done()
    tasks.task_done()
    simple.put(inner.get(timeout=60))

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    child = context.Process(target=work, args=(tasks, answers, simple, Service.queue))
    child.start()
    Service.queue.put("inner")
    for i in range(100):
        tasks.put(i)
    tasks.put(None)
    assert tasks.join(timeout=60)
    assert [answers.get(timeout=60) for _ in range(100)] == [*range(1, 101)]
    assert simple.get() == "inner"
    child.join(60)
    assert child.exitcode == 0
"""


def test_queues_made_at_import_time(start_method, tmp_path):
    before = shared_memory_names()
    program = tmp_path / "program.py"
    program.write_text(AT_IMPORT)
    done = subprocess.run(
        [sys.executable, str(program), start_method],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert left_since(before) == []


def _generation(depth: int, method: str, down: Queue[object], up: Queue[object]) -> None:
    up.put((depth, os.getpid(), down.get(timeout=PATIENCE)))
    if depth:
        child = multiprocessing.get_context(method).Process(
            target=_generation, args=(depth - 1, method, down, up)
        )
        child.start()
        child.join(PATIENCE)
        assert child.exitcode == 0


def test_grandchildren(start_method):
    with Queue() as down, Queue() as up:
        with run_in_process(_generation, 2, start_method, down, up, method=start_method) as child:
            down.put_many(["a", "b", "c"])
            told = [up.get(timeout=PATIENCE) for _ in range(3)]
            child.join(PATIENCE)
            assert child.exitcode == 0
        assert [depth for depth, _, _ in told] == [2, 1, 0]
        assert [message for _, _, message in told] == ["a", "b", "c"]
        assert len({pid for _, pid, _ in told}) == 3


def _start_and_leave(method: str, queue: Queue[object]) -> None:
    multiprocessing.get_context(method).Process(target=_after, args=(os.getpid(), queue)).start()
    os._exit(0)  # without waiting, as a daemon's launcher does


def _after(parent: int, queue: Queue[object]) -> None:
    queue.put("started")
    wait_for(lambda: os.getppid() != parent)
    queue.put("orphaned")


def test_a_grandchild_that_outlives_its_parent():
    with Queue() as queue:
        with run_in_process(_start_and_leave, "fork", queue) as child:
            child.join(PATIENCE)
        assert queue.get(timeout=PATIENCE) == "started"
        assert queue.get(timeout=PATIENCE) == "orphaned"


# ---- before the first get ------------------------------------------------------------------


def _put_all(number: int, queue: Queue[object], count: int) -> None:
    for i in range(count):
        queue.put({"from": number, "i": i})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_200_000_messages_are_put_before_the_first_get(method):
    with Queue() as queue:
        with running(method, 1, _put_all, queue, 200_000) as [child]:
            child.join(PATIENCE)
            assert child.exitcode == 0  # gone, and nothing was read
            assert queue.qsize() == 200_000
        for i in range(200_000):
            assert queue.get(timeout=PATIENCE) == {"from": 0, "i": i}
        assert queue.empty()


def _put_large(number: int, queue: Queue[object]) -> None:
    queue.put((number, np.full(1 << 20, number)))


@pytest.mark.parametrize(
    ("make", "method"),
    [(Queue, "spawn"), (JoinableQueue, "forkserver"), (SimpleQueue, "fork"), (Queue, "fork")],
)
def test_a_parent_that_joins_before_it_reads(make, method):
    """The deadlock that the standard library's documentation warns of."""
    with make() as queue:
        with running(method, 3, _put_large, queue) as children:
            for child in children:
                child.join(PATIENCE)
        taken = dict(queue.get() for _ in range(3))
        assert {number: int(array.sum()) for number, array in taken.items()} == {
            number: number << 20 for number in range(3)
        }


def test_a_program_ends_with_its_queue_full():
    """No process reads; the interpreter does not wait for one."""
    program = (
        "from shmring import Queue\n"
        "queue = Queue()\n"
        "for _ in range(100): queue.put(bytes(1 << 20))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

"""Executor on Dask: a scheduler and two workers on loopback, some of which are killed."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_tasks import note, note_and_wait, square

import shmring
from shmring import EncodeError, InvalidArgument, SchedulerNotFound, WorkerDied
from support import wait_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("distributed")

# Without Dask's nannies, whose semaphores stand in /dev/shm as long as they live.
PROGRAM = """
import asyncio, sys
from distributed import Scheduler

async def keep_a_worker(address):
    command = "-m distributed.cli.dask_worker --no-nanny --nthreads 1 --no-dashboard".split()
    while True:
        worker = await asyncio.create_subprocess_exec(sys.executable, *command, address)
        try:
            await worker.wait()
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()

async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        async with asyncio.TaskGroup() as workers:
            kept = [
                workers.create_task(keep_a_worker(scheduler.address))
                for _ in range(int(sys.argv[1]))
            ]
            print(scheduler.address, flush=True)
            await asyncio.to_thread(sys.stdin.read)
            for each in kept:
                each.cancel()

asyncio.run(main())
"""


@contextlib.contextmanager
def started(workers: int, folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A scheduler, its address, and the program in which it runs."""
    here = Path(__file__).parent
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(workers)],
        env={
            **os.environ,
            "PYTHONPATH": f"{here}:{here.parent}",
            "DASK_TEMPORARY_DIRECTORY": str(folder),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        yield program.stdout.readline().strip(), program
    finally:
        program.stdin.close()
        program.stdout.close()
        try:
            program.wait(30)
        finally:
            program.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(2, tmp_path_factory.mktemp("dask")) as (address, _):
        yield address


@pytest.fixture
def cluster(address: str) -> Iterator[Any]:
    with shmring.executor(address) as opened:
        yield opened


# ---- what the workers of these tests do --------------------------------------------------------


def die_once(folder: Path, deadly: set[int], number: int) -> int:
    note(folder, number)
    if number in deadly and (folder / str(number)).read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_at(folder: Path, deadly: int, number: int) -> int:
    note(folder, number)
    if number == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    if number == 3:
        raise KeyError(number)
    return number


def frame_of(number: int) -> Any:
    return sys._getframe()


# ---- results -----------------------------------------------------------------------------------


def test_the_calls_are_those_of_the_local_pool(cluster: Any) -> None:
    base = 10
    squares = [n * n for n in range(20)]
    assert cluster.submit(lambda n, more: n + base + more, 1, more=100).result(60) == 111
    assert list(cluster.map(square, range(20))) == squares
    assert list(cluster.map(square, range(20), chunksize=7, buffersize=1, timeout=60)) == squares
    assert list(cluster.map(pow, range(9), range(9), chunksize=4)) == [n**n for n in range(9)]
    assert sorted(cluster.map_unordered(square, range(20))) == squares
    for size in (10, 1 << 16):
        array = np.arange(size)
        assert np.array_equal(cluster.submit(np.negative, array).result(60), -array)
    counts = cluster.statistics()
    assert counts.submitted == counts.answered
    assert (counts.waiting, counts.retried, counts.died) == (0, 0, 0)


@pytest.mark.parametrize("chunksize", [1, 5])
def test_what_a_task_raises_arrives_with_its_traceback(cluster: Any, chunksize: int) -> None:
    results = cluster.map(fail, range(5), chunksize=chunksize)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError) as raised:
        next(results)
    assert "raise KeyError(number)" in str(raised.value.__cause__)


def test_what_cannot_be_pickled_fails_its_task_alone(cluster: Any) -> None:
    with pytest.raises(EncodeError, match="the result cannot be pickled"):
        cluster.submit(frame_of, 1).result(60)
    with pytest.raises(EncodeError, match="square"):
        cluster.submit(square, sys._getframe()).result(60)
    assert cluster.submit(square, 3).result(60) == 9


# ---- killed workers ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 4])
def test_what_a_killed_worker_was_at_runs_again(
    cluster: Any, tmp_path: Path, chunksize: int
) -> None:
    task = functools.partial(die_once, tmp_path, {5})
    assert list(cluster.map(task, range(12), chunksize=chunksize, timeout=60)) == list(range(12))
    assert (tmp_path / "5").read_text() == "xx"
    assert cluster.statistics().died >= 1


def test_a_task_that_kills_its_workers_fails_alone(cluster: Any, tmp_path: Path) -> None:
    pool = cluster.options(retries=1)
    task = functools.partial(die_at, tmp_path, 3)
    results = pool.map(task, range(5), chunksize=5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(WorkerDied, match=r"after 2 attempt\(s\)") as died:
        next(results)
    assert isinstance(died.value, BrokenProcessPool)
    assert died.value.pid > 0
    assert (tmp_path / "3").read_text() == "xx"
    assert cluster.submit(square, 3).result(60) == 9


def test_without_retries_no_task_begins_twice(cluster: Any, tmp_path: Path) -> None:
    pool = cluster.options(retries=0)
    task = functools.partial(die_at, tmp_path, 1)
    with pytest.raises(WorkerDied, match=r"after 1 attempt\(s\)"):
        list(pool.map(task, range(3), chunksize=3))
    cluster.shutdown()
    assert {each.read_text() for each in tmp_path.iterdir()} == {"x"}


# ---- the end -----------------------------------------------------------------------------------


def test_shutdown_cancels_what_no_worker_has(cluster: Any, tmp_path: Path) -> None:
    wait_for(lambda: cluster._max_workers == 2, 60, "the worker that replaces a killed one")
    task = functools.partial(note_and_wait, tmp_path)
    futures = [cluster.submit(task, number) for number in range(20)]
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 60)
    assert not futures[0].cancel()
    assert futures[19].cancel()
    cluster.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="after shutdown"):
        cluster.submit(square, 1)
    (tmp_path / "go").touch()
    cluster.shutdown()
    done = {each.result() for each in futures if not each.cancelled()}
    assert {0, 1} <= done
    assert len(done) < 10


def test_a_lost_scheduler_fails_what_is_open(tmp_path: Path) -> None:
    with (
        started(0, tmp_path) as (address, program),
        shmring.executor(address, connect_timeout=1) as cluster,
    ):
        future = cluster.submit(square, 3)
        program.kill()
        with pytest.raises(SchedulerNotFound, match=address):
            future.result(60)


def test_an_address_where_no_scheduler_answers_is_named() -> None:
    begun = time.monotonic()
    with pytest.raises(SchedulerNotFound, match=r"tcp://127\.0\.0\.1:1: .*after 0\.2 s"):
        shmring.executor("tcp://127.0.0.1:1", connect_timeout=0.2)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("address", ["lokal", "foo://host:1", 5])
def test_what_is_no_address_is_refused(address: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"\"local\", or the address of a Dask scheduler"):
        shmring.executor(address)


@pytest.mark.skipif(shmring.backend != "ring", reason="a pipe cannot carry a pool")
def test_local_is_the_pool_of_this_machine() -> None:
    with shmring.executor("local", max_workers=1) as pool:
        assert type(pool) is shmring.ProcessPoolExecutor
        assert pool.submit(square, 3).result(60) == 9

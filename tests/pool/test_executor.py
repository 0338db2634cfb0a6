"""ProcessPoolExecutor: futures that are answered once, whatever dies, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import copyreg
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pool_tasks import (
    die_at,
    die_once,
    log_something,
    note,
    note_and_wait,
    square,
    start_child_and_wait,
)

import shmring
from shmring import (
    DecodeError,
    EncodeError,
    InvalidArgument,
    MemoryExceeded,
    ProcessPoolExecutor,
    RegistryEntry,
    RemoteError,
    TaskTimeout,
    WorkerDied,
    share,
)
from support import wait_for

pytestmark = pytest.mark.skipif(shmring.backend != "ring", reason="a pipe cannot carry a pool")


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as opened:
        yield opened
    assert multiprocessing.active_children() == []


def times_begun(folder: Path) -> dict[int, int]:
    return {int(each.name): len(each.read_text()) for each in folder.iterdir()}


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def number_in(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text(), 30)
    return int(path.read_text())


def run_program(text: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 7, 100])
def test_map_gives_results_in_order(pool: ProcessPoolExecutor, chunksize: int) -> None:
    assert list(pool.map(square, range(50), chunksize=chunksize)) == [n * n for n in range(50)]
    assert list(pool.map(pow, range(9), range(9), chunksize=chunksize)) == [n**n for n in range(9)]


def test_map_unordered_gives_every_result_once(pool: ProcessPoolExecutor) -> None:
    assert sorted(pool.map_unordered(square, range(5000))) == [n * n for n in range(5000)]


def test_map_unordered_reads_an_endless_iterable_as_results_are_taken(
    pool: ProcessPoolExecutor,
) -> None:
    read = []

    def endless() -> Iterator[int]:
        while True:
            read.append(len(read))
            yield read[-1]

    results = pool.map_unordered(square, endless(), chunksize=2, buffersize=3)
    for _ in range(10):
        next(results)
        assert len(read) <= 10 + 2 + 2 * 3
    results.close()  # type: ignore[attr-defined]
    assert pool.submit(square, 3).result(30) == 9


def test_map_with_buffersize_reads_as_results_are_taken(pool: ProcessPoolExecutor) -> None:
    read = []
    results = pool.map(square, (read.append(n) or n for n in range(100)), buffersize=4)
    assert len(read) == 4
    assert next(results) == 0
    assert len(read) == 5
    assert list(results) == [n * n for n in range(1, 100)]


def test_a_stream_that_is_closed_early_cancels_what_no_worker_has_taken(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    task = functools.partial(note_and_wait, tmp_path)
    results = pool.map(task, range(20))
    wait_for(lambda: len(times_begun(tmp_path)) == 2)
    del results
    (tmp_path / "go").touch()
    pool.shutdown()
    (tmp_path / "go").unlink()
    assert len(times_begun(tmp_path)) <= 4


def test_progress_is_told(pool: ProcessPoolExecutor) -> None:
    told: list[tuple[int, int | None]] = []
    work = pool.map_unordered(square, range(10), chunksize=5, progress=lambda *at: told.append(at))
    assert len(list(work)) == 10
    assert told == [(5, 10), (10, 10)]


@pytest.mark.parametrize("nbytes", [0, 1 << 10, 1 << 20, 1 << 24])
def test_arrays_go_there_and_back(pool: ProcessPoolExecutor, nbytes: int) -> None:
    sent = np.arange(nbytes // 4, dtype=np.float32)
    came = pool.submit(np.negative, sent).result(30)
    assert np.array_equal(came, -sent)
    assert came.flags.writeable or nbytes == 0


def test_a_future_works_with_waiters_of_every_kind(pool: ProcessPoolExecutor) -> None:
    called: list[int] = []
    work = [pool.submit(square, n) for n in range(20)]
    for each in work:
        each.add_done_callback(lambda done: called.append(done.result()))
    assert not futures.wait(work, 30).not_done
    assert {each.result() for each in futures.as_completed(work)} == {n * n for n in range(20)}
    wait_for(lambda: len(called) == 20)
    work[0].add_done_callback(lambda done: called.append(-1))
    assert called[-1] == -1


def test_many_threads_submit_and_wait(pool: ProcessPoolExecutor) -> None:
    wrong: list[int] = []

    def work(start: int) -> None:
        for number in range(start, start + 200):
            if pool.submit(square, number).result(60) != number * number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n * 1000,)) for n in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert wrong == []


def test_it_serves_run_in_executor(pool: ProcessPoolExecutor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(pool, square, n) for n in range(50)))

    assert asyncio.run(main()) == [n * n for n in range(50)]


def pool_within(number: int) -> int:
    with ProcessPoolExecutor(1) as inner:
        return inner.submit(square, number).result(60)


def test_a_worker_may_have_a_pool_of_its_own(start_method: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context(start_method)) as pool:
        assert pool.submit(pool_within, 7).result(60) == 49


# ---- failures ----------------------------------------------------------------------------------


class Unfriendly(Exception):
    """Can be pickled, and not unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("only one")


class RaisesWhenLoaded:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit(3)",)


def raises(error: type[BaseException], *args: Any) -> None:
    raise error(*args)


def make(what: type) -> Any:
    return what()


def give_back_a_lambda() -> Any:
    return lambda: 1


@pytest.fixture
def forget_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of distributed, where another test imported it: it teaches pickle to carry exceptions."""
    monkeypatch.delitem(copyreg.dispatch_table, Unfriendly, raising=False)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ((raises, ValueError, 7), ValueError, "7"),
        ((raises, Unfriendly, 1, 2), RemoteError, "Unfriendly: only one"),
        ((raises, SystemExit, 5), SystemExit, "5"),
        ((raises, KeyboardInterrupt), KeyboardInterrupt, None),
        ((give_back_a_lambda,), EncodeError, "lambda"),
        ((make, RaisesWhenLoaded), DecodeError, "SystemExit"),
        ((square, RaisesWhenLoaded()), DecodeError, "SystemExit"),
        ((square, give_back_a_lambda()), EncodeError, "lambda"),
        ((give_back_a_lambda(),), EncodeError, "lambda"),
    ],
    ids=[
        "raises",
        "raises what cannot be unpickled",
        "exits",
        "interrupts",
        "a result that cannot be pickled",
        "a result that cannot be unpickled",
        "an argument that cannot be unpickled",
        "an argument that cannot be pickled",
        "a function that cannot be pickled",
    ],
)
def test_a_failure_costs_its_own_task_only(
    forget_reducer: None,
    pool: ProcessPoolExecutor,
    call: Any,
    error: type[BaseException],
    text: str | None,
) -> None:
    before, failing, after = pool.submit(square, 2), pool.submit(*call), pool.submit(square, 3)
    with pytest.raises(error, match=text):
        failing.result(30)
    assert (before.result(30), after.result(30)) == (4, 9)
    assert pool.statistics().died == 0


def test_an_exception_brings_its_remote_traceback(pool: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="7") as caught:
        pool.submit(raises, ValueError, 7).result(30)
    assert "raise error(*args)" in str(caught.value.__cause__)


def test_a_call_of_a_chunk_that_raises_comes_after_the_results_before_it(
    pool: ProcessPoolExecutor,
) -> None:
    results = pool.map(divmod, [4] * 6, [1, 2, 4, 0, 1, 2], chunksize=6)
    assert [next(results) for _ in range(3)] == [(4, 0), (2, 0), (1, 0)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def initialize(what: str) -> None:
    if what == "linger":
        threading.Thread(target=time.sleep, args=(60,)).start()
    if what != "exit":
        raise ValueError("no such luck")
    os._exit(4)


@pytest.mark.parametrize(
    ("what", "text"), [("raise", "no such luck"), ("linger", "no such luck"), ("exit", r"\[4\]")]
)
def test_a_pool_that_cannot_start_is_broken_and_says_why(what: str, text: str) -> None:
    with ProcessPoolExecutor(2, initializer=initialize, initargs=(what,)) as pool:
        first = pool.submit(square, 2)
        with pytest.raises(BrokenProcessPool, match=text):
            first.result(60)
        with pytest.raises(BrokenProcessPool, match=text):
            pool.submit(square, 2)


# ---- workers that die --------------------------------------------------------------------------


@pytest.mark.fault(12)
def test_of_a_killed_worker_exactly_its_own_task_runs_again(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Two run, four wait in the queue; one of the two workers is killed."""
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(6)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    os.kill(next(iter(pool._processes)), signal.SIGKILL)
    wait_for(lambda: sum(times_begun(tmp_path).values()) == 3, 30)
    (tmp_path / "go").touch()
    assert [each.result(30) for each in work] == list(range(6))
    (tmp_path / "go").unlink()
    assert sorted(times_begun(tmp_path).values()) == [1, 1, 1, 1, 1, 2]
    statistics = pool.statistics()
    assert (statistics.retried, statistics.died) == (1, 1)


@pytest.mark.fault(12)
@pytest.mark.parametrize("chunksize", [1, 10])
@pytest.mark.parametrize("retries", [0, 2])
def test_a_deadly_call_fails_alone(
    pool: ProcessPoolExecutor, tmp_path: Path, chunksize: int, retries: int
) -> None:
    task = functools.partial(die_at, 13, tmp_path)
    results = pool.options(retries=retries).map(task, range(30), chunksize=chunksize)
    assert [next(results) for _ in range(13)] == list(range(13))
    with pytest.raises(WorkerDied) as caught:
        next(results)
    assert isinstance(caught.value, BrokenProcessPool)
    assert (caught.value.exitcode, caught.value.attempts) == (3, retries + 1)
    pool.shutdown()
    begun = times_begun(tmp_path)
    assert begun.pop(13) == retries + 1
    if retries == 0:
        assert set(begun.values()) == {1}, "at most once"


@pytest.mark.fault(12)
def test_all_workers_killed_at_once_lose_nothing(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(20)]
    for killing in range(4):  # tasks that only stand in the queue are not charged
        wait_for(lambda: sum(times_begun(tmp_path).values()) >= 2 * killing + 2, 30)  # noqa: B023
        if killing < 2:
            for pid in list(pool._processes):
                os.kill(pid, signal.SIGKILL)
        else:
            break
    (tmp_path / "go").touch()
    assert [each.result(30) for each in work] == list(range(20))


@pytest.mark.fault(12)
@pytest.mark.parametrize("chunksize", [1, 16])
def test_a_random_worker_killed_again_and_again_costs_no_result(
    pool: ProcessPoolExecutor, chunksize: int
) -> None:
    rng = random.Random(7)
    stop = threading.Event()
    killed = 0

    def kill() -> None:
        nonlocal killed
        while not stop.wait(0.02):
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(list(pool._processes)), signal.SIGKILL)
                killed += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        patient = pool.options(retries=1000)
        rounds = 0
        while killed < 20:
            results = list(patient.map(square, range(1000), chunksize=chunksize))
            assert results == [n * n for n in range(1000)]
            rounds += 1
    finally:
        stop.set()
        killer.join(30)
    assert rounds > 0


@pytest.mark.fault(12)
def test_an_idle_worker_that_is_killed_is_replaced(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(square, 2).result(30) == 4
    (first, second) = pool._processes
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: first not in pool._processes, 30)
    assert [each.result(30) for each in [pool.submit(square, n) for n in range(9)]][8] == 64
    assert second in pool._processes


@pytest.mark.fault(12)
def test_a_worker_that_vanishes_before_it_is_killed_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = multiprocessing.get_context("forkserver")  # which reaps it
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(square, 2).result(60) == 4
        workers = pool._manager.workers
        (seen,) = workers.living()

        def vanish() -> list[RegistryEntry]:
            os.kill(seen.pid, signal.SIGKILL)
            wait_for(lambda: not Path(f"/proc/{seen.pid}").exists(), 30)
            return [seen]

        monkeypatch.setattr(workers, "_entries", vanish)
        assert not workers.signal(seen, signal.SIGKILL)
        monkeypatch.undo()


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.fault(49)
@pytest.mark.parametrize("chunksize", [1, 5])
def test_only_the_call_that_takes_too_long_fails_and_what_it_started_ends(
    tmp_path: Path, chunksize: int
) -> None:
    # The initializer has imported this module before the first task's time runs.
    begin = {"initializer": square, "initargs": (0,)}
    with ProcessPoolExecutor(1, task_timeout=3, max_retries=0, **begin) as pool:
        results = pool.map(start_or_square, [(tmp_path, n) for n in range(5)], chunksize=chunksize)
        assert [next(results) for _ in range(3)] == [0, 1, 4]
        with pytest.raises(TaskTimeout, match="task_timeout=3 s"):
            next(results)
        child = number_in(tmp_path / "child")
        wait_for(lambda: not is_alive(child), 10)
        assert pool.submit(square, 9).result(30) == 81


def start_or_square(task: tuple[Path, int]) -> int:
    folder, number = task
    if number == 3:
        start_child_and_wait(folder)
    return square(number)


def grow(nbytes: int, folder: Path) -> int:
    data = np.ones(nbytes, np.uint8)
    wait_for((folder / "go").exists, 60)
    return int(data[0])


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_a_call_that_outgrows_the_limit_fails_with_the_figure(tmp_path: Path) -> None:
    # Not this process's own: files that it has mapped are not resident in what it forks.
    with ProcessPoolExecutor(1) as pool:
        limit = pool.submit(resident).result(30) + (80 << 20)
    with ProcessPoolExecutor(1, max_memory_per_worker=limit) as pool:
        with pytest.raises(MemoryExceeded) as caught:
            pool.submit(grow, 160 << 20, tmp_path).result(60)
        assert caught.value.nbytes > caught.value.limit == limit
        assert pool.submit(square, 3).result(30) == 9


def keep(nbytes: int) -> int:
    globals().setdefault("kept", []).append(np.ones(nbytes, np.uint8))
    return os.getpid()


def test_a_worker_above_the_limit_is_replaced_between_two_tasks() -> None:
    with ProcessPoolExecutor(1, max_memory_per_worker=1 << 20) as pool:
        pool._manager.dispatcher.memory_limit = None  # only what the worker itself does
        first = pool.submit(keep, 1 << 20).result(60)
        wait_for(lambda: pool.submit(keep, 1).result(60) != first, 30)
        assert pool.statistics().died == 0


def test_a_worker_is_replaced_after_max_tasks_per_child() -> None:
    with ProcessPoolExecutor(1, max_tasks_per_child=3) as pool:
        pids = [each.result(60) for each in [pool.submit(os.getpid) for _ in range(7)]]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
        assert pool.statistics().died == 0


def wait_and_note_the_end(folder: Path) -> None:
    note(folder, 0)
    try:
        wait_for((folder / "go").exists, 60)
    finally:
        (folder / "1").write_text("x")


def stay(folder: Path) -> None:
    note(folder, 0)
    while True:
        with contextlib.suppress(BaseException):
            wait_for((folder / "go").exists, 60)


@pytest.mark.parametrize("task", [wait_and_note_the_end, stay])
def test_a_running_task_can_be_cancelled(
    pool: ProcessPoolExecutor, tmp_path: Path, task: Any
) -> None:
    running = pool.submit(task, tmp_path)
    wait_for(lambda: times_begun(tmp_path), 30)
    assert running.running()
    assert not running.cancel()
    assert running.cancel_running(0.1)  # type: ignore[attr-defined]
    with pytest.raises(futures.CancelledError):
        running.result(30)
    assert (tmp_path / "1").exists() == (task is wait_and_note_the_end)
    assert pool.submit(square, 3).result(30) == 9


def test_what_no_worker_has_taken_can_be_cancelled_even_if_it_was_sent(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    running = [pool.submit(note_and_wait, tmp_path, number) for number in (0, 1)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    waiting = [pool.submit(note, tmp_path, number) for number in range(2, 12)]
    assert all(each.cancel() for each in waiting[::2])
    (tmp_path / "go").touch()
    assert [each.result(30) for each in running + waiting[1::2]] == [0, 1, 3, 5, 7, 9, 11]
    (tmp_path / "go").unlink()
    assert sorted(times_begun(tmp_path)) == [0, 1, 3, 5, 7, 9, 11]


# ---- shared arrays -----------------------------------------------------------------------------


def total(data: np.ndarray[Any, Any], factor: int) -> tuple[float, bool]:
    return float(data.sum()) * factor, data.flags.writeable


def test_a_shared_array_is_read_by_every_task(start_method: str) -> None:
    shared = share(np.arange(100_000.0))
    assert not shared.array.flags.writeable
    with ProcessPoolExecutor(2, multiprocessing.get_context(start_method)) as pool:
        work = [pool.submit(total, shared, n) for n in range(6)]
        assert [each.result(60) for each in work] == [
            (shared.array.sum() * n, False) for n in range(6)
        ]


def test_a_shared_array_whose_handle_is_gone_is_a_clear_error(pool: ProcessPoolExecutor) -> None:
    import pickle

    shared = share(np.ones(10))
    data = pickle.dumps(shared)
    del shared
    with pytest.raises(DecodeError, match="shared array is gone"):
        pool.submit(pickle.loads, data).result(30)
    with pytest.raises(InvalidArgument, match="Python objects"):
        share(np.array([object()]))


# ---- what goes on ------------------------------------------------------------------------------


def test_what_workers_log_arrives_with_their_name(
    start_method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context(start_method)) as pool:
        pool.submit(log_something).result(60)
        wait_for(lambda: "from the worker" in caplog.text, 30)
    (record,) = [each for each in caplog.records if each.name == "some.library"]
    assert record.processName == "shmring-worker-0"


def test_events_say_what_happened(tmp_path: Path) -> None:
    events: list[Any] = []
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, on_event=events.append) as pool:
        assert pool.submit(die_once, tmp_path, 0).result(30) == 0
    kinds = [(each.kind, each.worker, each.task) for each in events]
    assert kinds == [
        ("started", "shmring-worker-0", None),
        ("retried", "shmring-worker-0", 0),
        ("died", "shmring-worker-0", None),
        ("started", "shmring-worker-1", None),
    ]


def test_statistics_count_tasks_and_workers(pool: ProcessPoolExecutor) -> None:
    list(pool.map(square, range(30), chunksize=3))
    pool.shutdown()
    statistics = pool.statistics()
    assert (statistics.submitted, statistics.answered, statistics.waiting) == (10, 10, 0)
    assert sum(row.tasks for row in statistics.workers) == 30


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_workers": 0}, InvalidArgument, "max_workers=0"),
        ({"max_workers": 129}, InvalidArgument, "max_workers=129"),
        ({"initializer": 5}, TypeError, "initializer"),
        ({"on_event": 5}, TypeError, "on_event"),
        ({"max_tasks_per_child": 0}, InvalidArgument, "max_tasks_per_child=0"),
        ({"max_tasks_per_child": "1"}, TypeError, "max_tasks_per_child='1'"),
        ({"max_retries": -1}, InvalidArgument, "max_retries=-1"),
        ({"task_timeout": float("nan")}, InvalidArgument, "task_timeout=nan"),
        ({"max_memory_per_worker": 5}, InvalidArgument, "max_memory_per_worker=5"),
    ],
)
def test_an_impossible_argument_is_named(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ProcessPoolExecutor(**options)


def test_impossible_sizes_of_map_are_named(pool: ProcessPoolExecutor) -> None:
    with pytest.raises(InvalidArgument, match="chunksize=0"):
        pool.map(square, [1], chunksize=0)
    with pytest.raises(InvalidArgument, match="buffersize=0"):
        pool.map(square, [1], buffersize=0)
    with pytest.raises(TypeError, match="chunksize='big'"):
        pool.map_unordered(square, [1], chunksize="big")  # type: ignore[arg-type]


def test_a_function_that_spawn_cannot_find_is_a_clear_error() -> None:
    done = run_program(
        "import multiprocessing, shmring\n"
        "def here(): pass\n"
        "with shmring.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:\n"
        "    try:\n"
        "        pool.submit(here).result()\n"
        "    except shmring.DecodeError as error:\n"
        "        print(error)\n"
    )
    assert "the function of the task is not known in the worker" in done.stdout

"""ProcessPoolExecutor: callbacks, forks, races, dead workers, full memory, odd objects."""

from __future__ import annotations

import contextlib
import copyreg
import errno
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pool_tasks import (
    die_once,
    fork_and_die,
    log_something,
    note_and_wait,
    square,
    start_child_and_wait,
)
from test_executor import is_alive, number_in, pool, run_program, times_begun

import shmring
from shmring import ProcessPoolExecutor, RemoteError, SharedMemoryFull, WorkerDied
from shmring.tasks import workers
from support import asleep, wait_for, within

resource = pytest.importorskip("resource")

__all__ = ["pool"]

pytestmark = pytest.mark.skipif(shmring.backend != "ring", reason="a pipe cannot carry a pool")


# ---- futures -----------------------------------------------------------------------------------


def test_a_cancelled_future_can_be_cancelled_again(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    running = [pool.submit(note_and_wait, tmp_path, number) for number in (0, 1)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    waiting = pool.submit(square, 2)
    again: list[bool] = []
    waiting.add_done_callback(lambda done: again.append(done.cancel()))
    assert waiting.cancel()
    assert waiting.cancel()
    assert waiting.cancel_running()  # type: ignore[attr-defined]
    assert again == [True]
    assert futures.wait([waiting], 30).done
    (tmp_path / "go").touch()
    assert [each.result(30) for each in running] == [0, 1]


def die_of_interrupt(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    note_and_wait(folder, 0)


def test_a_task_whose_worker_dies_of_its_cancel_is_cancelled(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    running = pool.submit(die_of_interrupt, tmp_path)
    wait_for(lambda: times_begun(tmp_path), 30)
    assert running.cancel_running(30)  # type: ignore[attr-defined]
    with pytest.raises(futures.CancelledError):
        running.result(30)
    assert pool.submit(square, 3).result(30) == 9
    assert times_begun(tmp_path) == {0: 1}


@contextlib.contextmanager
def raising(signum: signal.Signals) -> Iterator[type[Exception]]:
    """A handler that raises, and what it raises."""

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signum, interrupt)
    try:
        yield Interrupted
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("how", ["cancel", "shutdown"])
def test_a_signal_handler_that_raises_in_a_cancel_loses_no_task(
    pool: ProcessPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(12)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    dispatcher = pool._manager.dispatcher
    recall = dispatcher.recall

    def recall_and_signal() -> None:
        recall()
        os.kill(os.getpid(), signal.SIGUSR1)
        if threading.current_thread() is threading.main_thread():
            wait_for(lambda: False, 1)  # the handler runs here

    monkeypatch.setattr(dispatcher, "recall", recall_and_signal)
    cancel = work[7].cancel if how == "cancel" else partial(pool.shutdown, cancel_futures=True)
    with raising(signal.SIGUSR1) as interrupted, pytest.raises(interrupted):
        cancel()
    (tmp_path / "go").touch()
    cancelled = {7} if how == "cancel" else set(range(2, 12))
    assert not futures.wait(work, 30).not_done
    pool.shutdown()
    assert {number for number, each in enumerate(work) if each.cancelled()} == cancelled
    assert {number for number in range(12) if (tmp_path / str(number)).exists()} == (
        {*range(12)} - cancelled
    )


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_as_a_worker_starts_leaves_no_worker_unknown(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread receives the signal, between the fork and the note of the process."""
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("fork"))
    enough = threading.Event()
    other = threading.Thread(target=enough.wait)
    other.start()
    receiver, sender = socket.socketpair()
    fork = os.fork

    def interrupted() -> int:
        pid = fork()
        if pid != 0:
            monkeypatch.undo()
            signal.pthread_kill(other.ident, signal.SIGINT)
            receiver.recv(1)  # the handler is about to run
        return pid

    with pool, receiver, sender:
        receiver.settimeout(10)
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno())
        try:
            monkeypatch.setattr(os, "fork", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.submit(square, 2)
        finally:
            signal.set_wakeup_fd(before)
            enough.set()
            other.join()
        known = {each.pid for each in multiprocessing.active_children()}
        assert set(pool._processes) == known != set()
        assert pool.submit(square, 3).result(30) == 9


def test_a_callback_that_exits_costs_no_other_task_its_result(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    called = threading.Event()
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(10)]
    for each in work:
        each.add_done_callback(lambda done: sys.exit(3))
        each.add_done_callback(lambda done: called.set())
    (tmp_path / "go").touch()
    assert [each.result(30) for each in work] == list(range(10))
    assert called.wait(30)


# ---- what cannot be unpickled ------------------------------------------------------------------


class LoadsElsewhere:
    """Can be unpickled in any process but one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __reduce__(self) -> Any:
        return load_elsewhere, (self.pid,)


def load_elsewhere(pid: int) -> int:
    if os.getpid() == pid:
        raise ValueError("not in this process")
    return pid


def log_with(parent: int) -> None:
    for level in range(10, 60, 10):
        logging.getLogger().log(level, "odd", extra={"odd": LoadsElsewhere(parent)})


def test_a_cancel_loses_no_task_whose_arguments_load_in_workers_only(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    running = [pool.submit(note_and_wait, tmp_path, number) for number in (0, 1)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    odd = [pool.submit(abs, LoadsElsewhere(os.getpid())) for _ in range(3)]
    waiting = pool.submit(square, 2)
    assert waiting.cancel()
    (tmp_path / "go").touch()
    assert [each.result(30) for each in running] == [0, 1]
    assert [each.result(30) for each in odd] == [os.getpid()] * 3


def test_a_log_record_that_does_not_arrive_costs_no_task_its_result() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        work = [pool.submit(log_with, os.getpid()), *(pool.submit(square, n) for n in range(60))]
        assert [each.exception(30) for each in work] == [None] * 61


def log_with_a_lock() -> None:
    logging.getLogger("some.library").warning("hold %s", "on", extra={"held": threading.Lock()})


def test_a_log_record_that_cannot_be_pickled_arrives_without_what_is_extra(
    pool: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    pool.submit(log_with_a_lock).result(30)
    wait_for(lambda: "hold on" in caplog.text, 30)
    (record,) = [each for each in caplog.records if each.name == "some.library"]
    assert (record.funcName, record.levelno) == ("log_with_a_lock", logging.WARNING)
    assert not hasattr(record, "held")


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} is frozen")


def raise_frozen() -> None:
    raise Frozen("cold")


def test_an_exception_whose_class_refuses_attributes_arrives(
    pool: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of distributed, where another test imported it: it teaches pickle to carry exceptions.
    monkeypatch.delitem(copyreg.dispatch_table, Frozen, raising=False)
    with pytest.raises(Frozen, match="cold") as caught:
        pool.submit(raise_frozen).result(30)
    assert "raise_frozen" in str(caught.value.__cause__)
    assert pool.submit(square, 3).result(30) == 9


# ---- on_event, log handlers --------------------------------------------------------------------


def test_on_event_may_raise(tmp_path: Path) -> None:
    seen: list[str] = []

    def fail(event: Any) -> None:
        seen.append(event.kind)
        raise ValueError(event.kind)

    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), on_event=fail) as pool:
        assert pool.submit(die_once, tmp_path, 0).result(30) == 0
    assert seen == ["started", "retried", "died", "started"]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_on_event_may_submit(tmp_path: Path, start_method: str) -> None:
    more: list[Any] = []

    def submit(event: Any) -> None:
        more.append(pool.submit(square, 3))

    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(2, context, on_event=submit) as pool:
        work = [pool.submit(die_once, tmp_path, number) for number in range(2)]
        assert [each.result(60) for each in work] == [0, 1]
        wait_for(lambda: len(more) >= 6, 30)  # two started, each retried, died, replaced
        assert {each.result(60) for each in more} == {9}
        pids = [row.pid for row in pool.statistics().workers]
    assert len(pids) == len(set(pids)) == 2 + pool.statistics().died


def test_a_log_filter_that_raises_costs_no_task_its_result() -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError("refused")

    logger = logging.getLogger("some.library")
    logger.addFilter(refuse)
    try:
        # Spawned: the filter is the parent's alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(log_something).result(60)
            assert pool.submit(square, 3).result(30) == 9
            assert not pool._broken
    finally:
        logger.removeFilter(refuse)


# ---- shutdown while others submit, forked children ---------------------------------------------


def test_a_task_that_was_taken_in_as_the_pool_shuts_down_is_done() -> None:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    start = pool._manager._start

    def shut_down_first(unanswered: int) -> None:
        pool._manager._start = start  # type: ignore[method-assign]
        pool.shutdown(wait=False)
        start(unanswered)

    pool._manager._start = shut_down_first  # type: ignore[method-assign]
    assert pool.submit(square, 3).result(30) == 9
    pool.shutdown()


def use_inherited(pool: ProcessPoolExecutor, work: list[Any], said: Any) -> None:
    stopped = [each.cancel() or each.cancel_running() for each in work]
    pool.shutdown(cancel_futures=True)
    pool.kill_workers()
    said.put((stopped, pool.statistics().workers))


def test_a_forked_child_takes_no_task_of_its_parent(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(6)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    context = multiprocessing.get_context("fork")
    with shmring.Queue[Any]() as said:
        # At the worst moment: the locks are held, by a thread that the child does not have.
        with pool._manager._start_lock, pool._manager.dispatcher.lock:
            child = context.Process(target=use_inherited, args=(pool, work, said))
            within(30, child.start)
        assert said.get(timeout=30) == ([False] * 6, ())
        child.join(30)
    (tmp_path / "go").touch()
    assert [each.result(30) for each in work] == list(range(6))


# ---- the end of a worker -----------------------------------------------------------------------


def test_a_dead_worker_is_noticed_while_what_it_forked_lives(
    start_method: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(1, context, max_retries=0) as pool:
        with pytest.raises(WorkerDied):
            pool.submit(fork_and_die, tmp_path).result(30)
        wait_for(lambda: not is_alive(number_in(tmp_path / "child")), 10)


def test_what_a_worker_started_ends_with_it_whatever_reaps_the_worker(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, max_retries=0) as pool:
        running = pool.submit(start_child_and_wait, tmp_path)
        child = number_in(tmp_path / "child")
        (worker,) = pool._processes
        with pool._manager.workers._lock:  # the pool reaps after multiprocessing
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: not multiprocessing.active_children(), 10)
        with pytest.raises(WorkerDied):
            running.result(30)
        wait_for(lambda: not is_alive(child), 10)


def test_statistics_can_be_read_while_workers_are_replaced(
    pool: ProcessPoolExecutor,
) -> None:
    failures: list[Exception] = []
    enough = threading.Event()

    def read() -> None:
        while not enough.is_set():
            try:
                pool.statistics()
            except Exception as error:
                failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    readers = [threading.Thread(target=read) for _ in range(3)]
    try:
        for each in readers:
            each.start()
        for _ in range(12):
            for pid in list(pool._processes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert pool.submit(square, 3).result(30) == 9
    finally:
        enough.set()
        for each in readers:
            each.join()
        sys.setswitchinterval(interval)
    assert failures == []


# ---- what does not fit into shared memory ------------------------------------------------------

SMALL, LARGE = 1 << 18, 8 << 20


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY))


def raise_large(nbytes: int) -> None:
    raise ValueError("x" * nbytes)


def test_a_result_without_room_fails_its_own_call_only() -> None:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, initializer=limit_files, max_retries=0) as pool:
        with pytest.raises(SharedMemoryFull):
            pool.submit(bytes, LARGE).result(30)
        with pytest.raises(RemoteError, match="the ValueError of the task"):
            pool.submit(raise_large, LARGE).result(30)
        results = pool.map(bytes, [1, 2, LARGE, 3], chunksize=4)
        assert [next(results), next(results)] == [bytes(1), bytes(2)]
        with pytest.raises(SharedMemoryFull):
            next(results)
        assert pool.submit(square, 3).result(30) == 9
        assert pool.statistics().died == 0


def test_an_argument_without_room_fails_its_own_call_only(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    running = [pool.submit(note_and_wait, tmp_path, number) for number in range(40)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    limit_files()
    try:
        large = [pool.submit(len, bytes(LARGE)) for _ in range(20)]
        after = pool.submit(square, 3)
        (tmp_path / "go").touch()
        assert {type(each.exception(30)) for each in large} == {SharedMemoryFull}
        assert after.result(30) == 9
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [each.result(30) for each in running] == list(range(40))
    assert pool.submit(len, bytes(LARGE)).result(30) == LARGE


def test_a_worker_that_the_system_does_not_start_is_tried_again(
    pool: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pool.submit(square, 2).result(30) == 4
    refused = threading.Event()

    def refuse() -> None:
        refused.set()
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    with monkeypatch.context() as patched:
        patched.setattr(pool._manager.workers, "_start_one", refuse)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        wait_for(lambda: len(pool._processes) == 1, 30)
        assert pool.submit(square, 3).result(30) == 9
        assert refused.is_set()
    work = [pool.submit(square, n) for n in range(20)]
    wait_for(lambda: len(pool._processes) == 2, 30)
    assert [each.result(30) for each in work] == [n * n for n in range(20)]


def test_records_of_replaced_workers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MOST_RECORDS", 1)
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        assert list(pool.map(abs, range(5))) == list(range(5))
        assert 1 <= len(pool.statistics().workers) <= 3


# ---- the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "pool.shutdown(wait=False)", "del pool"])
def test_a_program_that_ends_waits_for_what_it_submitted(end: str, tmp_path: Path) -> None:
    done = run_program(
        "import pathlib, pool_tasks, shmring\n"
        "pool = shmring.ProcessPoolExecutor(2)\n"
        f"pool.submit(pool_tasks.note, pathlib.Path({str(tmp_path)!r}), 5)\n{end}\n"
    )
    assert done.stderr == ""
    assert times_begun(tmp_path) == {5: 1}


def test_submit_after_shutdown_is_refused(pool: ProcessPoolExecutor) -> None:
    pool.shutdown()
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(square, 2)


def test_shutdown_cancels_what_no_worker_has_taken(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(50)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    pool.shutdown(wait=False, cancel_futures=True)
    assert sum(each.cancelled() for each in work) == 48
    (tmp_path / "go").touch()
    assert sum(not each.cancelled() and each.result(30) in (0, 1) for each in work) == 2


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_workers_can_be_ended_at_once(pool: ProcessPoolExecutor, tmp_path: Path, how: str) -> None:
    running = pool.submit(start_child_and_wait, tmp_path)
    child = number_in(tmp_path / "child")
    getattr(pool, how)()
    with pytest.raises(BrokenProcessPool, match="terminated by the caller"):
        running.result(30)
    wait_for(lambda: not is_alive(child), 10)


def in_forked_child(pool: ProcessPoolExecutor, said: Any) -> None:
    try:
        pool.submit(square, 2)
    except RuntimeError as error:
        said.put(str(error))


def test_a_forked_child_cannot_use_the_pool_and_does_not_end_it(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(square, 2).result(30) == 4
    context = multiprocessing.get_context("fork")
    with shmring.Queue[str]() as said:
        child = context.Process(target=in_forked_child, args=(pool, said))
        child.start()
        assert "make one here" in said.get(timeout=30)
        child.join(30)
        assert child.exitcode == 0
    assert pool.submit(square, 3).result(30) == 9


PARENT = """
import pathlib, pool_tasks, shmring, sys
folder = pathlib.Path(sys.argv[1])
if __name__ == "__main__":
    with shmring.ProcessPoolExecutor(2, {method}) as pool:
        work = [pool.submit(pool_tasks.start_child_and_wait, folder)]
        work.append(pool.submit(pool_tasks.square, 2))
        work[1].result()
        (folder / "workers").write_text(" ".join(map(str, pool._processes)))
        work[0].result()
"""


@contextlib.contextmanager
def parent_of_a_pool(folder: Path, method: str) -> Iterator[tuple[Any, list[int]]]:
    """A program with a pool, and the processes that must end with it."""
    program = folder / "program.py"
    program.write_text(
        PARENT.format(method=f"__import__('multiprocessing').get_context({method!r})")
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])])
    with subprocess.Popen(
        [sys.executable, str(program), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    ) as parent:
        try:
            child = number_in(folder / "child")
            wait_for(lambda: (folder / "workers").exists(), 30)
            wait_for(lambda: (folder / "workers").read_text(), 30)
            workers = [int(pid) for pid in (folder / "workers").read_text().split()]
            assert all(map(is_alive, [child, *workers]))
            yield parent, [child, *workers]
        finally:
            parent.kill()


@pytest.mark.fault(15)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_with_its_parent_every_worker_ends_and_what_it_started(
    tmp_path: Path, start_method: str, number: signal.Signals
) -> None:
    with parent_of_a_pool(tmp_path, start_method) as (parent, others):
        # Free-threaded, CPython forgets a signal that comes just before it waits for a lock.
        wait_for(asleep(parent.pid), 30)
        begun = time.monotonic()
        parent.send_signal(number)
        parent.wait(30)
        for pid in others:
            wait_for(lambda pid=pid: not is_alive(pid), 30)
        assert time.monotonic() - begun < 10

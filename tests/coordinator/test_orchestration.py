"""Coordinator and workers, in real processes: answered once, joined, nothing left."""

from __future__ import annotations

import copyreg
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any

import pytest

from shmring._backend import backend
from shmring.coordinator.coordinator import Progress, Report, coordinator_process
from shmring.coordinator.example import multiprocessing_example
from shmring.coordinator.worker import worker_process
from shmring.errors import (
    DecodeError,
    EncodeError,
    InvalidArgument,
    NotSupportedByFallback,
    RemoteError,
    RingExists,
    RingNotFound,
    ShmringError,
    TaskTimeout,
    WorkerDied,
)
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.message import MessageType
from shmring.ipc.registry import ProcessRole
from shmring.tasks.task_loop import current_worker
from support import run_in_process, wait_for

both_backends = pytest.mark.both_backends
posix_only = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
ring_only = pytest.mark.skipif(backend != "ring", reason="a pipe does not survive kills")


@pytest.fixture
def ipc(namespace: str) -> Iterator[HighPerformanceIPC]:
    with HighPerformanceIPC("coordinator", namespace=namespace) as opened:
        yield opened
    # The coordinator ends with every worker joined.
    assert multiprocessing.active_children() == []


# -- handlers: at the top level, so that every start method finds them ------------------------


def double(task: Any) -> Any:
    return 2 * task


def fail_at_three(task: int) -> int:
    if task == 3:
        raise KeyError("three")
    return task


class Unfriendly(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first}")


def raise_unfriendly(task: int) -> int:
    raise Unfriendly(1, 2)


def exit_handler(task: int) -> int:
    sys.exit(5)


def return_unpicklable(task: int) -> Any:
    return lambda: task


class OnlyThere:
    """Unpickles in the worker, and nowhere else."""

    def __reduce__(self) -> Any:
        return _only_in_a_worker, (os.getpid(),)


def _only_in_a_worker(made_in: int) -> str:
    if made_in != os.getpid():
        raise RuntimeError("not in this process")
    return "fine"


def return_only_there(task: int) -> Any:
    return OnlyThere() if task == 1 else task


def die_at_three(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def die_once(task: tuple[str, int]) -> int:
    """Die at the first attempt, which the folder remembers."""
    folder, number = task
    try:
        Path(folder, str(number)).touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def append_and_kill_some(task: tuple[str, int]) -> int:
    """Note the start of each task; each third one kills its worker the first time."""
    folder, number = task
    attempts = Path(folder, f"{number}")
    with attempts.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    if number % 3 == 0 and len(attempts.read_text().splitlines()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def hang(task: int) -> int:
    if task == 1:
        signal.pause()
    return task


def touch_and_hang(task: str) -> None:
    Path(task).touch()
    signal.pause()


def ask_worker(task: int) -> tuple[str, bytes]:
    worker = current_worker()
    assert worker is not None
    worker.beat()
    return worker.ipc.process_id, worker.ipc.read_shared_data("data_buffer", 5)


class PoisonousHandler:
    """Kills its process where it is unpickled, or, after fork, called for."""

    def __reduce__(self) -> Any:
        return _exit_now, ()

    def __call__(self, task: int) -> int:
        return task


def _exit_now() -> None:
    os._exit(7)


# -- the plain run ----------------------------------------------------------------------------


@both_backends
def test_results_in_order_and_a_row_for_each_worker(
    ipc: HighPerformanceIPC, start_method: str
) -> None:
    report = coordinator_process(
        ipc, 2, tasks=range(200), spawn=True, handler=double, method=start_method
    )
    assert report.results == [2 * task for task in range(200)]
    assert [row.state for row in report.workers] == ["exited", "exited"]
    assert {row.worker_id for row in report.workers} == {"worker-0", "worker-1"}
    assert sum(row.tasks for row in report.workers) == 200
    assert all(row.heartbeats > 0 for row in report.workers)
    assert all(row.exitcode == 0 for row in report.workers)
    assert (report.retried, report.died) == (0, 0)
    assert report.heartbeats >= 2
    # 200 tasks and one SHUTDOWN message a worker.
    assert report.stats["messages_sent"] == 202
    if backend == "ring":
        assert report.stats["bytes_transferred"] > 202 * 16


@both_backends
def test_nothing_of_a_run_stays(ipc: HighPerformanceIPC) -> None:
    coordinator_process(ipc, 1, tasks=[1], spawn=True)
    assert (ipc.message_queues, ipc.shared_memories) == ({}, {})
    assert not ipc.is_registered
    with pytest.raises(RingNotFound):
        ipc.connect_message_queue("task_queue", timeout=0)
    report = coordinator_process(ipc, 1, tasks=[2], spawn=True)
    assert report.results == [2], "and the next run can begin"


@both_backends
def test_no_tasks_are_no_trouble(ipc: HighPerformanceIPC) -> None:
    report = coordinator_process(ipc, 2, spawn=True, handler=double)
    assert report.results == []
    assert report.stats["messages_sent"] == 2


@both_backends
def test_tasks_may_be_an_iterator_and_large(ipc: HighPerformanceIPC) -> None:
    tasks = (bytes(1 << 20) for _ in range(30))
    report = coordinator_process(ipc, 2, tasks=tasks, spawn=True, handler=len)
    assert report.results == [1 << 20] * 30


@both_backends
def test_arrays_go_there_and_back(ipc: HighPerformanceIPC) -> None:
    numpy = pytest.importorskip("numpy")
    tasks = [numpy.full(1 << 18, number, dtype="f4") for number in range(8)]
    report = coordinator_process(ipc, 2, tasks=tasks, spawn=True, handler=double)
    for number, array in enumerate(report.results):
        array += 1
        assert (array == 2 * number + 1).all()


@both_backends
def test_progress_is_told_after_each_answer(ipc: HighPerformanceIPC) -> None:
    told: list[Progress] = []
    coordinator_process(ipc, 2, tasks=range(10), spawn=True, progress=told.append)
    assert [each.done for each in told] == list(range(1, 11))
    assert {each.total for each in told} == {10}
    assert all(len(each.pids) == 2 for each in told)


@both_backends
def test_a_handler_reaches_its_worker_and_the_data_buffer(ipc: HighPerformanceIPC) -> None:
    report = coordinator_process(
        ipc, 1, tasks=[0], spawn=True, handler=ask_worker, shared_data=b"hello"
    )
    assert report.results == [("worker-0", b"hello")]
    assert current_worker() is None


# -- workers that the caller starts -------------------------------------------------------------


def start_workers(ipc: HighPerformanceIPC, number: int, method: str, handler: Any) -> list[Any]:
    context: Any = multiprocessing.get_context(method)
    workers = [
        context.Process(
            target=worker_process,
            args=(each, "task_queue"),
            kwargs={"handler": handler, "namespace": ipc.namespace},
        )
        for each in range(number)
    ]
    for worker in workers:
        worker.start()
    return workers


@both_backends
def test_workers_started_by_the_caller(ipc: HighPerformanceIPC, start_method: str) -> None:
    workers = start_workers(ipc, 3, start_method, double)
    report = coordinator_process(ipc, 3, tasks=range(100))
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert report.results == [2 * task for task in range(100)]
    assert {row.pid for row in report.workers} == {worker.pid for worker in workers}


@pytest.mark.fault(10, 16)
@ring_only
def test_without_spawn_the_tasks_of_the_dead_are_put_back(
    ipc: HighPerformanceIPC, tmp_path: Path
) -> None:
    workers = start_workers(ipc, 3, "fork", die_once)
    # One of three dies, the other two go on, and no process starts another.
    tasks = [(str(tmp_path), 0)]
    report = coordinator_process(ipc, 3, tasks=tasks)
    for worker in workers:
        worker.join(30)
    assert report.results == [0]
    assert (report.retried, report.died) == (1, 1)
    assert sorted(worker.exitcode for worker in workers) == [-9, 0, 0]


@both_backends
def test_without_workers_it_does_not_wait_for_ever(ipc: HighPerformanceIPC) -> None:
    with pytest.raises(ShmringError, match=r"no worker has been attached for 0\.3 s"):
        coordinator_process(ipc, 1, tasks=[1], worker_timeout=0.3, shutdown_timeout=0.1)


@both_backends
def test_without_a_coordinator_a_worker_gives_up(namespace: str) -> None:
    with pytest.raises(RingNotFound, match="'task_queue'"):
        worker_process(0, "task_queue", namespace=namespace, connect_timeout=0.1)


# -- failures of handlers -------------------------------------------------------------------


@both_backends
def test_an_exception_comes_with_its_traceback(ipc: HighPerformanceIPC, start_method: str) -> None:
    with pytest.raises(KeyError, match="three") as caught:
        coordinator_process(
            ipc, 2, tasks=range(10), spawn=True, handler=fail_at_three, method=start_method
        )
    cause = caught.value.__cause__
    assert type(cause).__name__ == "_RemoteTraceback"
    assert "in fail_at_three" in str(cause)
    assert (ipc.message_queues, ipc.shared_memories) == ({}, {})


@both_backends
def test_exceptions_can_stand_among_the_results(ipc: HighPerformanceIPC) -> None:
    report = coordinator_process(
        ipc, 2, tasks=range(6), spawn=True, handler=fail_at_three, return_exceptions=True
    )
    failed = report.results.pop(3)
    assert report.results == [0, 1, 2, 4, 5]
    assert isinstance(failed, KeyError)
    assert type(failed.__cause__).__name__ == "_RemoteTraceback"


@both_backends
@pytest.mark.parametrize(
    ("handler", "expected", "match"),
    [
        (raise_unfriendly, RemoteError, "Unfriendly: 1"),
        (exit_handler, SystemExit, "5"),
        (return_unpicklable, EncodeError, "lambda"),
        (return_only_there, DecodeError, "not in this process"),
    ],
)
def test_what_cannot_travel_costs_its_own_task_only(
    ipc: HighPerformanceIPC,
    monkeypatch: pytest.MonkeyPatch,
    handler: Callable[[int], Any],
    expected: type,
    match: str,
) -> None:
    # distributed, where another test imported it, teaches pickle to carry every exception
    monkeypatch.delitem(copyreg.dispatch_table, Unfriendly, raising=False)
    report = coordinator_process(
        ipc, 1, tasks=[1, 2], spawn=True, handler=handler, return_exceptions=True, method="fork"
    )
    with pytest.raises(expected, match=match):
        raise report.results[0]
    assert len(report.results) == 2
    assert report.died == 0


@both_backends
def test_a_task_that_cannot_be_pickled_fails(ipc: HighPerformanceIPC) -> None:
    tasks = [1, lambda: None, 3]
    with pytest.raises(EncodeError):
        coordinator_process(ipc, 1, tasks=tasks, spawn=True)
    report = coordinator_process(ipc, 1, tasks=tasks, spawn=True, return_exceptions=True)
    assert report.results[0::2] == [1, 3]
    assert isinstance(report.results[1], EncodeError)


@both_backends
def test_a_failing_iterable_of_tasks_is_raised(ipc: HighPerformanceIPC) -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        coordinator_process(ipc, 1, tasks=tasks(), spawn=True)


# -- killed workers ---------------------------------------------------------------------------


@pytest.mark.fault(10)
@ring_only
def test_a_killed_worker_is_replaced_and_its_task_done_by_another(
    ipc: HighPerformanceIPC, start_method: str, tmp_path: Path
) -> None:
    tasks = [(str(tmp_path), number) for number in range(12)]
    report = coordinator_process(
        ipc, 2, tasks=tasks, spawn=True, handler=append_and_kill_some, method=start_method
    )
    assert report.results == list(range(12))
    assert (report.retried, report.died) == (4, 4)
    assert sum(row.exitcode == -9 for row in report.workers) == 4
    assert sum(row.state == "exited" for row in report.workers) == 2
    attempts = {n: (tmp_path / f"{n}").read_text().splitlines() for n in range(12)}
    for number, pids in attempts.items():
        # A task that only stood in the queue is not run again, and not blamed.
        assert len(pids) == (2 if number % 3 == 0 else 1)
        assert len(set(pids)) == len(pids)


@pytest.mark.fault(10)
@ring_only
def test_a_worker_killed_from_outside_in_the_middle(ipc: HighPerformanceIPC) -> None:
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if progress.done >= 500 and not killed:
            killed.append(progress.pids[0])
            os.kill(killed[0], signal.SIGKILL)

    report = coordinator_process(
        ipc, 2, tasks=range(3000), spawn=True, handler=double, progress=kill_one
    )
    assert report.results == [2 * task for task in range(3000)]
    assert report.died == 1
    (row,) = [each for each in report.workers if each.pid == killed[0]]
    assert (row.state, row.exitcode) == ("dead", -9)


@pytest.mark.fault(12)
@ring_only
@pytest.mark.parametrize("max_retries", [0, 2])
def test_a_task_that_kills_its_workers_fails_alone(
    ipc: HighPerformanceIPC, max_retries: int
) -> None:
    report = coordinator_process(
        ipc,
        2,
        tasks=range(8),
        spawn=True,
        handler=die_at_three,
        max_retries=max_retries,
        return_exceptions=True,
    )
    failed = report.results.pop(3)
    assert report.results == [0, 1, 2, 4, 5, 6, 7]
    assert isinstance(failed, WorkerDied)
    assert (failed.task, failed.signal, failed.attempts) == (3, 9, max_retries + 1)
    assert failed.pid in {row.pid for row in report.workers}
    with pytest.raises(WorkerDied):
        coordinator_process(
            ipc, 2, tasks=range(8), spawn=True, handler=die_at_three, max_retries=max_retries
        )


@ring_only
def test_a_task_that_takes_too_long_fails_alone(ipc: HighPerformanceIPC) -> None:
    report = coordinator_process(
        ipc, 2, tasks=range(4), spawn=True, handler=hang, task_timeout=0.3, return_exceptions=True
    )
    failed = report.results.pop(1)
    assert isinstance(failed, TaskTimeout)
    assert (failed.task, failed.seconds) == (1, 0.3)
    assert report.results == [0, 2, 3]
    assert report.retried == 0


@both_backends
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_die_at_once_are_not_started_for_ever(
    ipc: HighPerformanceIPC, method: str
) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not start processes by {method}")
    expected = ShmringError if backend == "ring" else NotSupportedByFallback
    with pytest.raises(expected, match=r"died before they answered|ended before"):
        coordinator_process(
            ipc, 2, tasks=[1], spawn=True, handler=PoisonousHandler(), method=method
        )


@pytest.mark.both_backends
@pytest.mark.skipif(backend == "ring", reason="the ring survives this")
def test_on_the_fallback_a_killed_worker_is_a_clear_error(ipc: HighPerformanceIPC) -> None:
    with pytest.raises(NotSupportedByFallback, match="cannot be known on the fallback"):
        coordinator_process(ipc, 2, tasks=range(8), spawn=True, handler=die_at_three)
    with pytest.raises(NotSupportedByFallback, match="task_timeout"):
        coordinator_process(ipc, 2, tasks=[1], spawn=True, task_timeout=1)


@both_backends
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_handler_that_cannot_be_sent_is_a_clear_error(
    ipc: HighPerformanceIPC, method: str
) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not start processes by {method}")
    with pytest.raises(InvalidArgument, match="cannot be sent to a worker"):
        coordinator_process(ipc, 2, tasks=[1], spawn=True, handler=lambda x: x, method=method)


# -- the coordinator ends ---------------------------------------------------------------------


def coordinate_a_hanging_worker(namespace: str, marker: str, method: str) -> None:
    with HighPerformanceIPC("coordinator", namespace=namespace) as ipc:
        coordinator_process(
            ipc, 2, tasks=[marker], spawn=True, handler=touch_and_hang, method=method
        )


def coordinate_for_ever(namespace: str, method: str) -> None:
    def tasks() -> Iterator[int]:
        while True:
            yield 1

    with HighPerformanceIPC("coordinator", namespace=namespace) as ipc:
        coordinator_process(ipc, 2, tasks=tasks(), spawn=True, method=method)


def registered_workers(ipc: HighPerformanceIPC) -> list[Any]:
    return [each for each in ipc.registry_entries() if each.role is ProcessRole.WORKER]


@both_backends
def test_ctrl_c_ends_the_workers_too(
    ipc: HighPerformanceIPC, start_method: str, tmp_path: Path
) -> None:
    marker = tmp_path / "running"
    args = (ipc.namespace, str(marker), start_method)
    with run_in_process(coordinate_a_hanging_worker, *args, method="spawn") as process:
        wait_for(marker.exists, 30, "the handler")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 1, "KeyboardInterrupt came through"
        wait_for(lambda: all(each.is_dead() for each in registered_workers(ipc)), what="their end")


class Interrupter:
    """Has every forked child get Ctrl-C before its target is called."""

    def __init__(self) -> None:
        util.register_after_fork(self, Interrupter.interrupt)

    def interrupt(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def interrupts_blocked(task: Any = None) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@both_backends
@posix_only
def test_ctrl_c_does_not_kill_a_worker_that_is_being_started(ipc: HighPerformanceIPC) -> None:
    interrupter = Interrupter()
    report = coordinator_process(ipc, 2, tasks=range(4), spawn=True, handler=double, method="fork")
    del interrupter
    assert (report.results, report.died) == ([0, 2, 4, 6], 0)


class Newborn:
    """A handler that tells how Ctrl-C was when it came to its process."""

    def __init__(self, blocked: bool = False) -> None:
        self._blocked = blocked

    def __call__(self, task: object) -> bool:
        return self._blocked

    def __reduce__(self) -> Any:
        return _newborn, ()


def _newborn() -> Newborn:
    return Newborn(interrupts_blocked())


@both_backends
@posix_only
def test_a_spawned_worker_inherits_that_ctrl_c_is_blocked(ipc: HighPerformanceIPC) -> None:
    report = coordinator_process(ipc, 1, tasks=[1], spawn=True, handler=Newborn(), method="spawn")
    assert report.results == [True]


@both_backends
@posix_only
def test_ctrl_c_is_blocked_only_at_the_start(ipc: HighPerformanceIPC, start_method: str) -> None:
    report = coordinator_process(
        ipc, 1, tasks=[1], spawn=True, handler=interrupts_blocked, method=start_method
    )
    assert report.results == [False]
    assert not interrupts_blocked()


@both_backends
@pytest.mark.parametrize("taken", ["task_queue", "result_queue", "data_buffer"])
def test_what_the_caller_made_survives_that_its_name_is_taken(
    ipc: HighPerformanceIPC, taken: str
) -> None:
    if taken == "data_buffer":
        ipc.create_shared_memory(taken, 10)
    else:
        ipc.create_message_queue(taken)
    with pytest.raises(RingExists):
        coordinator_process(ipc, 1, tasks=[1], spawn=True)
    assert [*ipc.message_queues, *ipc.shared_memories] == [taken]
    if taken == "data_buffer":
        assert ipc.read_shared_data(taken, 10) == bytes(10)
    else:
        ipc.send_message(taken, MessageType.DATA, 1)
        assert ipc.receive_message(taken, timeout=5) is not None


@pytest.mark.fault(15)
@both_backends
def test_without_their_coordinator_workers_end_by_themselves(
    ipc: HighPerformanceIPC, start_method: str
) -> None:
    with run_in_process(
        coordinate_for_ever, ipc.namespace, start_method, method="spawn"
    ) as process:
        wait_for(lambda: len(registered_workers(ipc)) == 2, 30, "two workers")
        wait_for(lambda: all(each.tasks for each in registered_workers(ipc)), 30, "some work")
        process.kill()
        wait_for(
            lambda: all(each.is_dead() for each in registered_workers(ipc)), 30, "the workers' end"
        )
    # What they were the last to hold went with them: the fixture looks into /dev/shm.
    with pytest.raises(RingNotFound):
        ipc.connect_message_queue("task_queue", timeout=0)


@both_backends
def test_one_coordinator_a_namespace(ipc: HighPerformanceIPC) -> None:
    with HighPerformanceIPC("second", namespace=ipc.namespace) as second:

        def start_another(progress: Progress) -> None:
            with pytest.raises(RingExists):
                coordinator_process(second, 1, tasks=[1], spawn=True)

        report = coordinator_process(
            ipc, 1, tasks=[5], spawn=True, handler=double, progress=start_another
        )
    assert report.results == [10]


@pytest.mark.fault(42)
@pytest.mark.skipif(backend != "ring", reason="a served queue goes with its creator")
def test_each_worker_gets_one_shutdown_message(ipc: HighPerformanceIPC) -> None:
    """A worker written by hand, in this process, sees what the contract says."""
    with HighPerformanceIPC("by-hand", namespace=ipc.namespace) as worker:
        seen: list[MessageType] = []

        def tasks() -> Iterator[Any]:
            worker.register(ProcessRole.WORKER)
            worker.connect_message_queue("task_queue")
            yield from ()

        coordinator_process(ipc, 2, tasks=tasks(), shutdown_timeout=0.2)
        while message := worker.receive_message("task_queue", timeout=0):
            seen.append(message.msg_type)
    assert seen == [MessageType.SHUTDOWN] * 2


# -- arguments and the example ------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize(
    "wrong",
    [
        {"num_workers": 0},
        {"max_retries": -1},
        {"task_timeout": float("nan"), "spawn": True},
        {"worker_timeout": float("nan")},
        {"shutdown_timeout": float("nan")},
        {"handler": double},
        {"method": "spawn"},
        {"task_timeout": 1.0},
        {"shared_data": bytes((1 << 20) + 1), "spawn": True},
        {"queue_name": "a/b", "spawn": True},
    ],
)
def test_impossible_arguments_are_refused(ipc: HighPerformanceIPC, wrong: dict[str, Any]) -> None:
    arguments = {"num_workers": 1, "tasks": [1], **wrong}
    with pytest.raises((InvalidArgument, NotSupportedByFallback)):
        coordinator_process(ipc, arguments.pop("num_workers"), **arguments)
    assert not ipc.is_registered
    with pytest.raises(TypeError):
        coordinator_process(ipc, "two")  # type: ignore[arg-type]


@both_backends
def test_the_example_runs(start_method: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "shmring")
    results = multiprocessing_example(method=start_method)
    assert [each["task_id"] for each in results] == list(range(100))
    assert [each["result"] for each in results] == [
        f"processed_task_data_{number}" for number in range(100)
    ]
    assert {each["worker_id"] for each in results} <= {f"worker-{number}" for number in range(4)}
    assert "100 tasks in" in caplog.text
    assert sum(text.startswith("worker-") for text in caplog.messages) == 4
    assert "'messages_sent': 104" in caplog.text


def test_a_report_can_be_kept(ipc: HighPerformanceIPC) -> None:
    started = time.monotonic()
    report: Report = coordinator_process(ipc, 1, tasks=[1], spawn=True)
    assert 0 < report.seconds <= time.monotonic() - started

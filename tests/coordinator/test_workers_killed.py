"""Workers killed at chosen places, by their tasks, or only stopped: each task is answered once."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from header import is_stopped
from shmring import Queue
from shmring.coordinator.coordinator import coordinator_process
from shmring.coordinator.external_workers import ExternalWorkers
from shmring.coordinator.worker import worker_process
from shmring.errors import TaskTimeout, WorkerDied
from shmring.ipc import registry
from shmring.ipc import slot as layout
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.registry import ProcessRole, ProcessState
from shmring.process.liveness import process_start_ticks
from shmring.tasks import dispatcher
from shmring.tasks.task_loop import TaskLoop
from shmring.tasks.workers import ChildWorkers
from support import run_in_process, wait_for

resource = pytest.importorskip("resource")

TASKS = 30


@pytest.fixture
def ipc(namespace: str) -> Iterator[HighPerformanceIPC]:
    with HighPerformanceIPC("coordinator", namespace=namespace) as opened:
        yield opened
    assert multiprocessing.active_children() == []


# ---- killed between two steps of its loop ----------------------------------------------------


def die_once(marker: Path) -> None:
    """Kill this process, if it is the first to come here."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def append(task: tuple[str, int]) -> int:
    folder, number = task
    with Path(folder, str(number)).open("a") as lines:
        lines.write("x")
    return number


# where: (of which class, before or after which step, the attempts that there are altogether)
PLACES: dict[str, tuple[type, str, str, int]] = {
    "with the delivery, before the task is begun": (TaskLoop, "_call", "before", TASKS),
    "before the answer is sent": (TaskLoop, "_send", "before", TASKS + 1),
    "after the answer, with the delivery": (TaskLoop, "_send", "after", TASKS),
    "before the delivery is released": (Queue, "_claim_release", "before", TASKS),
    "after the delivery is released": (Queue, "_claim_release", "after", TASKS),
}


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("place", PLACES)
def test_killed_between_two_steps(
    ipc: HighPerformanceIPC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Workers are forked with a step that kills the first of them in the middle of its work."""
    cls, name, when, attempts = PLACES[place]
    folder, marker = tmp_path / "attempts", tmp_path / "died"
    folder.mkdir()
    original: Callable[..., Any] = getattr(cls, name)
    home = os.getpid()
    calls = 0

    def step(self: Any, *args: Any) -> Any:
        nonlocal calls
        working = os.getpid() != home and (name != "_send" or args[0][0] is not None)
        calls += working
        if working and calls == 5 and when == "before":
            die_once(marker)
        result = original(self, *args)
        if working and calls == 5 and when == "after":
            die_once(marker)
        return result

    monkeypatch.setattr(cls, name, step)
    tasks = [(str(folder), number) for number in range(TASKS)]
    report = coordinator_process(ipc, 2, tasks=tasks, spawn=True, handler=append, method="fork")
    assert report.results == list(range(TASKS))
    assert [row.exitcode for row in report.workers].count(-signal.SIGKILL) == 1
    assert sum(len(path.read_text()) for path in folder.iterdir()) == attempts
    assert report.retried == (when == "before" and cls is TaskLoop)


# ---- ended by its task -----------------------------------------------------------------------


def end_at_two(task: tuple[str, int]) -> int:
    how, number = task
    if number == 2:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if how == "exit":
            os._exit(3)
        if how == "segfault":
            ctypes.string_at(0)
        os.abort()
    return number


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("how", "exitcode", "method"),
    [
        ("exit", 3, "fork"),
        ("segfault", -signal.SIGSEGV, "fork"),
        ("abort", -signal.SIGABRT, "fork"),
        ("segfault", -signal.SIGSEGV, "spawn"),
    ],
)
def test_a_task_that_ends_its_worker_fails_alone(
    ipc: HighPerformanceIPC, how: str, exitcode: int, method: str
) -> None:
    report = coordinator_process(
        ipc,
        2,
        tasks=[(how, number) for number in range(6)],
        spawn=True,
        handler=end_at_two,
        method=method,
        max_retries=1,
        return_exceptions=True,
    )
    failed = report.results.pop(2)
    assert report.results == [0, 1, 3, 4, 5]
    assert isinstance(failed, WorkerDied)
    assert (failed.task, failed.exitcode, failed.attempts) == (2, exitcode, 2)
    assert failed.signal == (None if exitcode > 0 else -exitcode)
    assert report.died == 2


# ---- stopped -----------------------------------------------------------------------------------


def wait_for_file(task: tuple[str, int]) -> int:
    folder, number = task
    with Path(folder, f"begun-{number}").open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    wait_for(Path(folder, f"go-{number}").exists, 60)
    return number


@pytest.mark.fault(14)
def test_a_stopped_worker_is_silent_and_keeps_its_task(
    ipc: HighPerformanceIPC,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One is stopped at its task, one with none; a third one does all else."""
    monkeypatch.setattr(dispatcher, "_SILENCE", 0.5)
    begun, go = tmp_path / "begun-0", tmp_path / "go-0"
    (tmp_path / "go-1").touch()
    outcome: list[Any] = []

    def look(watcher: HighPerformanceIPC) -> None:
        wait_for(begun.exists, 30)
        wait_for(lambda: len(begun.read_text().split()) == 1)
        working = int(begun.read_text())

        def idle() -> list[int]:
            return [
                each.pid
                for each in watcher.registry_entries()
                if each.role is ProcessRole.WORKER and each.state is not ProcessState.WORKING
            ]

        wait_for(lambda: len(idle()) == 1)
        stopped = [working, *idle()]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            for pid in stopped:
                wait_for(lambda pid=pid: is_stopped(pid))
            for pid in stopped:
                line = f"(process {pid}) is silent"
                wait_for(lambda line=line: line in caplog.text, what=line)
            silent = {each.pid for each in watcher.registry_entries() if each.is_silent(0.4)}
            outcome.append(set(stopped) <= silent)
            outcome.append(any(each.is_dead() for each in watcher.registry_entries()))
            outcome.append(begun.read_text().split() == [str(working)])
        finally:
            go.touch()
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    with HighPerformanceIPC("watcher", namespace=ipc.namespace) as watcher:
        thread = threading.Thread(target=look, args=(watcher,))
        thread.start()
        report = coordinator_process(
            ipc, 2, tasks=[(str(tmp_path), 0)], spawn=True, handler=wait_for_file, method="fork"
        )
        thread.join(30)
    assert outcome == [True, False, True]
    assert report.results == [0]
    assert (report.retried, report.died) == (0, 0)
    said = [text for text in caplog.messages if "silent" in text]
    assert len(said) == 2
    assert "hung, stopped or starved; its tasks are not given to others" in said[0]
    assert caplog.records[0].levelno == logging.WARNING


# ---- the coordinator ends ------------------------------------------------------------------------


def coordinate(namespace: str) -> None:
    def tasks() -> Iterator[int]:
        while True:
            yield 1

    with HighPerformanceIPC("coordinator", namespace=namespace) as ipc:
        coordinator_process(ipc, 2, tasks=tasks(), spawn=True, method="fork")


@pytest.mark.fault(15)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_workers_of_a_coordinator_that_was_ended_end_and_leave_nothing(
    ipc: HighPerformanceIPC, number: int
) -> None:
    def workers() -> list[Any]:
        return [each for each in ipc.registry_entries() if each.role is ProcessRole.WORKER]

    with run_in_process(coordinate, ipc.namespace, method="spawn") as process:
        wait_for(lambda: len(workers()) == 2 and all(each.tasks for each in workers()), 30)
        assert process.pid is not None
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        begun = time.monotonic()
        os.kill(process.pid, number)
        wait_for(lambda: all(each.is_dead() for each in workers()), 30, "the workers' end")
        assert time.monotonic() - begun < 20
        process.join(30)
    assert process.exitcode == -number


# ---- two sentinels in one batch ----------------------------------------------------------------


@pytest.mark.fault(42)
@pytest.mark.parametrize("consumers", [2, 5])
def test_a_consumer_of_batches_puts_back_the_sentinels_that_are_not_for_it(consumers: int) -> None:
    def consume(number: int) -> None:
        while True:
            batch = tasks.get_many(timeout=30)
            work = [task for task in batch if task is not None]
            spare = len(batch) - len(work) - 1
            if spare > 0:  # each of the others needs one, too
                tasks.put_many([None] * spare)
            done.put((number, work, spare))
            if spare >= 0:
                return

    with Queue[Any]() as tasks, Queue[Any]() as done:
        tasks.put_many([*range(100), *[None] * consumers])
        running = [threading.Thread(target=consume, args=(n,)) for n in range(consumers)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(30)
            assert not thread.is_alive()
        assert tasks.empty()
        said = done.get_many()
        while not done.empty():
            said += done.get_many()
    assert sorted(task for _, work, _ in said for task in work) == list(range(100))
    assert sum(spare >= 0 for _, _, spare in said) == consumers
    assert max(spare for _, _, spare in said) > 0, "no batch held two"


# ---- a PID that is used again ------------------------------------------------------------------


def stand_by(namespace: str) -> None:
    with HighPerformanceIPC("worker", namespace=namespace) as ipc:
        ipc.register(ProcessRole.WORKER)
        signal.pause()


@pytest.mark.fault(17)
def test_a_worker_whose_pid_had_a_dead_one_is_not_taken_for_it(ipc: HighPerformanceIPC) -> None:
    """The dead one is made of a slot: the PID of the living one, started a tick earlier."""
    workers = ExternalWorkers(ipc.registry_entries, 2, 60.0)
    with (
        HighPerformanceIPC("ghost", namespace=ipc.namespace) as ghost,
        run_in_process(stand_by, ipc.namespace) as living,
    ):
        wait_for(lambda: len(workers.living()) == 1)
        (entry,) = workers.living()
        assert entry.pid == living.pid
        slot = ghost.register(ProcessRole.WORKER)
        slot._words[slot._base + layout.START] = entry.start_ticks - 1
        slot._words[slot._base + layout.PID] = entry.pid

        (departure,) = workers.departed()
        assert departure.worker_id == "ghost"
        assert departure.held(entry.pid, entry.start_ticks - 1, slot.key)
        assert departure.held(entry.pid, entry.start_ticks - 1, 0), "killed before it wrote its key"
        own = entry.pid, entry.start_ticks, entry.key
        assert not departure.held(*own), "claims of the living are its own"
        workers.reap(departure, useful=False)
        assert workers.departed() == []
        holders = [(entry.pid, entry.start_ticks - 1, slot.key), own]
        assert [each.start_ticks for each in workers.orphans(holders)] == [entry.start_ticks - 1]

        living.kill()
        wait_for(workers.departed, what="its own end to be seen")
        (departure,) = workers.departed()
        assert departure.worker_id == "worker"


@pytest.mark.fault(17)
def test_claims_say_when_their_holder_started() -> None:
    with Queue[Any]() as queue:
        slot = queue._claim_open(7)
        ticks = process_start_ticks(os.getpid())
        assert queue._claims() == [(slot, os.getpid(), ticks, 7, 0, 0)]
        queue._claim_close(slot)
        assert queue._claims() == []


# ---- entered again ---------------------------------------------------------------------------


def give_up_twice(folder: Path, task: int) -> int:
    if task == 0:
        times = len(list(folder.iterdir()))
        (folder / str(times)).touch()
        if times < 2:
            raise KeyboardInterrupt
    return task


def enter_again(folder: Path, queue_name: str, namespace: str) -> None:
    """A supervisor's loop: it starts the worker again in the same process."""
    ended = False
    while not ended:
        with contextlib.suppress(KeyboardInterrupt):
            worker_process(
                1,
                queue_name,
                handler=functools.partial(give_up_twice, folder),
                namespace=namespace,
            )
            ended = True


def work_in_threads(folder: Path, queue_name: str, namespace: str) -> None:
    threads = [
        threading.Thread(target=enter_again, args=(folder, queue_name, namespace)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.fault(49)
@pytest.mark.parametrize("supervisor", [enter_again, work_in_threads])
def test_a_worker_that_is_entered_again_in_its_process_loses_no_task(
    ipc: HighPerformanceIPC, tmp_path: Path, supervisor: Callable[..., None]
) -> None:
    number = 1 if supervisor is enter_again else 3
    with run_in_process(supervisor, tmp_path, "tasks", ipc.namespace):
        report = coordinator_process(ipc, number, tasks=range(20), queue_name="tasks")
    assert report.results == list(range(20))
    assert report.retried == 2


def wait_for_the_file(task: Path) -> str:
    wait_for(task.exists, timeout=30)
    return task.name


@pytest.mark.fault(49)
def test_a_task_timeout_spares_the_task_that_began_since_the_look(
    ipc: HighPerformanceIPC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look that finds task 0 overdue and the kill its worker goes on to task 1."""
    tasks = [tmp_path / "0", tmp_path / "1"]
    living = ChildWorkers.living
    moved = []

    def look_and_let_go_on(workers: ChildWorkers) -> list[registry.RegistryEntry]:
        seen = living(workers)
        if any(entry.task == 0 for entry in seen) and not moved:
            wait_for(lambda: time.monotonic_ns() > seen[0].task_started_ns + 500_000_000)
            tasks[0].touch()
            wait_for(lambda: [entry.task for entry in living(workers)] == [1])
            moved.append(seen)
        elif moved:
            tasks[1].touch()
        return seen

    monkeypatch.setattr(ChildWorkers, "living", look_and_let_go_on)
    report = coordinator_process(
        ipc, 1, tasks=tasks, spawn=True, handler=wait_for_the_file, task_timeout=0.4, max_retries=0
    )
    assert moved
    assert report.results == ["0", "1"]
    assert report.died == 0


@pytest.mark.fault(49)
def test_only_the_overdue_task_is_charged(ipc: HighPerformanceIPC, tmp_path: Path) -> None:
    tasks = [tmp_path / "never", tmp_path]
    report = coordinator_process(
        ipc,
        1,
        tasks=tasks,
        spawn=True,
        handler=wait_for_the_file,
        task_timeout=0.3,
        max_retries=0,
        return_exceptions=True,
    )
    assert isinstance(report.results[0], TaskTimeout)
    assert report.results[1] == tmp_path.name

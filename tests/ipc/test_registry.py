"""The registry: its entries, dead and silent told apart, slots that are never lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from typing import Any

import pytest

from shmring._backend import backend
from shmring.errors import InvalidArgument, LayoutMismatch, ShmringError
from shmring.fallback.files import SharedFile, fallback_folder
from shmring.ipc import registry
from shmring.ipc.registry import (
    REGISTRY_BYTES,
    ProcessRole,
    ProcessState,
    Registry,
    open_segment,
)
from shmring.process.liveness import is_process_dead, process_start_ticks
from support import run_in_process, wait_for

pytestmark = [
    pytest.mark.both_backends,
    pytest.mark.skipif(sys.platform != "linux", reason="death is proved by /proc and pidfd here"),
]

NAME = f"shmring.test-registry-{os.getpid()}.registry"


def open_storage(name: str = NAME) -> Any:
    if backend == "ring":
        return open_segment(name)
    return SharedFile.create_or_attach(name, REGISTRY_BYTES)


@pytest.fixture
def shared() -> Iterator[Registry]:
    with Registry(open_storage()) as opened:
        yield opened


def stay(name: str, process_id: str) -> None:
    with Registry(open_storage(name)) as opened:
        slot = opened.register(process_id, ProcessRole.WORKER)
        slot.task_words().begin(42)
        signal.pause()


def find(opened: Registry, process_id: str) -> Any:
    return next((each for each in opened.entries() if each.process_id == process_id), None)


def is_working_on(task: int, entry: Any) -> bool:
    return entry is not None and (entry.task, entry.state) == (task, ProcessState.WORKING)


def test_a_slot_says_what_its_process_does(shared: Registry) -> None:
    before = time.monotonic_ns()
    slot = shared.register("me", ProcessRole.COORDINATOR)
    entry = find(shared, "me")
    assert (entry.pid, entry.role, entry.state) == (
        os.getpid(),
        ProcessRole.COORDINATOR,
        ProcessState.STARTING,
    )
    assert entry.start_ticks == process_start_ticks(os.getpid()) > 0
    assert before <= entry.heartbeat_ns <= time.monotonic_ns()
    assert entry.task is None

    slot.task_words().begin(1)
    entry = find(shared, "me")
    assert (entry.state, entry.task) == (ProcessState.WORKING, 0)
    assert entry.task_started_ns >= before

    slot.waiting("ä" * 100)
    entry = find(shared, "me")
    assert entry.state is ProcessState.WAITING
    assert entry.waiting_since_ns >= before
    assert entry.waiting_on.startswith("ä" * 31)

    slot.count(tasks=1, nbytes=1000, messages=2)
    slot.count(nbytes=24)
    slot.idle()
    entry = find(shared, "me")
    assert (entry.tasks, entry.nbytes, entry.messages) == (1, 1024, 2)
    assert (entry.state, entry.task, entry.waiting_since_ns) == (ProcessState.IDLE, None, 0)

    beats = entry.heartbeats
    slot.beat()
    assert find(shared, "me").heartbeats == beats + 1


@pytest.mark.fault(16)
def test_another_process_is_seen_and_its_death_is_proved(
    shared: Registry, start_method: str
) -> None:
    with run_in_process(stay, NAME, "other", method=start_method) as process:
        wait_for(lambda: is_working_on(41, find(shared, "other")), what="the other at its task")
        entry = find(shared, "other")
        assert entry.pid == process.pid
        assert not entry.is_dead()
        process.kill()
        # Not joined: a zombie is dead already.
        wait_for(entry.is_dead, what="proof of death")
        after = find(shared, "other")
        assert (after.task, after.state) == (41, ProcessState.WORKING), "readable after death"


@pytest.mark.fault(14)
def test_stopped_is_silent_and_not_dead(shared: Registry) -> None:
    with run_in_process(stay, NAME, "stopped") as process:
        wait_for(lambda: find(shared, "stopped"), what="the slot")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        entry = find(shared, "stopped")
        wait_for(lambda: entry.is_silent(0.05), what="silence")
        assert not entry.is_dead()
        assert not entry.is_silent(3600)


@pytest.mark.fault(17)
def test_a_pid_used_again_is_not_taken_for_the_old_process() -> None:
    assert not is_process_dead(os.getpid(), process_start_ticks(os.getpid()))
    assert is_process_dead(os.getpid(), process_start_ticks(os.getpid()) + 1)
    assert not is_process_dead(os.getpid())


@pytest.mark.parametrize("pid", [0, 1 << 31, 1 << 63])
def test_impossible_pids_are_dead(pid: int) -> None:
    assert is_process_dead(pid)


def test_without_pidfd_death_is_still_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError("no pidfd here")

    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert is_process_dead(process.pid)
    assert not is_process_dead(os.getpid(), process_start_ticks(os.getpid()))
    assert is_process_dead(os.getpid(), process_start_ticks(os.getpid()) + 1)


def test_the_dead_keep_their_slots_for_a_while(shared: Registry) -> None:
    shared.register("departed").release()
    assert shared.register("next").index == 1
    assert find(shared, "departed").state is ProcessState.EXITED


def test_slots_of_the_dead_and_the_departed_are_used_again(
    shared: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_KEPT_NS", 0)
    shared.register("keeps its slot")
    with run_in_process(stay, NAME, "mortal") as process:
        wait_for(lambda: find(shared, "mortal"), what="the slot")
        index, incarnation = find(shared, "mortal").index, find(shared, "mortal").incarnation
        process.kill()
        wait_for(lambda: find(shared, "mortal").is_dead(), what="proof of death")
        heir = shared.register("heir")
    assert (heir.index, heir.incarnation) == (index, incarnation + 1)
    assert find(shared, "mortal") is None
    entry = find(shared, "heir")
    assert (entry.tasks, entry.task, entry.role) == (0, None, ProcessRole.PEER)

    heir.release()
    assert find(shared, "heir").state is ProcessState.EXITED
    assert find(shared, "heir").is_dead()
    assert shared.register("next").index == index
    heir.release()
    assert find(shared, "next").state is ProcessState.STARTING, (
        "an old handle ends no other process"
    )


def take_slots(barrier_event: Event, number: int) -> None:
    with Registry(open_storage()) as opened:
        assert barrier_event.wait(30)
        for each in range(20):
            opened.register(f"p{number}-{each}")
        signal.pause()


def test_slots_taken_at_the_same_time_are_different(shared: Registry) -> None:
    import multiprocessing

    start = multiprocessing.get_context("fork").Event()
    with contextlib.ExitStack() as stack:
        for number in range(4):
            stack.enter_context(run_in_process(take_slots, start, number))
        start.set()
        wait_for(lambda: len(shared.entries()) == 80, 30, "80 slots")
        assert len({each.process_id for each in shared.entries()}) == 80


def hold_lock(held: Event) -> None:
    with open_storage().exclusive():
        held.set()
        signal.pause()


def test_one_killed_while_it_allocates_stops_no_other(shared: Registry) -> None:
    import multiprocessing

    held = multiprocessing.get_context("fork").Event()
    with run_in_process(hold_lock, held) as process:
        assert held.wait(10)
        process.kill()
        process.join()
    assert shared.register("next").index == 0


def test_a_full_registry_says_so(shared: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SLOTS", 3)
    for each in range(3):
        shared.register(f"p{each}")
    with pytest.raises(ShmringError, match="all 3 slots"):
        shared.register("one too many")


@pytest.mark.parametrize("process_id", ["", "x" * 73, "ä" * 37])
def test_impossible_names_are_refused(shared: Registry, process_id: str) -> None:
    with pytest.raises(InvalidArgument, match="bytes"):
        shared.register(process_id)
    shared.register("x" * 72)
    assert find(shared, "x" * 72) is not None


@pytest.mark.fault(35)
def test_what_is_no_registry_is_refused(shared: Registry) -> None:
    storage = open_storage()
    with contextlib.closing(storage):
        storage.buffer[8:16] = b"nonsense"
        with pytest.raises(LayoutMismatch, match="magic"):
            Registry(storage)


@pytest.mark.fault(23)
def test_random_bytes_in_a_slot_are_no_crash(shared: Registry) -> None:
    shared.register("me")
    storage = open_storage()
    with contextlib.closing(storage):
        for value in (0, 1, 127, 255):
            for at in range(256, 512):
                storage.buffer[at] = value
                for entry in shared.entries():
                    entry.is_dead()
        storage.buffer[24:32] = b"\xff" * 8  # slots in use
        shared.entries()


def test_the_last_one_out_leaves_nothing() -> None:
    first, second = Registry(open_storage()), Registry(open_storage())
    folder = "/dev/shm" if backend == "ring" else fallback_folder()
    assert NAME in os.listdir(folder)
    first.close()
    first.close()
    assert NAME in os.listdir(folder)
    second.close()
    assert not [each for each in os.listdir(folder) if NAME in each]

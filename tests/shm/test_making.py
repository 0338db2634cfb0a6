"""Names that are being made, opened and cleaned away at the same moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest

from header import is_stopped
from shmring import (
    Queue,
    Ring,
    RingExists,
    RingNotFound,
    SharedMemoryManager,
    cleanup_stale,
)
from shmring.ipc.registry import open_segment
from shmring.shm import segment
from support import at_least, own_name, run_in_process, shared_memory_names, wait_for

pytestmark = pytest.mark.usefixtures("only_cleaner")

NAME = own_name("making")
PATH = Path("/dev/shm", NAME)


def make_memory() -> SharedMemoryManager:
    memory = SharedMemoryManager(NAME, 100)
    if not memory.create():
        raise RingExists("as a ring would say it")
    return memory


def attach_memory(timeout: float = 0) -> SharedMemoryManager:
    memory = SharedMemoryManager(NAME, 100)
    deadline = time.monotonic() + timeout
    while not memory.connect():
        if time.monotonic() >= deadline:
            raise RingNotFound("as a ring would say it")
    return memory


def use_queue(queue: Queue[object] | Ring) -> None:
    queue.put(b"x")
    assert queue.get() == b"x"
    queue.close()


def use_memory(memory: SharedMemoryManager) -> None:
    memory.write_data(b"x")
    assert memory.read_data(1) == b"x"
    memory.cleanup()


def left() -> set[str]:
    """Names of ours that are there."""
    return {name for name in shared_memory_names() if NAME in name}


# what: (make, attach, use and close)
MADE: dict[str, tuple[Callable[[], Any], Callable[[float], Any], Callable[[Any], None]]] = {
    "ring": (lambda: Ring.create(name=NAME), lambda t: Ring.attach(NAME, t), use_queue),
    "queue": (lambda: Queue(name=NAME), lambda t: Queue.attach(NAME, t), use_queue),
    "memory": (make_memory, attach_memory, use_memory),
}
made = pytest.mark.parametrize("what", MADE)


# ---- the maker is killed or stopped, before each call that it makes --------------------------


def make_up_to(step: int, then: signal.Signals, make: Callable[[], Any]) -> int:
    """Make something, but send a signal to this process before the `step`-th call in there.

    Returns:
        how many calls there were.
    """
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls == step:
                sys.setprofile(None)
                os.kill(os.getpid(), then)

    sys.setprofile(count)
    try:
        use = make()
    finally:
        sys.setprofile(None)
    (use.cleanup if isinstance(use, SharedMemoryManager) else use.close)()
    return calls


@made
@pytest.mark.fault(27)
def test_a_maker_killed_at_any_step_leaves_a_whole_one_or_none(what):
    make, attach, use = MADE[what]
    steps = make_up_to(0, signal.SIGKILL, make)
    assert steps > 20
    outcomes = set()
    for step in range(1, steps + 1, 4 if what == "queue" else 1):  # which goes the ring's way
        with run_in_process(make_up_to, step, signal.SIGKILL, make) as maker:
            maker.join(30)
            assert maker.exitcode == -signal.SIGKILL
        assert left() <= {NAME}
        outcomes.add(PATH.exists())
        if not PATH.exists():
            with pytest.raises(RingNotFound):
                attach(0)
        elif step % 2:
            use(attach(0))
        use(make())
        assert left() == set()
    assert outcomes == {False, True}


@pytest.mark.fault(27)
def test_a_registry_whose_maker_was_killed_at_any_step_is_there_for_the_next():
    """The first process makes it, so no process waits for another."""

    def make() -> Any:
        return open_segment(NAME)

    for step in range(1, make_up_to(0, signal.SIGKILL, make) + 1, 3):
        with run_in_process(make_up_to, step, signal.SIGKILL, make) as maker:
            maker.join(30)
            assert maker.exitcode == -signal.SIGKILL
        assert left() <= {NAME}
        make().close()
        assert left() == set()


@made
@pytest.mark.fault(27)
def test_a_maker_stopped_at_any_step_is_waited_for(what):
    make, attach, use = MADE[what]
    steps = make_up_to(0, signal.SIGSTOP, make)
    for step in range(1, steps + 1, 5):

        def make_and_stay(step: int = step) -> None:
            def make_and_keep() -> Any:
                kept = make()
                sys.setprofile(None)
                signal.pause()
                return kept

            make_up_to(step, signal.SIGSTOP, make_and_keep)

        with run_in_process(make_and_stay) as maker:
            wait_for(lambda: is_stopped(maker.pid))
            try:
                use(attach(0.01))
            except RingNotFound:
                assert not PATH.exists()
            os.kill(maker.pid, signal.SIGCONT)
            use(attach(10))
        use(make())


@made
@pytest.mark.fault(27)
def test_while_a_maker_is_stopped_another_may_have_the_name(what):
    make, attach, use = MADE[what]
    steps = make_up_to(0, signal.SIGSTOP, make)
    late = 0

    def make_late(step: int) -> None:
        try:
            make_up_to(step, signal.SIGSTOP, make)
        except RingExists:
            os._exit(7)

    for step in range(1, steps + 1, 5):
        with run_in_process(make_late, step) as maker:
            wait_for(lambda: is_stopped(maker.pid))
            try:
                rival = make()
            except RingExists:  # the stopped one has it
                os.kill(maker.pid, signal.SIGCONT)
                maker.join(30)
                assert maker.exitcode == 0
                continue
            os.kill(maker.pid, signal.SIGCONT)
            maker.join(30)
            assert maker.exitcode == 7
            use(attach(0))
            use(rival)
            late += 1
    assert late


@pytest.fixture
def block():
    made = shared_memory.SharedMemory(create=True, size=1 << 16)
    try:
        yield made
    finally:
        made.close()
        made.unlink()


@pytest.mark.fault(27)
@pytest.mark.parametrize("begun", [False, True])
def test_a_ring_in_a_users_block_that_is_never_finished(block, begun):
    if begun:
        with Ring.create(buffer=block):
            block.buf[48:52] = bytes(4)  # the word that is stored last: ready
            wait_in_vain(block)
    else:
        wait_in_vain(block)
    with Ring.create(buffer=block) as ring, Ring.attach(buffer=block) as other:
        ring.put(b"made after all")
        assert other.get() == b"made after all"


def wait_in_vain(block: shared_memory.SharedMemory) -> None:
    with (
        at_least(0.1),
        pytest.raises(RingNotFound, match="never finished it; remove it and create it anew"),
    ):
        Ring.attach(buffer=block, timeout=0.1)


@pytest.mark.fault(27)
def test_a_ring_in_a_users_block_is_waited_for(block):
    attached = []

    def attach() -> None:
        with Ring.attach(buffer=block, timeout=30) as ring:
            attached.append(ring.get(timeout=30))

    thread = threading.Thread(target=attach)
    thread.start()
    assert not attached
    with Ring.create(buffer=block) as ring:
        ring.put(b"ready")
        thread.join(30)
    assert attached == [b"ready"]


# ---- cleaners ------------------------------------------------------------------------------


def leave_stale() -> None:
    """A ring that no process has open, as when all its processes were killed."""
    with Ring.create() as ring:
        os.link(f"/dev/shm/{ring.name}", PATH)


def clean_each_round(barrier: Barrier, removed: Queue[tuple[int, bool]], rounds: int) -> None:
    for number in range(rounds):
        barrier.wait(30)
        removed.put((number, NAME in cleanup_stale()))
        barrier.wait(30)


@pytest.mark.fault(28)
def test_of_two_cleaners_at_once_one_removes_it():
    rounds, cleaners = 100, 3
    barrier = multiprocessing.get_context("fork").Barrier(cleaners + 1)
    with Queue() as removed, contextlib.ExitStack() as stack:
        for _ in range(cleaners):
            stack.enter_context(run_in_process(clean_each_round, barrier, removed, rounds))
        for number in range(rounds):
            leave_stale()
            barrier.wait(30)
            barrier.wait(30)
            assert not PATH.exists()
            said = [removed.get(timeout=30) for _ in range(cleaners)]
            assert sorted(said) == [(number, False)] * (cleaners - 1) + [(number, True)]


@pytest.mark.fault(28)
def test_a_cleaner_that_comes_too_late_does_not_claim_to_have_done_it(monkeypatch):
    leave_stale()
    lock = segment._lock

    def another_is_faster(fd: int, kind: int) -> bool:
        PATH.unlink()
        return lock(fd, kind)

    monkeypatch.setattr(segment, "_lock", another_is_faster)
    assert cleanup_stale() == []


def clean_on(stop: Event, counts: Queue[tuple[str, int]]) -> None:
    count = 0
    while not stop.is_set():
        count += NAME in cleanup_stale()
    counts.put(("cleaned", count))


def attach_on(stop: Event, counts: Queue[tuple[str, int]]) -> None:
    """A process that has attached has a ring with a name, until it leaves."""
    count = 0
    while not stop.is_set():
        try:
            ring = Ring.attach(NAME)
        except RingNotFound:
            continue
        with ring:
            for _ in range(3):
                ring.put(b"x")
                assert ring.get(timeout=5)
                assert PATH.stat().st_ino == os.fstat(ring._fileno()).st_ino
            count += 1
    counts.put(("attached", count))


def make_on(stop: Event, counts: Queue[tuple[str, int]]) -> None:
    """So has the process that made it, if it was the first."""
    count = 0
    while not stop.is_set():
        try:
            ring = Ring.create(name=NAME)
        except RingExists:
            continue
        with ring:
            assert PATH.stat().st_ino == os.fstat(ring._fileno()).st_ino
            count += 1
            cleanup_stale()
            assert PATH.stat().st_ino == os.fstat(ring._fileno()).st_ino
    counts.put(("made", count))


def race(seconds: float) -> None:
    """All against all, over one name that is left stale again and again."""
    stop = multiprocessing.get_context("fork").Event()
    racers = [clean_on, clean_on, attach_on, attach_on, make_on]
    with Queue() as counts, contextlib.ExitStack() as stack:
        running = [stack.enter_context(run_in_process(each, stop, counts)) for each in racers]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(FileExistsError):
                leave_stale()
            assert all(each.is_alive() for each in running)
        stop.set()
        for each in running:
            each.join(30)
            assert each.exitcode == 0
        said = counts.get_many()
        assert {what for what, count in said if count} == {"cleaned", "attached", "made"}
    cleanup_stale()
    assert not PATH.exists()


@pytest.mark.fault(28)
def test_cleaners_against_attachers_and_makers():
    race(1.5)


@pytest.mark.torture
@pytest.mark.fault(28)
def test_cleaners_against_attachers_and_makers_for_a_minute():
    race(60)

"""Killed in a chosen place, not reaped, replaced by `exec`: no call waits for the dead."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from header import (
    DATA_WAIT,
    LARGE,
    LEASE_OWNER,
    LOCKS,
    OWNER,
    SHUTDOWN,
    SLEEPING,
    WAITERS,
    WATCHES,
    WOKEN,
    first_frame,
    lock_word,
    stopped_under_lock,
    word,
)
from shmring import JoinableQueue, Queue, Ring
from shmring.errors import Empty, ShutDown
from support import asleep, run_in_process, wait_for
from traced import Traced, state_of, stop_to_be_traced


def name_of(pid: int | None) -> str:
    """Of the program that runs."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


# ---- locks -----------------------------------------------------------------------------------


@pytest.mark.fault(1, 2, 16)
@pytest.mark.parametrize("side", LOCKS)
def test_killed_under_a_lock_and_never_reaped(side):
    with Ring.create(1 << 24) as ring, stopped_under_lock(ring, side) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        ring.put(b"after", timeout=10)
        left = ring.get_many(timeout=10)
        wait_for(lambda: state_of(holder.pid) == "Z", what="it to be a zombie")
        assert left.pop() == b"after"
        assert [len(message) for message in left] in ([], [len(LARGE)])
        assert ring.statistics().recoveries == 1


@pytest.mark.fault(5)
@pytest.mark.parametrize("side", LOCKS)
def test_a_killed_waiter_for_a_lock_takes_nothing_with_it(side):
    def pass_through() -> None:
        if side == "producers":
            ring.put(b"", timeout=30)
        else:
            with contextlib.suppress(Empty):
                ring.get(timeout=3)  # on a busy machine it is seen asleep only if it waits for long
        assert ring.statistics().recoveries == 0

    with (
        Ring.create(1 << 24) as ring,
        stopped_under_lock(ring, side) as holder,
        run_in_process(pass_through) as victim,
    ):
        wait_for(lambda: lock_word(ring, side) & WAITERS, what="it to wait for the lock")
        with run_in_process(pass_through) as behind:
            wait_for(asleep(behind.pid), what="another to wait behind it")
            victim.kill()
            victim.join()
            assert lock_word(ring, side) & OWNER == holder.pid
            os.kill(holder.pid, signal.SIGCONT)
            behind.join(30)
            assert behind.exitcode == 0
        pass_through()


@pytest.mark.fault(19)
def test_exec_while_a_thread_holds_a_lock_lets_it_go():
    sleep = shutil.which("sleep")
    assert sleep is not None
    put_now, tell_to_put = os.pipe()
    exec_now, tell_to_exec = os.pipe()

    def replace_myself() -> None:
        def put() -> None:
            threads.put(threading.get_native_id())
            os.read(put_now, 1)
            ring.put(LARGE)

        threading.Thread(target=put, daemon=True).start()
        os.read(exec_now, 1)
        os.execl(sleep, sleep, "60")

    with Ring.create(1 << 24) as ring, Queue() as threads, run_in_process(replace_myself) as child:
        putter = threads.get(timeout=10)
        traced = Traced(putter, seize=True)
        os.write(tell_to_put, b"x")
        traced.step_while(lambda: lock_word(ring, "producers") & OWNER != putter)
        os.write(tell_to_exec, b"x")
        traced.wait_for_its_end()
        wait_for(lambda: name_of(child.pid) == "sleep")
        ring.put(b"after", timeout=10)
        assert ring.get_many(timeout=10) == [b"after"]
        assert ring.statistics().recoveries == 1
        assert child.is_alive()
    for each in (put_now, tell_to_put, exec_now, tell_to_exec):
        os.close(each)


@pytest.mark.fault(19)
@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_exec_inside_a_block_holds_the_message_until_the_new_program_ends(side):
    cat = shutil.which("cat")
    assert cat is not None
    reading, writing = os.pipe()

    def replace_myself() -> None:
        with ring.reserve(4) if side == "reserve" else ring.peek():
            ring.put(b"behind")
            os.dup2(reading, 0)
            os.close(writing)
            os.execl(cat, cat)

    with Ring.create() as ring:
        if side == "peek":
            ring.put(b"front")
        with run_in_process(replace_myself) as child:
            wait_for(lambda: name_of(child.pid) == "cat")
            with pytest.raises(Empty):
                ring.get(timeout=0.1)
            os.close(writing)
            assert ring.get(timeout=10) == (b"front" if side == "peek" else b"behind")
        os.close(reading)


# ---- owners of reservations and leases -------------------------------------------------------


def hold(ring: Ring, side: str) -> None:
    with ring.reserve(4) if side == "reserve" else ring.peek():
        ring.put(b"behind")
        signal.pause()


@pytest.mark.fault(9, 16)
@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_the_owner_of_a_block_killed_and_never_reaped(side):
    with Ring.create() as ring:
        ring.put(b"front")
        with run_in_process(hold, ring, side) as owner:
            wait_for(lambda: ring.statistics().messages == (3 if side == "reserve" else 2))
            owner.kill()
            assert [ring.get(timeout=10), ring.get(timeout=10)] == [b"front", b"behind"]
            wait_for(lambda: state_of(owner.pid) == "Z", what="it to be a zombie")


@pytest.mark.fault(17)
@pytest.mark.parametrize("side", ["reserve", "peek"])
def test_the_owner_of_a_block_whose_pid_another_process_has_now(side):
    with Ring.create() as ring:
        if side == "peek":
            ring.put(b"front")
        with run_in_process(hold, ring, side) as owner:
            wait_for(lambda: ring.statistics().messages == 2)
            at = LEASE_OWNER if side == "peek" else first_frame(ring) + 24
            named = word(ring, at)
            assert named & 0x3FFFFF == owner.pid
            with pytest.raises(Empty):
                ring.get(timeout=0.1)
            word(ring, at, named - (1 << 22))  # one that began a tick earlier
            assert ring.get(timeout=10) == (b"front" if side == "peek" else b"behind")
            assert owner.is_alive()


# ---- sleepers and wakes ----------------------------------------------------------------------


@pytest.mark.fault(3, 7)
def test_a_wake_that_never_arrives_costs_one_slice_of_sleep():
    """A producer that dies before its wake, and a woken one that dies, both leave this behind."""
    left_alone = 0
    with Ring.create() as ring:
        for _ in range(10):
            taken: list[bool] = []

            def take(taken: list[bool] = taken) -> None:
                ring.get(timeout=30)
                taken.append(True)

            thread = threading.Thread(target=take)
            thread.start()
            wait_for(lambda: word(ring, DATA_WAIT, size=4) & SLEEPING)
            woken = word(ring, DATA_WAIT, word(ring, DATA_WAIT, size=4) | WOKEN, size=4)
            ring.put(b"and no process is told")
            left_alone += word(ring, DATA_WAIT, size=4) == woken and not taken
            wait_for(lambda: taken, what="the end of its slice")  # noqa: B023
            thread.join(10)
    assert left_alone, "each of the wakes was made after all"


@pytest.mark.fault(7)
def test_a_woken_consumer_killed_leaves_the_message_to_another():
    with Ring.create() as ring, Queue() as answers:

        def be_woken() -> None:
            stop_to_be_traced()
            ring.get()

        def take() -> None:
            answers.put(ring.get(timeout=60))

        def killed_when_woken() -> bool:
            with run_in_process(be_woken) as victim:
                traced = Traced(victim.pid)
                traced.fall_asleep(lambda: word(ring, DATA_WAIT, size=4) & SLEEPING)
                with run_in_process(take) as other:
                    wait_for(lambda: other.pid in {w["pid"] for w in ring.statistics().waiters})
                    ring.put(b"for one of them")
                    woken = traced.woken()
                    victim.kill()
                    assert answers.get(timeout=10) == b"for one of them"
            return woken

        # On a busy machine its slice of sleep may have ended, and the other one was woken.
        assert any(killed_when_woken() for _ in range(10))


@pytest.mark.fault(6)
def test_puts_after_the_death_of_sleepers_wake_no_process():
    with Ring.create() as ring, contextlib.ExitStack() as victims:
        for _ in range(3):
            victims.enter_context(run_in_process(ring.get))
        wait_for(lambda: ring.statistics().consumers_waiting)
        victims.close()
        ring.put(b"first")  # finds out that no process sleeps
        after = word(ring, DATA_WAIT, size=4)
        assert not after & SLEEPING
        for _ in range(1000):
            ring.put(b"x")
        assert word(ring, DATA_WAIT, size=4) == after
        assert len(ring.get_many()) == 1001


def sleeps_of(pid: int | None) -> int:
    """How often a process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@contextlib.contextmanager
def many_sleepers(ring: Ring, count: int) -> Iterator[tuple[list[BaseProcess], Queue[object]]]:
    """Consumers that sleep, and the messages that they took."""
    with Queue() as taken, contextlib.ExitStack() as stack:

        def take() -> None:
            taken.put(ring.get())

        yield [stack.enter_context(run_in_process(take)) for _ in range(count)], taken


def those_on_watch(sleepers: list[BaseProcess], count: int) -> list[BaseProcess]:
    """Wait until so many of the sleepers look once a slice, which the others do not."""
    found: list[BaseProcess] = []

    def looked() -> bool:
        # One that keeps no watch sleeps once in two seconds.
        before = [sleeps_of(one.pid) for one in sleepers]
        time.sleep(0.5)
        found[:] = [
            one
            for one, already in zip(sleepers, before, strict=True)
            if sleeps_of(one.pid) - already >= 3
        ]
        return len(found) == count

    wait_for(looked, what=f"{count} sleepers that look once a slice")
    return found


@pytest.mark.fault(3, 6, 7)
def test_two_of_many_sleepers_look_once_a_slice_and_others_take_over_from_the_dead():
    with Ring.create() as ring, many_sleepers(ring, 5) as (sleepers, taken):
        for left in (4, 3):
            victim = those_on_watch(sleepers, 2)[0]
            victim.kill()
            victim.join(10)
            sleepers.remove(victim)
            assert len(sleepers) == left
        for victim in those_on_watch(sleepers, 2):  # both at once
            victim.kill()
            sleepers.remove(victim)
        those_on_watch(sleepers, 1)
        # A producer killed before it wakes a consumer, or a consumer killed when woken.
        word(ring, DATA_WAIT, word(ring, DATA_WAIT, size=4) | WOKEN, size=4)
        ring.put(b"and no process is told")
        assert taken.get(timeout=10) == b"and no process is told"


@pytest.mark.fault(6)
def test_forged_watches_are_taken_over():
    with Ring.create() as ring:
        for at in WATCHES:
            word(ring, at, 0xFFFFFFFFFFFFFFF0)
        with many_sleepers(ring, 3) as (sleepers, _):
            those_on_watch(sleepers, 2)


def test_a_shutdown_whose_caller_is_killed_reaches_every_sleeper():
    with Ring.create() as ring, Queue() as told, contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                ring.get()
            except ShutDown:
                told.put("shut down")

        sleepers = [stack.enter_context(run_in_process(take)) for _ in range(5)]
        those_on_watch(sleepers, 2)
        before = word(ring, DATA_WAIT, size=4)
        word(ring, SHUTDOWN, 1, size=4)  # and none is woken
        for _ in sleepers:
            assert told.get(timeout=10) == "shut down"
        sequence = [word(ring, DATA_WAIT, size=4) // 4, before // 4]
        assert sequence[0] > sequence[1], "those that keep no watch were left to themselves"


# ---- joining ---------------------------------------------------------------------------------


@pytest.mark.fault(39)
def test_a_consumer_killed_before_task_done_is_waited_for():
    with JoinableQueue() as queue, Queue() as taken:

        def take_and_wait() -> None:
            taken.put(queue.get())
            signal.pause()

        queue.put_many(["done", "never done"])
        queue.get()
        queue.task_done()
        with run_in_process(take_and_wait):
            assert taken.get(timeout=30) == "never done"
        joined = threading.Event()

        def join() -> None:
            queue.join()
            joined.set()

        thread = threading.Thread(target=join)
        thread.start()
        assert queue.join(timeout=0.3) is False
        assert not joined.is_set()
        queue.task_done()  # a supervisor that knows of the death may say so
        thread.join(30)
        assert joined.is_set()

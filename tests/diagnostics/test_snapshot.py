"""Waiters, holders and deaths in statistics()."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

import pytest

import shmring

pytest.importorskip("shmring._core.handle")

from header import LAYOUT, LOCKS, OWNER_DIED, lock_word, stopped_under_lock, word
from shmring import JoinableQueue, Queue, Ring
from shmring.process.liveness import process_start_ticks
from support import run_in_process, wait_for

LOCK_NAMES = {"producers": "the producers' lock", "consumers": "the consumers' lock"}
WAITERS, WAITER_BYTES = LAYOUT["WAITERS_OFFSET"], 32


def waiting(ring: Any) -> set[tuple[int, str, str]]:
    return {(each["pid"], each["call"], each["waits_for"]) for each in ring.statistics().waiters}


# ---- waiters --------------------------------------------------------------------------------


def _peek(ring: Ring) -> None:
    with ring.peek():
        pass


def _reserve(ring: Ring) -> None:
    with ring.reserve(100):
        pass


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda queue: queue.get(), "get"),
        (lambda queue: queue.get(timeout=60, peers=[os.getppid()]), "get"),
        (lambda queue: queue.get_many(), "get"),
        (lambda queue: shmring.wait([queue]), "wait"),
    ],
)
def test_a_waiter_for_a_message_is_shown(call, name) -> None:
    with Queue() as queue:
        assert queue.statistics().waiters == []
        before = time.monotonic_ns()
        with run_in_process(call, queue) as waiter:
            wait_for(lambda: queue.statistics().waiters)
            (shown,) = queue.statistics().waiters
            assert shown["seconds"] <= (time.monotonic_ns() - before) / 1e9
            assert before < shown["since_ns"] < time.monotonic_ns()
            assert {**shown, "since_ns": 0, "seconds": 0} == {
                "pid": waiter.pid,
                "tid": waiter.pid,
                "state": "alive",
                "call": name,
                "waits_for": "a message",
                "since_ns": 0,
                "seconds": 0,
            }
            wait_for(lambda: queue.statistics().waiters[0]["seconds"] > 0.2)
            assert queue.statistics().waiters[0]["since_ns"] == shown["since_ns"]
            queue.put(1)
            wait_for(lambda: queue.statistics().waiters == [])


@pytest.mark.parametrize("name", ["put", "reserve", "peek"])
def test_a_waiter_on_a_ring_is_shown(name) -> None:
    act = {"put": lambda ring: ring.put(bytes(2000)), "reserve": _reserve, "peek": _peek}[name]
    with Ring.create(1 << 12) as ring:
        if name != "peek":
            ring.put_many([bytes(1000)] * 3)
            ring.put(bytes(900))
        with run_in_process(act, ring) as waiter:
            wait_for(lambda: waiting(ring))
            reason = "a message" if name == "peek" else "room"
            assert waiting(ring) == {(waiter.pid, name, reason)}


def test_waiters_for_tasks_and_in_asyncio_are_shown() -> None:
    import asyncio

    with JoinableQueue() as queue:
        with run_in_process(lambda: asyncio.run(queue.aget())) as waiter:
            wait_for(lambda: waiting(queue))
            assert waiting(queue) == {(waiter.pid, "aget or aput", "a message")}
        queue.put(1)
        with run_in_process(queue.join) as waiter:
            wait_for(lambda: waiting(queue))
            assert waiting(queue) == {(waiter.pid, "join", "task_done")}


@pytest.mark.parametrize("side", LOCKS)
def test_the_waiter_and_the_holder_of_a_lock_are_shown(side: str) -> None:
    with Ring.create(1 << 24) as ring, stopped_under_lock(ring, side) as holder:
        act = ring.get if side == "consumers" else lambda: ring.put(b"")
        with run_in_process(act) as waiter:
            wait_for(lambda: ring.statistics().waiters)
            found = ring.statistics()
            call = "get" if side == "consumers" else "put"
            assert waiting(ring) == {(waiter.pid, call, "a lock")}
            assert found.holders == [
                {
                    "pid": holder.pid,
                    "tid": holder.pid,
                    "state": "stopped",
                    "holds": LOCK_NAMES[side],
                }
            ]


def test_a_stopped_waiter_is_said_to_be_stopped() -> None:
    with Queue() as queue, run_in_process(queue.get) as waiter:
        wait_for(lambda: queue.statistics().waiters)
        os.kill(waiter.pid or 0, signal.SIGSTOP)
        wait_for(lambda: queue.statistics().waiters[0]["state"] == "stopped")


def test_a_killed_waiter_is_not_shown_and_its_record_is_free() -> None:
    with Queue() as queue, contextlib.ExitStack() as stack:
        waiters = [stack.enter_context(run_in_process(queue.get)) for _ in range(3)]
        wait_for(lambda: len(queue.statistics().waiters) == 3)
        for waiter in waiters[:2]:
            os.kill(waiter.pid or 0, signal.SIGKILL)
        wait_for(lambda: len(queue.statistics().waiters) == 1)
        assert [each["pid"] for each in queue.statistics().waiters] == [waiters[2].pid]
        assert sum(word(queue, WAITERS + i * WAITER_BYTES) != 0 for i in range(32)) == 1


def test_waiters_use_the_records_of_the_dead_again() -> None:
    """A table full of dead waiters, which is not read."""
    dead = (process_start_ticks(os.getpid()) - 1) << 22 | os.getpid()
    with Queue() as queue:
        for i in range(LAYOUT["WAITER_COUNT"]):
            word(queue, WAITERS + i * WAITER_BYTES, dead)
            word(queue, WAITERS + i * WAITER_BYTES + 8, 1)
        with run_in_process(queue.get) as waiter:
            mine = process_start_ticks(waiter.pid or 0) << 22 | (waiter.pid or 0)

            def shown() -> bool:
                return any(word(queue, WAITERS + i * WAITER_BYTES) == mine for i in range(32))

            wait_for(shown)
            assert waiting(queue) == {(waiter.pid, "get", "a message")}


def test_more_wait_than_can_be_shown() -> None:
    with Queue() as queue:
        threads = [threading.Thread(target=queue.get) for _ in range(40)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(queue.statistics().waiters) == LAYOUT["WAITER_COUNT"])
        tids = {each["tid"] for each in queue.statistics().waiters}
        assert tids <= {thread.native_id for thread in threads}
        assert len(tids) == LAYOUT["WAITER_COUNT"]
        queue.put_many(range(40))
        for thread in threads:
            thread.join(20)
        assert queue.statistics().waiters == []
        assert queue.empty()


# ---- holders and deaths ----------------------------------------------------------------------


@pytest.mark.parametrize("side", LOCKS)
def test_the_death_of_a_lock_owner_is_shown(side: str) -> None:
    with Ring.create(1 << 24) as ring:
        assert ring.statistics().deaths == []
        with stopped_under_lock(ring, side) as holder:
            os.kill(holder.pid or 0, signal.SIGKILL)
            wait_for(lambda: lock_word(ring, side) & OWNER_DIED)
            begun = time.monotonic_ns()
            if side == "producers":  # to look at the front would recover the consumers'
                (shown,) = ring.statistics().holders
                assert (shown["pid"], shown["state"]) == (holder.pid, "dead")
            ring.put(b"", timeout=10)
            ring.get(timeout=10)
            found = ring.statistics()
            assert found.holders == []
            assert found.recoveries == 1
            (death,) = found.deaths
            assert (death["pid"], death["held"]) == (holder.pid, LOCK_NAMES[side])
            assert begun < death["when_ns"] < time.monotonic_ns()
            assert 0 <= death["seconds"] < 60


def test_a_lock_whose_dead_owner_is_unknown() -> None:
    with Ring.create() as ring:
        lock_word(ring, "producers", OWNER_DIED)
        ring.put(b"")
        (death,) = ring.statistics().deaths
        assert (death["pid"], death["held"]) == (None, "the producers' lock")


def test_a_held_lock_is_free_again_and_its_holder_forgotten() -> None:
    with Ring.create() as ring:
        ring.put(b"one")
        ring.get()
        for at in LOCKS.values():
            assert word(ring, at + 4, size=4) == 0
        assert ring.statistics().holders == []


@pytest.mark.parametrize("kind", ["reserve", "peek"])
def test_the_holder_of_a_block_and_its_death_are_shown(kind: str) -> None:
    with Ring.create() as ring:
        if kind == "peek":
            ring.put(b"front")
        with run_in_process(_hold, ring, kind) as owner:
            shown = {"pid": owner.pid, "tid": None, "state": "alive", "holds": f"a {kind}"}
            wait_for(lambda: ring.statistics().holders == [shown])  # not a lock on the way there
            os.kill(owner.pid or 0, signal.SIGKILL)
            wait_for(lambda: ring.statistics().holders == [{**shown, "state": "dead"}])
            ring.put(b"behind")
            assert ring.get(timeout=10) == (b"front" if kind == "peek" else b"behind")
            (death,) = ring.statistics().deaths
            assert (death["pid"], death["held"]) == (owner.pid, f"a {kind}")
            assert ring.statistics().holders == []


def _hold(ring: Ring, kind: str) -> None:
    with ring.reserve(10) if kind == "reserve" else ring.peek():
        signal.pause()


def test_to_look_changes_nothing_for_other_processes() -> None:
    with Queue() as queue:
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                queue.statistics()

        thread = threading.Thread(target=look)
        thread.start()
        for number in range(3000):
            queue.put(number)
            assert queue.get() == number
        stop.set()
        thread.join(10)
        assert queue.statistics().recoveries == 0

"""The observer: what stands in shared memory, named and anonymous, and what goes on there."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("shmring._core.handle")

from header import LAYOUT, area, stopped_under_lock, word
from shmring import (
    HighPerformanceIPC,
    MessageType,
    ProcessPoolExecutor,
    Queue,
    Ring,
    SharedMemoryManager,
)
from shmring.errors import RingNotFound
from shmring.ipc.registry import ProcessRole
from shmring.observer.observer import Observer, listing
from shmring.shm import segment
from support import SHARED_MEMORY, own_name, run_in_process, wait_for

pytestmark = pytest.mark.usefixtures("only_cleaner")

NAME = own_name("observer")


def found(name: str | None, pid: int | None = None, kind: str | None = None) -> dict[str, Any]:
    """What is listed under a name, or open in a process."""
    (block,) = (
        each
        for each in listing(0.01)
        if each["name"] == name
        if pid is None or pid in each["pids"]
        if kind is None or kind == each["kind"]
    )
    return block


def test_counters_are_those_of_statistics() -> None:
    with Queue[Any](5, name=NAME) as queue:
        for size in (1, 100, 200_000):
            queue.put(bytes(size))
        queue.get()
        block = found(NAME)
        statistics = queue.statistics()
        for field in statistics.__slots__:
            assert block[field] == getattr(statistics, field), field
        assert (block["kind"], block["max_messages"]) == ("queue", 5)
        assert block["nbytes"] == os.fstat(queue._fileno()).st_blocks * 512


def test_owner_and_age() -> None:
    with run_in_process(_leave_a_queue_behind) as maker:
        wait_for(lambda: (SHARED_MEMORY / NAME).exists())
        block = found(NAME)
        assert block["owner"] == {"pid": maker.pid, "state": "alive"}
        assert 0 < block["age_seconds"] < 60
    block = found(NAME)
    assert (block["owner"]["state"], block["pids"]) == ("dead", [])
    assert NAME in segment.cleanup_stale()


def _leave_a_queue_behind() -> None:
    queue = Queue[int](name=NAME)
    queue.put(1)
    signal.pause()


def test_a_waiter_is_a_consumer() -> None:
    with Queue[int](name=NAME) as queue, run_in_process(queue.get) as waiter:
        wait_for(lambda: queue.statistics().waiters)
        block = found(NAME)
        assert sorted(block["pids"]) == sorted([os.getpid(), waiter.pid or 0])
        assert [(each["pid"], each["waits_for"]) for each in block["waiters"]] == [
            (waiter.pid, "a message")
        ]
        assert block["consumers"] == [waiter.pid]


def _put_one(queue: Queue[int]) -> None:
    queue.put(1)
    signal.pause()


def _get_one(queue: Queue[int]) -> None:
    assert queue.get_nowait() == 1
    signal.pause()


def test_the_last_put_and_take_are_seen_afterwards() -> None:
    with Queue[int](name=NAME) as queue, run_in_process(_put_one, queue) as producer:
        wait_for(lambda: queue.qsize() == 1)
        assert (found(NAME)["producers"], found(NAME)["consumers"]) == ([producer.pid], [])
        with run_in_process(_get_one, queue) as consumer:
            wait_for(lambda: queue.qsize() == 0)
            block = found(NAME)
            assert (block["producers"], block["consumers"]) == ([producer.pid], [consumer.pid])


@pytest.mark.parametrize("side", ["producers", "consumers"])
def test_a_lock_holder_is_seen(side: str) -> None:
    with (
        Ring.create(1 << 24, name=NAME) as ring,
        stopped_under_lock(ring, side) as holder,
    ):
        block = found(NAME)
        assert [(each["pid"], each["state"], each["holds"]) for each in block["holders"]] == [
            (holder.pid, "stopped", f"the {side}' lock")
        ]
        assert block[side] == [holder.pid]
        assert block["stopped"] == [holder.pid]


def test_rates_are_measured_between_looks() -> None:
    with Queue[int](name=NAME) as queue, Observer(NAME) as observer:
        (first,) = observer.look()
        assert first["rate"] is None
        before = time.monotonic()
        queue.put_many(range(1000))
        queue.get_many(400)
        (block,) = observer.look()
        passed = time.monotonic() - before
        assert block["put_rate"] > 1000 / (passed + 10)
        assert block["rate"] == pytest.approx(0.4 * block["put_rate"])


def test_a_look_changes_nothing() -> None:
    with Ring.create(name=NAME) as ring, run_in_process(_reserve_for_ever, ring) as holder:
        wait_for(lambda: found(NAME)["holders"])
        assert found(NAME)["holders"][0]["holds"] == "a reserve"
        holder.kill()
        holder.join()
        wait_for(lambda: found(NAME)["holders"][0]["state"] == "dead")
        before = (SHARED_MEMORY / NAME).read_bytes()
        listing()
        assert (SHARED_MEMORY / NAME).read_bytes() == before
        assert found(NAME)["messages"] == 1


def _reserve_for_ever(ring: Ring) -> None:
    with ring.reserve(8):
        signal.pause()


def test_an_observer_is_no_user_of_what_it_looks_at() -> None:
    with Ring.create(name=NAME), Observer() as observer:
        observer.look()
        assert found(NAME)["pids"] == [os.getpid()]
    with Ring.create(name=NAME), run_in_process(_look_for_ever, NAME, method="spawn") as looking:
        wait_for(lambda: _has_it_open(looking.pid or 0), 60)
        assert looking.pid not in found(NAME)["pids"]
    assert not (SHARED_MEMORY / NAME).exists()


def _look_for_ever(name: str) -> None:
    with Observer(name) as observer:
        observer.look()
        signal.pause()


def _has_it_open(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(NAME in os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_a_ring_that_vanishes_is_gone_at_the_next_look() -> None:
    with Observer(NAME) as observer:
        with Ring.create(name=NAME):
            assert len(observer.look()) == 1
        with pytest.raises(RingNotFound, match="does not exist"):
            observer.look()


def test_anonymous_rings_bear_the_name_that_they_would_get() -> None:
    with Ring.create() as ring:
        (block,) = (each for each in listing(0.01) if os.getpid() in each["pids"])
        assert block["name"] is None
        assert block["id"] == ring.name
        assert found(ring.name)["kind"] == "ring"


def test_a_registry_and_what_its_processes_do() -> None:
    namespace = own_name("observer-registry")
    with HighPerformanceIPC("boss", namespace=namespace) as ipc:
        ipc.create_message_queue("jobs")
        ipc.register(ProcessRole.COORDINATOR)
        with run_in_process(_receive, namespace) as worker:
            registry = f"shmring.{namespace}.registry"

            def hand() -> dict[str, Any]:
                processes = {each["process_id"]: each for each in found(registry)["processes"]}
                assert processes["boss"]["role"] == "coordinator"
                return processes.get("hand", {"state": "absent"})

            wait_for(lambda: hand()["state"] == "waiting")
            assert (hand()["waits_for"], hand()["pid"]) == ("jobs", worker.pid)
            assert found(registry)["kind"] == "registry"
            os.kill(worker.pid or 0, signal.SIGKILL)
            wait_for(lambda: hand()["state"] == "dead")
        ipc.send_message("jobs", MessageType.DATA, None)


def _receive(namespace: str) -> None:
    with HighPerformanceIPC("hand", namespace=namespace) as ipc:
        ipc.connect_message_queue("jobs")
        ipc.receive_message("jobs")


def _until_released(path: str) -> None:
    wait_for(Path(path).exists, 60)


def test_a_pool_its_tasks_and_its_workers(tmp_path: Path) -> None:
    released = tmp_path / "released"
    with ProcessPoolExecutor(2) as pool, contextlib.ExitStack() as after:
        after.callback(released.touch)  # so that no failure here leaves a task that waits
        assert found(None, os.getpid(), "pool")["owner"] == {"pid": os.getpid(), "state": "alive"}
        futures = [pool.submit(_until_released, str(released)) for _ in range(3)]

        def shown() -> dict[str, Any]:
            return found(None, os.getpid(), "pool")

        wait_for(lambda: shown()["tasks"]["running"] == 2)
        block = shown()
        assert block["tasks"]["submitted"] == block["tasks"]["unanswered"] == 3
        workers = [each["pid"] for each in block["processes"]]
        assert sorted(workers) == sorted(pool._processes)
        queues = [each["id"] for each in listing(0.01) if os.getpid() in each["pids"]]
        assert {*block["queues"]} <= {*queues}
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: (shown()["tasks"]["retried"], shown()["died"]) == (1, 1))
        released.touch()
        for each in futures:
            each.result(60)
        wait_for(lambda: shown()["tasks"]["answered"] == 3)


def test_what_cannot_be_looked_into_says_why() -> None:
    with Ring.create(name=NAME) as ring:
        word(ring, 8, 77, size=4)
        assert "version 77 of the layout" in found(NAME)["error"]
        word(ring, 8, LAYOUT["VERSION"], size=4)
        kept = area(ring, 0)
        area(ring, 0, (0, 3, 1 << 63))
        assert "the ring is damaged" in found(NAME)["error"]
        area(ring, 0, (0, kept[1], kept[2]))


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_a_header_of_garbage_is_shown_or_refused(byte: int) -> None:
    """Everything behind the version, the namespace and `ready` is one byte, again and again."""
    with Ring.create(name=NAME) as ring:
        start = os.pread(ring._fileno(), 8192, 0)
        os.pwrite(ring._fileno(), bytes([byte]) * (8192 - 56), 56)
        try:
            block = found(NAME)
            assert block["kind"] == "ring"
            assert ("error" in block) or block["messages"] >= 0
        finally:
            os.pwrite(ring._fileno(), start, 0)


def test_a_file_that_is_cut_short_is_refused() -> None:
    ring = Ring.create(name=NAME)
    start = (SHARED_MEMORY / NAME).read_bytes()
    ring.close()
    try:
        (SHARED_MEMORY / NAME).write_bytes(start[:100])
        assert "too few" in found(NAME)["error"]
    finally:
        (SHARED_MEMORY / NAME).unlink()


@pytest.mark.parametrize("nbytes", [0, 100])
def test_a_file_is_cut_short_between_looks(nbytes: int) -> None:
    with Ring.create(name=NAME) as ring, Observer(NAME) as observer:
        observer._scan()
        start = (SHARED_MEMORY / NAME).read_bytes()
        os.ftruncate(ring._fileno(), nbytes)
        try:
            for _ in range(2):
                (block,) = observer.look(detail=False)
                assert "too few" in block["error"]
        finally:
            os.pwrite(ring._fileno(), start, 0)


def test_a_ring_without_a_time_is_looked_at_again() -> None:
    with Ring.create(name=NAME) as ring, Observer(NAME) as observer:
        word(ring, 56, 0)  # created_ns
        for _ in range(2):
            (block,) = observer.look(detail=False)
            assert block["age_seconds"] is None
            assert "error" not in block


def test_other_blocks() -> None:
    memory = SharedMemoryManager(NAME, 4096)
    assert memory.create()
    try:
        assert found(NAME)["kind"] == "memory"
    finally:
        memory.cleanup()
    foreign = SHARED_MEMORY / NAME
    foreign.write_bytes(b"of another program")
    try:
        assert not [each for each in listing(0.01) if each["name"] == NAME]
    finally:
        foreign.unlink()

"""``shmring ls``: what stands in shared memory, named and anonymous, and what goes on there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("shmring._core.handle")

from header import LAYOUT, word
from shmring import HighPerformanceIPC, MessageType, Queue, Ring, SharedMemoryManager
from shmring.cli.listing import listing
from shmring.ipc.registry import ProcessRole
from shmring.shm import segment
from support import SHARED_MEMORY, own_name, run_in_process, wait_for

pytestmark = pytest.mark.usefixtures("only_cleaner")

NAME = own_name("listing")


def ls(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "shmring", "ls", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def found(name: str | None, pid: int | None = None) -> dict[str, Any]:
    """What is listed under a name, or open in a process."""
    (block,) = (
        each for each in listing() if each["name"] == name and (pid is None or pid in each["pids"])
    )
    return block


def _wait_for_one(queue: Queue[int]) -> None:
    queue.get()


def test_a_named_queue_and_its_waiters() -> None:
    with Queue[int](name=NAME) as queue, run_in_process(_wait_for_one, queue) as waiter:
        wait_for(lambda: queue.statistics().waiters)
        block = found(NAME)
        assert (block["kind"], block["messages"]) == ("queue", 0)
        assert block["nbytes"] == os.fstat(queue._fileno()).st_blocks * 512
        assert sorted(block["pids"]) == sorted([os.getpid(), waiter.pid or 0])
        assert [each["pid"] for each in block["waiters"]] == [waiter.pid]
        shown = [each for each in json.loads(ls("--json")) if each["name"] == NAME]
        assert [each["pids"] for each in shown] == [block["pids"]]
        text = ls()
        assert f"{NAME}  queue, 0 messages, " in text
        assert f"process {waiter.pid} waits in get for a message, " in text


def test_a_stopped_reader_that_holds_nothing_is_marked_as_stopped() -> None:
    with Queue[int](name=NAME) as queue, run_in_process(_read_for_ever, queue) as reader:
        assert queue.get(timeout=30) == 0  # it has the queue open, and is in no call of it
        os.kill(reader.pid or 0, signal.SIGSTOP)
        wait_for(lambda: f"{reader.pid} (stopped)" in ls())
        assert f"process {reader.pid}" not in ls()
        os.kill(reader.pid or 0, signal.SIGCONT)
        wait_for(lambda: f"{reader.pid} (stopped)" not in ls())


def _read_for_ever(queue: Queue[int]) -> None:
    queue.put(0)
    signal.pause()


def test_an_anonymous_ring_is_found_by_its_open_files() -> None:
    with Ring.create() as ring, run_in_process(_hold_for_ever, ring) as holder:
        wait_for(lambda: ring.statistics().holders)
        block = found(None, holder.pid)
        assert (block["kind"], block["messages"]) == ("ring", 1)
        assert f"process {holder.pid} holds a reserve" in ls()
        os.kill(holder.pid or 0, signal.SIGSTOP)
        wait_for(lambda: f"process {holder.pid} (stopped) holds a reserve" in ls())
        os.kill(holder.pid or 0, signal.SIGKILL)
        wait_for(lambda: f"process {holder.pid} (dead) holds a reserve" in ls())
        ring.put(b"behind")
        assert ring.get(timeout=10) == b"behind"
        assert f"process {holder.pid} died holding a reserve, " in ls()


def _hold_for_ever(ring: Ring) -> None:
    with ring.reserve(8):
        signal.pause()


def test_a_registry_and_what_its_processes_do() -> None:
    namespace = own_name("listing-registry")
    with HighPerformanceIPC("boss", namespace=namespace) as ipc:
        ipc.create_message_queue("jobs")
        ipc.register(ProcessRole.COORDINATOR)
        with run_in_process(_receive, namespace) as worker:
            registry = f"shmring.{namespace}.registry"
            row = f"hand (process {worker.pid}) waiting, waits for jobs, "
            wait_for(lambda: row in ls())
            processes = {each["process_id"]: each for each in found(registry)["processes"]}
            assert processes["boss"]["role"] == "coordinator"
            assert processes["hand"]["waits_for"] == "jobs"
            assert found(registry)["kind"] == "registry"
            os.kill(worker.pid or 0, signal.SIGKILL)
            wait_for(lambda: f"hand (process {worker.pid}) dead, waits for jobs, " in ls())
        ipc.send_message("jobs", MessageType.DATA, None)


def _receive(namespace: str) -> None:
    with HighPerformanceIPC("hand", namespace=namespace) as ipc:
        ipc.connect_message_queue("jobs")
        ipc.receive_message("jobs")


def test_to_list_is_not_to_join_and_removes_nothing() -> None:
    with run_in_process(_leave_a_queue_behind) as crashed:
        wait_for(lambda: (SHARED_MEMORY / NAME).exists() and found(NAME).get("messages") == 1)
        crashed.kill()
        crashed.join(10)
    assert found(NAME)["pids"] == []
    assert f"{NAME}  queue, 1 message, " in ls()
    assert "open nowhere: shmring rm --stale removes it" in ls()
    assert (SHARED_MEMORY / NAME).exists()
    assert NAME in segment.cleanup_stale()


def _leave_a_queue_behind() -> None:
    queue = Queue[int](name=NAME)
    queue.put(1)
    signal.pause()


def test_what_cannot_be_looked_into_says_why() -> None:
    with Ring.create(name=NAME) as ring:
        word(ring, 8, 77, size=4)
        assert "version 77 of the layout" in found(NAME)["error"]
        assert "version 77 of the layout" in ls()
        word(ring, 8, LAYOUT["VERSION"], size=4)


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
        assert not [each for each in listing() if each["name"] == NAME]
    finally:
        foreign.unlink()


def test_the_fallback_has_nothing_to_list() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shmring", "ls"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "SHMRING_BACKEND": "queue"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "a pipe shows nothing" in done.stderr

"""HighPerformanceIPC and the registry: living and dead processes, slots taken and given back."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import time
from multiprocessing import util

import pytest

from shmring.fallback.files import fallback_folder
from shmring.ipc import high_performance_ipc as ipc_module
from shmring.ipc import registry
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.message import Message, MessageType
from support import run_in_process, wait_for

pytestmark = pytest.mark.both_backends


# -- the dead stay dead -----------------------------------------------------------------------


def stand_in_registry(namespace: str, process_id: str) -> None:
    with HighPerformanceIPC(process_id, namespace=namespace) as ipc:
        ipc.connect_message_queue("quiet", timeout=60)


@pytest.fixture
def slots_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of a dead process goes to the next, not only after ten seconds."""
    monkeypatch.setattr(registry, "_KEPT_NS", 0)


@pytest.mark.usefixtures("slots_go_at_once")
@pytest.mark.parametrize("seen_dead", [True, False])
def test_the_dead_stay_dead_when_another_has_their_slot(
    ipc: HighPerformanceIPC, namespace: str, seen_dead: bool
) -> None:
    with run_in_process(stand_in_registry, namespace, "a") as process:
        wait_for(lambda: ipc.check_alive_processes(60) == ["a"], what="it in the registry")
        (slot,) = [each.index for each in ipc.registry_entries() if each.process_id == "a"]
    assert process.exitcode == -9
    if seen_dead:
        assert ipc.check_alive_processes(60) == []
    with HighPerformanceIPC("b", namespace=namespace) as heir:
        assert heir.register(registry.ProcessRole.PEER).index == slot
        assert ipc.check_alive_processes(60) == ["b"]
        assert ipc.check_alive_processes(60) == ["b"]
        assert ipc.get_stats()["alive_processes"] == 2, "seen so far"
        with HighPerformanceIPC("a", namespace=namespace) as again:
            again.register(registry.ProcessRole.PEER)
            assert ipc.check_alive_processes(60) == ["a", "b"], "a newer sign of life"
        assert ipc.check_alive_processes(60) == ["b"]


@pytest.mark.usefixtures("slots_go_at_once")
def test_an_old_heartbeat_revives_no_process(ipc: HighPerformanceIPC, namespace: str) -> None:
    ipc.create_message_queue("q")
    queue = ipc.message_queues["q"]
    with HighPerformanceIPC("a", namespace=namespace) as mortal:
        mortal.connect_message_queue("q")
        mortal.send_heartbeat("q")
        assert ipc.check_alive_processes(60) == ["a"]
    assert ipc.check_alive_processes(60) == []
    with HighPerformanceIPC("b", namespace=namespace) as heir:
        heir.register(registry.ProcessRole.PEER)
        assert ipc.receive_message("q", timeout=5) is not None
        assert ipc.check_alive_processes(60) == ["b"], "it was sent before the death"
        queue.put(Message(MessageType.HEARTBEAT, "a", time.time()))
        assert ipc.receive_message("q", timeout=5) is not None
        assert ipc.check_alive_processes(60) == ["a", "b"]


# -- one slot, given back ---------------------------------------------------------------------


def test_threads_that_come_first_together_take_one_slot(
    ipc: HighPerformanceIPC, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_here = threading.Barrier(4)
    original = ipc_module.open_registry

    def open_together(name: str) -> registry.RegistryStorage:
        with contextlib.suppress(threading.BrokenBarrierError):
            all_here.wait(0.5)  # without the lock all four get here
        return original(name)

    monkeypatch.setattr(ipc_module, "open_registry", open_together)
    threads = [threading.Thread(target=ipc.check_alive_processes) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [each.process_id for each in ipc.registry_entries()] == ["main"]


def use_inherited(ipc: HighPerformanceIPC) -> None:
    ipc.process_id = "child"
    ipc.create_message_queue("from-child")
    ipc.connect_message_queue("never", timeout=60)


def test_a_child_forked_while_a_thread_joins_is_not_stuck(ipc: HighPerformanceIPC) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ipc._joining:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:
        with (
            HighPerformanceIPC("watch", namespace=ipc.namespace) as watch,
            run_in_process(use_inherited, ipc),
        ):
            watch.connect_message_queue("from-child", timeout=30)
            assert watch.check_alive_processes() == ["child"]
    finally:
        done.set()
        thread.join(10)


def test_one_that_is_dropped_open_says_so_and_leaves(namespace: str) -> None:
    dropped = HighPerformanceIPC("dropped", namespace=namespace)
    dropped.create_message_queue("q")
    with HighPerformanceIPC("main", namespace=namespace) as ipc:
        assert ipc.check_alive_processes() == ["dropped"]
        instances = [dropped]
        del dropped
        with pytest.warns(ResourceWarning, match="'dropped' .* dropped open"):
            instances.clear()
        assert ipc.check_alive_processes() == []
        ipc.create_message_queue("q")


def test_one_that_was_never_used_is_dropped_in_silence(namespace: str) -> None:
    HighPerformanceIPC("unused", namespace=namespace)
    gc.collect()


def test_the_closed_are_forgotten(namespace: str) -> None:
    before = len(util._finalizer_registry)  # type: ignore[attr-defined]
    for _ in range(5):
        with HighPerformanceIPC("main", namespace=namespace) as ipc:
            ipc.create_message_queue("q")
            ipc.create_shared_memory("m", 10)
        HighPerformanceIPC("unused", namespace=namespace)
    assert len(util._finalizer_registry) == before  # type: ignore[attr-defined]


_DROPPED = """
import sys
from shmring import HighPerformanceIPC

def use():
    ipc = HighPerformanceIPC("main", namespace=sys.argv[1])
    ipc.create_message_queue("q")
    ipc.check_alive_processes()

use()
kept = HighPerformanceIPC("kept", namespace=sys.argv[1])
kept.create_message_queue("q")
"""


def test_a_program_that_forgets_cleanup_leaves_nothing(namespace: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", _DROPPED, namespace],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.count("dropped open: call cleanup()") == 1
    # The fixture looks into /dev/shm; the fallback's files stand elsewhere.
    left = [each for each in fallback_folder().iterdir() if namespace in each.name]
    assert left == []

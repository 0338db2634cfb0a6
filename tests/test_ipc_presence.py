"""HighPerformanceIPC among others: who lives, who is dead, who takes a slot and gives it back."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import util

import pytest

from shmring import board
from shmring import ipc as ipc_module
from shmring.ipc import HighPerformanceIPC
from shmring.message import Message, MessageType
from support import run_in_process, wait_for

pytestmark = pytest.mark.both_backends


@pytest.fixture
def namespace() -> str:
    return f"test-{os.getpid()}-{secrets.token_hex(4)}"


@pytest.fixture
def ipc(namespace: str) -> Iterator[HighPerformanceIPC]:
    with HighPerformanceIPC("main", namespace=namespace) as opened:
        yield opened


# -- the dead stay dead -----------------------------------------------------------------------


def stand_on_board(namespace: str, process_id: str) -> None:
    with HighPerformanceIPC(process_id, namespace=namespace) as ipc:
        ipc.connect_message_queue("quiet", timeout=60)


@pytest.fixture
def slots_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of a dead process goes to the next, not only after ten seconds."""
    monkeypatch.setattr(board, "_KEPT_NS", 0)


@pytest.mark.usefixtures("slots_go_at_once")
@pytest.mark.parametrize("seen_dead", [True, False])
def test_the_dead_stay_dead_when_another_has_their_slot(
    ipc: HighPerformanceIPC, namespace: str, seen_dead: bool
) -> None:
    with run_in_process(stand_on_board, namespace, "a") as process:
        wait_for(lambda: ipc.check_alive_processes(60) == ["a"], what="it on the board")
        (slot,) = [each.index for each in ipc.board_entries() if each.process_id == "a"]
    assert process.exitcode == -9
    if seen_dead:
        assert ipc.check_alive_processes(60) == []
    with HighPerformanceIPC("b", namespace=namespace) as heir:
        assert heir.join_board(board.Role.PEER).index == slot
        assert ipc.check_alive_processes(60) == ["b"]
        assert ipc.check_alive_processes(60) == ["b"]
        assert ipc.get_stats()["alive_processes"] == 2, "seen so far"
        with HighPerformanceIPC("a", namespace=namespace) as again:
            again.join_board(board.Role.PEER)
            assert ipc.check_alive_processes(60) == ["a", "b"], "a newer sign of life"
        assert ipc.check_alive_processes(60) == ["b"]


@pytest.mark.usefixtures("slots_go_at_once")
def test_an_old_heartbeat_revives_nobody(ipc: HighPerformanceIPC, namespace: str) -> None:
    ipc.create_message_queue("q")
    queue = ipc.message_queues["q"]
    with HighPerformanceIPC("a", namespace=namespace) as mortal:
        mortal.connect_message_queue("q")
        mortal.send_heartbeat("q")
        assert ipc.check_alive_processes(60) == ["a"]
    assert ipc.check_alive_processes(60) == []
    with HighPerformanceIPC("b", namespace=namespace) as heir:
        heir.join_board(board.Role.PEER)
        assert ipc.receive_message("q", timeout=5) is not None
        assert ipc.check_alive_processes(60) == ["b"], "it was sent before the death"
        queue.put(Message(MessageType.HEARTBEAT, "a", time.time()))
        assert ipc.receive_message("q", timeout=5) is not None
        assert ipc.check_alive_processes(60) == ["a", "b"]

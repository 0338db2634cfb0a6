"""HighPerformanceIPC: the whole contract, over both back ends."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
from typing import Any

import pytest

from shmring.errors import (
    EncodeError,
    Full,
    InvalidArgument,
    RingClosed,
    RingExists,
    RingNotFound,
)
from shmring.ipc import high_performance_ipc as ipc_module
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.message import Message, MessageType
from shmring.ipc.registry import RegistryEntry
from support import at_least, run_in_process, wait_for

pytestmark = pytest.mark.both_backends


# -- queues ---------------------------------------------------------------------------------


@pytest.mark.parametrize("msg_type", MessageType)
def test_a_message_arrives(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC, msg_type: MessageType
) -> None:
    ipc.create_message_queue("q")
    other.connect_message_queue("q")
    before = time.time()
    ipc.send_message("q", msg_type, {"n": 1})
    message = other.receive_message("q", timeout=5)
    assert isinstance(message, Message)
    assert (message.msg_type, message.sender_id, message.data) == (msg_type, "main", {"n": 1})
    assert before <= message.timestamp <= time.time()


def test_messages_keep_their_order_and_go_to_one_receiver(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    for number in range(100):
        ipc.send_message("q", MessageType.DATA, number)
    received = [ipc.receive_message("q", timeout=5) for _ in range(100)]
    assert [each.data for each in received if each] == list(range(100))
    assert ipc.receive_message("q", timeout=0) is None


def test_large_arrays_arrive_writable(ipc: HighPerformanceIPC) -> None:
    numpy = pytest.importorskip("numpy")
    ipc.create_message_queue("q")
    ipc.send_message("q", MessageType.DATA, numpy.ones(1 << 18, dtype="f4"))
    message = ipc.receive_message("q", timeout=5)
    assert message is not None
    array: Any = message.data
    array += 1
    assert array.sum() == 2 << 18


def test_none_means_time_out_only(ipc: HighPerformanceIPC, other: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    with at_least(0.3):
        assert ipc.receive_message("q", timeout=0.3) is None
    assert ipc.get_stats()["errors"] == 0
    ipc.message_queues["q"].close()
    with pytest.raises(RingClosed):
        ipc.receive_message("q", timeout=1)
    assert ipc.get_stats()["errors"] == 1


def test_a_full_queue_is_full_at_the_deadline(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q", maxsize=1)
    ipc.send_message("q", MessageType.DATA, 1, timeout=0)
    with pytest.raises(Full):
        ipc.send_message("q", MessageType.DATA, 2, timeout=0.05)
    stats = ipc.get_stats()
    assert (stats["messages_sent"], stats["errors"]) == (1, 1)


def test_what_cannot_be_pickled_is_not_sent(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    with pytest.raises(EncodeError):
        ipc.send_message("q", MessageType.DATA, lambda: None)
    assert ipc.receive_message("q", timeout=0) is None
    ipc.send_message("q", MessageType.DATA, "still usable")
    message = ipc.receive_message("q", timeout=5)
    assert message is not None
    assert message.data == "still usable"


def test_a_queue_is_created_once(ipc: HighPerformanceIPC, other: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    for instance in (ipc, other):
        with pytest.raises(RuntimeError, match="'q' exists"):
            instance.create_message_queue("q")
    assert issubclass(RingExists, FileExistsError)
    ipc.send_message("q", MessageType.DATA, "the first one works on")
    assert ipc.receive_message("q", timeout=5) is not None


def test_connecting_waits_for_the_creator(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC
) -> None:
    connecting = threading.Event()

    def create() -> None:
        connecting.wait(10)
        ipc.create_message_queue("late")

    thread = threading.Thread(target=create)
    thread.start()
    connecting.set()
    other.connect_message_queue("late", timeout=10)
    thread.join()
    other.send_message("late", MessageType.DATA, 1)
    assert ipc.receive_message("late", timeout=5) is not None


def test_connecting_gives_up_at_the_deadline(ipc: HighPerformanceIPC) -> None:
    with (
        at_least(0.3),
        pytest.raises(RuntimeError, match=r"'never' .* within timeout=0.3 s"),
    ):
        ipc.connect_message_queue("never", timeout=0.3)
    assert issubclass(RingNotFound, FileNotFoundError)


def test_connecting_twice_is_allowed(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    queue = ipc.message_queues["q"]
    ipc.connect_message_queue("q")
    assert ipc.message_queues == {"q": queue}


def test_unknown_names_are_value_errors(ipc: HighPerformanceIPC) -> None:
    for call in (
        lambda: ipc.send_message("no", MessageType.DATA, 1),
        lambda: ipc.receive_message("no", timeout=0),
        lambda: ipc.send_heartbeat("no"),
        lambda: ipc.write_shared_data("no", b""),
        lambda: ipc.read_shared_data("no", 1),
    ):
        with pytest.raises(ValueError, match="'no'"):
            call()


@pytest.mark.parametrize("name", ["", "a/b", "a\0b", "x" * 101])
def test_impossible_names_are_refused(ipc: HighPerformanceIPC, name: str) -> None:
    with pytest.raises(InvalidArgument):
        ipc.create_message_queue(name)
    with pytest.raises(InvalidArgument):
        ipc.connect_message_queue(name, timeout=0)
    with pytest.raises(InvalidArgument):
        ipc.create_shared_memory(name, 10)


def test_impossible_bounds_are_refused(ipc: HighPerformanceIPC) -> None:
    for absurd in (1 << 63, 1 << 70):
        with pytest.raises(InvalidArgument, match=f"maxsize={absurd}: at most"):
            ipc.create_message_queue("q", absurd)
    assert ipc.message_queues == {}
    ipc.create_message_queue("q", (1 << 63) - 1)
    ipc.send_message("q", MessageType.DATA, 1)
    ipc.create_message_queue("unbounded", -1)
    ipc.send_message("unbounded", MessageType.DATA, 1)


def test_a_deadline_that_has_passed_is_a_timeout_of_0(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q", 1)
    assert ipc.receive_message("q", timeout=-1) is None
    ipc.send_message("q", MessageType.DATA, 1, timeout=-1)
    with pytest.raises(Full):
        ipc.send_message("q", MessageType.DATA, 2, timeout=-1)
    with pytest.raises(RingNotFound):
        ipc.connect_message_queue("q2", timeout=-1)
    assert ipc.check_alive_processes(timeout=-1) == []


def test_a_timeout_that_is_no_number_is_refused(ipc: HighPerformanceIPC) -> None:
    timeout = float("nan")
    ipc.create_message_queue("q")
    with pytest.raises(InvalidArgument, match="timeout"):
        ipc.receive_message("q", timeout=timeout)
    with pytest.raises(InvalidArgument, match="timeout"):
        ipc.connect_message_queue("q2", timeout=timeout)
    with pytest.raises(InvalidArgument, match="timeout"):
        ipc.send_message("q", MessageType.DATA, 1, timeout=timeout)
    with pytest.raises(InvalidArgument, match="timeout"):
        ipc.check_alive_processes(timeout=timeout)


def test_wrong_types_are_type_errors(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    with pytest.raises(TypeError):
        ipc.send_message("q", "data", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ipc.create_message_queue("other", maxsize="5")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ipc.create_message_queue(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        HighPerformanceIPC(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["", "a.b", "a/b", "x" * 65])
def test_impossible_namespaces_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="namespace"):
        HighPerformanceIPC("p", namespace=bad)


@pytest.mark.parametrize("bad", ["", "x" * 73])
def test_impossible_process_ids_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="process_id"):
        HighPerformanceIPC(bad)


def test_the_namespace_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMRING_NAMESPACE", "mine")
    assert HighPerformanceIPC("p").namespace == "mine"
    assert HighPerformanceIPC("p", namespace="other").namespace == "other"
    monkeypatch.delenv("SHMRING_NAMESPACE")
    assert HighPerformanceIPC("p").namespace == "default"


def test_namespaces_do_not_meet(ipc: HighPerformanceIPC, namespace: str) -> None:
    ipc.create_message_queue("q")
    with HighPerformanceIPC("main", namespace=f"{namespace}-2") as stranger:
        with pytest.raises(RingNotFound):
            stranger.connect_message_queue("q", timeout=0)
        stranger.create_message_queue("q")
        assert stranger.check_alive_processes() == []


# -- processes ------------------------------------------------------------------------------


def keep_beating(namespace: str, process_id: str) -> None:
    with HighPerformanceIPC(process_id, namespace=namespace) as ipc:
        ipc.connect_message_queue("quiet", timeout=30)
        while ipc.receive_message("quiet", timeout=60) is not None:
            pass


def entry_of(ipc: HighPerformanceIPC, process_id: str) -> RegistryEntry:
    (entry,) = [each for each in ipc.registry_entries() if each.process_id == process_id]
    return entry


@pytest.mark.fault(16)
def test_others_are_seen_alive_until_they_die(ipc: HighPerformanceIPC, start_method: str) -> None:
    ipc.create_message_queue("quiet")
    assert ipc.check_alive_processes() == []
    with run_in_process(keep_beating, ipc.namespace, "child", method=start_method) as process:
        wait_for(lambda: ipc.check_alive_processes() == ["child"], what="the child in the registry")
        process.kill()
        # Well within the ten seconds, and it is not reaped.
        wait_for(lambda: ipc.check_alive_processes() == [], 5, "its death")
    assert ipc.get_stats()["alive_processes"] == 1
    assert list(ipc.alive_processes) == ["child"]


@pytest.mark.fault(14)
def test_the_stopped_are_silent_in_time(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("quiet")
    with run_in_process(keep_beating, ipc.namespace, "child") as process:
        wait_for(lambda: ipc.check_alive_processes() == ["child"], what="the child in the registry")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: ipc.check_alive_processes(timeout=0.6) == [], what="silence")
        assert ipc.check_alive_processes(timeout=3600) == ["child"], "silent, not dead"
        os.kill(process.pid, signal.SIGCONT)
        wait_for(lambda: ipc.check_alive_processes(timeout=0.6) == ["child"], what="its return")


def test_a_blocked_receiver_goes_on_beating(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("quiet")
    with run_in_process(keep_beating, ipc.namespace, "child"):
        wait_for(lambda: ipc.check_alive_processes() == ["child"], what="the child in the registry")
        wait_for(lambda: entry_of(ipc, "child").waiting_on == "quiet", what="it to wait")
        entry = entry_of(ipc, "child")
        wait_for(
            lambda: entry_of(ipc, "child").heartbeats >= entry.heartbeats + 3,
            what="three more heartbeats",
        )


def test_a_heartbeat_message_marks_its_sender_alive(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC
) -> None:
    ipc.create_message_queue("q")
    other.connect_message_queue("q")
    assert other.last_heartbeat == 0.0
    before = time.time()
    other.send_heartbeat("q")
    assert before <= other.last_heartbeat <= time.time()
    assert other.get_stats()["last_heartbeat"] == other.last_heartbeat
    message = ipc.receive_message("q", timeout=5)
    assert message is not None
    assert (message.msg_type, message.data) == (MessageType.HEARTBEAT, None)
    assert "other" in ipc.alive_processes
    assert ipc.check_alive_processes() == ["other"]
    other.cleanup()
    assert ipc.check_alive_processes() == [], "it said that it left"


def test_one_seen_by_messages_only_counts_for_its_time(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    ipc.message_queues["q"].put(Message(MessageType.HEARTBEAT, "far-away", time.time()))
    ipc.message_queues["q"].put(Message(MessageType.HEARTBEAT, "main", time.time()))
    assert ipc.receive_message("q", timeout=5)
    assert ipc.receive_message("q", timeout=5)
    assert ipc.check_alive_processes() == ["far-away"], "others only"
    wait_for(lambda: ipc.check_alive_processes(timeout=0.01) == [], what="its time to pass")
    assert ipc.get_stats()["alive_processes"] == 1


# -- statistics, attributes, the end ----------------------------------------------------------


def test_statistics_and_attributes(ipc: HighPerformanceIPC, other: HighPerformanceIPC) -> None:
    assert ipc.heartbeat_interval == 5.0
    assert (ipc.message_queues, ipc.shared_memories, ipc.alive_processes) == ({}, {}, {})
    ipc.create_message_queue("q")
    other.connect_message_queue("q")
    ipc.send_message("q", MessageType.DATA, b"x" * 1000)
    other.receive_message("q", timeout=5)
    stats = ipc.get_stats()
    assert set(stats) == {
        "messages_sent",
        "messages_received",
        "bytes_transferred",
        "errors",
        "process_id",
        "alive_processes",
        "last_heartbeat",
    }
    assert (stats["messages_sent"], stats["messages_received"]) == (1, 0)
    assert stats["process_id"] == ipc.process_id == "main"
    assert 1000 < stats["bytes_transferred"] < 1200
    received = other.get_stats()
    assert received["messages_received"] == 1
    assert received["bytes_transferred"] == stats["bytes_transferred"]
    ipc.create_shared_memory("m", 100)
    ipc.write_shared_data("m", b"12345")
    ipc.read_shared_data("m", 3)
    assert ipc.get_stats()["bytes_transferred"] == stats["bytes_transferred"] + 8
    with pytest.raises(InvalidArgument):
        ipc.read_shared_data("m", 101)
    assert ipc.get_stats()["errors"] == ipc.stats["errors"] == 1


def test_cleanup_ends_everything_and_can_be_repeated(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC
) -> None:
    ipc.create_message_queue("q")
    ipc.create_shared_memory("m", 10)
    ipc.cleanup()
    ipc.cleanup()
    assert (ipc.message_queues, ipc.shared_memories) == ({}, {})
    assert ipc.get_stats()["errors"] == 0
    with pytest.raises(RingNotFound):
        other.connect_message_queue("q", timeout=0)
    with pytest.raises(RingNotFound):
        other.connect_shared_memory("m", 10)
    ipc.create_message_queue("q")  # and the names are free again


def test_an_array_over_memory_outlives_cleanup(ipc: HighPerformanceIPC) -> None:
    pytest.importorskip("numpy")
    ipc.create_shared_memory("m", 16)
    array = ipc.shared_memories["m"].as_array("u1", 16)
    ipc.write_shared_data("m", b"x" * 16)
    ipc.cleanup()
    array += 1
    assert bytes(array) == b"y" * 16


# -- other processes ------------------------------------------------------------------------


def double_and_return(ipc: HighPerformanceIPC) -> None:
    ipc.process_id = "child"
    message = ipc.receive_message("out", timeout=30)
    assert message is not None
    numbers: Any = message.data
    ipc.send_message("back", MessageType.DATA, [2 * each for each in numbers])
    ipc.send_message("back", MessageType.DATA, ipc.read_shared_data("m", 5))
    ipc.send_message("back", MessageType.DATA, ipc.get_stats())
    ipc.cleanup()


def test_an_instance_can_be_passed_to_a_child(ipc: HighPerformanceIPC, start_method: str) -> None:
    ipc.create_message_queue("out")
    ipc.create_message_queue("back")
    ipc.create_shared_memory("m", 100)
    ipc.write_shared_data("m", b"hello")
    with run_in_process(double_and_return, ipc, method=start_method) as process:
        ipc.send_message("out", MessageType.DATA, [1, 2, 3])
        answers = [ipc.receive_message("back", timeout=30) for _ in range(3)]
        process.join(30)
        assert process.exitcode == 0
    doubled, memory, stats = (each.data for each in answers if each)
    assert doubled == [2, 4, 6]
    assert memory == b"hello"
    assert isinstance(stats, dict)
    assert (stats["messages_sent"], stats["messages_received"]) == (2, 1), "its own, not ours"
    assert answers[0] is not None
    assert answers[0].sender_id == "child"
    # The child's cleanup has removed nothing of ours.
    ipc.send_message("out", MessageType.DATA, "still here")
    assert ipc.receive_message("out", timeout=5) is not None
    assert ipc.read_shared_data("m", 5) == b"hello"


def test_pickled_elsewhere_it_connects_by_name(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    ipc.create_shared_memory("m", 10)
    with contextlib.closing(_Closer(pickle.loads(pickle.dumps(ipc)))) as copy:
        copy.ipc.send_message("q", MessageType.DATA, "through the copy")
        message = ipc.receive_message("q", timeout=5)
        assert message is not None
        assert message.data == "through the copy"
        copy.ipc.write_shared_data("m", b"abc")
    assert ipc.read_shared_data("m", 3) == b"abc"


class _Closer:
    def __init__(self, ipc: HighPerformanceIPC) -> None:
        self.ipc = ipc

    def close(self) -> None:
        self.ipc.cleanup()


def create_and_wait(namespace: str) -> None:
    ipc = HighPerformanceIPC("mortal", namespace=namespace)
    ipc.create_message_queue("q")
    ipc.create_shared_memory("m", 10)
    ipc.create_message_queue("ready")
    signal.pause()


@pytest.mark.fault(37)
def test_names_of_the_killed_can_be_used_again(ipc: HighPerformanceIPC, start_method: str) -> None:
    with run_in_process(create_and_wait, ipc.namespace, method=start_method):
        ipc.connect_message_queue("ready", timeout=30)
    ipc.close_message_queue("ready")
    ipc.create_message_queue("q")
    ipc.create_shared_memory("m", 10)
    ipc.create_message_queue("ready")
    ipc.send_message("q", MessageType.DATA, 1)
    assert ipc.receive_message("q", timeout=5) is not None


def forget_to_clean_up(namespace: str) -> None:
    ipc = HighPerformanceIPC("forgetful", namespace=namespace)
    ipc.create_message_queue("q")
    ipc.create_shared_memory("m", 10)


def test_a_process_that_ends_without_cleanup_leaves_nothing(
    namespace: str, start_method: str
) -> None:
    with run_in_process(forget_to_clean_up, namespace, method=start_method) as process:
        process.join(30)
        assert process.exitcode == 0
    with HighPerformanceIPC("main", namespace=namespace) as ipc:
        with pytest.raises(RingNotFound):
            ipc.connect_message_queue("q", timeout=0)
        with pytest.raises(RingNotFound):
            ipc.connect_shared_memory("m", 10)


def test_threads_share_an_instance(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    received: list[object] = []

    def send(number: int) -> None:
        for each in range(100):
            ipc.send_message("q", MessageType.DATA, (number, each))

    def receive() -> None:
        while (message := ipc.receive_message("q", timeout=10)) is not None:
            if message.msg_type is MessageType.SHUTDOWN:
                return
            received.append(message.data)

    receivers = [threading.Thread(target=receive) for _ in range(3)]
    senders = [threading.Thread(target=send, args=(number,)) for number in range(3)]
    for thread in receivers + senders:
        thread.start()
    for thread in senders:
        thread.join(60)
    for _ in receivers:
        ipc.send_message("q", MessageType.SHUTDOWN, None)
    for thread in receivers:
        thread.join(60)
    assert sorted(received) == [(n, each) for n in range(3) for each in range(100)]  # type: ignore[type-var]
    stats = ipc.get_stats()
    assert (stats["messages_sent"], stats["messages_received"]) == (303, 303)


# -- queues that went, and came again ---------------------------------------------------------


@pytest.fixture
def opened_queues(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every queue that an instance makes or attaches to, in order."""
    opened: list[Any] = []
    for name in ("create_queue", "attach_queue"):
        original = getattr(ipc_module, name)

        def record(*args: Any, original: Any = original) -> Any:
            opened.append(original(*args))
            return opened[-1]

        monkeypatch.setattr(ipc_module, name, record)
    return opened


def is_closed(queue: Any) -> bool:
    try:
        queue.qsize()
    except RingClosed:
        return True
    return False


def test_connecting_again_finds_the_queue_of_today(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC, opened_queues: list[Any]
) -> None:
    ipc.create_message_queue("q")
    other.connect_message_queue("q")
    ipc.send_message("q", MessageType.DATA, "of yesterday")
    assert other.receive_message("q", timeout=5) is not None
    ipc.close_message_queue("q")
    ipc.create_message_queue("q")
    ipc.send_message("q", MessageType.DATA, "of today")
    other.connect_message_queue("q", timeout=5)
    message = other.receive_message("q", timeout=1)
    assert message is not None
    assert message.data == "of today"
    assert [is_closed(each) for each in opened_queues] == [True, True, False, False]


def test_connecting_again_to_one_that_has_gone_fails(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC
) -> None:
    ipc.create_message_queue("q")
    other.connect_message_queue("q")
    ipc.close_message_queue("q")
    with pytest.raises(RingNotFound):
        other.connect_message_queue("q", timeout=0)
    assert other.message_queues == {}


def test_creating_closes_the_handle_of_one_that_has_gone(
    ipc: HighPerformanceIPC, other: HighPerformanceIPC, opened_queues: list[Any]
) -> None:
    ipc.create_message_queue("q")
    other.connect_message_queue("q")
    ipc.close_message_queue("q")
    other.create_message_queue("q")
    ipc.connect_message_queue("q", timeout=5)
    assert [is_closed(each) for each in opened_queues] == [True, True, False, False]


def test_connecting_may_wait_for_ever(ipc: HighPerformanceIPC, other: HighPerformanceIPC) -> None:
    connecting = threading.Thread(target=other.connect_message_queue, args=("late", None))
    connecting.start()
    ipc.create_message_queue("late")
    connecting.join(30)
    assert list(other.message_queues) == ["late"]


def test_every_failure_counts(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    bad: Any = "data"
    for count, call in enumerate(
        (
            lambda: ipc.send_message("no", MessageType.DATA, 1),
            lambda: ipc.send_message("q", bad, 1),
            lambda: ipc.send_message("q", MessageType.DATA, 1, timeout=float("nan")),
            lambda: ipc.send_heartbeat("no"),
            lambda: ipc.receive_message("no"),
            lambda: ipc.receive_message("q", timeout=float("nan")),
            lambda: ipc.receive_message("q", timeout=bad),
            lambda: ipc.write_shared_data("no", b""),
            lambda: ipc.read_shared_data("no", 1),
        ),
        1,
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
        assert ipc.get_stats()["errors"] == count
    assert ipc.get_stats()["messages_sent"] == 0


def test_a_malformed_message_is_not_put(ipc: HighPerformanceIPC) -> None:
    ipc.create_message_queue("q")
    wrong: Any = "data"
    for message in (Message(wrong, "x"), Message(MessageType.DATA, "x", float("nan"))):
        with pytest.raises(EncodeError, match=r"msg_type='data'|timestamp=nan"):
            ipc.message_queues["q"].put(message)
    assert ipc.receive_message("q", timeout=0) is None

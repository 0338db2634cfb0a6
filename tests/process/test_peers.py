"""peers=: a call whose peers are all dead raises PeerDied, and no other call does."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shmring
from shmring import (
    InvalidArgument,
    JoinableQueue,
    NotSupportedByFallback,
    PeerDied,
    Queue,
    RingClosed,
    ShutDown,
    SimpleQueue,
)
from shmring.errors import Empty, Full
from shmring.process.liveness import process_start_ticks
from shmring.process.peers import PeerPoll
from support import asleep, run_in_process, turns, until, wait_for, within
from traced import state_of

if shmring.backend == "ring":
    from shmring import Ring

both_backends = pytest.mark.both_backends
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SIGSTOP, zombies, /proc")

TOLD_WITHIN = 10.0  # seconds; 100 ms are promised, and a machine may be busy


def forever() -> None:
    threading.Event().wait()


def put_and_flush(queue: Queue[Any], *objects: object) -> None:
    queue.put_many(objects)
    queue.close()
    queue.join_thread()  # on a pipe, what the feeder thread holds dies with the process


def die_after(*objects: object) -> Callable[[Queue[Any]], None]:
    return lambda queue: (put_and_flush(queue, *objects), os.kill(os.getpid(), signal.SIGKILL))[0]


@contextlib.contextmanager
def dead_process(target: Callable[..., object] = forever, *args: object) -> Iterator[Any]:
    """A zombie, killed and not reaped; or what had ended by itself."""
    with run_in_process(target, *args) as process:
        if target is forever:
            process.kill()
        wait_for(lambda: has_ended(process.pid), what="the end of the process")
        yield process


def has_ended(pid: int) -> bool:
    """Without reaping it."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is not None


@contextlib.contextmanager
def killed_soon(process: Any, sure: Callable[[], object] = lambda: True) -> Iterator[None]:
    """Kill it from another thread as soon as it is `sure`."""

    def kill() -> None:
        wait_for(sure, what="the moment to kill")
        os.kill(process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
        assert not thread.is_alive()


def taken_until_told(queue: Queue[Any], peer: Any) -> list[Any]:
    taken = []
    with contextlib.suppress(PeerDied):
        while True:
            taken.append(queue.get(timeout=20, peers=[peer]))
    return taken


# ---- get -----------------------------------------------------------------------------------


@both_backends
def test_a_waiting_get_is_told_of_the_death(start_method: str) -> None:
    with Queue[int]() as queue, run_in_process(forever, method=start_method) as peer:
        with killed_soon(peer), pytest.raises(PeerDied) as caught:
            within(TOLD_WITHIN, queue.get, peers=[peer])
        assert caught.value.pid == peer.pid
        assert f"process {peer.pid} is dead" in str(caught.value)
        assert "nothing is left to take" in str(caught.value)
        assert caught.value.exitcode == -signal.SIGKILL
        peer.join(10)
        assert peer.exitcode == -signal.SIGKILL


@both_backends
def test_what_the_dead_had_put_is_delivered_first() -> None:
    with Queue[Any]() as queue, dead_process(die_after("one", "two", "three"), queue) as peer:
        assert queue.get_many(1, peers=[peer]) == ["one"]
        assert taken_until_told(queue, peer) == ["two", "three"]
        with pytest.raises(PeerDied):
            queue.get_many(peers=[peer])
        with pytest.raises(Empty):
            queue.get(block=False)


def test_what_is_committed_just_before_the_death_is_delivered() -> None:
    with Queue[int]() as queue:
        for number in range(1, 60):
            with run_in_process(_put_and_die, queue, number) as peer:
                assert taken_until_told(queue, peer) == list(range(number))


def _put_and_die(queue: Queue[int], number: int) -> None:
    for each in range(number):
        queue.put(each)
    os.kill(os.getpid(), signal.SIGKILL)


@both_backends
def test_a_message_wakes_a_call_with_peers() -> None:
    with Queue[str]() as queue, run_in_process(forever) as peer:
        for number in range(5):
            sender = threading.Timer(0.02 * number, queue.put, [f"message {number}"])
            sender.start()
            assert queue.get(timeout=20, peers=[peer]) == f"message {number}"
            sender.join(10)


@both_backends
def test_time_runs_out_beside_the_living() -> None:
    with Queue[int](1) as queue, run_in_process(forever) as peer:
        for timeout in (0, 0.01, 0.15):
            with pytest.raises(Empty):
                queue.get(timeout=timeout, peers=[peer])
        with pytest.raises(Empty):
            queue.get(False, peers=[peer])
        queue.put(1)
        with pytest.raises(Full):
            queue.put(2, timeout=0.15, peers=[peer])
        with pytest.raises(Full):
            queue.put(2, False, peers=[peer])


@both_backends
@pytest.mark.parametrize("how", [{"block": False}, {"timeout": 0}, {"timeout": 30}, {}])
def test_the_dead_are_told_of_by_every_way_of_waiting(how: dict[str, Any]) -> None:
    with Queue[int](1) as queue, dead_process() as peer:
        with pytest.raises(PeerDied):
            queue.get(**how, peers=[peer])
        queue.put(1, **how, peers=[peer])
        wait_for(lambda: not queue.empty())
        with pytest.raises(PeerDied, match="no room came"):
            queue.put(2, **how, peers=[peer])
        assert queue.get(**how, peers=[peer]) == 1


def test_every_waiter_is_told() -> None:
    with Queue[int]() as queue, run_in_process(forever) as peer:
        outcomes: list[object] = []

        def get() -> None:
            try:
                outcomes.append(queue.get(peers=[peer]))
            except PeerDied as died:
                outcomes.append(died.exitcode)

        threads = [threading.Thread(target=get) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(queue.statistics().waiters) == 4)
        os.kill(peer.pid or 0, signal.SIGKILL)
        for thread in threads:
            thread.join(20)
        assert outcomes == [-signal.SIGKILL] * 4


# ---- put and join --------------------------------------------------------------------------


@both_backends
def test_a_waiting_put_is_told_of_the_death() -> None:
    with Queue[int](1) as queue, run_in_process(forever) as peer:
        queue.put(1)
        with killed_soon(peer), pytest.raises(PeerDied, match="no room came"):
            within(TOLD_WITHIN, queue.put, 2, peers=[peer])
        assert queue.get() == 1
        queue.put(2, peers=[peer])  # there is space: the peer is not asked
        assert queue.get() == 2


@both_backends
def test_put_many_says_how_many_went_in() -> None:
    with Queue[int](3) as queue, dead_process() as peer:
        with pytest.raises(PeerDied) as caught:
            queue.put_many(range(5), peers=[peer])
        assert caught.value.count == 3
        assert [queue.get(timeout=10) for _ in range(3)] == [0, 1, 2]


def test_a_put_that_waits_for_bytes_is_told() -> None:
    with Ring.create(1 << 12) as ring, dead_process() as peer:
        with pytest.raises(PeerDied) as caught:
            ring.put_many([bytes(1000)] * 9, peers=[peer])
        assert ring.qsize() == caught.value.count > 0
        with pytest.raises(PeerDied), ring.reserve(3000, peers=[peer]):
            pytest.fail("there is no room")


@pytest.mark.fault(39)
@both_backends
def test_join_is_told_of_the_death() -> None:
    with JoinableQueue[int]() as queue, run_in_process(forever) as peer:
        assert queue.join(peers=[peer])
        queue.put(1)
        queue.put(2)
        assert queue.get(timeout=10) == 1
        queue.task_done()
        assert not queue.join(0.1, peers=[peer])
        with killed_soon(peer), pytest.raises(PeerDied, match="tasks are unfinished"):
            within(TOLD_WITHIN, queue.join, peers=[peer])
        assert queue.get(timeout=10) == 2
        queue.task_done()
        assert queue.join(peers=[peer])


# ---- proofs of death -----------------------------------------------------------------------


@pytest.mark.fault(16)
@both_backends
@pytest.mark.parametrize(
    ("end", "exitcode"),
    [
        (lambda: os._exit(0), 0),
        (lambda: os._exit(7), 7),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM),
    ],
)
def test_the_exit_code_of_a_child_is_told_and_left_to_its_parent(
    end: Callable[[], None], exitcode: int
) -> None:
    with Queue[int]() as queue, dead_process(end) as peer:
        for process in (peer, peer.pid):
            with pytest.raises(PeerDied) as caught:
                queue.get(peers=[process])
            assert (caught.value.pid, caught.value.exitcode) == (peer.pid, exitcode)
            assert caught.value.signal == (-exitcode if exitcode < 0 else None)
        assert has_ended(peer.pid), "it was reaped"
        peer.join(10)
        assert peer.exitcode == exitcode
        with pytest.raises(PeerDied) as caught:  # reaped, its object remembers
            queue.get(peers=[peer])
        assert caught.value.exitcode == exitcode


@both_backends
def test_the_exit_code_of_a_fork_servers_child_is_waited_for() -> None:
    with Queue[int]() as queue, run_in_process(forever, method="forkserver") as peer:
        server = int(Path(f"/proc/{peer.pid}/status").read_text().split("PPid:")[1].split()[0])
        os.kill(server, signal.SIGSTOP)
        try:
            peer.kill()
            wait_for(lambda: state_of(peer.pid) == "Z")
            threading.Timer(0.1, os.kill, (server, signal.SIGCONT)).start()
            with pytest.raises(PeerDied) as caught:
                queue.get(timeout=20, peers=[peer])
        finally:
            os.kill(server, signal.SIGCONT)
        assert caught.value.exitcode == -signal.SIGKILL


@both_backends
def test_a_popen_is_a_peer() -> None:
    with Queue[int]() as queue:
        peer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            with pytest.raises(Empty):
                queue.get(timeout=0.1, peers=[peer])
            peer.terminate()
            for _ in range(2):
                with pytest.raises(PeerDied) as caught:
                    queue.get(peers=[peer])
                assert caught.value.exitcode == -signal.SIGTERM
                assert peer.wait(10) == -signal.SIGTERM  # ours to reap, now and not before
        finally:
            peer.kill()
            peer.communicate()


@pytest.mark.fault(13)
@both_backends
def test_a_stopped_peer_is_not_dead() -> None:
    with Queue[int]() as queue, run_in_process(forever) as peer:
        os.kill(peer.pid or 0, signal.SIGSTOP)
        os.waitid(os.P_PID, peer.pid or 0, os.WSTOPPED)
        with pytest.raises(Empty):
            queue.get(timeout=0.3, peers=[peer])
        os.kill(peer.pid or 0, signal.SIGKILL)
        with pytest.raises(PeerDied):
            queue.get(peers=[peer])


@both_backends
def test_all_of_them_must_be_dead() -> None:
    with Queue[str]() as queue, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(run_in_process(forever)) for _ in range(5)]
        for peer in (*peers[:2], *peers[3:]):
            os.kill(peer.pid or 0, signal.SIGKILL)
            wait_for(lambda pid=peer.pid: has_ended(pid))
        with pytest.raises(Empty):
            queue.get(timeout=0.2, peers=peers)
        queue.put("of another process")
        assert queue.get(timeout=10, peers=peers) == "of another process"
        watch = PeerPoll(iter(peers))
        assert not watch.all_dead()
        with killed_soon(peers[2]), pytest.raises(PeerDied) as caught:
            queue.get(peers=iter(peers))
        for error in (caught.value, watch.error("") if watch.all_dead() else None):
            assert error is not None
            assert {pid for pid, _ in error.deaths} == {peer.pid for peer in peers}
            for peer in peers:
                assert f"process {peer.pid} is dead" in str(error)
        assert error.pid == peers[2].pid, "the one that died last"


@pytest.mark.fault(17)
@both_backends
def test_a_pid_used_again_is_not_the_peer() -> None:
    mine = process_start_ticks(os.getpid())
    earlier = SimpleNamespace(pid=os.getpid(), start_ticks=mine - 1)
    with Queue[int]() as queue:
        with pytest.raises(PeerDied) as caught:
            queue.get(peers=[earlier])
        assert (caught.value.pid, caught.value.exitcode) == (os.getpid(), None)
        with pytest.raises(Empty):
            queue.get(timeout=0.1, peers=[SimpleNamespace(pid=os.getpid(), start_ticks=mine)])
        # One that was reaped long ago: its object knows how it ended.
        reaped = SimpleNamespace(pid=os.getpid(), exitcode=-9)
        with pytest.raises(PeerDied) as caught:
            queue.get(peers=[reaped])
        assert caught.value.exitcode == -9


def test_a_number_given_to_a_later_child_is_not_the_peer() -> None:
    with dead_process() as later:
        ticks = process_start_ticks(later.pid)
        watch = PeerPoll([SimpleNamespace(pid=later.pid, start_ticks=ticks - 1)])
        assert watch.all_dead()
        assert watch.error("").exitcode is None, "the end of another is told"


@both_backends
def test_the_dead_of_others_are_proved_by_the_kernel() -> None:
    """A grandchild that is not reaped: its parent lives, and is not this process."""
    read, write = os.pipe()
    with Queue[int]() as queue, run_in_process(_have_a_child, write):
        grandchild = int(os.read(read, 20))
        with pytest.raises(Empty):
            queue.get(timeout=0.1, peers=[grandchild])
        os.kill(grandchild, signal.SIGKILL)
        with pytest.raises(PeerDied) as caught:
            queue.get(peers=[grandchild])
        assert (caught.value.pid, caught.value.exitcode) == (grandchild, None)
        assert "exit code unknown" in str(caught.value)
    os.close(read)
    os.close(write)


def _have_a_child(write: int) -> None:
    pid = os.fork()
    if pid == 0:
        # it must not outlive this test
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        forever()
    os.write(write, str(pid).encode())
    forever()


@both_backends
def test_a_child_that_closes_all_its_files_is_not_dead() -> None:
    """Its sentinel, the end of a pipe, says so; the process itself does not."""
    with Queue[int]() as queue, run_in_process(_close_everything) as peer:
        wait_for(lambda: multiprocessing.connection.wait([peer.sentinel], 0))
        with pytest.raises(Empty):
            queue.get(timeout=0.2, peers=[peer])


def _close_everything() -> None:
    os.closerange(3, 1000)
    forever()


@both_backends
@pytest.mark.parametrize(
    ("peers", "error", "says"),
    [
        ([], InvalidArgument, "empty"),
        ([0], InvalidArgument, "pid=0"),
        ([-4], InvalidArgument, "pid=-4"),
        ([1 << 40], InvalidArgument, "is no process"),
        ([multiprocessing.Process()], InvalidArgument, "has not been started"),
        (["worker-1"], TypeError, "has no pid"),
        (17, TypeError, "iterable"),
    ],
)
def test_what_is_no_peer(peers: Any, error: type[Exception], says: str) -> None:
    with JoinableQueue[int]() as queue:
        queue.put(1)
        for call in (queue.get, queue.get_many, queue.join):
            with pytest.raises(error, match=says):
                call(peers=peers)
        with pytest.raises(error, match=says):
            queue.put(1, peers=peers)


def test_the_error_travels_and_names_no_crowd() -> None:
    deaths = tuple((1000 + i, -9) for i in range(100))
    error = PeerDied(1099, -9, deaths, "nothing is left to take", 3)
    again = pickle.loads(pickle.dumps(error))
    assert (again.pid, again.exitcode, again.deaths, again.count) == (1099, -9, deaths, 3)
    assert str(again) == str(error)
    assert str(error).startswith("92 others are dead, process 1092 is dead (killed by signal 9)")
    assert str(PeerDied(5)) == "process 5 is dead (exit code unknown)"


# ---- beside everything else that ends a wait -----------------------------------------------


@pytest.mark.fault(31)
@both_backends
def test_ctrl_c_ends_a_wait_beside_peers() -> None:
    with Queue[int]() as queue, run_in_process(forever) as peer:
        main = threading.main_thread()

        def interrupt() -> None:
            wait_for(asleep(main), what="the call to sleep")
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):
            (thread.start(), queue.get(timeout=20, peers=[peer]))
        thread.join(10)
        queue.put(1)
        assert queue.get(timeout=10, peers=[peer]) == 1


def _outcome_of_get(queue: Queue[int], peer: Any, outcomes: list[object]) -> None:
    try:
        outcomes.append(queue.get(timeout=20, peers=[peer]))
    except BaseException as error:
        outcomes.append(type(error))


@pytest.mark.parametrize(
    ("end", "outcome"),
    [(lambda queue: queue.close(), RingClosed), (lambda queue: queue.shutdown(), ShutDown)],
)
def test_the_end_of_the_queue_ends_a_wait_beside_peers(
    end: Callable[[Any], None], outcome: type[Exception]
) -> None:
    outcomes: list[object] = []
    with Queue[int]() as queue, run_in_process(forever) as peer:
        thread = threading.Thread(target=_outcome_of_get, args=(queue, peer, outcomes))
        thread.start()
        wait_for(lambda: queue.statistics().waiters)
        end(queue)
        thread.join(20)
        assert outcomes == [outcome]


@both_backends
def test_a_queue_that_was_shut_down_says_so_though_the_peers_are_dead() -> None:
    with Queue[int]() as queue, dead_process() as peer:
        queue.shutdown()
        with pytest.raises(ShutDown):
            queue.get(peers=[peer])
        with pytest.raises(ShutDown):
            queue.put(1, peers=[peer])


def test_what_a_living_consumer_peeks_at_is_not_gone() -> None:
    with Ring.create() as ring, dead_process() as peer:
        ring.put(b"one")
        outcomes: list[object] = []
        thread = threading.Thread(target=_outcome_of_get, args=(ring, peer, outcomes))
        with contextlib.suppress(ZeroDivisionError), ring.peek():
            thread.start()
            wait_for(lambda: [each["waits_for"] for each in ring.statistics().waiters])
            assert ring.statistics().waiters[0]["waits_for"] == "the end of a peek"
            assert not outcomes
            raise ZeroDivisionError  # it is left for another
        thread.join(20)
        assert outcomes == [b"one"]


def test_what_the_dead_had_reserved_never_comes() -> None:
    with Ring.create() as ring, run_in_process(_reserve_for_ever, ring) as peer:
        wait_for(ring.qsize)
        with pytest.raises(Empty):
            ring.get(timeout=0.1, peers=[peer])
        with killed_soon(peer), pytest.raises(PeerDied):
            ring.get(peers=[peer])
        with pytest.raises(PeerDied), ring.peek(peers=[peer]):
            pytest.fail("there is nothing")


def _reserve_for_ever(ring: Any) -> None:
    with ring.reserve(100):
        forever()


def test_a_simple_queue_has_peers_too() -> None:
    with SimpleQueue[int]() as queue, dead_process() as peer:
        queue.put(1, peers=[peer])
        assert queue.get(peers=[peer]) == 1
        with pytest.raises(PeerDied):
            queue.get(peers=[peer])


@pytest.mark.skipif(shmring.backend == "ring", reason="the ring's SimpleQueue has peers")
@both_backends
def test_a_simple_queue_of_the_fallback_says_what_it_cannot() -> None:
    with SimpleQueue[int]() as queue:
        for call in (lambda: queue.get(peers=[1]), lambda: queue.put(1, peers=[1])):
            with pytest.raises(NotSupportedByFallback, match="waited for as one"):
                call()


# ---- of named queues -----------------------------------------------------------------------


@both_backends
def test_receive_message_has_peers() -> None:
    with (
        shmring.HighPerformanceIPC("waiter", namespace=f"peers-{os.getpid()}") as ipc,
        run_in_process(forever) as peer,
    ):
        ipc.create_message_queue("answers")
        ipc.send_message("answers", shmring.MessageType.DATA, 1)
        message = ipc.receive_message("answers", peers=[peer])
        assert message is not None
        assert message.data == 1
        assert ipc.receive_message("answers", 0.1, peers=[peer]) is None
        with killed_soon(peer), pytest.raises(PeerDied):
            within(TOLD_WITHIN, ipc.receive_message, "answers", peers=[peer])
        assert ipc.get_stats()["errors"] == 0


# ---- in asyncio programs -------------------------------------------------------------------


def test_aget_delivers_and_then_tells() -> None:
    async def main() -> None:
        assert await queue.aget(peers=[peer]) == "early"
        waiter = asyncio.create_task(queue.aget(peers=[peer]))
        await until(lambda: queue.statistics().waiters)
        queue.put("late")
        assert await waiter == "late"
        waiters = [asyncio.create_task(queue.aget(peers=[peer])) for _ in range(3)]
        await until(lambda: queue.statistics().waiters)
        assert not any(each.done() for each in waiters)
        os.kill(peer.pid or 0, signal.SIGKILL)
        async with asyncio.timeout(TOLD_WITHIN):
            outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(each) for each in outcomes] == [PeerDied] * 3
        with pytest.raises(PeerDied):
            await queue.aget(peers=[peer])
        queue.put("of another process")
        assert await queue.aget(peers=[peer]) == "of another process"

    with Queue[str]() as queue, run_in_process(forever) as peer:
        queue.put("early")
        asyncio.run(asyncio.wait_for(main(), 60))


def test_a_call_told_of_a_death_gives_up_its_place_in_the_line() -> None:
    async def main() -> None:
        first = asyncio.create_task(queue.aget(peers=[peer]))
        second = asyncio.create_task(queue.aget())
        await until(lambda: queue.statistics().waiters)
        os.kill(peer.pid or 0, signal.SIGKILL)
        with pytest.raises(PeerDied):
            await first
        assert not second.done()
        queue.put("of another process")
        assert await second == "of another process"

    with Queue[str]() as queue, run_in_process(forever) as peer:
        asyncio.run(asyncio.wait_for(main(), 60))


def test_a_cancelled_aget_beside_peers_has_taken_nothing() -> None:
    async def main() -> None:
        for number in range(30):
            waiter = asyncio.create_task(queue.aget(peers=[peer]))
            await turns(number)
            queue.put(number)
            waiter.cancel()
            taken = await asyncio.gather(waiter, return_exceptions=True)
            if isinstance(taken[0], asyncio.CancelledError):
                taken = [await queue.aget(peers=[peer])]
            assert taken == [number]

    with Queue[int]() as queue, run_in_process(forever) as peer:
        asyncio.run(asyncio.wait_for(main(), 60))


def test_aput_waits_for_room_and_is_told() -> None:
    async def main() -> None:
        await queue.aput(1, peers=[peer])
        waiter = asyncio.create_task(queue.aput(2, peers=[peer]))
        await until(lambda: queue.statistics().waiters)
        assert queue.get() == 1
        await waiter
        waiters = [asyncio.create_task(queue.aput(each, peers=[peer])) for each in (3, 4)]
        await until(lambda: queue.statistics().waiters)
        os.kill(peer.pid or 0, signal.SIGKILL)
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(each) for each in outcomes] == [PeerDied] * 2
        assert queue.get() == 2
        await queue.aput(5, peers=[peer])
        assert queue.get() == 5

    with Queue[int](1) as queue, run_in_process(forever) as peer:
        asyncio.run(asyncio.wait_for(main(), 60))

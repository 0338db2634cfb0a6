"""Closing in the wrong moment: while other threads wait, decode, shut down, or hold views.

Most of these crashed the process once, so each runs in a child whose exit status tells.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import select
import selectors
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Full
from typing import Any

import pytest

from header import LAYOUT
from shmring import HighPerformanceIPC, JoinableQueue, Queue, Ring, RingClosed, RingNotFound, wait
from support import own_name, run_in_process, wait_for, within

CONSUMERS = LAYOUT["CONSUMERS_OFFSET"]
PRODUCERS = LAYOUT["PRODUCERS_OFFSET"]
OWNER_DIED = 0x40000000


def hold(fd: int, offset: int, owner: int) -> None:
    """Write a lock word as if `owner` held it (0: it is free)."""
    os.pwrite(fd, struct.pack("<I", owner), offset)


def in_a_child(scene: Callable[[], None]) -> None:
    with run_in_process(scene) as child:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.fault(33)
@pytest.mark.parametrize("side", ["peek", "reserve"])
def test_while_a_block_is_being_entered(side):
    """The lock is held by another; close begins; the lock is released; the block is entered."""

    def scene() -> None:
        ring = Ring.create()
        fd = os.dup(ring._fileno())
        ring.put(b"front")
        offset = CONSUMERS if side == "peek" else PRODUCERS
        hold(fd, offset, os.getppid())
        entered, leave, refused = threading.Event(), threading.Event(), threading.Event()

        def enter() -> None:
            try:
                with ring.peek() if side == "peek" else ring.reserve(8):
                    entered.set()
                    leave.wait(30)
            except RingClosed:
                refused.set()

        thread = threading.Thread(target=enter)
        thread.start()
        threading.Timer(0.02, hold, (fd, offset, 0)).start()
        try:
            ring.close()
        except BufferError:
            wait_for(entered.is_set)
        leave.set()
        thread.join(30)
        assert entered.is_set() or refused.is_set()
        ring.close()

    in_a_child(scene)


class Slow:
    """Unpickling it lets another thread close the queue."""

    unpickling = threading.Event()
    closed = threading.Event()

    def __init__(self) -> None:
        self.something = 1

    def __setstate__(self, state: object) -> None:
        Slow.unpickling.set()
        Slow.closed.wait(0.05)


@pytest.mark.fault(33)
def test_while_get_many_decodes():
    def scene() -> None:
        queue = Queue()
        queue.put_many([Slow() for _ in range(20)])
        taken: list[object] = []
        thread = threading.Thread(target=lambda: taken.extend(queue.get_many()))
        thread.start()
        wait_for(Slow.unpickling.is_set)
        queue.close()
        Slow.closed.set()
        thread.join(30)
        assert taken

    in_a_child(scene)


@pytest.mark.fault(33)
def test_while_shutdown_waits_for_the_lock():
    def scene() -> None:
        ring = Ring.create()
        fd = os.dup(ring._fileno())
        hold(fd, PRODUCERS, os.getppid())
        outcome: list[object] = []

        def shut_down() -> None:
            try:
                ring.shutdown()
            except RingClosed as error:
                outcome.append(error)

        thread = threading.Thread(target=shut_down)
        thread.start()
        threading.Timer(0.2, hold, (fd, PRODUCERS, 0)).start()
        ring.close()
        thread.join(30)
        assert not thread.is_alive()

    in_a_child(scene)


@pytest.mark.fault(18, 33)
def test_in_a_forked_child_whose_own_thread_waits():
    with Ring.create() as ring:

        def scene() -> None:
            raised = threading.Event()

            def wait() -> None:
                try:
                    ring.get()
                except RingClosed:
                    raised.set()

            thread = threading.Thread(target=wait)
            thread.start()
            wait_for(lambda: ring.statistics().consumers_waiting)
            ring.close()
            thread.join(30)
            assert raised.is_set()

        in_a_child(scene)


@pytest.mark.fault(18)
def test_a_child_forked_inside_a_block_can_get_and_close():
    with Ring.create() as ring:
        ring.put_many([b"1", b"2"])

        def scene() -> None:
            assert ring.get(timeout=30) == b"2"  # when the parent has consumed the first
            ring.close()

        with contextlib.ExitStack() as children:
            with ring.peek():
                child = children.enter_context(run_in_process(scene))
                wait_for(lambda: ring.statistics().consumers_waiting)
            child.join(60)
            assert child.exitcode == 0


@pytest.mark.parametrize("reused", [True, False])
def test_recovery_never_touches_a_file_that_took_our_descriptor(tmp_path, reused):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"precious" * 10_000)
    ring = Ring.create(4096, max_capacity=1 << 20)
    fd = ring._fileno()
    kept = os.dup(fd)
    hold(kept, PRODUCERS, OWNER_DIED)  # what the kernel leaves when an owner dies
    if reused:
        stranger = os.open(foreign, os.O_RDWR)
        os.dup2(stranger, fd)
        os.close(stranger)
    else:
        os.close(fd)
    ring.put(b"x")
    assert ring.get() == b"x"
    assert not ring.statistics().poisoned
    assert foreign.read_bytes() == b"precious" * 10_000
    os.dup2(kept, fd)
    os.close(kept)
    ring.close()


def test_get_many_takes_what_is_there_and_not_what_comes():
    with Ring.create(1 << 16) as ring, run_in_process(_flood, ring):
        wait_for(lambda: ring.statistics().producers_waiting)
        for _ in range(20):
            # a full ring, and one that was taken before the look at what is there
            assert len(ring.get_many(timeout=10)) <= (1 << 16) // 40 + 1


def _flood(ring: Ring) -> None:
    while True:
        ring.put(b"12345678")


def test_growing_twice_in_one_call_leaves_no_mapping():
    with Ring.create(4096, max_capacity=1 << 24, name=own_name("closing")) as ring:
        other = Ring.attach(ring.name)
        before = _mappings()
        for _ in range(10):
            ring.put_many([bytes(1000)] * 8)  # grows
            other.put(bytes(100_000), block=False)  # follows, and grows again, in one call
            ring.get_many()
            with pytest.raises(Exception, match=r"^$"):
                ring.get(timeout=0.2)  # shrinks
        assert _mappings() <= before + 6
        other.close()


def _mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


def test_unpickling_a_queue_that_is_gone_fails_at_the_first_call():
    with Queue() as queue:
        sent = pickle.dumps(queue)
    received = pickle.loads(sent)
    assert received.closed
    with pytest.raises(RingNotFound, match="keeps its handle open"):
        received.get_nowait()


# ---- many threads, signal handlers, descriptors that are not ours any more -----------------------

# What a thread may do with a handle while others close it; each ends in RingClosed.
USES: list[Callable[[Any], object]] = [
    lambda handle: handle.put_many([b"x" * 100] * 20, timeout=0.01),
    lambda handle: handle.get_many(timeout=0.01),
    lambda handle: handle.put(b"y", timeout=0.01),
    lambda handle: handle.get(timeout=0.01),
    lambda handle: handle.qsize(),
    lambda handle: handle.statistics(),
    repr,
    lambda handle: handle.capacity + handle.max_capacity,
]


def reserve_and_peek(ring: Any) -> None:
    with ring.reserve(100, timeout=0.01) as view:
        view[:1] = b"z"
    with ring.peek(timeout=0.01):
        pass


def use_at_once(make: Callable[[], Any], rounds: int) -> int:
    """Eight threads use one handle in every way while two of them close it; returns the calls."""
    calls = [0] * 8
    for _ in range(rounds):
        handle = make()
        errors: list[BaseException] = []
        begin = threading.Barrier(8)

        def run(
            number: int, handle: Any = handle, begin: Any = begin, errors: Any = errors
        ) -> None:
            mine = [*USES[number:], *USES[:number]]
            if isinstance(handle, Ring):
                mine.insert(1, reserve_and_peek)
            begin.wait(30)
            try:
                for turn in range(10 if number < 2 else 100_000):
                    with contextlib.suppress(Empty, Full):
                        mine[turn % len(mine)](handle)
                    calls[number] += 1
                while True:
                    with contextlib.suppress(BufferError):  # another thread is inside a view
                        handle.close()
                        return
            except RingClosed:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors, errors
        assert not any(thread.is_alive() for thread in threads)
    return sum(calls)


@pytest.mark.parametrize("make", [Queue, JoinableQueue, Ring.create])
@pytest.mark.fault(44)
def test_a_handle_that_eight_threads_use_is_closed_by_two_of_them(make):
    in_a_child(lambda: use_at_once(make, 40))


@pytest.mark.parametrize("make", [Queue, Ring.create])
@pytest.mark.fault(44)
def test_threads_that_close_one_handle_at_once_close_each_descriptor_once(make):
    def scene() -> None:
        for _ in range(300):
            handle, begin = make(), threading.Barrier(4)
            failed: list[BaseException] = []

            def close(handle: Any = handle, begin: Any = begin, failed: Any = failed) -> None:
                begin.wait(30)
                try:
                    handle.close()
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=close) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert not failed, failed

    in_a_child(scene)


@pytest.mark.parametrize("make", [Queue, Ring.create])
@pytest.mark.fault(44)
def test_put_many_that_close_cuts_short_says_how_many_went_in(make):
    name = own_name("closing")
    with make(name=name, max_capacity=1 << 16) as handle, type(handle).attach(name) as other:
        outcome: list[Any] = []

        def put() -> None:
            try:
                handle.put_many([bytes(1000)] * 1000)
            except RingClosed as error:
                outcome.append(error)

        thread = threading.Thread(target=put)
        thread.start()
        wait_for(lambda: other.statistics().producers_waiting)
        handle.close()
        thread.join(30)
        assert outcome[0].count == other.qsize()
        assert 0 < outcome[0].count < 1000


@pytest.mark.fault(44)
def test_arrays_that_end_in_other_threads_give_the_place_back_once():
    def scene() -> None:
        with Ring.create() as ring:
            for turn in range(100):
                ring.put(b"front")
                block = ring.reserve(80) if turn % 2 == 0 else ring.peek()
                with pytest.raises(BufferError), block as view:
                    parts = [view[number : number + 1] for number in range(4)]
                begin = threading.Barrier(4)

                def drop(parts: Any = parts, begin: Any = begin) -> None:
                    begin.wait(30)
                    parts.pop().release()

                del view
                threads = [threading.Thread(target=drop) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(30)
                assert ring.get(timeout=30) == b"front"
                with pytest.raises(Empty):
                    ring.get_nowait()

    in_a_child(scene)


def full(queue: Any) -> Any:
    queue.put(b"x" * 50_000)
    return queue


def locked(handle: Any, offset: int) -> Any:
    hold(handle._fileno(), offset, os.getppid())
    return handle


# In which call of which handle the main thread is interrupted.
INSIDE: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "get": (Queue, lambda queue: queue.get()),
    "get_many": (Queue, lambda queue: queue.get_many()),
    "put": (lambda: full(Queue(max_capacity=1 << 16)), lambda queue: queue.put(b"x" * 50_000)),
    "join": (lambda: full(JoinableQueue()), lambda queue: queue.join()),
    "wait": (Queue, lambda queue: wait([queue])),
    "peek": (Ring.create, lambda ring: ring.peek().__enter__()),
    "reserve": (lambda: full(Ring.create()), lambda ring: ring.reserve(50_000).__enter__()),
    "a lock": (lambda: locked(Queue(), PRODUCERS), lambda queue: queue.put(1)),
}


@pytest.mark.parametrize("call", INSIDE)
@pytest.mark.fault(44)
def test_close_in_a_signal_handler_does_not_wait_for_the_call_that_it_interrupts(call):
    make, enter = INSIDE[call]

    def scene() -> None:
        handle = make()
        closed = []

        def close(*_: object) -> None:
            within(1.0, handle.close)
            closed.append(True)

        def interrupt() -> None:
            wait_for(lambda: handle.statistics().waiters)
            os.kill(os.getpid(), signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, close)
        threading.Thread(target=interrupt).start()
        with pytest.raises(RingClosed):
            enter(handle)
        assert closed

    in_a_child(scene)


@pytest.mark.fault(44)
def test_cleanup_in_a_signal_handler_does_not_wait_for_the_call_that_it_interrupts():
    def scene() -> None:
        with HighPerformanceIPC("a", namespace=own_name("closing")) as ipc:
            ipc.create_message_queue("q")
            queue = ipc.message_queues["q"]

            def interrupt() -> None:
                wait_for(lambda: queue.statistics().waiters)
                os.kill(os.getpid(), signal.SIGUSR1)

            signal.signal(signal.SIGUSR1, lambda *_: within(1.0, ipc.cleanup))
            threading.Thread(target=interrupt).start()
            with pytest.raises(RingClosed):
                ipc.receive_message("q")

    in_a_child(scene)


# How each is made under a name, and ended; {name} is the name, or the namespace.
KINDS = {
    "Queue": ("shmring.Queue(name={name!r})", "close"),
    "Ring": ("shmring.Ring.create(name={name!r})", "close"),
    "SharedMemoryManager": ("memory({name!r})", "cleanup"),
    "HighPerformanceIPC": ("ipc({name!r})", "cleanup"),
}
PRELUDE = """
import gc, os, sys
import shmring

def memory(name):
    made = shmring.SharedMemoryManager(name, 100)
    made.create()
    return made

def ipc(name):
    made = shmring.HighPerformanceIPC("a", namespace=name)
    made.create_message_queue("q")
    made.create_shared_memory("m", 10)
    return made

def left(name):
    return [each for each in os.listdir("/dev/shm") if name in each]
"""
WAIT_FOR = f"""
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from support import wait_for
"""


def run_program(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(46)
def test_a_handle_that_is_dropped_gives_its_name_back_where_warnings_are_errors(kind):
    name = own_name("closing")
    made = KINDS[kind][0].format(name=name)
    done = run_program(
        f"made = {made}\nassert left({name!r})\ndel made; gc.collect()\nprint(left({name!r}))",
        "-Werror",
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(47)
def test_a_descriptor_that_another_file_got_is_left_alone(kind):
    name = own_name("closing")
    make, end = KINDS[kind]
    done = run_program(
        f"made = {make.format(name=name)}\n"
        "os.closerange(3, 100)\n"
        "others = [os.open('/dev/null', os.O_RDONLY) for _ in range(60)]\n"
        "try:\n"
        f"    made.{end}()\n"
        "finally:\n"
        "    print(sum(os.path.sameopenfile(fd, others[0]) for fd in others))\n"
    )
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(45)
def test_the_last_of_processes_that_were_forked_without_multiprocessing_leaves(kind):
    name = own_name("closing")
    made = KINDS[kind][0].format(name=name)
    done = run_program(
        f"made = {made}\n"
        "reader, writer = os.pipe()\n"
        "for _ in range(2):\n"
        "    if os.fork():\n"
        "        os._exit(0)\n"
        "os.close(writer)\n"
        "os.read(reader, 1)\n"  # until both parents have ended
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not [each for each in os.listdir("/dev/shm") if name in each]


@pytest.mark.fault(45)
def test_a_child_that_is_forked_while_a_thread_is_inside_uses_the_same_handle():
    name = own_name("closing")
    done = run_program(
        f"import threading\n{WAIT_FOR}"
        f"made = ipc({name!r})\n"
        "queue = made.message_queues['q']\n"
        "threads = [threading.Thread(target=made.receive_message, args=('q',)) for _ in range(2)]\n"
        "for each in threads: each.start()\n"
        "wait_for(lambda: len(queue.statistics().waiters) == 2)\n"
        "made._guard.acquire()\n"  # as a thread that counts has it
        "pid = os.fork()\n"
        "made._guard.release() if pid else None\n"
        "if pid == 0:\n"
        "    for number in range(2):\n"
        "        made.send_message('q', shmring.MessageType.DATA, number)\n"
        "    made.write_shared_data('m', b'child')\n"
        "    made.cleanup()\n"
        "    os._exit(0)\n"
        "for each in threads: each.join(30)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), made.read_shared_data('m', 5))\n"
        "made.cleanup()\n"
    )
    assert (done.stdout, done.stderr) == ("0 b'child'\n", "")


# ---- the end of a program ------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(43)
def test_a_program_that_imported_dill_ends_silently(kind, ended):
    pytest.importorskip("dill")
    make, end = KINDS[kind]
    made = make.format(name=own_name("closing"))
    done = run_program(f"import dill\nmade = {made}\n" + (f"made.{end}()\n" if ended else ""))
    assert (done.returncode, done.stderr) == (0, "")


# What a daemon thread is in when its program ends.
DAEMONS = {
    "Queue.get": "q = shmring.Queue(); call = q.get",
    "Queue.put": "q = shmring.Queue(1); q.put(1); call = lambda: q.put(1)",
    "JoinableQueue.join": "q = shmring.JoinableQueue(); q.put(1); call = q.join",
    "Ring.get": "q = shmring.Ring.create(); call = q.get",
    "Ring.peek": "q = shmring.Ring.create(); call = q.peek().__enter__",
    "wait": "q = shmring.Queue(); call = lambda: shmring.wait([q])",
    "aget": "import asyncio; q = shmring.Queue(); call = lambda: asyncio.run(q.aget())",
    "QueueListener": "import logging.handlers; q = shmring.Queue();"
    " call = logging.handlers.QueueListener(q).start",
    "HighPerformanceIPC": "made = ipc({name!r}); q = made.message_queues['q'];"
    " call = lambda: made.receive_message('q')",
}
INSIDE_MEMORY = """
import threading
made = memory({name!r})
def call():
    while True:
        made.write_data(b"x" * 100)
threading.Thread(target=call, daemon=True).start()
wait_for(lambda: made.read_data(1) == b"x")
"""
BECOME_DAEMON = """
import threading
{setup}
def run():
    threading.Thread(target=call, daemon=True).start()
    wait_for(lambda: q.statistics().waiters)
"""


@pytest.mark.parametrize("where", ["the program", "a forked child", "a spawned child"])
@pytest.mark.parametrize("call", DAEMONS)
@pytest.mark.fault(43)
def test_a_daemon_thread_that_waits_ends_silently_with_its_process(call, where, tmp_path):
    program = tmp_path / "program.py"
    setup = DAEMONS[call].format(name=own_name("closing"))
    text = BECOME_DAEMON
    if where == "the program":
        text = PRELUDE + WAIT_FOR + text.format(setup=setup) + "run()\n"
    else:
        method = "fork" if where == "a forked child" else "spawn"
        indented = "\n".join(f"    {line}" for line in text.format(setup=setup).splitlines())
        text = (
            f"{PRELUDE}{WAIT_FOR}import multiprocessing\n"
            f"def child():\n{indented}\n    run()\n"
            "if __name__ == '__main__':\n"
            f"    started = multiprocessing.get_context({method!r}).Process(target=child)\n"
            "    started.start()\n    started.join()\n    sys.exit(started.exitcode)\n"
        )
    program.write_text(text)
    ended = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.fault(43)
def test_a_daemon_thread_that_writes_memory_ends_silently():
    done = run_program(WAIT_FOR + INSIDE_MEMORY.format(name=own_name("closing")))
    assert (done.returncode, done.stderr) == (0, "")


# ---- handles that arrive too late ----------------------------------------------------------------


def test_a_pool_gets_an_error_where_the_queue_it_was_sent_is_gone(tmp_path):
    queue = Queue()
    go = tmp_path / "go"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        busy = pool.apply_async(_wait_for_file, (go,))
        late = pool.apply_async(_take, (queue,))
        wait_for(lambda: queue._identity()[0])  # it was pickled, and is still to be unpickled
        queue.close()
        go.touch()
        busy.get(60)
        with pytest.raises(RingNotFound, match="keeps its handle open"):
            late.get(60)


def _wait_for_file(path: Path) -> None:
    wait_for(path.exists, timeout=60)


def _take(queue: Any) -> object:
    return queue.get(timeout=1)


def test_what_an_ipc_had_is_missed_when_it_is_used_and_not_when_it_arrives():
    with HighPerformanceIPC("a", namespace=own_name("closing")) as ipc:
        ipc.create_message_queue("q")
        ipc.create_shared_memory("m", 10)
        sent = pickle.dumps(ipc)
    with pickle.loads(sent) as received:
        with pytest.raises(RingNotFound, match="keeps its handle open"):
            received.receive_message("q", timeout=0)
        with pytest.raises(RingNotFound, match="keeps its block"):
            received.read_shared_data("m", 1)


@pytest.mark.parametrize("make", [Queue, Ring.create])
def test_select_on_a_queue_names_wait(make):
    with make() as queue:
        selector = selectors.DefaultSelector()
        for call in (
            lambda: select.select([queue], [], [], 0),
            lambda: selector.register(queue, selectors.EVENT_READ),
            lambda: multiprocessing.connection.wait([queue], 0),
        ):
            with pytest.raises(OSError, match=r"shmring\.wait"):
                call()
        selector.close()

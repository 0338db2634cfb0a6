"""Signals while a call waits, and interpreters that end while a thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

import shmring
from header import MEMORY_LOCK, WAITERS, lock_word, stopped_under_lock, word
from shmring import JoinableQueue, Queue, Ring, SharedMemoryManager
from shmring.errors import Empty, Full, RingClosed, ShutDown
from support import asleep, at_least, own_name, run_in_process, wait_for

LARGE = bytes(1000)


# ---- what blocks ---------------------------------------------------------------------------


@contextmanager
def full() -> Iterator[Ring]:
    with Ring.create(4096) as ring:
        with pytest.raises(Full):
            ring.put_many([LARGE] * 10, block=False)
        yield ring


@contextmanager
def empty() -> Iterator[Ring]:
    with Ring.create() as ring:
        yield ring


@contextmanager
def locked(side: str) -> Iterator[Ring]:
    with Ring.create(1 << 24) as ring, stopped_under_lock(ring, side):
        yield ring


@contextmanager
def unfinished() -> Iterator[JoinableQueue[object]]:
    with JoinableQueue[object]() as queue:
        queue.put("never done")
        yield queue


def consumers_sleep(ring: Ring) -> bool:
    return ring.statistics().consumers_waiting


def producers_sleep(ring: Ring) -> bool:
    return ring.statistics().producers_waiting


def producers_queue_up(ring: Ring) -> bool:
    return bool(lock_word(ring, "producers") & WAITERS)


def consumers_queue_up(ring: Ring) -> bool:
    return bool(lock_word(ring, "consumers") & WAITERS)


def nothing_to_see(queue: object) -> bool:
    return True


def peek(ring: Ring, timeout: float | None = None) -> None:
    with ring.peek(timeout=timeout):
        pass


def reserve(ring: Ring, timeout: float | None = None) -> None:
    with ring.reserve(2000, timeout=timeout):
        pass


def wait(ring: Ring, timeout: float | None = None) -> None:
    if not shmring.wait([ring], timeout):
        raise Empty


def join(queue: JoinableQueue[object], timeout: float | None = None) -> None:
    if not queue.join(timeout):
        raise Empty


def get(ring: Ring, timeout: float | None = None) -> None:
    ring.get(timeout=timeout)


def get_many(ring: Ring, timeout: float | None = None) -> None:
    ring.get_many(timeout=timeout)


def put(ring: Ring, timeout: float | None = None) -> None:
    ring.put(LARGE, timeout=timeout)


def put_many(ring: Ring, timeout: float | None = None) -> None:
    ring.put_many([LARGE], timeout=timeout)


# name: (what to block on, the call, how it is seen to block)
BLOCKED = {
    "get": (empty, get, consumers_sleep),
    "get_many": (empty, get_many, consumers_sleep),
    "peek": (empty, peek, consumers_sleep),
    "wait": (empty, wait, consumers_sleep),
    "put": (full, put, producers_sleep),
    "put_many": (full, put_many, producers_sleep),
    "reserve": (full, reserve, producers_sleep),
    "join": (unfinished, join, nothing_to_see),
    "put, for the lock": (lambda: locked("producers"), put, producers_queue_up),
    "get, for the lock": (lambda: locked("consumers"), get, consumers_queue_up),
}
WITHOUT_TIMEOUT = {
    "shutdown, for the lock": (lambda: locked("producers"), Ring.shutdown, producers_queue_up),
}


# ---- Ctrl-C --------------------------------------------------------------------------------


def block(
    ready: Queue[object],
    interrupted: Queue[str],
    call: Callable[[object], object],
    ring: object,
    with_threads: bool,
) -> None:
    """Be interrupted inside a call, and say so; then everything still works."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = threading.Event()
    with ExitStack() as stack:
        if with_threads:
            other = stack.enter_context(Queue[object]())

            def wait() -> None:
                other.get(timeout=60)

            def work() -> None:
                while not stop.is_set():
                    sum(range(1000))

            threads = [threading.Thread(target=each) for each in (wait, wait, work)]
            for thread in threads:
                thread.start()
            wait_for(lambda: other.statistics().consumers_waiting)
        try:
            ready.put("ready")
            call(ring)
        except KeyboardInterrupt:
            interrupted.put("interrupted")
        if with_threads:
            stop.set()
            other.put_many([1, 1])
            for thread in threads:
                thread.join(30)


@pytest.mark.fault(31)
@pytest.mark.parametrize("with_threads", [False, True], ids=["alone", "among threads"])
@pytest.mark.parametrize("what", {**BLOCKED, **WITHOUT_TIMEOUT})
def test_ctrl_c_while_blocked(what, with_threads):
    prepare, call, blocks = {**BLOCKED, **WITHOUT_TIMEOUT}[what]
    with prepare() as ring, Queue() as ready, Queue() as interrupted:
        with run_in_process(block, ready, interrupted, call, ring, with_threads) as child:
            assert ready.get(timeout=30) == "ready"
            wait_for(lambda: blocks(ring), what="it to block")
            wait_for(asleep(child.pid), what="it to sleep there")
            os.kill(child.pid, signal.SIGINT)
            assert interrupted.get(timeout=10) == "interrupted"
            child.join(30)
            assert child.exitcode == 0
        if what == "get":  # and the one that was interrupted has taken nothing with it
            ring.put(b"for another")
            assert ring.get(timeout=5) == b"for another"


@pytest.mark.fault(31)
def test_ctrl_c_while_plain_memory_is_locked():
    name = own_name("interrupted")
    with SharedMemoryManager(name, 100) as memory, Queue() as ready, Queue() as interrupted:
        assert memory.create()
        with open(f"/dev/shm/{name}", "r+b") as file:
            word(file.fileno(), MEMORY_LOCK, os.getpid(), size=4)  # as if this process held it

            def read(memory: SharedMemoryManager) -> None:
                memory.read_data(10)

            with run_in_process(block, ready, interrupted, read, memory, False) as child:
                wait_for(lambda: word(file.fileno(), MEMORY_LOCK, size=4) & WAITERS)
                os.kill(child.pid, signal.SIGINT)
                assert interrupted.get(timeout=10) == "interrupted"
                child.join(30)
                assert child.exitcode == 0


@pytest.mark.fault(31)
def test_ctrl_c_in_the_main_thread_leaves_the_threads_that_wait_alone():
    """They go on waiting; the program ends them."""
    program = r"""
import os, signal, threading
from shmring import Queue
queue = Queue()
taken = []
thread = threading.Thread(target=lambda: taken.append(queue.get()))
thread.start()
try:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    Queue().get()
except KeyboardInterrupt:
    assert thread.is_alive()
    queue.put("on")
    thread.join(30)
    assert taken == ["on"]
    queue.close()
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "interrupted\n"


CUTS = {
    "close": (lambda handle, other: handle.close(), RingClosed),
    "shutdown": (lambda handle, other: other.shutdown(), ShutDown),
    "Ctrl-C": (lambda handle, other: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("kind", [Ring, Queue])
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize(("before", "batch", "count"), [(0, 10, 3), (2, 2, 1), (3, 1, 0)])
def test_a_put_many_that_is_cut_says_how_many_went_in(how, kind, before, batch, count):
    cut, error = CUTS[how]
    with ExitStack() as stack:
        if kind is Ring:
            handle = stack.enter_context(Ring.create(4096))
        else:
            handle = stack.enter_context(Queue(maxsize=3))
        other = stack.enter_context(kind.attach(handle.name))
        handle.put_many([LARGE] * before)

        def cut_when_it_waits() -> None:
            wait_for(lambda: other.statistics().producers_waiting)
            cut(handle, other)

        thread = threading.Thread(target=cut_when_it_waits)
        thread.start()
        with pytest.raises(error) as caught:
            handle.put_many([LARGE] * batch, timeout=30)
        thread.join(30)
        assert caught.value.count == count
        assert other.qsize() == 3
        assert other.get_many(block=False) == [LARGE] * 3


# ---- a storm of signals ----------------------------------------------------------------------


@contextmanager
def storm() -> Iterator[list[int]]:
    """A signal each millisecond, handled in Python; how many came is the length of the list.

    A call that outlasts the ten thousandth is ended.
    """
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 10_000:
            raise TimeoutError("the call outlasts ten thousand signals")

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.fault(32)
@pytest.mark.parametrize("what", BLOCKED)
def test_a_storm_of_signals_leaves_the_deadline_where_it_was(what):
    prepare, call, _ = BLOCKED[what]
    with prepare() as ring, storm() as came:
        with at_least(0.3), pytest.raises((Empty, Full)):
            call(ring, timeout=0.3)
        assert len(came) > 1, "no storm"


@pytest.mark.fault(32)
def test_a_storm_of_signals_loses_no_message():
    with Ring.create(4096) as ring:

        def produce() -> None:
            for number in range(3000):
                ring.put(number.to_bytes(8, "little"), timeout=30)

        with storm() as came, run_in_process(produce) as child:
            taken = [int.from_bytes(ring.get(timeout=30), "little") for _ in range(3000)]
            wait_for(lambda: len(came) > 10, what="the storm")
        assert taken == list(range(3000))
        assert child.exitcode in (0, -signal.SIGKILL)


@pytest.mark.fault(32)
def test_a_handler_that_raises_ends_the_wait_and_takes_nothing():
    class Enough(Exception):
        pass

    def enough(number: int, frame: object) -> None:
        raise Enough

    before = signal.signal(signal.SIGALRM, enough)
    try:
        with Ring.create() as ring:
            for _ in range(20):
                signal.setitimer(signal.ITIMER_REAL, 0.005)
                with pytest.raises(Enough):
                    ring.get(timeout=30)
            ring.put(b"still there")
            assert ring.get(timeout=5) == b"still there"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- an interpreter that ends -----------------------------------------------------------------

ENDS = r"""
import sys, threading
from shmring import Ring
ring = Ring.attach(sys.argv[1])
thread = threading.Thread(target=lambda: {call}, daemon=True)
thread.start()
while not ring.statistics().{waiting}:
    pass
{end}
"""


@pytest.mark.fault(34)
@pytest.mark.parametrize("end", ["", "sys.exit(0)", "1 / 0", "import os; os._exit(0)"])
@pytest.mark.parametrize(
    ("call", "waiting"),
    [
        ("ring.get()", "consumers_waiting"),
        ("ring.peek().__enter__()", "consumers_waiting"),
        ("ring.put(bytes(3000))", "producers_waiting"),
    ],
)
def test_an_interpreter_that_ends_with_a_thread_blocked_leaves_the_others_alone(call, waiting, end):
    with Ring.create(4096) as ring:
        if "put" in call:
            ring.put(bytes(3000))
        done = subprocess.run(
            [sys.executable, "-c", ENDS.format(call=call, waiting=waiting, end=end), ring.name],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == (end == "1 / 0")
        if "put" in call:
            assert ring.get(timeout=5) == bytes(3000)
        ring.put(b"to myself", timeout=5)
        assert ring.get(timeout=5) == b"to myself"
        assert ring.qsize() == 0

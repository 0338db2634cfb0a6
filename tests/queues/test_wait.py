"""wait: on queues, processes, connections; readiness, and which waiter is woken."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading

import pytest

import shmring
from shmring import InvalidArgument, JoinableQueue, Queue, RingClosed, SimpleQueue, wait
from support import at_least, run_in_process, wait_for, within

if shmring.backend == "ring":
    from shmring import Ring
    from shmring._core import wait as core_wait
    from traced import Traced, stop_to_be_traced

both_backends = pytest.mark.both_backends


@pytest.fixture
def queues():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Queue()) for _ in range(20)]


@pytest.fixture(params=[False, True], ids=["waitv", "no-waitv"])
def kernel(request):
    before = core_wait._set_waitv_absent(request.param)
    yield
    core_wait._set_waitv_absent(before)


def forever():
    threading.Event().wait()


@contextlib.contextmanager
def in_thread(target, *args):
    thread = threading.Thread(target=target, args=args)
    thread.start()
    yield thread
    thread.join(20)
    assert not thread.is_alive()


def asleep(queue):
    return lambda: queue.statistics().consumers_waiting


def sleepers(queue):
    return {waiter["pid"] for waiter in queue.statistics().waiters}


# ---- queues alone -----------------------------------------------------------------------------


@both_backends
def test_the_ready_ones_in_the_order_given(queues):
    for number in (13, 4, 8):
        queues[number].put(number)
    wait_for(lambda: len(wait(queues, 0)) == 3)
    assert wait(queues) == [queues[4], queues[8], queues[13]]
    assert wait(queues[::-1]) == [queues[13], queues[8], queues[4]]
    assert wait(iter(queues[8:])) == [queues[8], queues[13]]
    assert [queues[number].get() for number in (13, 4, 8)] == [13, 4, 8]


@both_backends
@pytest.mark.parametrize("timeout", [0, 0.05, 0.2, -1])
def test_time_runs_out(queues, timeout):
    with at_least(max(0, timeout)):
        assert within(10, wait, queues, timeout) == []


@both_backends
def test_nothing_to_wait_for():
    with pytest.raises(InvalidArgument, match="object_list is empty"):
        wait([])
    assert wait([], 0.01) == []


@both_backends
def test_a_thread_puts_while_we_sleep(queues):
    with in_thread(queues[5].put, "x"):
        assert wait(queues, 20) == [queues[5]]


def test_all_kinds_of_queues_and_rings(kernel):
    with Queue() as a, JoinableQueue() as b, SimpleQueue() as c, Ring.create() as d:
        assert wait([a, b, c, d], 0.1) == []
        for each in (a, b, c, d):
            each.put(b"")
            assert wait([a, b, c, d]) == [each]
            each.get()
        assert wait([a, b, c, d], 0) == []
        a.put(1)
        assert wait([a, b, a]) == [a, a]


def wait_traced(queues, answers):
    stop_to_be_traced()
    answers.put([queues.index(each) for each in wait(queues)])


def test_it_sleeps_in_the_kernel_and_a_put_wakes_it(queues):
    def woken_by(chosen):
        with Queue() as answers, run_in_process(wait_traced, queues, answers) as child:
            traced = Traced(child.pid)
            traced.fall_asleep(asleep(queues[-1]))
            queues[chosen].put(1)
            woken = traced.woken()
            traced.let_go()
            assert answers.get(timeout=10) == [chosen]
            queues[chosen].get()
        return woken

    # A slice of sleep may end of itself just then, now and then.
    assert all(any(woken_by(chosen) for _ in range(5)) for chosen in (0, 7, 19))


def put_one(queue):
    queue.put(1)


def test_from_another_process(queues, start_method):
    with run_in_process(put_one, queues[3], method=start_method):
        assert wait(queues, 20) == [queues[3]]


def test_more_queues_than_the_kernel_watches():
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(Queue()) for _ in range(150)]
        assert wait(many, 0.05) == []
        for chosen in (many[0], many[126], many[127], many[149]):
            with in_thread(lambda chosen=chosen: (wait_for(asleep(many[0])), chosen.put(1))):
                assert wait(many, 20) == [chosen]
            chosen.get()


# ---- what readiness is ------------------------------------------------------------------------


def test_a_message_that_cannot_be_taken_now_does_not_count():
    with Ring.create() as ring, Queue() as queue:
        with ring.reserve(8) as view:
            ring.put(b"behind")
            assert wait([ring, queue], 0.1) == []
            view[:] = b"reserved"
        assert wait([ring, queue]) == [ring]
        assert ring.get() == b"reserved"
        with ring.peek():
            assert wait([ring, queue], 0.1) == []
        assert wait([ring, queue], 0) == []
        ring.put(b"x")
        assert wait([ring, queue], 0) == [ring]


def reserve_and_die(ring, ready):
    with ring.reserve(8):
        ring.put(b"behind")
        ready.put(1)
        forever()


def peek_and_die(ring, ready):
    with ring.peek():
        ready.put(1)
        forever()


@pytest.mark.fault(9, 16)
@pytest.mark.parametrize("how", [reserve_and_die, peek_and_die])
def test_the_way_is_cleared_of_the_killed(how):
    with Ring.create() as ring, Queue() as ready, Queue() as other:
        if how is peek_and_die:
            ring.put(b"behind")
        with run_in_process(how, ring, ready) as holder:
            ready.get(timeout=20)
            assert wait([ring, other], 0.05) == []
            os.kill(holder.pid, signal.SIGKILL)
            assert wait([ring, other], 20) == [ring]
            assert ring.get(timeout=1) == b"behind"


@both_backends
def test_shut_down_is_ready(queues):
    with in_thread(queues[2].shutdown):
        assert wait(queues, 20) == [queues[2]]
    with pytest.raises(shmring.ShutDown):
        queues[2].get()
    queues[3].put(1)
    queues[3].shutdown()
    wait_for(lambda: len(wait(queues, 0)) == 2)
    assert queues[3].get() == 1


@both_backends
def test_closed_raises(queues):
    closed = Queue()
    closed.close()
    with pytest.raises(RingClosed):
        wait([*queues, closed])


@pytest.mark.fault(33)
def test_closed_while_we_wait(queues, kernel):
    queue = Queue()
    with in_thread(lambda: (wait_for(asleep(queue)), queue.close())), pytest.raises(RingClosed):
        within(10, wait, [*queues, queue])
    for each in queues:  # and no call is still counted as being inside
        within(10, each.close)


# ---- with processes, connections, sockets -----------------------------------------------------


@both_backends
def test_beside_a_process_that_is_killed(queues):
    with run_in_process(forever) as process:
        assert wait([queues[0], process, queues[1]], 0.1) == []
        os.kill(process.pid, signal.SIGKILL)
        assert wait([queues[0], process, queues[1]], 20) == [process]
        assert wait([process.sentinel], 20) == [process.sentinel]


@both_backends
def test_beside_a_connection(queues):
    here, there = multiprocessing.Pipe()
    with here, there:
        assert wait([here, queues[0]], 0.05) == []
        with in_thread(there.send, "x"):
            assert wait([here, queues[0]], 20) == [here]
        queues[0].put(1)
        wait_for(lambda: len(wait([here, queues[0]], 20)) == 2)
        here.recv()
        assert wait([here, queues[0]], 0) == [queues[0]]
        there.close()
        assert wait([here], 20) == [here]  # the end is an event, as in multiprocessing


def test_long_waits_use_a_thread_that_ends(queues, kernel):
    left, right = socket.socketpair()
    before = threading.active_count()

    def later(action):
        wait_for(lambda: any(t.name == "shmring-wait" for t in threading.enumerate()))
        action()

    with left, right:
        for action, expected in (
            (lambda: right.send(b"x"), [left]),
            (lambda: queues[7].put(1), [left, queues[7]]),
        ):
            with in_thread(later, action):
                if len(expected) == 2:
                    left.recv(1)
                    expected = expected[1:]
                assert wait([left, *queues], 20) == expected
            assert threading.active_count() == before


def test_files_that_another_reads_first(queues):
    """The watcher rings for nothing, and must go on watching."""
    left, right = socket.socketpair()
    twin = left.dup()

    def tease():
        for _ in range(20):
            wait_for(lambda: any(t.name == "shmring-wait" for t in threading.enumerate()))
            right.send(b"x")
            with contextlib.suppress(BlockingIOError):
                twin.recv(1)
        queues[0].put(1)

    with left, right, twin:
        twin.setblocking(False)
        with in_thread(tease):
            while wait([left, *queues], 20) == [left]:
                with contextlib.suppress(BlockingIOError):
                    left.recv(1, socket.MSG_DONTWAIT)
        assert wait(queues, 0) == [queues[0]]


@both_backends
def test_what_cannot_be_waited_for():
    with pytest.raises((TypeError, ValueError)):
        wait(["text"], 0)
    with pytest.raises(ValueError, match="not started"):
        wait([multiprocessing.Process(target=forever)], 0)


# ---- the others, signals, forks ---------------------------------------------------------------


def get_to(queue, answers):
    while (message := queue.get()) is not None:
        answers.put(message)


def test_a_waiter_that_is_woken_and_takes_nothing_passes_the_wake_up_on(queues):
    woken = []
    with Queue() as answers, run_in_process(get_to, queues[0], answers) as other:
        for number in range(10):
            with in_thread(wait, queues, 1 if number % 2 else None):
                wait_for(asleep(queues[1]))
                traced = Traced(other.pid, seize=True)  # which puts it behind us
                traced.fall_asleep(lambda: other.pid in sleepers(queues[0]))
                queues[0].put(number)
                woken.append(traced.woken())
                traced.let_go()
                assert answers.get(timeout=10) == number
                queues[1].put("end")
            queues[1].get()
            with contextlib.suppress(shmring.Empty):
                queues[1].get_nowait()
        queues[0].put(None)
    assert sum(woken) >= 7, "a slice of sleep may end of itself just then, now and then"


def wait_in_process(queues, ready, result):
    try:
        ready.put(1)
        wait(queues)
    except KeyboardInterrupt:
        result.put("interrupted")


@pytest.mark.fault(31)
@pytest.mark.parametrize("with_file", [False, True])
def test_ctrl_c_ends_it(queues, with_file):
    left, right = socket.socketpair()
    with left, right, Queue() as ready, Queue() as result:
        objects = [*queues, left] if with_file else queues
        with run_in_process(wait_in_process, objects, ready, result) as process:
            ready.get(timeout=20)
            wait_for(asleep(queues[0]))
            os.kill(process.pid, signal.SIGINT)
            assert result.get(timeout=10) == "interrupted"
            process.join(10)
            assert process.exitcode == 0


@pytest.mark.fault(6)
def test_killed_waiters_do_not_disturb(queues):
    with Queue() as ready, Queue() as result:
        for number in range(10):
            with run_in_process(wait_in_process, queues, ready, result) as process:
                ready.get(timeout=20)
                os.kill(process.pid, signal.SIGKILL)
            with in_thread(queues[number].put, number):
                assert wait(queues, 20) == [queues[number]]
            assert queues[number].get() == number


def wait_and_answer(queues, answers):
    wait(queues)
    answers.put(len(wait(queues)))


@pytest.mark.fault(18)
def test_fork_while_another_thread_waits(queues):
    with Queue() as answers, in_thread(wait, queues):
        wait_for(asleep(queues[0]))
        with run_in_process(wait_and_answer, queues, answers) as child:
            queues[9].put(1)
            assert answers.get(timeout=20) == 1
            child.join(20)
            assert child.exitcode == 0


def consume(queues, answers):
    taken = 0
    while True:
        for queue in wait(queues):
            with contextlib.suppress(shmring.Empty):
                message = queue.get_nowait()
                if message is None:
                    answers.put(taken)
                    return
                taken += 1


def test_several_waiters_share_the_work(queues):
    """Every message is taken by one of them, and none sleeps beside a message."""
    with Queue() as answers, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(run_in_process(consume, queues, answers))
        for number in range(4000):
            queues[number % 20].put(number)
        wait_for(lambda: all(queue.empty() for queue in queues), 30)
        for _ in range(3):
            queues[0].put(None)
        assert sum(answers.get(timeout=20) for _ in range(3)) == 4000


GEVENT = """
from gevent import monkey
monkey.patch_all()
import asyncio, multiprocessing, threading
import shmring

def put(queue):
    queue.put(1)

async def get(queue):
    return await queue.aget()

queue, other = shmring.Queue(), shmring.Queue()
child = multiprocessing.get_context("fork").Process(target=put, args=(queue,))
child.start()
assert shmring.wait([queue, child], 30)
assert queue.get(timeout=30) == 1
assert shmring.wait([other, child], 30) == [child]
try:
    asyncio.run(get(queue))
except RuntimeError as error:
    print(error)
"""


def test_a_program_that_gevent_patched_waits_in_slices_and_is_told_where_it_cannot():
    pytest.importorskip("gevent")
    done = subprocess.run(
        [sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gevent has replaced threads" in done.stdout


@pytest.mark.parametrize("make", [Queue, shmring.Ring.create])
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

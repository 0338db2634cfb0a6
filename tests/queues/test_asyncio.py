"""aget and aput: order, turns that are given up, one thread, several loops, forks and ends."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import shmring
from shmring import (
    DecodeError,
    EncodeError,
    InvalidArgument,
    JoinableQueue,
    Queue,
    RingClosed,
    ShutDown,
)
from shmring.errors import Empty, Full
from support import at_least, run_in_process, turns, until, wait_for
from traced import Traced

if shmring.backend == "ring":
    from header import lock_word
    from shmring._core import wait
    from shmring.queues import aio


def run(main):
    """asyncio.run with a deadline: a test that waits in vain ends."""

    async def limited():
        async with asyncio.timeout(60):
            return await main

    return asyncio.run(limited())


def run_for_ever():
    while True:
        pass


def helpers():
    return [thread for thread in threading.enumerate() if thread.name == "shmring-asyncio"]


def waiting(queue):
    return len(aio._lines_of(queue).getters) + len(aio._lines_of(queue).putters)


async def start(queue, count, call="aget"):
    tasks = [asyncio.create_task(getattr(queue, call)()) for _ in range(count)]
    await until(lambda: waiting(queue) >= count)
    return tasks


@pytest.fixture(params=[Queue, JoinableQueue])
def queue(request):
    with request.param() as made:
        yield made
    wait_for(lambda: not helpers(), what="the end of the helper thread")


@pytest.fixture(params=[False, True], ids=["waitv", "no-waitv"])
def kernel(request):
    before = wait._set_waitv_absent(request.param)
    yield
    wait._set_waitv_absent(before)


def put_range(queue, count):
    for i in range(count):
        queue.put(i)


# ---- the order of the calls -------------------------------------------------------------------


def test_what_is_there_is_taken_at_once_without_a_thread(queue):
    async def main():
        for i in range(100):
            await queue.aput(i)
        assert [await queue.aget() for _ in range(100)] == list(range(100))
        assert not helpers()

    run(main())


def test_a_thousand_calls_are_served_in_their_order_by_one_thread(queue, kernel):
    async def main():
        taken = []

        async def take(number):
            taken.append((number, await queue.aget()))

        before = threading.active_count()
        tasks = [asyncio.create_task(take(number)) for number in range(1000)]
        await until(lambda: waiting(queue) == 1000)
        assert threading.active_count() <= before + 1
        queue.put_many(range(500))
        put_range(queue, 500)
        await asyncio.gather(*tasks)
        assert [number for number, _ in taken] == list(range(1000))
        assert [obj for _, obj in taken] == [*range(500), *range(500)]
        await until(lambda: threading.active_count() == before)

    run(main())


def test_a_late_call_does_not_overtake(queue):
    async def main():
        early = await start(queue, 3)
        queue.put_many("abcd")  # no one has had a chance to run yet
        late = await queue.aget()
        assert [await task for task in early] == ["a", "b", "c"]
        assert late == "d"

    run(main())


def test_from_another_process(queue, start_method, kernel):
    async def main():
        with run_in_process(put_range, queue, 300, method=start_method):
            assert [await queue.aget() for _ in range(300)] == list(range(300))

    run(main())


def test_asyncio_timeout_ends_a_call(queue):
    async def main():
        for seconds in (0, 0.01, 0.05):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(seconds):
                    await queue.aget()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.aget(), 0.01)
        queue.put("there")
        assert await asyncio.wait_for(queue.aget(), 10) == "there"
        await until(lambda: not helpers())

    run(main())


def test_a_timeout_raises_empty_or_full_when_it_passes(kernel):
    async def main():
        with Queue(1) as queue:
            for seconds in (0, -1, 0.01, 0.05):
                with at_least(seconds), pytest.raises(Empty):
                    await queue.aget(timeout=seconds)
            await queue.aput("first", timeout=0)
            for seconds in (0, -1, 0.01, 0.05):
                with at_least(seconds), pytest.raises(Full):
                    await queue.aput("second", timeout=seconds)
            assert waiting(queue) == 0
            assert await queue.aget(timeout=0) == "first"
            assert queue.empty()
            await until(lambda: not helpers())
            for call in (queue.aget, lambda timeout: queue.aput("x", timeout=timeout)):
                with pytest.raises(InvalidArgument, match="timeout=nan"):
                    await call(timeout=float("nan"))

    run(main())


def test_a_call_with_a_timeout_is_served_in_its_turn(queue):
    async def main():
        patient = (await start(queue, 1))[0]
        timed = asyncio.create_task(queue.aget(timeout=1e9))
        endless = asyncio.create_task(queue.aget(timeout=float("inf")))
        await until(lambda: waiting(queue) == 3)
        with pytest.raises(Empty):
            await queue.aget(timeout=0.01)
        queue.put_many("abc")
        assert [await patient, await timed, await endless] == ["a", "b", "c"]

    run(main())


def test_a_call_that_times_out_in_its_turn_leaves_the_message_to_the_next(queue, monkeypatch):
    async def main():
        first = asyncio.create_task(queue.aget(timeout=0.5))
        await until(lambda: waiting(queue) == 1)
        heir = asyncio.create_task(queue.aget())
        await until(lambda: waiting(queue) == 2)
        monkeypatch.setattr(aio, "_take_now", lambda ring: (_ for _ in ()).throw(Empty))
        queue.put("message")
        with pytest.raises(Empty):
            await first
        monkeypatch.undo()
        assert await heir == "message"

    run(main())


def test_timeouts_lose_and_double_nothing(queue):
    count = 2000

    async def main():
        rng = random.Random(7)
        taken = []

        async def take():
            with contextlib.suppress(Empty):
                taken.append(await queue.aget(timeout=rng.choice((0, 1e-4, 1e-3, 1e-2))))

        with run_in_process(put_range, queue, count):
            while len(taken) < count:
                await asyncio.gather(*(take() for _ in range(20)))
        assert taken == list(range(count))

    run(main())


def test_async_for_ends_when_the_queue_is_shut_down(queue, start_method):
    async def main():
        with run_in_process(put_range_and_shut_down, queue, 300, method=start_method):
            assert [obj async for obj in queue] == list(range(300))
        assert [obj async for obj in queue] == []

    run(main())


def test_async_for_takes_nothing_beyond_a_break(queue):
    async def main():
        queue.put_many("abc")
        async for obj in queue:
            if obj == "b":
                break
        assert queue.get_many() == ["c"]

    run(main())


def put_range_and_shut_down(queue, count):
    put_range(queue, count)
    queue.shutdown()


def test_sync_consumers_and_asyncio_share(queue):
    async def main():
        got = []
        thread = threading.Thread(target=lambda: got.extend(queue.get() for _ in range(200)))
        thread.start()
        tasks = await start(queue, 200)
        put_range(queue, 400)
        got.extend(await asyncio.gather(*tasks))
        await until(lambda: not thread.is_alive())
        assert sorted(got) == list(range(400))

    run(main())


def test_a_message_that_cannot_be_decoded_concerns_one_call(queue):
    async def main():
        tasks = await start(queue, 3)
        queue.put("first")
        queue.put(Poisonous())
        queue.put("third")
        first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert (first, third) == ("first", "third")
        assert isinstance(second, DecodeError)

    run(main())


class Poisonous:
    def __reduce__(self):
        return int, ("not a number",)


# ---- cancelled --------------------------------------------------------------------------------


def test_cancelled_calls_leave_no_thread(queue, kernel):
    async def main():
        before = threading.active_count()
        tasks = await start(queue, 100)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert waiting(queue) == 0
        await until(lambda: threading.active_count() == before)

    run(main())


def test_cancelled_when_its_turn_has_come_it_has_taken_nothing(queue, monkeypatch):
    async def main():
        victim, heir = await start(queue, 2)

        def give_and_cancel(turn, give=aio._give):
            give(turn)
            victim.cancel()  # the turn is there, the task has not run

        monkeypatch.setattr(aio, "_give", give_and_cancel)
        queue.put("message")
        assert await heir == "message"
        with pytest.raises(asyncio.CancelledError):
            await victim

    run(main())


def test_a_storm_of_cancellations_loses_and_doubles_nothing(queue):
    count = 3000

    async def main():
        rng = random.Random(7)
        taken = []

        async def take():
            taken.append(await queue.aget())

        with run_in_process(put_range, queue, count):
            live = set()
            while len(taken) < count:
                live = {task for task in live if not task.done()}
                while len(live) < 40:
                    live.add(asyncio.create_task(take()))
                for task in rng.sample(sorted(live, key=id), 15):
                    task.cancel()
                await turns(rng.choice((1, 1, 30)))
            for task in live:
                task.cancel()
            await asyncio.gather(*live, return_exceptions=True)
        assert taken == list(range(count))
        assert queue.empty()
        await until(lambda: not helpers())

    run(main())


def get_to(queue, answers):
    while (message := queue.get()) is not None:
        answers.put(message)


def asleep_on(queue):
    return {waiter["pid"] for waiter in queue.statistics().waiters}


def get_when_asked(queue, orders, answers):
    while orders.get() is not None:
        answers.put(queue.get())


def test_a_cancelled_call_passes_its_wake_on(queue):
    """We sleep, then a consumer elsewhere does; the wake is ours, and we give up.

    A slice of sleep may end of itself just then, now and then.
    """

    async def main():
        woken = collections.deque(maxlen=10)
        with (
            Queue() as orders,
            Queue() as answers,
            run_in_process(get_when_asked, queue, orders, answers) as other,
        ):
            while sum(woken) < 8:
                (task,) = await start(queue, 1)
                await until(lambda: asleep_on(queue) == {os.getpid()})
                orders.put("get")
                await until(lambda: asleep_on(queue) == {os.getpid(), other.pid})
                traced = Traced(other.pid, seize=True)
                traced.fall_asleep(lambda: other.pid in asleep_on(queue))
                queue.put("message")
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                woken.append(traced.woken())
                traced.let_go()
                assert answers.get(timeout=10) == "message"
            orders.put(None)

    run(main())


# ---- put --------------------------------------------------------------------------------------


def test_aput_waits_for_room_in_the_order_of_the_calls(kernel):
    async def main():
        with Queue(2) as queue:
            tasks = [asyncio.create_task(queue.aput(i)) for i in range(50)]
            await until(lambda: waiting(queue) == 48)
            assert len(helpers()) == 1
            with pytest.raises(Full):
                queue.put_nowait("sync")
            assert [await queue.aget() for _ in range(50)] == list(range(50))
            await asyncio.gather(*tasks)
            await until(lambda: not helpers())

    run(main())


def test_aput_waits_for_a_reader_in_another_process():
    async def main():
        with Queue(1) as queue, Queue() as answers, run_in_process(get_to, queue, answers):
            for i in range(200):
                await queue.aput(i)
            await queue.aput(None)
            assert [await answers.aget() for _ in range(200)] == list(range(200))

    run(main())


def test_a_cancelled_aput_has_put_nothing():
    async def main():
        with Queue(1) as queue:
            queue.put("there")
            tasks = [asyncio.create_task(queue.aput(i)) for i in range(10)]
            await until(lambda: waiting(queue) == 10)
            for task in tasks[::2]:
                task.cancel()
            assert await queue.aget() == "there"
            assert [await queue.aget() for _ in range(5)] == [1, 3, 5, 7, 9]
            await asyncio.gather(*tasks, return_exceptions=True)
            assert queue.empty()

    run(main())


def test_aput_waits_for_bytes_and_large_ones_get_their_turn():
    async def main():
        with Queue(max_capacity=1 << 16) as queue:
            put_range(queue, 300)
            large = asyncio.create_task(queue.aput(b"x" * 60_000))
            await until(lambda: waiting(queue) == 1)
            sizes = 0
            for _ in range(301):
                sizes += len(obj) if isinstance(obj := await queue.aget(), bytes) else 0
            await large
            assert sizes == 60_000

    run(main())


def test_what_cannot_be_encoded_or_never_fits_raises_at_once():
    async def main():
        with Queue(1, max_capacity=1 << 16) as queue:
            queue.put("full")
            with pytest.raises(EncodeError):
                await queue.aput(lambda: None)
            with pytest.raises(shmring.MessageTooLarge):
                await queue.aput(b"x" * (1 << 17))

    run(main())


# ---- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("immediate", [False, True])
def test_shutdown_while_waiting(queue, immediate):
    async def main():
        tasks = await start(queue, 10)
        queue.put("last")
        assert await tasks[0] == "last"
        queue.shutdown(immediate)
        ends = await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert all(isinstance(end, ShutDown) for end in ends)
        with pytest.raises(ShutDown):
            await queue.aput("more")
        with pytest.raises(ShutDown):
            await queue.aget()

    run(main())


def test_shutdown_reaches_waiting_aputs():
    async def main():
        with Queue(1) as queue:
            queue.put("full")
            tasks = [asyncio.create_task(queue.aput(i)) for i in range(5)]
            await until(lambda: waiting(queue) == 5)
            queue.shutdown()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, ShutDown) for end in ends)
            assert await queue.aget() == "full"

    run(main())


@pytest.mark.fault(33)
def test_close_while_waiting():
    async def main():
        queue = Queue()
        tasks = await start(queue, 10)
        queue.close()
        async with asyncio.timeout(10):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, RingClosed) for end in ends)
        with pytest.raises(RingClosed):
            await queue.aget()
        with pytest.raises(RingClosed):
            await queue.aput(1)
        await until(lambda: not helpers())

    run(main())


def test_a_killed_producer_does_not_disturb(queue):
    async def main():
        with run_in_process(put_range, queue, 10**9) as producer:
            for i in range(1000):
                assert await queue.aget() == i
            os.kill(producer.pid, signal.SIGKILL)
            producer.join()
            while not queue.empty():
                await queue.aget()
        task = (await start(queue, 1))[0]
        queue.put("after")
        assert await task == "after"

    run(main())


# ---- loops, forks, the end of the process -----------------------------------------------------


def test_several_loops_in_several_threads(queue):
    count, threads = 400, 4
    taken = [[] for _ in range(threads)]
    most = []

    async def consume(mine):
        async def take():
            mine.append(await queue.aget())
            most.append(len(helpers()))

        await asyncio.gather(*(take() for _ in range(count)))

    workers = [threading.Thread(target=run, args=(consume(mine),)) for mine in taken]
    for worker in workers:
        worker.start()
    put_range(queue, count * threads)
    for worker in workers:
        worker.join(60)
    assert sorted(itertools.chain(*taken)) == list(range(count * threads))
    assert max(most) <= 2  # one, and perhaps the last instructions of the one before


def test_a_loop_that_does_not_run_holds_up_no_other(queue):
    stopped, closed = asyncio.new_event_loop(), asyncio.new_event_loop()
    pending = stopped.create_task(queue.aget())
    lost = closed.create_task(queue.aget())
    for count, loop in enumerate((stopped, closed), 1):
        loop.run_until_complete(until(lambda count=count: waiting(queue) == count))
    lost._log_destroy_pending = False
    closed.close()

    async def main():
        (task,) = await start(queue, 1)
        queue.put("for the running loop")
        assert await task == "for the running loop"

    run(main())
    queue.put("later")
    assert stopped.run_until_complete(pending) == "later"
    stopped.close()
    lost.get_coro().close()


@pytest.mark.fault(18)
def test_a_forked_child_begins_afresh(queue):
    def child(results):
        async def main():
            await results.aput(await queue.aget())

        assert not helpers()
        run(main())

    async def main():
        with Queue() as results:
            tasks = await start(queue, 3)
            process = multiprocessing.get_context("fork").Process(target=child, args=(results,))
            process.start()
            put_range(queue, 4)
            mine = await asyncio.gather(*tasks)
            theirs = await results.aget()
            assert sorted([*mine, theirs]) == [0, 1, 2, 3]
            await until(lambda: process.exitcode is not None)
            assert process.exitcode == 0

    run(main())


END = """
import asyncio, sys, threading
from shmring import Queue
from support import until

queue = Queue()
bounded = Queue(1)
bounded.put(1)

async def main():
    global tasks
    tasks = [asyncio.create_task(queue.aget()) for _ in range(10)]
    tasks += [asyncio.create_task(bounded.aput(i)) for i in range(10)]
    await until(lambda: threading.active_count() == 3)  # this thread and a helper a queue

if sys.argv[1] == "run":
    asyncio.run(main())
else:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    if sys.argv[1] == "close":
        loop.close()
print("end")
"""


@pytest.mark.fault(34)
@pytest.mark.parametrize("how", ["run", "stop", "close"])
def test_a_process_ends_with_calls_pending(how):
    done = subprocess.run(
        [sys.executable, "-c", END, how],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert "Traceback" not in done.stderr


# ---- a lock that is held ---------------------------------------------------------------------


@pytest.mark.parametrize(("call", "side"), [("aget", "consumers"), ("aput", "producers")])
def test_the_loop_goes_on_while_a_lock_is_held(queue, call, side):
    """By a holder that needs a CPU, for which get_nowait and put_nowait wait up to a second."""
    arguments = {"aget": (), "aput": ("more",)}[call]

    async def main(holder):
        lock_word(queue, side, holder.pid)
        stood = []
        try:
            for _ in range(5):  # a busy machine does not stop the loop each time
                begun = time.monotonic()
                task = asyncio.create_task(getattr(queue, call)(*arguments))
                await turns(2)
                stood.append(time.monotonic() - begun)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            task = asyncio.create_task(getattr(queue, call)(*arguments))
            await until(lambda: waiting(queue))
        finally:
            lock_word(queue, side, 0)
        assert min(stood) < 0.5
        return await task

    queue.put("there")
    with run_in_process(run_for_ever) as holder:
        assert run(main(holder)) == ("there" if call == "aget" else None)
    assert queue.get_many(block=False) == ["there", "more"] if call == "aput" else queue.empty()


class Doubling(Queue):
    def get(self, *args, **kwargs):
        return 2 * super().get(*args, **kwargs)


def test_aget_goes_through_an_overridden_get():
    with Doubling() as doubling:
        doubling.put(21)
        assert run(doubling.aget()) == 42

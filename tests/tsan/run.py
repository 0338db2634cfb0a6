"""What `make tsan` runs over an instrumented build: threads that meet in one handle.

First the loops of `hammer.pyx`, which never take the GIL, over rings that stay, that grow
and that have a limit of messages; then Python threads, as programs have them.  Each round
checks that every message came once, whole, and in the order of its producer.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from test_closing import use_at_once

import hammer
import shmring
from shmring.errors import Empty, RingClosed
from support import wait_for

QUIET_S = 1.0  # consumers end when nothing came for so long


class Threads:
    """Threads that are started together, joined together, and whose errors are not lost."""

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.results: list[Any] = []

    def add(self, call: Callable[..., Any], *args: Any) -> None:
        """Have a thread make a call."""
        self._calls.append((call, args))

    def run(self) -> list[Any]:
        """Make all of them at once; their results, in the order in which they were added."""
        self.results = [None] * len(self._calls)
        errors: list[BaseException] = []

        def make(index: int) -> None:
            call, args = self._calls[index]
            try:
                self.results[index] = call(*args)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=make, args=(i,)) for i in range(len(self._calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return self.results


def hammered(
    ring: Any, count: int, most: int, ways: tuple[str, ...], *, in_place: bool = True
) -> int:
    """Three producers, one of them by reservations, and a consumer for each of `ways`."""
    threads = Threads()
    for producer in range(3):
        threads.add(hammer.produce, ring, producer, count, most, in_place and producer == 2)
    for way in ways:
        threads.add(hammer.consume, ring, most, way, QUIET_S)
    asking = threading.Event()

    def ask() -> None:
        while not asking.wait(0.001):
            ring.statistics()
            ring.qsize()

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        results = threads.run()
    finally:
        asking.set()
        asker.join()
    sent, taken = results[:3], results[3:]
    for each in taken:
        last: dict[int, int] = collections.defaultdict(lambda: -1)
        for producer, number in each:
            assert number > last[producer], "out of order"
            last[producer] = number
    everything = [what for each in taken for what in each]
    assert len(everything) == len(set(everything)) == sum(sent), (len(everything), sent)
    return len(everything)


def rings(count: int) -> int:
    """The loops that never take the GIL."""
    total = 0
    for most, ways in ((1000, ("copy", "copy", "span")), (4000, ("copy", "lease"))):
        with shmring.Ring.create(1 << 14) as ring:
            total += hammered(ring, count, most, ways)
    with shmring.Ring.create(4096, max_capacity=1 << 22) as ring:
        # Each side maps an area that it grew into on its own, so that the release of a
        # reservation by its owner and the acquire by its taker are at two addresses here.
        ways = ("copy", "span", "lease")
        total += hammered(ring, count, 60_000, ways, in_place=False)
    with shmring.Queue(20, codec="bytes", max_capacity=1 << 16) as queue:
        total += hammered(queue, count // 4, 500, ("copy", "copy"))
    return total


def programs(count: int) -> int:
    """Python threads over one queue: large objects, waiting on many, asyncio, closing."""
    large, small = b"x" * 200_000, {"id": 1}
    with shmring.Queue() as queue, shmring.JoinableQueue() as done:
        threads = Threads()

        def put(number: int) -> int:
            for turn in range(count):
                queue.put(large if turn % 4 == 0 else small)
                done.put(number)
            return count

        def get() -> int:
            taken = 0
            while True:
                try:
                    queue.get(timeout=QUIET_S)
                except Empty:
                    return taken
                taken += 1
                done.get(timeout=60)
                done.task_done()

        def wait() -> int:
            turns = 0
            while shmring.wait([queue, done], timeout=QUIET_S):
                turns += 1
                queue.qsize()
            return turns

        for number in range(2):
            threads.add(put, number)
            threads.add(get)
        threads.add(wait)
        results = threads.run()
        assert done.join(timeout=60)
        assert results[0] + results[2] == results[1] + results[3], results
    used = use_at_once(shmring.Queue, count // 50) + use_at_once(shmring.Ring.create, count // 50)
    return results[0] + results[2] + asynchronous(count) + closing(count // 10) + used


def asynchronous(count: int) -> int:
    """Awaited puts and gets in two loops, each in a thread of its own."""
    with shmring.Queue(8) as queue:

        async def put() -> None:
            for turn in range(count):
                await queue.aput(turn)

        async def get() -> list[int]:
            return [await queue.aget() for _ in range(count)]

        threads = Threads()
        threads.add(lambda: asyncio.run(put()))
        threads.add(lambda: asyncio.run(get()))
        assert threads.run()[1] == list(range(count))
    return count


def closing(count: int) -> int:
    """A handle that is closed while others wait in it."""
    for _ in range(count):
        queue = shmring.Queue()
        threads = Threads()

        def get(queue: Any = queue) -> None:
            with contextlib.suppress(RingClosed):
                queue.get()

        def close(queue: Any = queue) -> None:
            wait_for(lambda: len(queue.statistics().waiters) == 2, what="two waiters")
            queue.close()

        threads.add(get)
        threads.add(get)
        threads.add(close)
        threads.run()
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="of each producer")
    options = parser.parse_args()
    begun = time.monotonic()
    for what, run, count in (
        ("rings without the GIL", rings, options.messages),
        ("programs with threads", programs, options.messages // 20),
    ):
        print(f"{what}: {run(count):,} messages, {time.monotonic() - begun:.1f} s", flush=True)
    print(f"pid {os.getpid()}: whatever was seen to race stands above")


main()

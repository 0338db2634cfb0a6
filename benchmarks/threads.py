"""Messages a second that one thread moves through a queue of its own, and two through two.

    python -m benchmarks.threads [--seconds 2] [--rounds 5]

Each thread puts a batch and takes it again.  Without a GIL two threads should move nearly
twice as much; with one they share it.  Printed are the medians of interleaved rounds, by the
clock and by the processor time of each thread: on a busy machine only the second says
whether the threads hinder each other.
"""

from __future__ import annotations

import argparse
import operator
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Callable

import shmring

BATCH = 64
PAYLOADS = {"bytes": b"x" * 64, "dict": {"id": 1, "name": "a name", "values": [1.5, 2.5]}}


def rates(threads: int, payload: object, seconds: float) -> tuple[float, float]:
    """Messages a second that so many threads move, each through a queue of its own: by the
    clock, and by their processor time, added up.
    """
    moved = [0] * threads
    spent = [0.0] * threads
    begin = threading.Barrier(threads + 1)
    stop = threading.Event()

    def run(number: int) -> None:
        with shmring.Queue[object]() as queue:
            put: Callable[[object], None] = queue.put
            own = pickle.loads(pickle.dumps(payload))
            begin.wait()
            before = time.thread_time()
            while not stop.is_set():
                for _ in range(BATCH):
                    put(own)
                for _ in range(BATCH):
                    queue.get()
                moved[number] += BATCH
            spent[number] = time.thread_time() - before

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    begin.wait()
    begun = time.monotonic()
    time.sleep(seconds)
    stop.set()
    for thread in running:
        thread.join()
    clock = time.monotonic() - begun
    return sum(moved) / clock, sum(map(operator.truediv, moved, spent))


def main() -> int:
    parser = argparse.ArgumentParser(prog="threads", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name, payload in PAYLOADS.items():
        rounds = [
            [rates(threads, payload, options.seconds) for threads in (1, 2)]
            for _ in range(options.rounds)
        ]
        for by, what in enumerate(("clock", "processor time")):
            one, two = (statistics.median(each[n][by] for each in rounds) for n in (0, 1))
            ratio = statistics.median(each[1][by] / each[0][by] for each in rounds)
            print(
                f"{name}, by {what}: {one:,.0f}/s by one thread, {two:,.0f}/s by two: {ratio:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

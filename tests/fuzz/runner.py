"""Runs drivers in children, so that a crash or a hang is seen, and counts what came of it."""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import shmring._core.ring
from fuzz.drivers import Tally, patience, queue_driver, ring_driver
from fuzz.handles import HandleDriver
from fuzz.payloads import message_driver, tree_driver
from fuzz.races import RaceDriver

STANDSTILL_S = 60.0  # without a batch, and a child counts as hung
FILE_BYTES = 1 << 26  # no mutation makes a file grow beyond


class Driver(Protocol):
    """What makes batches of reads."""

    tally: Tally

    def batch(self, rng: random.Random, say: Callable[[str], None] | None = None) -> int:
        """Some reads; returns how many."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


# Each with its share of all reads.
DRIVERS: dict[str, tuple[Callable[[], Driver], float]] = {
    "ring": (ring_driver, 0.35),
    "queue": (queue_driver, 0.22),
    "races": (RaceDriver, 0.04),
    "handles": (HandleDriver, 0.003),
    "trees": (tree_driver, 0.25),
    "messages": (message_driver, 0.137),
}

_PROGRESS = struct.Struct("<4Q")  # driver, batch, reads, whether it ended well


@dataclass(slots=True)
class Count:
    """What one driver did, in one child or in all."""

    seconds: float = 0.0
    tally: Tally = field(default_factory=collections.Counter)

    @property
    def reads(self) -> int:
        """How many."""
        return sum(self.tally.values())


class Worker:
    """A child that runs the batches of its number, and says where it is."""

    def __init__(self, number: int, workers: int, wanted: dict[str, int], seed: str) -> None:
        self.number = number
        self.workers = workers
        self.wanted = wanted
        self.seed = seed
        self.progress = mmap.mmap(-1, mmap.PAGESIZE)
        self.result = tempfile.TemporaryFile("w+")  # noqa: SIM115, held until it is read
        self.moved = time.monotonic()
        self._seen = b""
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._work()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)

    def _work(self) -> None:
        faulthandler.enable()
        limit_growth()
        patience.start()
        counts = {}
        for index, (name, reads) in enumerate(self.wanted.items()):
            begun = time.monotonic()
            driver = DRIVERS[name][0]()
            done, batch = 0, self.number
            while done < reads:
                _PROGRESS.pack_into(self.progress, 0, index, batch, done, 0)
                done += driver.batch(dice(self.seed, name, batch))
                batch += self.workers
            driver.close()
            seconds = time.monotonic() - begun
            counts[name] = [seconds, [[*what, n] for what, n in driver.tally.items()]]
        patience.stop()
        json.dump(counts, self.result)
        self.result.flush()

    def where(self) -> str:
        """The batch it is in, as `--only` and `--seed` take it."""
        index, batch, _, _ = _PROGRESS.unpack_from(self.progress)
        return f"--only {list(self.wanted)[index]} --seed {self.seed}:{batch}"

    def is_hung(self) -> bool:
        """Whether nothing has moved for too long."""
        seen = self.progress[: _PROGRESS.size]
        if seen != self._seen:
            self._seen, self.moved = seen, time.monotonic()
        return time.monotonic() - self.moved > STANDSTILL_S

    def counts(self) -> dict[str, Count]:
        """What it did."""
        self.result.seek(0)
        return {
            name: Count(seconds, collections.Counter({(kind, what): n for kind, what, n in rows}))
            for name, (seconds, rows) in json.load(self.result).items()
        }


def dice(seed: str, driver: str, batch: int) -> random.Random:
    """What determines a batch."""
    return random.Random(f"{seed}:{driver}:{batch}")


def limit_growth() -> None:
    """A mutated capacity is not to fill the memory of the machine."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))


def run(reads: int, seed: str, workers: int, only: str | None = None) -> dict[str, Count]:
    """Make `reads` mutated reads, in so many children.

    Args:
        only: the name of one driver, instead of all by their shares.

    Raises:
        AssertionError: a child crashed, hung, or found what must not be; its own report went
            to stderr, and the text says how to run its last batch again.
    """
    shares = {name: share for name, (_, share) in DRIVERS.items() if only in (None, name)}
    wanted = {
        name: max(1, round(reads * share / sum(shares.values()) / workers))
        for name, share in shares.items()
    }
    sys.stdout.flush()
    children = [Worker(number, workers, wanted, seed) for number in range(workers)]
    left = {child.pid: child for child in children}
    pidfds = {pid: os.pidfd_open(pid) for pid in left}
    try:
        while left:
            wait([pidfds[pid] for pid in left], 0.05)
            for pid, child in list(left.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del left[pid]
                    code = os.waitstatus_to_exitcode(status)
                    if code != 0:
                        raise AssertionError(f"exit code {code}; again by {child.where()}")
                elif child.is_hung():
                    os.kill(pid, signal.SIGABRT)  # faulthandler tells where it hangs
                    del left[pid]
                    os.waitpid(pid, 0)
                    raise AssertionError(
                        f"no batch ended in {STANDSTILL_S:g} s; again by {child.where()}"
                    )
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    total: dict[str, Count] = {name: Count() for name in wanted}
    for child in children:
        for name, count in child.counts().items():
            total[name].seconds = max(total[name].seconds, count.seconds)
            total[name].tally.update(count.tally)
    return total


def table(counts: dict[str, Count]) -> str:
    """What came of each kind of mutation, driver by driver."""
    lines = []
    for name, count in counts.items():
        lines.append(f"{name}: {count.reads:,} reads in {count.seconds:.1f} s")
        kinds = collections.Counter[str]()
        for (kind, _), number in count.tally.items():
            kinds[kind] += number
        for kind, number in kinds.most_common():
            outcomes = collections.Counter(
                {what: n for (of, what), n in count.tally.items() if of == kind}
            )
            told = ", ".join(f"{what} {n:,}" for what, n in outcomes.most_common())
            lines.append(f"  {kind:<20}{number:>11,}  {told}")
    return "\n".join(lines)


def check_sanitized() -> None:
    """That over-reads would be seen: the extension is instrumented, Python's heap is poisoned.

    Raises:
        SystemExit: saying what is missing.
    """
    path = Path(shmring._core.ring.__file__)
    program: Any = ctypes.CDLL(None)
    if b"__asan_report_load8" not in path.read_bytes():
        raise SystemExit(f"{path} is not instrumented: build it with SHMRING_SANITIZE=address")
    if not hasattr(program, "__asan_address_is_poisoned"):
        raise SystemExit("libasan is not loaded: LD_PRELOAD=$(gcc -print-file-name=libasan.so)")
    held = bytes(100)
    behind = id(held) + sys.getsizeof(held)
    if not program.__asan_address_is_poisoned(ctypes.c_void_p(behind)):
        raise SystemExit("what lies behind a bytes object is not poisoned: PYTHONMALLOC=malloc")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=list(DRIVERS), help="one driver instead of all")
    parser.add_argument("--seed", default="1", help="S, or S:BATCH to run one batch and tell all")
    parser.add_argument("--sanitized", action="store_true", help="insist on an instrumented build")
    options = parser.parse_args()
    if options.sanitized:
        check_sanitized()
    seed, _, batch = options.seed.partition(":")
    if batch:
        faulthandler.enable()
        limit_growth()
        patience.start()
        driver = DRIVERS[options.only or "ring"][0]()
        driver.batch(
            dice(seed, options.only or "ring", int(batch)),
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        patience.stop()
        return
    begun = time.monotonic()
    counts = run(options.reads, seed, options.workers, options.only)
    print(table(counts))
    total = sum(count.reads for count in counts.values())
    print(
        f"{total:,} mutated reads, seed {seed}, {options.workers} processes,"
        f" {time.monotonic() - begun:.0f} s: no crash, no hang, nothing out of bounds"
    )

"""What the package is to reach, line by line: ``python -m benchmarks.targets --peers``.

Each line is measured in one go with what it is compared to: a peer, what pickle
or memcpy allow, a bare futex.  A line that is not reached is printed like any
other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import limits, machine, scaling
from benchmarks.adapters import (
    BareWake,
    MultiprocessingQueue,
    ShmringInPlace,
    ShmringQueue,
    ThreadQueue,
    Transport,
)
from benchmarks.peers import PEERS
from benchmarks.sessions import ManyToMany, OneProcess, OneWay, RoundTrips, Session, two_cpus
from benchmarks.transports import able
from benchmarks.turns import Runs, per_second, progress, take_turns
from benchmarks.work import Work, arrays, bytes_of, records, small_dicts

__all__ = ["LINES", "Aim", "Line", "Measuring", "main"]

QUEUE, IN_PLACE = ShmringQueue.label, ShmringInPlace.label
MIB = 1 << 20


@dataclass(frozen=True)
class Aim:
    """One thing that a line asks for.

    Attributes:
        what: how it is told; "{}" stands for what was measured.
        asked: the figure.
        measured: ours, in the same unit; None where nothing to compare with is installed.
        most: `asked` is an upper bound.
    """

    what: str
    asked: float
    measured: float | None
    most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.most else self.measured >= self.asked

    def __str__(self) -> str:
        shown = "-" if self.measured is None else f"{self.measured:.3g}"
        verdict = {True: "", False: ", **not reached**", None: ", not measured"}[self.reached]
        word = "at most" if self.most else "at least"
        return f"{self.what.format(shown)} ({word} {self.asked:g}{verdict})"


@dataclass(frozen=True)
class Line:
    """A line of the table: the work, what was measured, and what was asked of it."""

    work: str
    measured: str
    aims: Sequence[Aim]

    def __str__(self) -> str:
        return f"| {self.work} | {self.measured} | {'; '.join(map(str, self.aims))} |"


class Measuring:
    """How the lines are measured.

    Args:
        runs: of each side of a comparison.
        scale: share of the messages to send.
        peers: compare with the peers that are installed, too.
        limits: the program that measures the limits of the machine.
    """

    def __init__(self, runs: int, scale: float, peers: bool, limits: Path) -> None:
        self.runs, self.scale, self.peers, self.limits = runs, scale, peers, limits

    def bound(self, name: str) -> float:
        """A limit of the machine, now.  To be asked before and after what is read against it."""
        progress(name)
        start = name.removesuffix("_median_ns")
        return limits.measured(self.limits, min(1.0, self.scale), start)[name]

    def turns(
        self,
        session: Callable[..., Session],
        work: Work,
        ours: Sequence[type[Transport]],
        *,
        kind: str | None = None,
        shared: bool = False,
        **options: Any,
    ) -> dict[str, Runs]:
        """The runs by transport, and of peers that carry that `kind`; failed ones are left out."""
        chosen = list(ours)
        if self.peers and kind is not None:
            chosen += [
                one
                for one in able(kind, shared=shared)
                if one.peer and one.missing() is None and work.nbytes <= one.largest
            ]
        make = functools.partial(session, work=work, scale=self.scale, **options)
        found = take_turns(
            self.runs, {one.label: functools.partial(make, one) for one in chosen}, progress
        )
        for one in ours:
            if (error := found[one.label].error) is not None:
                raise error
        return {label: one for label, one in found.items() if one.error is None and one.rates}


def best_peer(found: dict[str, Runs]) -> tuple[str, float] | None:
    """The fastest of those that are not ours nor the standard library's."""
    peers = {one.label for one in PEERS}
    rates = {label: one.median for label, one in found.items() if label in peers}
    if not rates:
        return None
    label = max(rates, key=rates.__getitem__)
    return label, rates[label]


def beside(found: dict[str, Runs], times: float, ours: str = QUEUE) -> Aim:
    """So many times the best peer."""
    peer = best_peer(found)
    name = "the best peer" if peer is None else f"{peer[0]} ({per_second(peer[1])})"
    ratio = None if peer is None else found[ours].median / peer[1]
    return Aim(f"{{}} times {name}", times, ratio)


def small(run: Measuring) -> Line:
    found = run.turns(
        OneWay,
        bytes_of(64, count=1_000_000),
        [ShmringQueue, MultiprocessingQueue],
        kind="bytes",
    )
    ours = found[QUEUE].median
    baseline = found[MultiprocessingQueue.label].median
    return Line(
        "64 B bytes 1:1, one call a message",
        per_second(ours),
        [
            Aim("{} M/s", 4.0, ours / 1e6),
            Aim("{} times multiprocessing.Queue", 45, ours / baseline),
            beside(found, 3),
        ],
    )


def batches(run: Measuring) -> Line:
    work = bytes_of(64, count=3_000_000)
    ours = run.turns(OneWay, work, [ShmringQueue], batches=True)[QUEUE].median
    return Line(
        "the same, put_many and get_many", per_second(ours), [Aim("{} M/s", 20.0, ours / 1e6)]
    )


def _pickle_alone(work: Work, seconds: float) -> float:
    """Messages a second, one process with nothing but dumps and another with nothing but loads.

    Both at the same time, because that is how they run: two CPUs of one core are slower then.
    """
    dumped = [pickle.dumps(one, -1) for one in work.pool]
    context = multiprocessing.get_context("fork")
    rates = context.SimpleQueue()
    dump = functools.partial(pickle.dumps, protocol=-1)
    sides = [
        context.Process(target=_repeat, args=(rates, call, arguments, seconds))
        for call, arguments in ((dump, work.pool), (pickle.loads, dumped))
    ]
    for side in sides:
        side.start()
    found = [rates.get() for _ in sides]
    for side in sides:
        side.join()
    return min(found)


def _repeat(
    rates: Any, call: Callable[[Any], Any], arguments: Sequence[Any], seconds: float
) -> None:
    start = now = time.perf_counter()
    count = 0
    while now - start < seconds:
        for one in arguments:
            call(one)
        count += len(arguments)
        now = time.perf_counter()
    rates.put(count / (now - start))


def _object(run: Measuring, name: str, work: Work, share: float, times: float | None) -> Line:
    before = _pickle_alone(work, run.scale)
    found = run.turns(OneWay, work, [ShmringQueue], kind="object" if times is not None else None)
    allowed = statistics.mean((before, _pickle_alone(work, run.scale)))
    ours = found[QUEUE].median
    aims = [Aim(f"{{}} of what pickle alone allows ({per_second(allowed)})", share, ours / allowed)]
    return Line(name, per_second(ours), aims if times is None else [*aims, beside(found, times)])


def dicts(run: Measuring) -> Line:
    return _object(run, "small dict 1:1, one call a message", small_dicts(300_000), 1.7, 2.5)


def objects(run: Measuring) -> Line:
    return _object(run, "small object of a class", records(200_000), 0.9, None)


def two_to_two(run: Measuring) -> Line:
    work = bytes_of(64, count=600_000)
    found = run.turns(ManyToMany, work, [ShmringQueue], kind="bytes", shared=True)
    ours = found[QUEUE].median
    return Line("64 B, 2:2", per_second(ours), [Aim("{} M/s", 3.5, ours / 1e6), beside(found, 4)])


def _copied(run: Measuring, mib: int, count: int, times: float) -> tuple[str, float, Aim]:
    found = run.turns(OneWay, arrays(mib * MIB, count), [ShmringQueue], kind="array")
    ours = found[QUEUE].median * mib * MIB
    return f"{ours / 1e9:.2f} GB/s", ours, beside(found, times)


def one_mib(run: Measuring) -> Line:
    limit = "memcpy_1_mib_bytes_per_second"
    before = run.bound(limit)
    told, ours, peer = _copied(run, 1, 3000, 1.5)
    allowed = statistics.mean((before, run.bound(limit)))
    what = f"{{}} of memcpy between processes ({allowed / 1e9:.2f} GB/s)"
    aims = [Aim(what, 0.42, ours / allowed), peer]
    return Line("1 MiB float32 copied out, writable, summed", told, aims)


def eight_mib(run: Measuring) -> Line:
    told, _, peer = _copied(run, 8, 300, 1.5)
    return Line("8 MiB copied out", told, [peer])


def _in_place(run: Measuring, mib: int, count: int, times: float) -> Line:
    found = run.turns(OneWay, arrays(mib * MIB, count), [ShmringInPlace], kind="in place")
    rate = found[IN_PLACE].median * mib * MIB
    aims = [beside(found, times, IN_PLACE)]
    return Line(f"{mib} MiB in place, summed", f"{rate / 1e9:.2f} GB/s", aims)


def one_mib_in_place(run: Measuring) -> Line:
    return _in_place(run, 1, 4000, 1.25)


def eight_mib_in_place(run: Measuring) -> Line:
    return _in_place(run, 8, 300, 1.0)


def _trips(
    run: Measuring, count: int, of: Sequence[type[Transport]] = (ShmringQueue,), **options: Any
) -> list[tuple[float, float]]:
    """Median and 99th percentile of each, in us."""
    found = run.turns(RoundTrips, bytes_of(64, count=count), of, **options)
    ordered = [sorted(found[one.label].trips_ns) for one in of]
    return [(one[len(one) // 2] / 1000, one[len(one) * 99 // 100] / 1000) for one in ordered]


def _trips_line(run: Measuring, name: str, median: float, p99: float, **options: Any) -> Line:
    ((middle, tail),) = _trips(run, 20_000, **options)
    aims = [
        Aim("median {} us", median, middle, most=True),
        Aim("p99 {} us", p99, tail, most=True),
    ]
    return Line(name, f"{middle:.2f} us", aims)


def trips_apart(run: Measuring) -> Line:
    return _trips_line(run, "round trip of 64 B, both awake, a CPU each", 1.3, 15, apart=True)


def trips_free(run: Measuring) -> Line:
    return _trips_line(run, "round trip of 64 B, both awake, not bound", 8, 25)


def trips_idle(run: Measuring) -> Line:
    aims, told = [], []
    for placement in ("apart", "free"):
        limit = f"futex_{placement}_idle_1_ms_median_ns"
        before = run.bound(limit)
        both = (ShmringQueue, BareWake)
        ours, bare_python = _trips(run, 1000, both, idle_s=0.001, apart=placement == "apart")
        bare = statistics.mean((before, run.bound(limit))) / 1000
        aims.append(
            Aim(f"{{}} times a bare futex pair, {placement}", 1.25, ours[0] / bare, most=True)
        )
        told.append(f"{ours[0]:.1f} us {placement} (two {BareWake.label}: {bare_python[0]:.1f})")
    return Line("round trip of 64 B, 1 ms idle between", ", ".join(told), aims)


def trips_busy(run: Measuring) -> Line:
    with busy_cores():
        return _trips_line(run, "the same with a busy process on each core", 10, 1000)


def one_process(run: Measuring) -> Line:
    work = bytes_of(64, count=400_000)
    found = run.turns(OneProcess, work, [ShmringQueue, ThreadQueue])
    ours, threads = found[QUEUE].median, found[ThreadQueue.label].median
    aims = [Aim("{} times what queue.SimpleQueue takes", 1.5, threads / ours, most=True)]
    return Line("put + get in one process, 64 B", f"{1e9 / ours:.0f} ns", aims)


def idle_consumers(run: Measuring) -> Line:
    shares = []
    for _ in range(run.runs):
        progress(f"{scaling.IDLE} consumers, {scaling.TRICKLE_PER_SECOND} messages a second")
        session = scaling.Trickle(
            ShmringQueue,
            bytes_of(64),
            producers=1,
            consumers=scaling.IDLE,
            count=max(10, int(1000 * run.scale)),
        )
        shares.append(100 * scaling.measure(session)["consumers_share_of_a_core"])
    share = statistics.median(shares)
    aims = [Aim("{} % of a core", 2.0, share, most=True)]
    return Line("64 idle consumers, 100 messages a second", f"{share:.2f} %", aims)


def a_million(run: Measuring) -> Line:
    work = bytes_of(64)
    counts = {1_000_000: 1, 10_000: 20}  # and how often in a turn
    each: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(run.runs):
        for count, times in counts.items():
            for _ in range(times):
                with OneWay(ShmringQueue, work, count=max(1000, int(count * run.scale))) as session:
                    each[count].append(session.run() / session.count)
    many, few = (statistics.median(one) for one in each.values())
    aims = [Aim("{} times the cost of one of ten thousand", 1.1, many / few, most=True)]
    return Line("one of a million messages", f"{many * 1e9:.0f} ns", aims)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """A process on each of the CPUs we may use that never sleeps."""
    context = multiprocessing.get_context("fork")
    spinning = [context.Process(target=_spin, args=(cpu,)) for cpu in two_cpus() or (0,)]
    for process in spinning:
        process.start()
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.join()


def _spin(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    parent = os.getppid()
    while os.getppid() == parent:
        for _ in range(100_000):
            pass


LINES: dict[str, Callable[[Measuring], Line]] = {
    one.__name__.replace("_", "-"): one
    for one in (
        small,
        batches,
        dicts,
        objects,
        two_to_two,
        one_mib,
        eight_mib,
        one_mib_in_place,
        eight_mib_in_place,
        trips_apart,
        trips_free,
        trips_idle,
        trips_busy,
        one_process,
        idle_consumers,
        a_million,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a markdown table, and write what was found."""
    parser = argparse.ArgumentParser(prog="benchmarks.targets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the messages to send")
    parser.add_argument("--peers", action="store_true", help="with the peers that are installed")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="LINE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: at least 1")
    before = machine.describe()
    program = limits.compiled(limits.BUILD)
    run = Measuring(options.runs, options.scale, options.peers, program)
    print("Machine: " + "; ".join(f"{key} {value}" for key, value in before.items()) + ".")
    print(
        f"Median of {options.runs} interleaved runs.\n\n| work | measured | asked |\n|---|---|---|"
    )
    lines = []
    for name in options.only:
        lines.append(LINES[name](run))
        print(lines[-1], flush=True)
    if options.json is not None:
        written = {"machine": before, "runs": options.runs, "lines": [asdict(one) for one in lines]}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every figure the project promises, each beside its target: `make report`.

A line is measured in turns with what it is compared to: multiprocessing, the best
package from PyPI, or what the machine, pickle or a bare futex allow.  A line that
is not reached is printed like any other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import shmring
from benchmarks import costs, limits, machine, machine_line, parser, per_second, save
from benchmarks.adapters import (
    FORK,
    BareWake,
    MultiprocessingQueue,
    ShmringInPlace,
    ShmringQueue,
    ShmringRing,
    ThreadQueue,
    Transport,
    able,
)
from benchmarks.costs import Aim, Line, Measuring
from benchmarks.limits import PICKLE
from benchmarks.sessions import (
    ManyToMany,
    OneProcess,
    OneWay,
    RoundTrips,
    Runs,
    Session,
    take_turns,
    two_cpus,
)
from benchmarks.work import Work, arrays, bytes_of, records, small_dicts

__all__ = ["LINES", "main"]

MIB = 1 << 20
PEER = "the best peer"
MEMCPY = "memcpy_1_mib_bytes_per_second"


# ---- rates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """A line about a rate.

    Attributes:
        asked: by what it is compared to, at least so many times that: a transport, `PEER`,
            `PICKLE` or a limit of the machine; "M/s" for the rate itself.  Of a queue
            between threads: at most so many times what it takes.
        kind: of the peers it is compared to, where that is not the kind of the work.
    """

    question: str
    work: Callable[[], Work]
    asked: Mapping[Any, float]
    session: type[Session] = OneWay
    ours: type[Transport] = ShmringQueue
    kind: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, run: Measuring) -> Line:
        work = self.work()
        size = work.nbytes if work.kind == "array" else 1
        bounds = [one for one in self.asked if one == PICKLE or one in limits.LIMITS]
        before = {name: run.bound(name, work) for name in bounds}
        others = [one for one in self.asked if isinstance(one, type)]
        peers: list[type[Transport]] = []
        if run.peers and PEER in self.asked:
            shared = self.session is ManyToMany
            peers = [
                one
                for one in able(self.kind or work.kind, shared=shared)
                if one.package and one.missing() is None and work.nbytes <= one.largest
            ]
        found = run.turns(self.session, work, [self.ours, *others], peers, **self.options)
        allowed = {
            name: statistics.mean((first, run.bound(name, work))) for name, first in before.items()
        }
        runs = found[self.ours.label]
        aims = [
            self._aim(one, asked, runs.median, size, found, allowed)
            for one, asked in self.asked.items()
        ]
        spread = f"{_rate(min(runs.rates), size)} to {_rate(max(runs.rates), size)}"
        raw = {label: one.rates for label, one in found.items()} | allowed
        shown = _rate(runs.median, size)
        if self.session is OneProcess:  # no two processes: the time of a call is what counts
            shown = f"{1e9 / runs.median:.0f} ns"
        return Line(self.question, shown, aims, spread, raw)

    def _aim(
        self,
        compared: Any,
        asked: float,
        ours: float,
        size: int,
        found: dict[str, Runs],
        allowed: dict[str, float],
    ) -> Aim:
        if compared == "M/s":
            return Aim("{} M/s", asked, ours / 1e6)
        if compared == PEER:
            return beside(found, asked, self.ours.label)
        if compared == PICKLE:
            what = f"{{}} of {PICKLE} ({per_second(allowed[PICKLE])})"
            return Aim(what, asked, ours / allowed[PICKLE])
        if compared in limits.LIMITS:
            limit = allowed[compared]
            return Aim(f"{{}} of memcpy ({limit / 1e9:.2f} GB/s)", asked, ours * size / limit)
        theirs = found[compared.label].median
        if not compared.between_processes:
            return Aim(f"{{}} times what {compared.label} takes", asked, theirs / ours, most=True)
        return Aim(f"{{}} times {compared.label} ({_rate(theirs, size)})", asked, ours / theirs)


def _rate(rate: float, size: int) -> str:
    return f"{rate * size / 1e9:.2f} GB/s" if size > 1 else per_second(rate)


def best_peer(found: Mapping[str, Runs]) -> tuple[str, float] | None:
    """Return the fastest package from PyPI and its rate."""
    packages = {one.label for kind in ("bytes", "in place") for one in able(kind) if one.package}
    rates = {label: one.median for label, one in found.items() if label in packages}
    return max(rates.items(), key=lambda pair: pair[1]) if rates else None


def beside(found: Mapping[str, Runs], times: float, ours: str = ShmringQueue.label) -> Aim:
    """So many times the best peer."""
    peer = best_peer(found)
    name = PEER if peer is None else f"{peer[0]} ({per_second(peer[1])})"
    return Aim(f"{{}} times {name}", times, None if peer is None else found[ours].median / peer[1])


def a_million(run: Measuring) -> Line:
    counts = {"many": (1_000_000, 1), "few": (10_000, 20)}  # messages; sessions in a turn
    found = take_turns(
        run.runs,
        {
            (name, number): functools.partial(
                OneWay, ShmringQueue, bytes_of(64), count=max(1000, int(count * run.scale))
            )
            for name, (count, times) in counts.items()
            for number in range(times)
        },
    )
    each: dict[str, list[float]] = {name: [] for name in counts}
    for (name, _), one in found.items():
        if one.error is not None:
            raise one.error
        each[name] += [1 / rate for rate in one.rates]
    many, few = (statistics.median(one) for one in each.values())
    aims = [Aim("{} times the cost of one of ten thousand", 1.1, many / few, most=True)]
    return Line("one of a million messages", f"{many * 1e9:.0f} ns", aims, raw=dict(each))


# ---- round trips ----------------------------------------------------------------------------


def _trips(
    run: Measuring, count: int, of: Sequence[type[Transport]], **options: Any
) -> list[tuple[float, float]]:
    """Return the median and the 99th percentile of each, in us."""
    found = run.turns(RoundTrips, bytes_of(64, count=count), of, **options)
    ordered = [sorted(found[one.label].trips_ns) for one in of]
    return [(one[len(one) // 2] / 1000, one[len(one) * 99 // 100] / 1000) for one in ordered]


def round_trip(
    run: Measuring, *, question: str, median: float, p99: float, apart: bool = False
) -> Line:
    ((middle, tail),) = _trips(run, 20_000, [ShmringQueue], apart=apart)
    aims = [
        Aim("median {} us", median, middle, most=True),
        Aim("p99 {} us", p99, tail, most=True),
    ]
    return Line(question, f"{middle:.2f} us", aims)


def trips_idle(run: Measuring) -> Line:
    aims, told = [], []
    for placement in ("apart", "free"):
        limit = f"futex_{placement}_idle_1_ms_median_ns"
        before = run.bound(limit, bytes_of(64))
        both = (ShmringQueue, BareWake)
        ours, python = _trips(run, 1000, both, idle_s=0.001, apart=placement == "apart")
        bare = statistics.mean((before, run.bound(limit, bytes_of(64)))) / 1000
        what = f"{{}} times a bare futex pair, {placement}"
        aims.append(Aim(what, 1.25, ours[0] / bare, most=True))
        told.append(f"{ours[0]:.1f} us {placement} (two {BareWake.label}: {python[0]:.1f})")
    return Line("round trip of 64 B, 1 ms idle between", ", ".join(told), aims)


def trips_busy(run: Measuring) -> Line:
    with busy_cores():
        question = "the same with a busy process on each core"
        return round_trip(run, question=question, median=10, p99=1000)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep two of the CPUs we may use busy."""
    spinning = [FORK.Process(target=_spin, args=(cpu,)) for cpu in two_cpus() or (0,)]
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


# ---- the table ------------------------------------------------------------------------------

_arrays = functools.partial(functools.partial, arrays)
_bytes = functools.partial(functools.partial, bytes_of, 64)
_trip = functools.partial(functools.partial, round_trip)

LINES: dict[str, Callable[[Measuring], Line]] = {
    "small": Rate(
        "64 B bytes 1:1, one call a message",
        _bytes(count=1_000_000),
        {"M/s": 4.0, MultiprocessingQueue: 45, PEER: 3},
    ),
    "ring": Rate(
        "the same through a Ring",
        _bytes(count=1_000_000),
        {MultiprocessingQueue: 35},
        ours=ShmringRing,
    ),
    "batches": Rate(
        "64 B bytes, put_many and get_many",
        _bytes(count=3_000_000),
        {"M/s": 20.0},
        options={"batches": True},
    ),
    "dicts": Rate(
        "small dict 1:1, one call a message",
        functools.partial(small_dicts, 300_000),
        {MultiprocessingQueue: 6, PICKLE: 1.7, PEER: 2.5},
    ),
    "objects": Rate("small object of a class", functools.partial(records, 200_000), {PICKLE: 0.9}),
    "two-to-two": Rate(
        "64 B, 2:2", _bytes(count=600_000), {"M/s": 3.5, PEER: 4}, session=ManyToMany
    ),
    "one-mib": Rate(
        "1 MiB float32 copied out, writable, summed",
        _arrays(MIB, 3000),
        {MultiprocessingQueue: 5, MEMCPY: 0.42, PEER: 1.5},
    ),
    "eight-mib": Rate("8 MiB copied out", _arrays(8 * MIB, 300), {PEER: 1.5}),
    "one-mib-in-place": Rate(
        "1 MiB in place, summed",
        _arrays(MIB, 4000),
        {PEER: 1.25},
        ours=ShmringInPlace,
        kind="in place",
    ),
    "eight-mib-in-place": Rate(
        "8 MiB in place, summed",
        _arrays(8 * MIB, 300),
        {PEER: 1.0},
        ours=ShmringInPlace,
        kind="in place",
    ),
    "trips-apart": _trip(
        question="round trip of 64 B, both awake, a CPU each", median=1.3, p99=15, apart=True
    ),
    "trips-free": _trip(question="round trip of 64 B, both awake, not bound", median=8, p99=25),
    "trips-idle": trips_idle,
    "trips-busy": trips_busy,
    "one-process": Rate(
        "put + get in one process, 64 B",
        _bytes(count=400_000),
        {MultiprocessingQueue: 60, ThreadQueue: 1.5},
        session=OneProcess,
    ),
    "a-million": a_million,
    **{
        one.__name__.replace("_", "-"): one
        for one in (
            costs.idle_consumers,
            costs.joinable,
            costs.unread,
            costs.first,
            costs.blocked,
            costs.unused,
            costs.killed,
        )
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a Markdown table, and write what was found."""
    options = parser("report", __doc__)
    options.add_argument("--peers", action="store_true", help="with the peers that are installed")
    options.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="LINE")
    asked = options.parse_args(arguments)
    if shmring.backend != "ring":
        options.error(f"the back end is {shmring.backend}: the figures are those of the ring")
    before = machine()
    run = Measuring(asked.runs, asked.scale, asked.peers, limits.compiled(limits.BUILD))
    print(machine_line())
    print(f"Median of {asked.runs} interleaved runs.")
    print("\n| work | measured | slowest to fastest | asked |\n|---|---|---|---|")
    lines = []
    for name in asked.only:
        lines.append(LINES[name](run))
        print(lines[-1], flush=True)
    found = {
        "machine": before,
        "load_average_after": machine()["load average"],
        "runs": asked.runs,
        "scale": asked.scale,
        "lines": [asdict(line) for line in lines],
    }
    save(asked.results, "report.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every figure of the project beside its target: `make report`.

Each row is measured in turns with what it is compared to: multiprocessing, the best package
from PyPI, or what the machine, pickle or a bare futex allow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import shmring
from benchmarks import (
    Row,
    Settings,
    Target,
    commands,
    costs,
    limits,
    loaders,
    machine,
    machine_line,
    parser,
    per_second,
    pools,
    print_head,
    print_row,
    recovery,
    save,
)
from benchmarks.adapters import (
    MultiprocessingQueue,
    ShmringInPlace,
    ShmringLent,
    ShmringQueue,
    ShmringRing,
    ThreadQueue,
    Transport,
)
from benchmarks.bench_queues import QUESTIONS
from benchmarks.sessions import OneWay, RoundTrips, Runs, forever, take_turns, two_cpus
from benchmarks.work import bytes_of

LONGER = 2.5  # times the work of `make bench`
_NAMED = (ShmringRing, ShmringLent)  # beside others of ours in a row of the same question
MEMCPY = "memcpy_1_mib_bytes_per_second"


# ---- rates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """A row about the rate of a question of bench_queues.py, and its targets."""

    question: str
    ours: type[Transport] = ShmringQueue
    rate: float | None = None  # at least so many messages a second
    mp_queue: float | None = None  # at least so many times the rate of multiprocessing.Queue
    peer: float | None = None  # at least so many times the rate of the best package from PyPI
    limit: tuple[str, float] | None = None  # a limit, and at least this share of it
    thread_queue: float | None = None  # at most so many times the time of queue.SimpleQueue
    in_place: float | None = None  # at least so many times the rate of Ring in place

    def __call__(self, settings: Settings) -> Row:
        asked = QUESTIONS[self.question]
        work, scale = asked.work(), LONGER * settings.scale
        transports = [self.ours]
        transports += [MultiprocessingQueue] if self.mp_queue else []
        transports += [ThreadQueue] if self.thread_queue else []
        transports += [ShmringInPlace] if self.in_place else []
        if self.peer and settings.peers:
            transports += [one for one in asked.transports if one.package and not one.missing()]

        limit = self.limit[0] if self.limit else None
        bounds = [limits.bound(limit, work, settings.scale)] if limit else []
        found = _runs(settings, transports, asked.session, work, scale=scale, **asked.options)
        bounds += [limits.bound(limit, work, settings.scale)] if limit else []
        allowed = statistics.mean(bounds) if bounds else 0.0

        size = work.nbytes if work.kind == "array" else 1
        runs = found[self.ours]
        slowest, fastest = (_rate(rate, size) for rate in (min(runs.rates), max(runs.rates)))
        raw: dict[str, Any] = {one.label: each.rates for one, each in found.items()}
        return Row(
            self.question + (f", {self.ours.label}" if self.ours in _NAMED else ""),
            # In one process the time of a call is of interest.
            f"{1e9 / runs.median:.0f} ns" if self.thread_queue else _rate(runs.median, size),
            list(self._targets(runs.median, size, found, allowed)),
            f"{slowest} to {fastest}",
            raw | ({limit: bounds} if limit else {}),
        )

    def _targets(
        self, ours: float, size: int, found: Mapping[type[Transport], Runs], allowed: float
    ) -> Iterator[Target]:
        if self.rate:
            yield Target("{} M/s", self.rate / 1e6, ours / 1e6)
        if self.mp_queue:
            theirs = found[MultiprocessingQueue].median
            text = f"{{}} times {MultiprocessingQueue.label} ({_rate(theirs, size)})"
            yield Target(text, self.mp_queue, ours / theirs)
        if self.limit:
            name, share = self.limit
            text = f"{{}} of {name.split('_')[0]} ({_rate(allowed / size, size)})"
            yield Target(text, share, ours * size / allowed)
        if self.peer:
            yield beside_best_peer(found, self.peer, ours)
        if self.in_place:
            theirs = found[ShmringInPlace].median
            text = f"{{}} times {ShmringInPlace.label} ({_rate(theirs, size)})"
            yield Target(text, self.in_place, ours / theirs)
        if self.thread_queue:
            text = f"{{}} times what {ThreadQueue.label} takes"
            yield Target(text, self.thread_queue, found[ThreadQueue].median / ours, at_most=True)


def _runs(
    settings: Settings, transports: Iterable[type[Transport]], *args: Any, **options: Any
) -> dict[type[Transport], Runs]:
    """Take turns; leave out peers that failed."""
    found = take_turns(settings.runs, transports, *args, **options)
    for transport, runs in found.items():
        if runs.error is not None and transport.package is None:
            raise runs.error
    return {transport: runs for transport, runs in found.items() if runs.error is None}


def _rate(rate: float, size: int) -> str:
    return f"{rate * size / 1e9:.2f} GB/s" if size > 1 else per_second(rate)


def beside_best_peer(found: Mapping[type[Transport], Runs], times: float, ours: float) -> Target:
    """Return the target of at least so many times the rate of the fastest package from PyPI."""
    rates = {one.label: runs.median for one, runs in found.items() if one.package is not None}
    if not rates:
        return Target("{} times the best peer", times, None)
    best = max(rates, key=lambda label: rates[label])
    text = f"{{}} times {best} ({per_second(rates[best])})"
    return Target(text, times, ours / rates[best])


def a_million(settings: Settings) -> Row:
    def seconds(count: int) -> float:
        with OneWay(ShmringQueue, bytes_of(64), count=count) as session:
            return session.run() / count

    many, few = [], []
    for _ in range(settings.runs):
        many.append(seconds(max(1000, int(1_000_000 * settings.scale))))
        few += [seconds(max(1000, int(10_000 * settings.scale))) for _ in range(20)]
    cost, other = statistics.median(many), statistics.median(few)
    targets = [Target("{} times one of ten thousand", 1.1, cost / other, at_most=True)]
    raw = {"many": many, "few": few}
    return Row("one of a million messages", f"{cost * 1e9:.0f} ns", targets, raw=raw)


# ---- round trips ----------------------------------------------------------------------------


def _trips_us(settings: Settings, count: int, **options: Any) -> list[float]:
    """Return the median and the 99th percentile."""
    work, scale = bytes_of(64, count), settings.scale
    runs = _runs(settings, [ShmringQueue], RoundTrips, work, scale=scale, **options)
    return runs[ShmringQueue].trips_us(0.5, 0.99)


def round_trip(
    settings: Settings, *, question: str, median: float, p99: float, apart: bool = False
) -> Row:
    middle, tail = _trips_us(settings, 20_000, apart=apart)
    targets = [
        Target("median {} us", median, middle, at_most=True),
        Target("p99 {} us", p99, tail, at_most=True),
    ]
    return Row(question, f"{middle:.2f} us", targets)


def trips_idle(settings: Settings) -> Row:
    targets, measured = [], []
    for placement in ("apart", "free"):
        limit = f"futex_{placement}_idle_1_ms_median_ns"
        bound = functools.partial(limits.bound, limit, bytes_of(64), settings.scale)
        before = bound()
        ours, _ = _trips_us(settings, 1000, idle_s=0.001, apart=placement == "apart")
        futex = statistics.mean((before, bound())) / 1000
        text = f"{{}} times a bare futex pair, {placement}"
        targets.append(Target(text, 1.25, ours / futex, at_most=True))
        measured.append(f"{ours:.1f} us {placement}")
    return Row("round trip of 64 B, 1 ms idle between", ", ".join(measured), targets)


def trips_busy(settings: Settings) -> Row:
    question = "round trip of 64 B, a busy process on each CPU"
    with contextlib.ExitStack() as stack:
        for cpu in two_cpus() or (0,):
            stack.enter_context(forever(_spin_on, cpu))
        return round_trip(settings, question=question, median=10, p99=1000)


def _spin_on(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    for _ in range(1_000_000):
        pass


# ---- the table ------------------------------------------------------------------------------

_trip = functools.partial(functools.partial, round_trip)
_small, _one_mib = "64 B bytes, one call a message", "1 MiB float32, writable, summed"

ROWS: dict[str, Callable[[Settings], Row]] = {
    "small": Rate(_small, rate=4e6, mp_queue=45, peer=3),
    "ring": Rate(_small, ours=ShmringRing, mp_queue=35),
    "batches": Rate("64 B bytes, batches of 100", rate=20e6),
    "dicts": Rate(
        "small dict, one call a message", mp_queue=6, peer=2.5, limit=(limits.PICKLE, 1.7)
    ),
    "objects": Rate("small object of a class", limit=(limits.PICKLE, 0.9)),
    "two-to-two": Rate("64 B bytes, 2:2", rate=3.5e6, peer=4),
    "one-mib": Rate(_one_mib, mp_queue=5, peer=1.8, limit=(MEMCPY, 0.42)),
    "eight-mib": Rate("8 MiB float32, writable, summed", peer=1.5),
    "one-mib-in-place": Rate("1 MiB float32, summed in place", ours=ShmringInPlace, peer=1.25),
    "eight-mib-in-place": Rate("8 MiB float32, summed in place", ours=ShmringInPlace, peer=1),
    "eight-mib-lent": Rate(
        "8 MiB float32, summed in place", ours=ShmringLent, peer=1, in_place=0.85
    ),
    "trips-apart": _trip(question="round trip of 64 B, a CPU each", median=1.3, p99=15, apart=True),
    "trips-free": _trip(question="round trip of 64 B, not bound", median=8, p99=25),
    "trips-idle": trips_idle,
    "trips-busy": trips_busy,
    "one-process": Rate("put + get of 64 B in one process", mp_queue=60, thread_queue=1.5),
    "a-million": a_million,
    "idle-consumers": costs.idle_consumers,
    "joinable": costs.joinable,
    "unread": costs.unread,
    "kept": costs.kept,
    "first-message": costs.first_message,
    "blocked": costs.blocked,
    "unused": costs.unused,
    "killed": costs.killed,
    "command-ls": commands.listing,
    "command-top": commands.top,
    "pool-submit": pools.submit,
    "pool-map": pools.chunks,
    "pool-coordinator": pools.coordinator,
    "pool-arrays": pools.arrays,
    "pool-killed": pools.killed,
    **{
        f"pool-first-{method}": functools.partial(pools.first_result, method)
        for method in ("fork", "spawn")
    },
    "pool-idle": pools.idle,
    **loaders.ROWS,
    **{f"kill-{name}": functools.partial(recovery.row, name) for name in recovery.KINDS},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a Markdown table, and write it with the raw values."""
    options = parser("report", __doc__)
    options.add_argument("--peers", action="store_true", help="with the peers that are installed")
    options.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    chosen = options.parse_args(arguments)
    if shmring.backend != "ring":
        options.error(f"the back end is {shmring.backend}: the figures are those of the ring")
    before = machine()
    settings = Settings(chosen.runs, chosen.scale, chosen.peers)
    print(machine_line())
    print(f"Medians of {chosen.runs} interleaved runs.")
    print_head("work", "measured", "slowest to fastest", "targets")
    rows = []
    for name in chosen.only:
        row = ROWS[name](settings)
        rows.append(row)
        print_row(row.question, row.measured, row.spread, "; ".join(map(str, row.targets)))
    found = {
        "machine": before,
        "runs": chosen.runs,
        "scale": chosen.scale,
        "rows": [asdict(row) for row in rows],
    }
    save(chosen.results, "report.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

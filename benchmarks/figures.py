"""The figures this project promises, measured: ``python -m benchmarks.figures``.

The two sides of a comparison take turns, run by run, in one process tree, so
that a machine that drifts does so for both.  ``multiprocessing.Queue`` sends
the same objects, fewer of them because it is slow, and rates are compared; its
feeder thread is flushed before the producer ends, and the clock stops at the
last message received.

A figure that is not reached is printed like any other; only wrong content and
what does not come back are errors.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import costs, machine
from benchmarks.adapters import MultiprocessingQueue, ShmringQueue, ShmringRing
from benchmarks.sessions import OneProcess, OneWay, Session
from benchmarks.turns import per_second, progress, take_turns
from benchmarks.work import arrays, bytes_of, small_dicts

__all__ = ["main"]

QUEUE, RING, BASELINE = ShmringQueue.label, ShmringRing.label, MultiprocessingQueue.label

Rates = dict[str, list[float]]  # messages a second, by transport, run by run


@dataclass
class Row:
    """A line of the table, and the raw figures behind it."""

    work: str
    target: str
    measured: str
    ratio: str = "-"
    spread: str = "-"
    raw: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"| {self.work} | {self.target} | {self.measured} | {self.ratio} | {self.spread} |"


# ---- rates ----------------------------------------------------------------------------------


def rates_in_turns(runs: int, sessions: dict[str, Callable[[], Session]]) -> Rates:
    """Run each session in turn, as often as asked; one that fails ends it all."""
    found = take_turns(runs, sessions, progress)
    for one in found.values():
        if one.error is not None:
            raise one.error
    return {label: one.rates for label, one in found.items()}


def rate_row(work: str, times: int, label: str, rates: Rates, show: Callable[[float], str]) -> Row:
    """`label` against the baseline: medians, their ratio, and how the runs lay apart."""
    ours, theirs = rates[label], rates[BASELINE]
    ratio = statistics.median(ours) / statistics.median(theirs)

    def between(rates: list[float]) -> str:
        low, high = (min(rates), max(rates)) if show is per_second else (max(rates), min(rates))
        return f"{show(low)}-{show(high)}"

    pairs = [one / other for one, other in zip(ours, theirs, strict=True)]
    return Row(
        work,
        f"at least {times} times",
        f"{show(statistics.median(ours))} against {show(statistics.median(theirs))}",
        f"{ratio:.1f} times",
        f"{min(pairs):.1f}-{max(pairs):.1f} times; {between(ours)} against {between(theirs)}",
        {"target": times, "ratio": ratio, "ratios": pairs, label: ours, BASELINE: theirs},
    )


def rate_rows(runs: int, scale: float) -> list[Row]:
    """The works that are a matter of speed."""
    rows = []

    work = bytes_of(64, count=1_000_000)
    one_way = functools.partial(OneWay, work=work, scale=scale)
    transports = [ShmringQueue, MultiprocessingQueue]
    if ShmringRing.missing() is None:
        transports.append(ShmringRing)
    rates = rates_in_turns(runs, {one.label: functools.partial(one_way, one) for one in transports})
    name = "64 B bytes, one call a message"
    rows.append(rate_row(f"{name}, `Queue`", 30, QUEUE, rates, per_second))
    if RING in rates:
        rows.append(rate_row(f"{name}, `Ring`", 35, RING, rates, per_second))

    def pair(kind: type[Session], work: Any) -> Rates:
        return rates_in_turns(
            runs,
            {
                one.label: functools.partial(kind, one, work, scale=scale)
                for one in (ShmringQueue, MultiprocessingQueue)
            },
        )

    rates = pair(OneWay, small_dicts(count=200_000))
    rows.append(rate_row("small dict, `Queue`", 6, QUEUE, rates, per_second))
    rates = pair(OneWay, arrays(1 << 20, count=2000))
    name = "1 MiB float32 array, received writable and summed, `Queue`"
    rows.append(rate_row(name, 5, QUEUE, rates, per_second))
    rates = pair(OneProcess, bytes_of(64, count=400_000))
    rows.append(rate_row("put + get in one process, 64 B, `Queue`", 60, QUEUE, rates, each))
    return rows


# ---- costs ----------------------------------------------------------------------------------


def blocked_row(consumers: int, seconds: float) -> Row:
    """What waiting costs."""
    progress(f"{consumers} consumers of each kind blocked in get for {seconds:g} s")
    spent = costs.blocked(seconds, consumers)
    ours = [used["cpu_ms"] for used in spent[QUEUE]]
    theirs = [used["cpu_ms"] for used in spent[BASELINE]]
    return Row(
        f"idle: a consumer blocked in `get` for {seconds:g} s",
        "under 10 ms of CPU",
        f"{statistics.median(ours):.2f} ms against {statistics.median(theirs):.2f} ms",
        spread=f"{min(ours):.2f}-{max(ours):.2f} ms against {min(theirs):.2f}-{max(theirs):.2f} ms",
        raw={"seconds": seconds, **spent},
    )


def unused_row() -> Row:
    """What merely having one costs."""
    progress("a queue nobody used")
    found = costs.unused()

    def told(one: dict[str, Any]) -> str:
        counts = ", ".join(
            f"{counted} {noun}"
            for noun, counted in (
                ("descriptor(s)", one["descriptors"]),
                ("thread(s)", one["threads"]),
                ("process(es)", one["processes"]),
                ("file(s) in /dev/shm", len(one["names"])),
            )
        )
        if "allocated_bytes" not in one:
            return counts
        kib = one["allocated_bytes"] / 1024
        return f"{kib:.0f} KiB (st_size {one['size_bytes'] / 1024:.0f} KiB), {counts}"

    return Row(
        "a `Queue()` nobody used",
        "under 128 KiB of shared memory, one descriptor, no thread, no process,"
        " no file in /dev/shm",
        f"{told(found[QUEUE])} (`{BASELINE}`: {told(found[BASELINE])})",
        raw=found,
    )


def killed_row(runs: int) -> Row:
    """What is left when nobody could clean up."""
    progress("all processes of a program killed")
    found = [costs.killed() for _ in range(runs)]
    left = sorted({name for one in found for name in one["names"]})
    one = found[0]
    return Row(
        "all processes of a program killed with SIGKILL",
        "nothing of its anonymous queues is left in /dev/shm",
        f"left after {runs} kills of {one['processes']} processes with {one['queues']} queues: "
        + (", ".join(left) or "nothing"),
        raw={"kills": found},
    )


# ---- to the reader --------------------------------------------------------------------------


def each(rate: float) -> str:
    """What one takes: 377 ns"""
    seconds = 1 / rate
    return f"{seconds * 1e9:.0f} ns" if seconds < 1e-6 else f"{seconds * 1e6:.1f} us"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a markdown table."""
    parser = argparse.ArgumentParser(prog="benchmarks.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the messages, 2 s idle: only to see it work",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there too")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: at least 1")

    before = machine.describe()
    rows = rate_rows(options.runs, 0.1 if options.quick else 1.0)
    rows.append(blocked_row(options.runs, 2.0 if options.quick else 10.0))
    rows.append(unused_row())
    rows.append(killed_row(options.runs))

    print("Machine: " + "; ".join(f"{key} {value}" for key, value in before.items()) + ".")
    print(f"Median of {options.runs} interleaved runs against `{BASELINE}`.")
    if options.quick:
        print("With --quick: too short to be quoted.")
    print()
    print("| work | target | measured | ratio | spread (min-max) |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(row)
    if options.json is not None:
        written = {
            "machine": before,
            "load_average_after": machine.describe()["load average"],
            "runs": options.runs,
            "quick": options.quick,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

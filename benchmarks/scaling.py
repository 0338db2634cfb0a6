"""What one queue carries between many processes: `make scaling`.

64 bytes a message, one call each, and in batches where there are some; the CPU time that a message
costs, from ``/proc``; and how long the puts of one producer among eight take at full load.  Needs
nothing but the built tree; matplotlib, where it is installed, draws the plot.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import machine, machine_line, parser, per_second, print_head, print_row, save
from benchmarks.adapters import ShmringQueue, Transport, present
from benchmarks.sessions import ManyToMany, quantiles_us, take_turns
from benchmarks.work import bytes_of

SHAPES = ("1:1", "1:4", "4:1", "2:2", "4:4", "8:8", "16:16")  # producers : consumers
WAITING = "8:8"  # one of these producers times its puts
BATCHES = "shmring.Queue, batches of 100"

_MESSAGES = 300_000


def measure(
    chosen: Sequence[type[Transport]], shapes: Sequence[str], runs: int, scale: float
) -> dict[str, Any]:
    """Measure the rates of all at each shape, and the puts of one producer."""
    rates: dict[str, list[Any]] = {one.label: [] for one in chosen} | {BATCHES: []}
    work = bytes_of(64, count=_MESSAGES)
    for shape in shapes:
        options = _processes(shape)
        found = take_turns(runs, chosen, ManyToMany, work, scale=scale, **options)
        for one, runs_of_one in found.items():
            rates[one.label].append(runs_of_one.figures())
        batches = take_turns(
            runs, [ShmringQueue], ManyToMany, work, scale=scale, batches=True, **options
        )
        rates[BATCHES].append(batches[ShmringQueue].figures())

    timed = take_turns(
        runs, chosen, ManyToMany, work, scale=scale, timed=True, **_processes(WAITING)
    )
    puts = {
        one.label: dict(zip(("p50", "p99", "p99.9", "longest"), quantiles, strict=True))
        for one, runs_of_one in timed.items()
        if (
            quantiles := runs_of_one.puts_ns
            and quantiles_us(runs_of_one.puts_ns, 0.5, 0.99, 0.999, 1)
        )
    }
    return {"shapes": shapes, "rates": rates, "puts_us": {WAITING: puts}}


def _processes(shape: str) -> dict[str, int]:
    producers, consumers = map(int, shape.split(":"))
    return {"producers": producers, "consumers": consumers}


def show(found: dict[str, Any]) -> None:
    """Print the rates, the CPU time a message, and the waits."""
    print_head("producers : consumers", *found["rates"])
    for place, shape in enumerate(found["shapes"]):
        print_row(shape, *(_cell(points[place]) for points in found["rates"].values()))
    for shape, puts in found["puts_us"].items():
        print_head(f"puts of one producer, {shape}", "p50", "p99", "p99.9", "longest")
        for label, quantiles in puts.items():
            print_row(label, *(f"{value:.1f} us" for value in quantiles.values()))


def _cell(point: dict[str, Any]) -> str:
    if "error" in point:
        return point["error"][:40]
    return f"{per_second(point['median'])}, {point['cpu_us_a_message']:.2f} us CPU"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the results, and plot."""
    options = parser("scaling", __doc__)
    options.add_argument("--no-peers", action="store_true", help="without the packages from PyPI")
    options.add_argument("--shapes", nargs="+", default=SHAPES, metavar="P:C", help="e.g. 4:4")
    asked = options.parse_args(arguments)
    before = machine()
    print(machine_line())
    print(f"Medians of {asked.runs} interleaved runs.")
    chosen = present("bytes", peers=not asked.no_peers, shared=True)
    found = measure(chosen, asked.shapes, asked.runs, asked.scale)
    found |= {"machine": before, "runs": asked.runs, "scale": asked.scale}
    save(asked.results, "scaling.json", found)
    show(found)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return 0
    from benchmarks.plots import medians, plot

    path = plot(
        found,
        asked.results / "scaling.svg",
        medians(range(len(asked.shapes)), found["rates"]),
        xlabel="producers : consumers",
        ylabel="messages a second",
        title="64 B through one queue",
        ticks=(range(len(asked.shapes)), asked.shapes),
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

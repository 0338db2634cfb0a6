"""Rates by size, round trips, and plots of them: `make curves`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, parser, print_head, print_row, save
from benchmarks.adapters import Transport, present
from benchmarks.plots import medians, plot
from benchmarks.sessions import OneWay, RoundTrips, take_turns, two_cpus
from benchmarks.work import bytes_of

SIZES = (8, 64, 512, 4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20, 64 << 20)  # bytes
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999)

_MAX_BYTES = 1 << 29  # of a run on shmring
_MAX_MESSAGES = 300_000
_TRIPS = 20_000


def measure(
    chosen: Sequence[type[Transport]], runs: int, scale: float, *, short: bool = False
) -> dict[str, Any]:
    """Measure all; `short` leaves out large messages."""
    turns = functools.partial(take_turns, runs)
    sizes = SIZES[:4] if short else SIZES

    by_size: dict[str, list[Any]] = {one.label: [] for one in chosen}
    for nbytes in sizes:
        work = bytes_of(nbytes, count=min(_MAX_MESSAGES, _MAX_BYTES // nbytes))
        for one, runs_of_one in turns(chosen, OneWay, work, scale=scale).items():
            by_size[one.label].append(runs_of_one.figures())

    trips: dict[str, Any] = {"quantiles": QUANTILES}
    work = bytes_of(64, count=_TRIPS)
    for placement in ("free", "apart") if two_cpus() is not None else ("free",):
        found = turns(chosen, RoundTrips, work, scale=scale, apart=placement == "apart")
        trips[placement] = {
            one.label: each.trips_us(*QUANTILES) for one, each in found.items() if each.trips_ns
        }
    return {
        "by_size": {"sizes": sizes, "rates": by_size},
        "round_trips": trips,
    }


# ---- plots ----------------------------------------------------------------------------------


def _size(nbytes: int) -> str:
    """Format a size: 64 KiB."""
    unit = 2 if nbytes >= 1 << 20 else 1 if nbytes >= 1 << 10 else 0
    return f"{nbytes >> 10 * unit} {('B', 'KiB', 'MiB')[unit]}"


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Plot what was measured; return the paths of the plots."""
    sizes = found["by_size"]["sizes"]
    by_size = plot(
        found,
        folder / "rate_by_size.svg",
        medians(sizes, found["by_size"]["rates"]),
        xscale="log",
        xlabel="size of a message",
        ylabel="messages a second",
        title="bytes from one process to another, one call a message",
        ticks=(sizes, [_size(size) for size in sizes]),
    )
    paths = [by_size]
    longer = [1 - share for share in found["round_trips"]["quantiles"]]
    for placement, title in {"free": "not bound", "apart": "a CPU each"}.items():
        if placement in found["round_trips"]:
            trips = found["round_trips"][placement]
            path = plot(
                found,
                folder / f"round_trip_{placement}.svg",
                {label: (microseconds, longer) for label, microseconds in trips.items()},
                xscale="log",
                xlabel="microseconds of a round trip",
                ylabel="share of round trips that took longer",
                title=f"64 B there and back, {title}",
            )
            paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the round trips, and plot."""
    options = parser("curves", __doc__)
    options.add_argument("--peers", action="store_true", help="with the peers that are installed")
    options.add_argument("--short", action="store_true", help="only up to 4 KiB")
    asked = options.parse_args(arguments)
    before = machine()
    chosen = present("bytes", peers=asked.peers)
    found = measure(chosen, asked.runs, asked.scale, short=asked.short)
    found |= {"machine": before, "runs": asked.runs, "scale": asked.scale}
    save(asked.results, "curves.json", found)
    trips = found["round_trips"]
    print_head("round trip", "queue", "median", "p99")
    for placement in sorted(trips.keys() - {"quantiles"}):
        for label, microseconds in trips[placement].items():
            middle, tail = (microseconds[QUANTILES.index(share)] for share in (0.5, 0.99))
            print_row(placement, label, f"{middle:.2f} us", f"{tail:.2f} us")
    for path in draw(found, asked.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rates by size and by number of processes, round trips, and plots of them: `make curves`.

With the rates by processes goes the CPU time that a message costs, from ``/proc``.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import machine, parser, per_second, print_head, print_row, progress, save
from benchmarks.adapters import Transport, able
from benchmarks.sessions import ManyToMany, OneWay, RoundTrips, Runs, take_turns, two_cpus
from benchmarks.work import bytes_of

SIZES = (8, 64, 512, 4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20, 64 << 20)  # bytes
SHAPES = ("1:1", "1:4", "4:1", "2:2", "4:4", "16:16")  # producers : consumers
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999)

_MAX_BYTES = 1 << 29  # of a run on shmring
_MAX_MESSAGES = 300_000
_TRIPS = 20_000


def measure(
    chosen: Sequence[type[Transport]], runs: int, scale: float, *, short: bool = False
) -> dict[str, Any]:
    """Measure all; `short` leaves out large messages and many processes."""
    turns = functools.partial(take_turns, runs)
    sizes, shapes = (SIZES[:4], SHAPES[:4]) if short else (SIZES, SHAPES)

    by_size: dict[str, list[Any]] = {one.label: [] for one in chosen}
    for nbytes in sizes:
        work = bytes_of(nbytes, count=min(_MAX_MESSAGES, _MAX_BYTES // nbytes))
        for one, runs_of_one in turns(chosen, OneWay, work, scale=scale).items():
            by_size[one.label].append(_point(runs_of_one))

    trips: dict[str, Any] = {"quantiles": QUANTILES}
    work = bytes_of(64, count=_TRIPS)
    for placement in ("free", "apart") if two_cpus() is not None else ("free",):
        found = turns(chosen, RoundTrips, work, scale=scale, apart=placement == "apart")
        trips[placement] = {
            one.label: each.trips_us(*QUANTILES) for one, each in found.items() if each.trips_ns
        }

    shared = [one for one in chosen if one.shared]
    by_processes: dict[str, list[Any]] = {one.label: [] for one in shared}
    work = bytes_of(64, count=_MAX_MESSAGES)
    for shape in shapes:
        producers, consumers = map(int, shape.split(":"))
        options = {"producers": producers, "consumers": consumers}
        found = turns(shared, ManyToMany, work, scale=scale, **options)
        for one, runs_of_one in found.items():
            by_processes[one.label].append(_point(runs_of_one))
    return {
        "by_size": {"sizes": sizes, "rates": by_size},
        "round_trips": trips,
        "by_processes": {"shapes": shapes, "rates": by_processes},
    }


def _point(runs: Runs) -> dict[str, Any]:
    """Return the rates, or the error."""
    if runs.error is not None:
        return {"error": repr(runs.error)}
    rates = {"median": runs.median, "slowest": min(runs.rates), "fastest": max(runs.rates)}
    return rates | ({"cpu_us_a_message": statistics.median(runs.cpu_us)} if runs.cpu_us else {})


# ---- plots ----------------------------------------------------------------------------------

# The same figures give the same file, so that a commit shows what changed.
matplotlib.rcParams.update({"svg.hashsalt": "shmring", "font.size": 9, "figure.dpi": 100})


def _plot(found: dict[str, Any], path: Path, curves: Mapping[str, Any], **options: Any) -> Path:
    """Plot curves, each a pair of xs and ys, with the machine below."""
    figure = Figure(figsize=(9, 4.8))
    axes = figure.subplots()
    ticks = options.pop("ticks", None)
    for order, (label, (xs, ys)) in enumerate(curves.items()):
        width, zorder = (2.4, 3) if label.startswith("shmring") else (1.1, 2)
        marker, colour = "o^vsDPX*d<>"[order % 11], matplotlib.colormaps["tab20"](order % 20)
        (line,) = axes.plot(xs, ys, label=label, marker=marker, markersize=4, color=colour)
        line.set(linewidth=width, zorder=zorder)
    axes.set(yscale="log", **options)
    if ticks is not None:
        axes.set_xticks(*ticks, fontsize=7)
        axes.minorticks_off()
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    named = found["machine"]
    text = (
        f"{named['cpu']}, cores {named['cores']}, {named['kernel']}, {named['python']};"
        f" {found['runs']} runs, load before {named['load average']}"
    )
    figure.text(0.01, 0.01, text, fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    return path


def _size(nbytes: int) -> str:
    """Format a size: 64 KiB."""
    unit = 2 if nbytes >= 1 << 20 else 1 if nbytes >= 1 << 10 else 0
    return f"{nbytes >> 10 * unit} {('B', 'KiB', 'MiB')[unit]}"


def _medians(xs: Sequence[Any], rates: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return a curve of each transport, without the points that failed."""
    curves = {}
    for label, points in rates.items():
        measured = [place for place, point in enumerate(points) if "median" in point]
        ys = [points[place]["median"] for place in measured]
        curves[label] = ([xs[place] for place in measured], ys)
    return curves


def plot(found: dict[str, Any], folder: Path) -> list[Path]:
    """Plot what was measured; return the paths of the plots."""
    sizes, shapes = found["by_size"]["sizes"], found["by_processes"]["shapes"]
    places = range(len(shapes))
    by_size = _plot(
        found,
        folder / "rate_by_size.svg",
        _medians(sizes, found["by_size"]["rates"]),
        xscale="log",
        xlabel="size of a message",
        ylabel="messages a second",
        title="bytes from one process to another, one call a message",
        ticks=(sizes, [_size(size) for size in sizes]),
    )
    by_processes = _plot(
        found,
        folder / "rate_by_processes.svg",
        _medians(places, found["by_processes"]["rates"]),
        xlabel="producers : consumers",
        ylabel="messages a second",
        title="64 B through one queue, one call a message",
        ticks=(places, shapes),
    )
    paths = [by_size, by_processes]
    longer = [1 - share for share in found["round_trips"]["quantiles"]]
    for placement, title in {"free": "not bound", "apart": "a CPU each"}.items():
        if placement in found["round_trips"]:
            trips = found["round_trips"][placement]
            path = _plot(
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
    """Measure, write the results, print the rates by processes, and plot."""
    options = parser("curves", __doc__)
    options.add_argument("--peers", action="store_true", help="with the peers that are installed")
    options.add_argument("--short", action="store_true", help="only up to 4 KiB and 2:2")
    asked = options.parse_args(arguments)
    before, chosen = machine(), []
    for one in able("bytes"):
        if one.package is not None and not asked.peers:
            continue
        if reason := one.missing():
            progress(f"left out: {one.label}: {reason}")
        else:
            chosen.append(one)
    found = measure(chosen, asked.runs, asked.scale, short=asked.short)
    found |= {"machine": before, "runs": asked.runs, "scale": asked.scale}
    save(asked.results, "curves.json", found)
    print_head("processes", "queue", "rate", "CPU a message")
    for place, shape in enumerate(found["by_processes"]["shapes"]):
        for label, points in found["by_processes"]["rates"].items():
            point = points[place]
            rate = per_second(point["median"]) if "median" in point else point["error"]
            cpu = f"{point['cpu_us_a_message']:.2f} us" if "median" in point else ""
            print_row(shape, label, rate, cpu)
    for path in plot(found, asked.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rates by size and by number of processes, round trips, and pictures of them: `make curves`.

With the rates by processes goes what a message costs there, from ``/proc``: how often a
process slept and was preempted, and CPU.  Where strace is there, system calls and futex
wakes of `shmring.Queue` are counted in runs of their own: tracing slows processes down
and so changes how often they sleep.  A trickle to many consumers shows what idle ones cost.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, machine, parser, per_second, progress, save
from benchmarks.adapters import MultiprocessingQueue, ShmringQueue, Transport, able
from benchmarks.sessions import (
    TRICKLE_PER_SECOND,
    ManyToMany,
    OneWay,
    RoundTrips,
    Runs,
    Session,
    Trickle,
    take_turns,
    two_cpus,
)
from benchmarks.work import bytes_of

__all__ = ["draw", "main", "measure", "system_calls"]

SIZES = (8, 64, 512, 4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20, 64 << 20)  # bytes
SHAPES = ("1:1", "1:4", "4:1", "2:2", "4:4", "16:16")  # producers, consumers
IDLE = "1:64"
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999)

_MOST_BYTES = 1 << 29  # of one run of the fastest
_MOST_MESSAGES = 300_000
_TRIPS = 20_000
_TRICKLE = 1000
_TRACED = (1000, 11_000)  # messages of the two runs under strace; a tenth at a trickle
_PATIENCE_S = 300.0

Chosen = Sequence[type[Transport]]


def measure(
    chosen: Chosen, runs: int, scale: float, *, short: bool = False, trace: bool = False
) -> dict[str, Any]:
    """Measure all of it; `short` leaves out large messages and many processes."""

    def turns(of: Chosen, session: Callable[..., Session]) -> dict[str, Runs]:
        makers = {one.label: functools.partial(session, one, scale=scale) for one in of}
        return take_turns(runs, makers, progress)

    sizes = SIZES[:4] if short else SIZES
    by_size: dict[str, list[Any]] = {one.label: [] for one in chosen}
    for nbytes in sizes:
        work = bytes_of(nbytes, count=min(_MOST_MESSAGES, _MOST_BYTES // nbytes))
        able_to = [one for one in chosen if nbytes <= one.largest]
        found = turns(able_to, functools.partial(OneWay, work=work))
        for label, points in by_size.items():
            points.append(_point(found.get(label)))

    trips: dict[str, Any] = {"quantiles": QUANTILES}
    for placement in ("free", "apart") if two_cpus() is not None else ("free",):
        work = bytes_of(64, count=_TRIPS)
        found = turns(chosen, functools.partial(RoundTrips, work=work, apart=placement == "apart"))
        trips[placement] = {
            label: _quantiles_us(one.trips_ns) for label, one in found.items() if one.trips_ns
        }

    shapes = SHAPES[:4] if short else SHAPES
    shared = [one for one in chosen if one.shared]
    by_processes: dict[str, list[Any]] = {one.label: [] for one in shared}
    calls = {}
    for shape in shapes:
        found = turns(shared, functools.partial(_many, shape=shape))
        for label, points in by_processes.items():
            points.append(_point(found.get(label)))
        if trace:
            calls[shape] = traced(shape, scale)
    found = turns(
        [one for one in chosen if one in (ShmringQueue, MultiprocessingQueue)],
        functools.partial(_many, shape=IDLE, trickle=True),
    )
    if trace:
        calls["trickle"] = traced(IDLE, scale, trickle=True)
    return {
        "by_size": {"sizes": sizes, "rates": by_size},
        "round_trips": trips,
        "by_processes": {"shapes": shapes, "rates": by_processes},
        "trickle": {label: _point(one) for label, one in found.items()},
        "system_calls_a_message": calls,
    }


def _many(
    transport: type[Transport],
    *,
    shape: str,
    scale: float = 1.0,
    count: int | None = None,
    trickle: bool = False,
) -> ManyToMany:
    producers, consumers = map(int, shape.split(":"))
    if trickle and count is None:  # as many of each transport
        count = max(10, int(_TRICKLE * scale))
    return (Trickle if trickle else ManyToMany)(
        transport,
        bytes_of(64, count=_MOST_MESSAGES),
        scale=scale,
        count=count,
        producers=producers,
        consumers=consumers,
    )


def _point(one: Runs | None) -> dict[str, Any] | None:
    """None where it cannot take part; with the error where it failed."""
    if one is None:
        return None
    if one.error is not None or not one.rates:
        return {"error": repr(one.error)}
    rates = {"median": one.median, "slowest": min(one.rates), "fastest": max(one.rates)}
    return rates | one.cost


def _quantiles_us(trips_ns: Sequence[int]) -> list[float]:
    ordered = sorted(trips_ns)
    return [ordered[min(int(share * len(ordered)), len(ordered) - 1)] / 1000 for share in QUANTILES]


# ---- system calls ---------------------------------------------------------------------------


def system_calls(trace: str) -> Counter[str]:
    """Count calls in what strace wrote, futex by its operation."""
    found: Counter[str] = Counter()
    for line in trace.splitlines():
        call = re.match(r"(?:\d+ +)?(\w+)\((?:[^,]*, (FUTEX_[A-Z_]+))?", line)
        if call is not None:  # else the second half of one, a signal or an end
            found[" ".join(filter(None, call.groups()))] += 1
    return found


def _trace(shape: str, count: int, trickle: bool) -> Counter[str]:
    run = f"from benchmarks import curves; curves._traced_run({shape!r}, {count}, {trickle})"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        subprocess.run(
            ["strace", "-f", "-qq", "-o", str(path), sys.executable, "-c", run],
            cwd=ROOT,
            check=True,
            timeout=_PATIENCE_S,
        )
        return system_calls(path.read_text(errors="replace"))


def _traced_run(shape: str, count: int, trickle: bool) -> None:
    with _many(ShmringQueue, shape=shape, count=count, trickle=trickle) as session:
        session.run()


def traced(shape: str, scale: float, *, trickle: bool = False) -> dict[str, float]:
    """Return system calls a message, by name: the difference of two runs of `shmring.Queue`."""
    progress(f"strace: {shape}")
    share = min(1.0, scale) * (0.1 if trickle else 1.0)
    few, many = (
        max(least, int(share * count)) for least, count in zip((10, 20), _TRACED, strict=True)
    )
    found = _trace(shape, many, trickle)
    found.subtract(_trace(shape, few, trickle))
    more = many - few
    calls = {name: count / more for name, count in found.most_common() if count / more >= 0.001}
    every = sum(found.values()) / more
    return {"every": every, "wakes": calls.get("futex FUTEX_WAKE", 0.0), **calls}


# ---- pictures -------------------------------------------------------------------------------

_COLOURS = (
    *("#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    *("#000080", "#808000", "#ff9896", "#006400"),
)


def _plot(
    found: dict[str, Any], path: Path, curves: Mapping[str, Any], **axes_options: Any
) -> Path:
    """Draw curves, each a pair of xs and ys; the machine stands beneath."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.curves draws with matplotlib ({error}): it comes with the extra `bench`,"
            " pip install -e '.[bench]'"
        ) from error
    matplotlib.use("svg")
    # The same figures give the same file, so that a commit shows what changed.
    matplotlib.rcParams.update({"svg.hashsalt": "shmring", "font.size": 9, "figure.dpi": 100})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8))
    ticks = axes_options.pop("ticks", None)
    for order, (label, (xs, ys)) in enumerate(curves.items()):
        if label.startswith("shmring"):
            style = {"linewidth": 2.4, "marker": "o", "zorder": 3, "color": f"C{order}"}
        else:
            colour, marker = _COLOURS[order % len(_COLOURS)], "^vsDPX*d<>"[order % 10]
            style = {"linewidth": 1.1, "marker": marker, "color": colour}
        axes.plot(xs, ys, label=label, markersize=4, **style)
    axes.set(yscale="log", **axes_options)
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
    pyplot.close(figure)
    return path


def _size(nbytes: int) -> str:
    """64 KiB"""
    unit = 2 if nbytes >= 1 << 20 else 1 if nbytes >= 1 << 10 else 0
    return f"{nbytes >> 10 * unit} {('B', 'KiB', 'MiB')[unit]}"


def _measured(xs: Sequence[Any], rates: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the curve of each transport, of the points that were measured."""
    curves = {}
    for label, points in rates.items():
        pairs = [
            (x, one["median"]) for x, one in zip(xs, points, strict=True) if one and "median" in one
        ]
        curves[label] = ([x for x, _ in pairs], [rate for _, rate in pairs])
    return curves


def draw(folder: Path) -> list[Path]:
    """Draw the ``curves.json`` of a folder; return the pictures, which lie beside it.

    Raises:
        SystemExit: matplotlib or the file is missing; the message says what to do.
    """
    path = folder / "curves.json"
    if not path.exists():
        raise SystemExit(f"{path}: not there; `python -m benchmarks.curves` writes it")
    found = json.loads(path.read_text())
    sizes, shapes = found["by_size"]["sizes"], found["by_processes"]["shapes"]
    places = range(len(shapes))
    paths = [
        _plot(
            found,
            folder / "rate_by_size.svg",
            _measured(sizes, found["by_size"]["rates"]),
            xscale="log",
            xlabel="size of a message",
            ylabel="messages a second",
            title="bytes from one process to another, one call a message",
            ticks=(sizes, [_size(size) for size in sizes]),
        ),
        _plot(
            found,
            folder / "rate_by_processes.svg",
            _measured(places, found["by_processes"]["rates"]),
            xlabel="producers : consumers",
            ylabel="messages a second",
            title="64 B through one queue, one call a message",
            ticks=(places, shapes),
        ),
    ]
    longer = [1 - share for share in found["round_trips"]["quantiles"]]
    for placement, title in {"free": "left to the scheduler", "apart": "a CPU each"}.items():
        if placement in found["round_trips"]:
            trips = found["round_trips"][placement]
            paths.append(
                _plot(
                    found,
                    folder / f"round_trip_{placement}.svg",
                    {label: (microseconds, longer) for label, microseconds in trips.items()},
                    xscale="log",
                    xlabel="microseconds of a round trip",
                    ylabel="share of round trips that took longer",
                    title=f"64 B there and back, {title}",
                )
            )
    return paths


# ---- to the reader --------------------------------------------------------------------------


def _print_costs(found: dict[str, Any]) -> None:
    print("| processes | queue | rate | sleeps | preemptions | CPU | waiting | calls | wakes |")
    print("|---" * 9 + "|")
    many = found["by_processes"]
    rows = [
        (shape, label, points[place], found["system_calls_a_message"].get(shape))
        for place, shape in enumerate(many["shapes"])
        for label, points in many["rates"].items()
        if label in found["trickle"]
    ]
    calls = found["system_calls_a_message"].get("trickle")
    trickle = f"{IDLE}, {TRICKLE_PER_SECOND} a second"
    rows += [(trickle, label, point, calls) for label, point in found["trickle"].items()]
    for load, label, point, calls in rows:
        if "error" in point:
            print(f"| {load} | {label} | {point['error']} |")
            continue
        ours = calls if label == ShmringQueue.label else None
        cells = [
            per_second(point["median"]),
            f"{point['sleeps_a_message']:.3f}",
            f"{point['preemptions_a_message']:.3f}",
            f"{point['cpu_us_a_message']:.2f} us",
            f"{point['consumers_share_of_a_core']:.1%}",
            *(f"{ours[name]:.3f}" if ours else "-" for name in ("every", "wakes")),
        ]
        print(f"| {load} | {label} | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write what was found, print what a message costs, and draw."""
    options = parser("curves", __doc__)
    options.add_argument("--peers", action="store_true", help="with the peers that are installed")
    options.add_argument("--short", action="store_true", help="up to 4 KiB and 2:2: to see it work")
    options.add_argument("--no-strace", action="store_true", help="leave out the system calls")
    options.add_argument("--draw", action="store_true", help="only draw what was measured before")
    asked = options.parse_args(arguments)
    if not asked.draw:
        before, chosen = machine(), []
        for one in able("bytes", peers=asked.peers):
            if reason := one.missing():
                progress(f"left out: {one.label}: {reason}")
            else:
                chosen.append(one)
        trace = not asked.no_strace and shutil.which("strace") is not None
        found = measure(chosen, asked.runs, asked.scale, short=asked.short, trace=trace)
        found |= {"machine": before, "runs": asked.runs, "scale": asked.scale}
        found["load_average_after"] = machine()["load average"]
        save(asked.results, "curves.json", found)
        _print_costs(found)
    for path in draw(asked.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

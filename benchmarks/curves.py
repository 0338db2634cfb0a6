"""Rates by size and by number of processes, and how round trips are spread.

``python -m benchmarks.curves --peers`` measures all of it, each transport in
turn, and writes ``benchmarks/results/curves.json``; ``benchmarks.plots`` draws it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import machine
from benchmarks.adapters import Transport
from benchmarks.sessions import ManyToMany, OneWay, RoundTrips, Session, two_cpus
from benchmarks.transports import able
from benchmarks.turns import Runs, progress, take_turns
from benchmarks.work import bytes_of

__all__ = ["QUANTILES", "RESULTS", "SHAPES", "SIZES", "main"]

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (8, 64, 512, 4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20, 64 << 20)  # bytes
SHAPES = ((1, 1), (1, 4), (4, 1), (2, 2), (4, 4), (16, 16))  # producers, consumers
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999)

_MOST_BYTES = 1 << 29  # of one run of the fastest
_MOST_MESSAGES = 300_000
_TRIPS = 20_000

Chosen = Sequence[type[Transport]]


def by_size(chosen: Chosen, runs: int, scale: float, sizes: Sequence[int]) -> dict[str, Any]:
    """Messages a second from one process to another, by bytes of a message."""
    rates: dict[str, list[Any]] = {one.label: [] for one in chosen}
    for nbytes in sizes:
        work = bytes_of(nbytes, count=min(_MOST_MESSAGES, _MOST_BYTES // nbytes))
        takers = [one for one in chosen if nbytes <= one.largest]
        found = _turns(runs, takers, functools.partial(OneWay, work=work, scale=scale))
        for label, points in rates.items():
            points.append(_rates(found.get(label)))
    return {"sizes": list(sizes), "rates": rates}


def by_processes(
    chosen: Chosen, runs: int, scale: float, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Messages of 64 B a second, by how many send and receive."""
    rates: dict[str, list[Any]] = {one.label: [] for one in chosen if one.shared}
    for producers, consumers in shapes:
        session = functools.partial(
            ManyToMany,
            work=bytes_of(64, count=_MOST_MESSAGES),
            scale=scale,
            producers=producers,
            consumers=consumers,
        )
        found = _turns(runs, [one for one in chosen if one.shared], session)
        for label, points in rates.items():
            points.append(_rates(found.get(label)))
    return {"shapes": [f"{left}:{right}" for left, right in shapes], "rates": rates}


def round_trips(chosen: Chosen, runs: int, scale: float) -> dict[str, Any]:
    """Microseconds of a round trip of 64 B, by quantile; free, and bound to a CPU each."""
    placements = ["free", "apart"] if two_cpus() is not None else ["free"]
    spread: dict[str, Any] = {"quantiles": QUANTILES}
    for placement in placements:
        session = functools.partial(
            RoundTrips,
            work=bytes_of(64, count=_TRIPS),
            scale=scale,
            apart=placement == "apart",
        )
        found = _turns(runs, chosen, session)
        spread[placement] = {
            label: _quantiles_us(one.trips_ns) for label, one in found.items() if one.trips_ns
        }
    return spread


def _turns(
    runs: int, chosen: Chosen, session: Callable[[type[Transport]], Session]
) -> dict[str, Runs]:
    makers = {one.label: functools.partial(session, one) for one in chosen}
    return take_turns(runs, makers, progress)


def _rates(one: Runs | None) -> dict[str, Any] | None:
    """None where it cannot take part; with the error where it failed."""
    if one is None:
        return None
    if one.error is not None or not one.rates:
        return {"error": repr(one.error)}
    return {"median": one.median, "slowest": min(one.rates), "fastest": max(one.rates)}


def _quantiles_us(trips_ns: Sequence[int]) -> list[float]:
    ordered = sorted(trips_ns)
    return [ordered[min(int(share * len(ordered)), len(ordered) - 1)] / 1000 for share in QUANTILES]


def measure(chosen: Chosen, runs: int, scale: float, *, short: bool = False) -> dict[str, Any]:
    """All of it; `short` leaves out large messages and many processes."""
    before = machine.describe()
    sizes = [size for size in SIZES if size <= 4096] if short else SIZES
    return {
        "machine": before,
        "runs": runs,
        "scale": scale,
        "by_size": by_size(chosen, runs, scale, sizes),
        "round_trips": round_trips(chosen, runs, scale),
        "by_processes": by_processes(chosen, runs, scale, SHAPES[:4] if short else SHAPES),
        "load_average_after": machine.describe()["load average"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="benchmarks.curves", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=5, help="of each point (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the messages to send")
    parser.add_argument("--peers", action="store_true", help="with the peers that are installed")
    parser.add_argument(
        "--short", action="store_true", help="up to 4 KiB and 2:2: only to see it work"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}"
    )
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: at least 1")
    chosen = []
    for one in able("bytes"):
        if one.peer and not options.peers:
            continue
        if reason := one.missing():
            progress(f"left out: {one.label}: {reason}")
            continue
        chosen.append(one)
    found = measure(chosen, options.runs, options.scale, short=options.short)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "curves.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

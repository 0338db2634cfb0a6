"""Draw what `benchmarks.curves` measured: ``python -m benchmarks.plots``.

SVG files beside ``curves.json``, each with the machine beneath.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.curves import RESULTS

__all__ = ["draw", "main"]

_COLOURS = (
    *("#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    *("#000080", "#808000", "#ff9896", "#006400"),
)
_UNITS = ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.plots needs matplotlib ({error}): it comes with the extra `bench`,"
            " pip install -e '.[bench]'"
        ) from error
    matplotlib.use("svg")
    # The same figures give the same file, so that a commit shows what changed.
    matplotlib.rcParams.update({"svg.hashsalt": "shmring", "font.size": 9, "figure.dpi": 100})
    from matplotlib import pyplot

    return pyplot


def _style(label: str, order: int) -> dict[str, Any]:
    """Ours is what the eye finds first; the others differ by colour and marker."""
    if label.startswith("shmring"):
        return {"linewidth": 2.4, "marker": "o", "markersize": 4, "zorder": 3, "color": f"C{order}"}
    colour = _COLOURS[order % len(_COLOURS)]
    return {"linewidth": 1.1, "marker": "^vsDPX*d<>"[order % 10], "markersize": 4, "color": colour}


def _finish(pyplot: Any, figure: Any, axes: Any, found: dict[str, Any], path: Path) -> Path:
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
    unit, name = next(pair for pair in _UNITS if nbytes >= pair[0])
    return f"{nbytes // unit} {name}"


def _points(xs: Sequence[Any], rates: Sequence[Any]) -> tuple[list[Any], list[float]]:
    """Those that were measured."""
    pairs = [
        (x, one["median"]) for x, one in zip(xs, rates, strict=True) if one and "median" in one
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _rate_by_size(pyplot: Any, found: dict[str, Any], folder: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(9, 4.8))
    curves = found["by_size"]
    for order, (label, rates) in enumerate(curves["rates"].items()):
        axes.plot(*_points(curves["sizes"], rates), label=label, **_style(label, order))
    axes.set(xscale="log", yscale="log", xlabel="size of a message", ylabel="messages a second")
    axes.set_xticks(curves["sizes"], [_size(size) for size in curves["sizes"]], fontsize=7)
    axes.minorticks_off()
    axes.set_title("bytes from one process to another, one call a message")
    return _finish(pyplot, figure, axes, found, folder / "rate_by_size.svg")


def _round_trips(pyplot: Any, found: dict[str, Any], folder: Path) -> list[Path]:
    titles = {"free": "left to the scheduler", "apart": "a CPU each"}
    paths = []
    for placement, title in titles.items():
        if placement not in found["round_trips"]:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 4.8))
        longer = [1 - share for share in found["round_trips"]["quantiles"]]
        for order, (label, microseconds) in enumerate(found["round_trips"][placement].items()):
            axes.plot(microseconds, longer, label=label, **_style(label, order))
        axes.set(xscale="log", yscale="log", xlabel="microseconds of a round trip")
        axes.set_ylabel("share of round trips that took longer")
        axes.set_title(f"64 B there and back, {title}")
        paths.append(_finish(pyplot, figure, axes, found, folder / f"round_trip_{placement}.svg"))
    return paths


def _rate_by_processes(pyplot: Any, found: dict[str, Any], folder: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(9, 4.8))
    curves = found["by_processes"]
    places = range(len(curves["shapes"]))
    for order, (label, rates) in enumerate(curves["rates"].items()):
        axes.plot(*_points(places, rates), label=label, **_style(label, order))
    axes.set(yscale="log", xlabel="producers : consumers", ylabel="messages a second")
    axes.set_xticks(places, curves["shapes"])
    axes.set_title("64 B through one queue, one call a message")
    return _finish(pyplot, figure, axes, found, folder / "rate_by_processes.svg")


def draw(folder: Path) -> list[Path]:
    """Draw the ``curves.json`` of a folder; return the files, which lie beside it.

    Raises:
        SystemExit: matplotlib or the file is missing; the message says what to do.
    """
    path = folder / "curves.json"
    pyplot = _pyplot()
    if not path.exists():
        raise SystemExit(f"{path}: not there; `python -m benchmarks.curves` writes it")
    found = json.loads(path.read_text())
    return [
        _rate_by_size(pyplot, found, folder),
        *_round_trips(pyplot, found, folder),
        _rate_by_processes(pyplot, found, folder),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and name the files."""
    parser = argparse.ArgumentParser(prog="benchmarks.plots", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}"
    )
    for path in draw(parser.parse_args(arguments).results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Plots of what was measured, as SVG, with the machine below each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# The same figures give the same file, so that a commit shows what changed.
matplotlib.rcParams.update({"svg.hashsalt": "shmring", "font.size": 9, "figure.dpi": 100})


def plot(found: dict[str, Any], path: Path, curves: Mapping[str, Any], **options: Any) -> Path:
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


def medians(xs: Sequence[Any], rates: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return a curve of each transport, without the points that failed."""
    curves = {}
    for label, points in rates.items():
        measured = [place for place, point in enumerate(points) if "median" in point]
        ys = [points[place]["median"] for place in measured]
        curves[label] = ([xs[place] for place in measured], ys)
    return curves

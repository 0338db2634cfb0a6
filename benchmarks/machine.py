"""Which machine it was: a figure without it says nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

import shmring

__all__ = ["describe", "one_line"]


def describe() -> dict[str, str]:
    """Name the machine, what runs on it, and how busy it is now."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "cpu": _cpu_model(),
        "cores": f"{usable} of {os.cpu_count()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "shmring": f"{shmring.__version__} ({shmring.backend})",
        "load average": load,
    }


def one_line() -> str:
    """The same for a header."""
    return "; ".join(f"{key} {value}" for key, value in describe().items())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":  # aarch64 has no such line
            return value.strip()
    return platform.processor() or platform.machine()

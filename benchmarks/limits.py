"""What this machine allows, and what share of it is reached: `make limits`.

Compiles ``limits.c`` with ``cc`` (or ``$CC``) into ``build/``, runs it, and
writes ``benchmarks/results/limits.json``.  Beside rates that ``make bench-peers``
left there, each figure of ours is shown as a share of the limit that binds it:
quote it only where both were measured in one quiet hour.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, machine, machine_line, parser, save
from benchmarks.adapters import FORK
from benchmarks.work import Work

__all__ = ["LIMITS", "PICKLE", "compiled", "main", "measured", "pickle_alone", "shares"]

SOURCE = ROOT / "benchmarks" / "limits.c"
BUILD = ROOT / "build"
PATIENCE_S = 300.0

LIMITS = {
    "memcpy_1_mib_bytes_per_second": "memcpy between processes, 1 MiB blocks, 4 slots",
    "memcpy_8_mib_bytes_per_second": "memcpy between processes, 8 MiB blocks, 4 slots",
    "whole_1_mib_bytes_per_second": "1 MiB copied in, out, and read, whole, in 4 MiB",
    "pieces_1_mib_bytes_per_second": "1 MiB copied in, out, and read, by 128 KiB through 1 MiB",
    "in_place_1_mib_bytes_per_second": "1 MiB copied in, and read in place, in 4 MiB",
    "whole_8_mib_bytes_per_second": "8 MiB copied in, out, and read, whole, in 32 MiB",
    "pieces_8_mib_bytes_per_second": "8 MiB copied in, out, and read, by 128 KiB through 1 MiB",
    "in_place_8_mib_bytes_per_second": "8 MiB copied in, and read in place, in 32 MiB",
    "ring_64_b_messages_per_second": "C ring of 64 B messages, one to one, no guard",
    "cache_line_median_ns": "round trip of a cache line, a CPU each",
    "futex_apart_median_ns": "futex round trip, a CPU each",
    "futex_free_median_ns": "futex round trip, left to the scheduler",
    "futex_apart_idle_1_ms_median_ns": "futex round trip, 1 ms idle between, a CPU each",
    "futex_free_idle_1_ms_median_ns": "futex round trip, 1 ms idle between, left to the scheduler",
}


PICKLE = "what pickle alone allows"

# The figure of a question (a rate, or a time in us) and the limit it is read against.
_RING = ("messages_per_second", "ring_64_b_messages_per_second")
SHARES = (
    ("64 B bytes, one call a message", *_RING),
    ("64 B bytes, batches of 100", *_RING),
    *(
        (f"{mib} MiB float32, {how}", "megabytes_per_second", f"{limit}_{mib}_mib_bytes_per_second")
        for how, limit in (("writable, summed", "memcpy"), ("summed in place", "in_place"))
        for mib in (1, 8)
    ),
    ("round trip of 64 B, a CPU each", "median_us", "cache_line_median_ns"),
    ("round trip of 64 B, a CPU each", "median_us", "futex_apart_median_ns"),
    ("round trip of 64 B", "median_us", "futex_free_median_ns"),
)


def compiled(folder: Path) -> Path:
    """Compile the program into a folder, unless what is there is newer than its source.

    Raises:
        SystemExit: there is no C compiler, or it refused; the message says which.
    """
    program = folder / "limits"
    if program.exists() and program.stat().st_mtime > SOURCE.stat().st_mtime:
        return program
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler.split()[0]) is None:
        raise SystemExit(f"benchmarks.limits needs a C compiler: {compiler!r} (from $CC, or cc)")
    folder.mkdir(parents=True, exist_ok=True)
    command = [*compiler.split(), "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return program


def measured(program: Path, scale: float = 1.0, start: str = "") -> dict[str, float]:
    """Run the program; the values by name, in the units that the names say.

    Only what has a name that begins with `start` is measured.
    """
    done = subprocess.run(
        [program, str(scale), start],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    if done.returncode != 0:
        raise SystemExit(f"{program} ended with {done.returncode}: {done.stderr}")
    return {
        name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())
    }


def shares(
    limits: Mapping[str, float], questions: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """What part of a limit each transport of ours reaches.

    Args:
        limits: what `measured` found.
        questions: the rates of ``peers.json``: figures by question and transport.
    """
    found = []
    for question, name, limit in SHARES:
        for label, figures in questions.get(question, {}).items():
            if label.startswith("shmring") and name in figures:
                figure = figures[name]
                if name.endswith("_us"):
                    share = limits[limit] / (figure * 1000)
                else:
                    share = figure * (1e6 if name.startswith("mega") else 1) / limits[limit]
                row = {"question": question, "transport": label, "figure": figure}
                found.append(row | {"limit": limit, "share": share})
    return found


def pickle_alone(work: Work, seconds: float) -> float:
    """Return messages a second of one process that only dumps and another that only loads.

    Both at the same time, as in a queue: two CPUs of one core are slower then.
    """
    rates = FORK.SimpleQueue()
    dump = functools.partial(pickle.dumps, protocol=-1)
    dumped = [dump(one) for one in work.pool]
    sides = [
        FORK.Process(target=_repeat, args=(rates, call, arguments, seconds))
        for call, arguments in ((dump, work.pool), (pickle.loads, dumped))
    ]
    for side in sides:
        side.start()
    found = [rates.get() for _ in sides]
    for side in sides:
        side.join()
    return float(min(found))


def _repeat(rates: Any, call: Callable[[Any], Any], pool: Sequence[Any], seconds: float) -> None:
    start = now = time.perf_counter()
    count = 0
    while now - start < seconds:
        for one in pool:
            call(one)
        count += len(pool)
        now = time.perf_counter()
    rates.put(count / (now - start))


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_per_second"):
        return f"{value / 1e6:.1f} M/s"
    return f"{value / 1000:.2f} us"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print two tables, and write what was found."""
    options = parser("limits", __doc__).parse_args(arguments)
    described = machine()
    limits = measured(compiled(BUILD), options.scale)
    print(machine_line())
    if not limits["cpus_apart"]:
        print("One CPU only: nothing ran at the same time.")
    print("\n| limit | measured |\n|---|---|")
    for name, text in LIMITS.items():
        p99 = limits.get(name.replace("_median_ns", "_p99_ns")) if "_median" in name else None
        after = f" (p99 {_shown('', p99)})" if p99 is not None else ""
        print(f"| {text} | {_shown(name, limits[name])}{after} |")

    rates = options.results / "peers.json"
    reached = []
    if rates.exists():
        told = json.loads(rates.read_text())
        reached = shares(limits, told["questions"])
        print(f"\nRates of {rates} (load {told['machine']['load average']}):")
        print("\n| question | transport | limit | share |\n|---|---|---|---|")
        for one in reached:
            limit = LIMITS[one["limit"]]
            print(f"| {one['question']} | {one['transport']} | {limit} | {one['share']:.1%} |")
    found = {"machine": described, "scale": options.scale, "limits": limits, "shares": reached}
    save(options.results, "limits.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

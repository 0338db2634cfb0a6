"""Limits of this machine, and the share of them that shmring reaches: `make limits`.

Compiles ``limits.c`` with ``cc`` (or ``$CC``) into ``build/``, runs it, and writes
``benchmarks/results/limits.json``.  Rates that ``make bench-peers`` left in the same folder
are shown as shares of the limit that binds them: valid only if the machine was quiet in both.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import ROOT, machine, machine_line, parser, print_head, print_row, save
from benchmarks.adapters import FORK
from benchmarks.work import Work

SOURCE = ROOT / "benchmarks" / "limits.c"
BUILD = ROOT / "build"
TIMEOUT_S = 300.0

LIMITS = {
    "memcpy_1_mib_bytes_per_second": "memcpy between processes, 1 MiB blocks, 4 slots",
    "memcpy_8_mib_bytes_per_second": "memcpy between processes, 8 MiB blocks, 4 slots",
    "ring_64_b_messages_per_second": "C ring of 64 B messages, 1:1, no checks",
    "cache_line_median_ns": "round trip of a cache line, a CPU each",
    "futex_apart_median_ns": "futex round trip, a CPU each",
    "futex_free_median_ns": "futex round trip, not bound",
    "futex_apart_idle_1_ms_median_ns": "futex round trip, 1 ms idle between, a CPU each",
    "futex_free_idle_1_ms_median_ns": "futex round trip, 1 ms idle between, not bound",
}
PICKLE = "pickle alone"

# A question of bench_queues.py, its figure (a rate, or a time in us), the limit that binds it.
SHARES = (
    ("64 B bytes, one call a message", "messages_per_second", "ring_64_b_messages_per_second"),
    ("64 B bytes, batches of 100", "messages_per_second", "ring_64_b_messages_per_second"),
    ("1 MiB float32, writable, summed", "megabytes_per_second", "memcpy_1_mib_bytes_per_second"),
    ("8 MiB float32, writable, summed", "megabytes_per_second", "memcpy_8_mib_bytes_per_second"),
    ("round trip of 64 B, a CPU each", "median_us", "cache_line_median_ns"),
    ("round trip of 64 B, a CPU each", "median_us", "futex_apart_median_ns"),
    ("round trip of 64 B", "median_us", "futex_free_median_ns"),
)


def _compile() -> str:
    """Compile the program unless it is newer than its source; return its path.

    Raises:
        SystemExit: there is no C compiler, or it failed.
    """
    program = BUILD / "limits"
    if program.exists() and program.stat().st_mtime > SOURCE.stat().st_mtime:
        return str(program)
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler.split()[0]) is None:
        raise SystemExit(f"benchmarks.limits needs a C compiler: {compiler!r} (from $CC, or cc)")
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [*compiler.split(), "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return str(program)


def measure(scale: float = 1.0, prefix: str = "") -> dict[str, float]:
    """Return limits by name, in the unit that the name says.

    Args:
        scale: share of the work.
        prefix: measure only limits whose name begins with this.
    """
    command = [_compile(), str(scale), prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    pairs = (line.split() for line in done.stdout.splitlines())
    return {name: float(value) for name, value in pairs}


def bound(name: str, work: Work, scale: float) -> float:
    """Measure one limit, a key of `LIMITS`, or what pickle alone allows for some work."""
    if name == PICKLE:
        return _pickle_alone(work, scale)
    return measure(min(1.0, scale), name.removesuffix("_median_ns"))[name]


def _pickle_alone(work: Work, seconds: float) -> float:
    """Return messages a second of one process that only dumps and one that only loads.

    Both run at the same time, as in a queue: two hyper-threads of one core are slower then.
    """
    rates = FORK.SimpleQueue()
    dump = functools.partial(pickle.dumps, protocol=-1)
    dumped = [dump(one) for one in work.pool]
    processes = [
        FORK.Process(target=_repeat, args=(rates, call, arguments, seconds))
        for call, arguments in ((dump, work.pool), (pickle.loads, dumped))
    ]
    for process in processes:
        process.start()
    found = [rates.get() for _ in processes]
    for process in processes:
        process.join()
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


def shares(
    limits: Mapping[str, float], questions: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Iterator[dict[str, Any]]:
    """Yield the share of a limit that each transport of shmring reaches.

    Args:
        limits: what `measure` returned.
        questions: the rates of ``peers.json``: figures by question and transport.
    """
    for question, name, limit in SHARES:
        for label, figures in questions.get(question, {}).items():
            if label.startswith("shmring") and name in figures:
                figure = figures[name]
                if name.endswith("_us"):
                    share = limits[limit] / (figure * 1000)
                else:
                    share = figure * (1e6 if name.startswith("mega") else 1) / limits[limit]
                row = {"question": question, "transport": label, "figure": figure}
                yield row | {"limit": limit, "share": share}


def _text(name: str, value: float) -> str:
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_per_second"):
        return f"{value / 1e6:.1f} M/s"
    return f"{value / 1000:.2f} us"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the limits and the shares of them, and write both."""
    options = parser("limits", __doc__).parse_args(arguments)
    before = machine()
    limits = measure(options.scale)
    print(machine_line())
    if not limits["cpus_apart"]:
        print("There is only one CPU: nothing ran at the same time.")
    print_head("limit", "measured", "p99")
    for name, text in LIMITS.items():
        p99 = limits.get(name.replace("_median_ns", "_p99_ns")) if "_median" in name else None
        print_row(text, _text(name, limits[name]), "" if p99 is None else _text("", p99))

    rates = options.results / "peers.json"
    reached = []
    if rates.exists():
        earlier = json.loads(rates.read_text())
        reached = list(shares(limits, earlier["questions"]))
        print(f"\nRates of {rates} (load {earlier['machine']['load average']}):")
        print_head("question", "transport", "limit", "share")
        for one in reached:
            share = f"{one['share']:.1%}"
            print_row(one["question"], one["transport"], LIMITS[one["limit"]], share)
    found = {"machine": before, "scale": options.scale, "limits": limits, "shares": reached}
    save(options.results, "limits.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

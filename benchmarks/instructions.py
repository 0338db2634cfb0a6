"""Instructions a call may cost: `make budgets`; ``--guards``: the cost of each guard.

Counted by callgrind (Debian's valgrind): unlike seconds they are the same on a busy
machine.  The cost of a call is the difference of two runs that differ by how often it is
made.  A call of `shmring.Queue` in one process that grew by more than 5 % over
``budgets.json`` fails, until the new figure is written there (``--write``) in a commit
that says what it buys.  Budgets hold for one interpreter and one compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import shmring
from benchmarks import ROOT

__all__ = ["CALLS", "count", "environment", "instructions", "judge", "main", "missing"]

BUDGETS = ROOT / "benchmarks" / "budgets.json"
GROWTH = 0.05
PACKAGE = Path(shmring.__file__).parent

# Many queues, each of which stays in its first 64 KiB: no growth, and no waiting.
_QUEUES = 32
_PROGRAM = f"""
import sys, queue, shmring
from itertools import repeat
puts, put_manys, gets, get_manys, empties = map(int, sys.argv[1:])
message, batch = bytes(64), [bytes(64)] * 100
queues = [shmring.Queue() for _ in range({_QUEUES})]
for one in queues:
    put, put_many, get, get_many = one.put, one.put_many, one.get, one.get_many
    for _ in repeat(None, puts):
        put(message)
    for _ in repeat(None, put_manys):
        put_many(batch)
    for _ in repeat(None, gets):
        get()
    for _ in repeat(None, get_manys):
        get_many(100)
get_nowait, Empty = shmring.Queue().get_nowait, queue.Empty
for _ in repeat(None, empties):
    try:
        get_nowait()
    except Empty:
        pass
"""

# How often a call is made in the run to compare with, how often more, on how many queues.
CALLS = {
    "put": (200, 200, _QUEUES),
    "put_many(100)": (2, 2, _QUEUES),
    "get": (50, 200, _QUEUES),
    "get_many(100)": (1, 2, _QUEUES),
    "get_nowait, empty": (10, 2000, 1),
}


def missing() -> str | None:
    """Return why nothing can be counted here; None if it can."""
    return None if shutil.which("valgrind") else "there is no valgrind"


def instructions(program: str, *arguments: object, package: Path) -> int:
    """Count the instructions of a whole process.

    Args:
        program: Python source.
        arguments: its ``sys.argv[1:]``.
        package: the folder in which `shmring` is found.

    Raises:
        RuntimeError: the program failed; with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
                *(sys.executable, "-c", program, *map(str, arguments)),
            ],
            env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the counted program ended with {done.returncode}:\n{done.stderr}")
        found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("callgrind wrote no total")
    return int(found.group(1))


# ---- budgets --------------------------------------------------------------------------------


def environment() -> str:
    """Name the interpreter, and the compiler that made the extension."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    binary = next(iter(sorted(PACKAGE.rglob(f"*{suffix}")))).read_bytes()
    found = re.search(rb"GCC: \([^)]*\) ([\d.]+)|clang version ([\d.]+)", binary)
    compiler = found.group(0).decode() if found is not None else "unknown compiler"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{python} ({platform.python_compiler()}), {platform.machine()}, {compiler}"


def count() -> dict[str, float]:
    """Count the instructions of each call, by its name."""
    few = {name: times for name, (times, _, _) in CALLS.items()}
    runs = [few, *({**few, name: few[name] + more} for name, (_, more, _) in CALLS.items())]

    def total(run: Mapping[str, int]) -> int:
        return instructions(_PROGRAM, *run.values(), package=PACKAGE.parent)

    total(few)  # compiles what is imported
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        base, *others = pool.map(total, runs)
    return {
        name: round((one - base) / (more * queues), 1)
        for (name, (_, more, queues)), one in zip(CALLS.items(), others, strict=True)
    }


def judge(allowed: Mapping[str, float], counted: Mapping[str, float]) -> bool:
    """Print each call beside its budget; return whether all are within.

    Raises:
        SystemExit: a call has no budget, or a budget no call.
    """
    if odd := ", ".join(sorted(allowed.keys() ^ counted.keys())):
        raise SystemExit(f"{BUDGETS.name} and the calls that are counted differ by: {odd}")
    exceeded = False
    for call, figure in counted.items():
        change = figure / allowed[call] - 1
        over = figure > allowed[call] * (1 + GROWTH)
        exceeded |= over
        mark = f"  over by more than {GROWTH:.0%}" if over else ""
        print(f"{call:20} {figure:10,.0f}  of {allowed[call]:10,.0f}  {change:+.1%}{mark}")
    return not exceeded


# ---- guards ---------------------------------------------------------------------------------

_MODULES = ("_core", "_handle", "_queue")
_WITNESS, _COUNT = "cython/shmring/_core/diagnostics.h", "cython/shmring/_core/count.h"
_LOOP = """
import sys, shmring
queue = shmring.Queue()
put, get, message = queue.put, queue.get, bytes(64)
for _ in range(int(sys.argv[1])):
    put(message)
    get()
queue.close()
"""


def guards() -> dict[str, list[Any]]:
    """Return the patches that take a guard out, by the guard."""
    from builds import DIRECT, SYNC, Patch

    return {
        "the kernel is told of a lock that is being taken or released": [
            Patch(
                SYNC,
                "    *pending = word == NULL ? NULL"
                " : (struct robust_list *)((char *)word - self->head->futex_offset);\n",
                "    (void)pending, (void)word;\n",
            )
        ],
        "the pid beside the lock word": [
            Patch(_WITNESS, "{ store_relaxed32(word + 1, sync_pid()); }", "{ (void)word; }"),
            Patch(_WITNESS, "{ store_relaxed32(word + 1, 0); }", "{ (void)word; }"),
        ],
        "counts that are right after a kill between any two stores": [
            Patch(
                _COUNT,
                "    store_release64(&count->previous, value);\n"
                "    store_release64(&count->position, following);\n"
                "    store_release64(&count->current, value + by);\n",
                "    (void)following;\n    count->current = value + by;\n",
            ),
            Patch(
                _COUNT,
                "return count->position == position ? count->current : count->previous;",
                "(void)position;\n    return count->current;",
            ),
        ],
        "a frame is checked before it is believed": [
            Patch(
                DIRECT,
                " and frame_is_possible(frame, length, pos, m.capacity, limit):\n",
                ":\n",
            )
        ],
        "positions are checked before they are believed": [
            Patch(DIRECT, "h.write_generation and pos & 7 == 0\n", "h.write_generation\n"),
            Patch(DIRECT, "h.read_generation and pos & 7 == 0):\n", "h.read_generation):\n"),
            Patch(DIRECT, " or limit - pos > m.capacity:\n", ":\n"),
        ],
        "a poisoned ring is left alone": [
            Patch(
                DIRECT,
                "    if (load_relaxed32(&h.poisoned) == 0 and load_relaxed32(&h.shutdown) == 0\n"
                f"            and {following}",
                f"    if (load_relaxed32(&h.shutdown) == 0\n            and {following}",
            )
            for following in ("m.generation", "load")
        ],
        "no message is read by peek": [
            Patch(DIRECT, "load_relaxed64(&h.lease_owner) == 0 and ", "")
        ],
    }


def cost_of_guards() -> None:
    """Count put + get of 64 bytes with every guard, without each, and without all."""
    sys.path.append(str(ROOT / "tests" / "torture"))
    from builds import Build

    without = guards()
    everything = [patch for patches in without.values() for patch in patches]
    whole = 0.0
    print("| without | instructions of put + get | the guard's share |\n|---|---|---|")
    for name, patches in {"nothing": [], **without, "all of these": everything}.items():
        with tempfile.TemporaryDirectory() as folder:
            package = Build(patches, _MODULES, quick=False).make(Path(folder) / "tree")
            instructions(_LOOP, 1, package=package)  # compiles what is imported
            few, many = (instructions(_LOOP, n, package=package) for n in (1000, 11_000))
        cost = (many - few) / 10_000
        whole = whole or cost
        print(f"| {name} | {cost:,.0f} | {(whole - cost) / cost:.1%} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and compare; 0 within the budgets, 1 over one, 2 where nothing can be compared."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="take what is counted as the budget")
    parser.add_argument(
        "--where-known", action="store_true", help="0 where nothing can be compared (for CI)"
    )
    parser.add_argument("--guards", action="store_true", help="count the cost of each guard")
    options = parser.parse_args(arguments)
    here = environment()
    known: dict[str, dict[str, float]] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    reason = missing()
    if reason is None and here not in known and not (options.write or options.guards):
        reason = f"{BUDGETS.name} has no budget for {here}; --write makes one"
    if reason is not None:
        print(f"budgets: skipped: {reason}")
        return 0 if options.where_known else 2
    if options.guards:
        cost_of_guards()
        return 0

    print(f"budgets: instructions a call, {here}")
    counted = count()
    if options.write:
        known[here] = counted
        BUDGETS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    if judge(known[here], counted):
        return 0
    print("Mend what grew; or, if it is worth it, `make budgets BUDGETS_ARGS=--write`.")
    return 1


if __name__ == "__main__":
    sys.exit(main())

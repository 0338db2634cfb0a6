"""Instructions a call may cost: `make budgets`.

Counted by callgrind (Debian's valgrind): unlike seconds they are the same on a busy machine.
The cost of a call is the difference of two runs that differ in how often it is made.  A call
that grew by more than 5 % over ``budgets.json`` fails, until ``--write`` puts the new figure
there, in a commit that says what it is for.  A budget holds for one interpreter and compiler.
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

import shmring
from benchmarks import ROOT

BUDGETS = ROOT / "benchmarks" / "budgets.json"
GROWTH = 0.05
PACKAGE = Path(shmring.__file__).parent

# Many queues, each below its first 64 KiB: no growth, no waiting.
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

# Calls in the first run, additional calls in the second, queues.
CALLS = {
    "put": (200, 200, _QUEUES),
    "put_many(100)": (2, 2, _QUEUES),
    "get": (50, 200, _QUEUES),
    "get_many(100)": (1, 2, _QUEUES),
    "get_nowait, empty": (10, 2000, 1),
}


def _instructions(*times: int) -> int:
    """Count the instructions of a whole process that makes each call so many times.

    Raises:
        RuntimeError: the program failed; with its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
                *(sys.executable, "-c", _PROGRAM, *map(str, times)),
            ],
            env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
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


def environment() -> str:
    """Return the interpreter and the compiler of the extension, the key of a budget."""
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
    _instructions(*few.values())  # compiles what is imported
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        base, *others = pool.map(lambda run: _instructions(*run.values()), runs)
    return {
        name: round((one - base) / (more * queues), 1)
        for (name, (_, more, queues)), one in zip(CALLS.items(), others, strict=True)
    }


def judge(allowed: Mapping[str, float], counted: Mapping[str, float]) -> bool:
    """Print each call beside its budget; return whether all are within theirs.

    Raises:
        SystemExit: a call has no budget, or a budget has no call.
    """
    if odd := ", ".join(sorted(allowed.keys() ^ counted.keys())):
        raise SystemExit(
            f"{BUDGETS.name} and the counted calls differ in: {odd}; --write makes it anew"
        )
    exceeded = False
    for call, figure in counted.items():
        change = figure / allowed[call] - 1
        over = figure > allowed[call] * (1 + GROWTH)
        exceeded |= over
        mark = f"  over by more than {GROWTH:.0%}" if over else ""
        print(f"{call:20} {figure:10,.0f}  of {allowed[call]:10,.0f}  {change:+.1%}{mark}")
    return not exceeded


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and compare; return 0 if within budget, 1 if over, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="make the counts the budget")
    parser.add_argument(
        "--where-known", action="store_true", help="return 0 if nothing can be compared (for CI)"
    )
    options = parser.parse_args(arguments)
    here = environment()
    known: dict[str, dict[str, float]] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    reason = None if shutil.which("valgrind") else "valgrind is not installed"
    if reason is None and here not in known and not options.write:
        reason = f"{BUDGETS.name} has no budget for {here}; --write makes one"
    if reason is not None:
        print(f"budgets: skipped: {reason}")
        return 0 if options.where_known else 2
    print(f"budgets: instructions a call, {here}")
    counted = count()
    if options.write:
        known[here] = counted
        BUDGETS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    if judge(known[here], counted):
        return 0
    print("Reduce what grew or, if it is worth it, `make budgets BUDGETS_ARGS=--write`.")
    return 1


if __name__ == "__main__":
    sys.exit(main())

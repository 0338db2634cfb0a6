"""How many instructions a call may cost: ``python -m benchmarks.budgets``.

Counts `put`, `get`, `put_many(100)`, `get_many(100)` of 64 bytes and a
`get_nowait` that finds nothing, on `shmring.Queue` in one process, and compares
with ``budgets.json``: one that grew by more than 5 % fails, until somebody
writes the new figure there (``--write``) and says in the commit what it buys.
The figures hold for one interpreter and one compiler, by which they are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import shmring
from benchmarks import counting

__all__ = ["CALLS", "GROWTH", "Budget", "count", "environment", "main"]

BUDGETS = Path(__file__).resolve().parent / "budgets.json"
GROWTH = 0.05

# Many queues, each of which stays in its first 64 KiB: no growth, and nobody waits.
_QUEUES = 32
_PROGRAM = """
import sys, queue, shmring
from itertools import repeat
puts, put_manys, gets, get_manys, empties = map(int, sys.argv[1:])
message, batch = bytes(64), [bytes(64)] * 100
queues = [shmring.Queue() for _ in range(QUEUES)]
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
""".replace("QUEUES", str(_QUEUES))


@dataclass(frozen=True)
class Call:
    """A call that is counted: how often in the run to compare with, and how often more."""

    few: int
    more: int
    queues: int = _QUEUES


CALLS = {
    "put": Call(200, 200),
    "put_many(100)": Call(2, 2),
    "get": Call(50, 200),
    "get_many(100)": Call(1, 2),
    "get_nowait, empty": Call(10, 2000, queues=1),
}


@dataclass(frozen=True)
class Budget:
    """One call's figures, in instructions."""

    call: str
    allowed: float
    counted: float

    @property
    def exceeded(self) -> bool:
        return self.counted > self.allowed * (1 + GROWTH)

    def __str__(self) -> str:
        change = self.counted / self.allowed - 1
        mark = f"  over by more than {GROWTH:.0%}" if self.exceeded else ""
        return (
            f"{self.call:20} {self.counted:10,.0f}  of {self.allowed:10,.0f}  {change:+.1%}{mark}"
        )


def environment() -> str:
    """The interpreter, and the compiler that made the extension."""
    from shmring import _core

    found = re.search(rb"GCC: \([^)]*\) ([\d.]+)|clang version ([\d.]+)", _binary(_core.__file__))
    compiler = found.group(0).decode() if found is not None else "unknown compiler"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{python} ({platform.python_compiler()}), {platform.machine()}, {compiler}"


def _binary(path: str) -> bytes:
    return Path(path).read_bytes()


def count(package: Path) -> dict[str, float]:
    """Instructions of each call, by its name.

    Args:
        package: the folder in which `shmring` is found.
    """
    few = {name: call.few for name, call in CALLS.items()}
    runs = [few, *({**few, name: call.few + call.more} for name, call in CALLS.items())]
    counting.instructions(_PROGRAM, *few.values(), package=package)  # compiles what is imported
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        base, *others = pool.map(
            lambda run: counting.instructions(_PROGRAM, *run.values(), package=package), runs
        )
    return {
        name: round((total - base) / (call.more * call.queues), 1)
        for (name, call), total in zip(CALLS.items(), others, strict=True)
    }


def judged(allowed: Mapping[str, float], counted: Mapping[str, float]) -> list[Budget]:
    """Each call that has a budget or was counted; one without the other is an error.

    Raises:
        SystemExit: a call has no budget, or a budget no call.
    """
    if allowed.keys() != counted.keys():
        odd = ", ".join(sorted(allowed.keys() ^ counted.keys()))
        raise SystemExit(f"{BUDGETS.name} and the calls that are counted differ by: {odd}")
    return [Budget(call, allowed[call], figure) for call, figure in counted.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and compare; 0 within the budgets, 1 over one, 2 where nothing can be compared."""
    parser = argparse.ArgumentParser(prog="benchmarks.budgets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="take what is counted as the budget")
    parser.add_argument(
        "--where-known",
        action="store_true",
        help="where nothing can be compared, say so and be content (for CI)",
    )
    options = parser.parse_args(arguments)
    here = environment()
    known: dict[str, dict[str, float]] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    reason = counting.missing()
    if reason is None and here not in known and not options.write:
        reason = f"{BUDGETS.name} has no budget for {here}; --write makes one"
    if reason is not None:
        print(f"budgets: skipped: {reason}")
        return 0 if options.where_known else 2

    print(f"budgets: instructions a call, {here}")
    counted = count(Path(shmring.__file__).parent.parent)
    if options.write:
        known[here] = counted
        BUDGETS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    budgets = judged(known[here], counted)
    for budget in budgets:
        print(budget)
    if any(budget.exceeded for budget in budgets):
        print("Mend what grew; or, if it is worth it, `make budgets BUDGETS_ARGS=--write`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

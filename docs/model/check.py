"""Search the models of this folder with spin: what must hold, and mistakes that must be found.

    python docs/model/check.py [--quick] [--only MODEL]

Each line of the plan is one search of one model: spin writes a program, gcc compiles it, and that
program visits every state.  A model as it stands must have no error, and be searched to
its end.  With a mistake put in (a #define of that name in the model) an error must be found.
Exit status 1 if one of them is otherwise, 2 if spin or gcc is missing.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 7000  # of one search
MOST_DEPTH = 100_000
COMPILE = ["gcc", "-w", "-DSAFETY", f"-DMEMLIM={MEMORY_MIB}", "-o", "pan", "pan.c"]


@dataclass(frozen=True)
class Search:
    """One line of the plan.

    Args:
        model: the name of the file, without `.pml`.
        crashes: how many processes may be killed.
        settings: #defines that change the size or what takes part.
        mistake: the #define of a mistake, which must be found; "" if nothing may be found.
        quick: part of `--quick`.
    """

    model: str
    crashes: int
    settings: str = ""
    mistake: str = ""
    quick: bool = False

    def defines(self) -> list[str]:
        names = [f"CRASHES={self.crashes}", *self.settings.split(), *self.mistake.split()]
        return [f"-D{name}" for name in names]


@dataclass(frozen=True)
class Outcome:
    """What came of a search.

    Args:
        seconds: of processor time.
        error: the first error, or "".
        trouble: why nothing is known: it could not be built, or not searched to its end.
    """

    states: int = 0
    depth: int = 0
    seconds: float = 0.0
    error: str = ""
    trouble: str = ""

    def is_right(self, search: Search) -> bool:
        return not self.trouble and bool(self.error) == bool(search.mistake)

    def text(self, search: Search) -> str:
        if self.trouble:
            return f"FAILED: {self.trouble}"
        if search.mistake:
            return f"found: {self.error}" if self.error else "NOT FOUND"
        return f"ERROR: {self.error}" if self.error else "no error"


def run(search: Search, folder: Path) -> Outcome:
    """Search in `folder`, which is empty."""
    model = HERE / f"{search.model}.pml"
    small = search.quick or search.mistake  # to optimise would take longer than to search
    for command in (
        ["spin", *search.defines(), "-a", str(model)],
        [*COMPILE, "-O0" if small else "-O1"],
    ):
        made = _call(command, folder)
        if made.returncode != 0 or not (folder / "pan.c").exists():
            return Outcome(trouble=f"{command[0]}: {made.stdout.strip()[:200]}")
    begun = _processor_time()
    said = _call(["./pan", f"-m{MOST_DEPTH}", "-w24"], folder).stdout
    seconds = _processor_time() - begun
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"([\d.e+]+) states, stored", said)
    depth = re.search(r"depth reached (\d+)", said)
    if errors is None or states is None or depth is None:
        return Outcome(seconds=seconds, trouble=f"no result: {said.strip()[-200:]}")
    found = re.search(r"^pan:\d+: (.*?)(?: \(at depth \d+\))?$", said, re.MULTILINE)
    error = " ".join(found[1].split()) if found and errors[1] != "0" else ""
    whole = error or not re.search(r"too small|out of memory|not completed|truncated", said)
    return Outcome(
        states=int(float(states[1])),
        depth=int(depth[1]),
        seconds=seconds,
        error=error,
        trouble="" if whole else "not searched to its end",
    )


def _processor_time() -> float:
    """Seconds that the programs took which were called."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _call(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def check(plan: Sequence[Search]) -> int:
    """Print a table of all of them; returns how many were not as they must be."""
    wrong = 0
    begun = time.monotonic()
    row = "{:9} {:>7} {:>11} {:>6} {:>8}  {}  ->  {}"
    print(row.format("model", "crashes", "states", "depth", "seconds", "what", "outcome"))
    for search in plan:
        with tempfile.TemporaryDirectory(prefix="shmring-model-") as folder:
            outcome = run(search, Path(folder))
        right = outcome.is_right(search)
        wrong += not right
        what = f"{search.mistake or 'as it is'} {search.settings}".strip()
        states, seconds = f"{outcome.states:,}", f"{outcome.seconds:.1f}"
        said = outcome.text(search) + ("" if right else "  <<<")
        print(
            row.format(search.model, search.crashes, states, outcome.depth, seconds, what, said),
            flush=True,
        )
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    mistakes = sum(bool(search.mistake) for search in plan)
    print(
        f"{len(plan) - mistakes} searches of the models as they are, {mistakes} of mistakes,"
        f" {wrong} not as they must be; "
        f"{time.monotonic() - begun:.0f} s, {_processor_time():.0f} of one processor, {most:,} MiB"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small searches")
    parser.add_argument("--only", metavar="MODEL", help="one model")
    options = parser.parse_args()
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            print(f"{tool} is missing: apt-get install {tool}", file=sys.stderr)
            return 2
    plan = [
        search
        for search in PLAN
        if (search.quick or not options.quick) and options.only in (None, search.model)
    ]
    return 1 if check(plan) else 0


PLAN = [
    Search("lock", 0),
    Search("lock", 1, "EARLY=1"),
    Search("lock", 2),
    Search("lock", 1, "PROCESSES=2", quick=True),
    Search("lock", 1, mistake="LOCK_NOT_ROBUST", quick=True),
    Search("lock", 1, mistake="PENDING_AFTER_TAKING"),
    Search("lock", 1, mistake="PENDING_CLEARED_BEFORE_THE_WAKE"),
    Search("lock", 0, mistake="WAITERS_NOT_PASSED_ON"),
    Search("lock", 0, "EARLY=1", "STEAL_AFTER_A_SLICE"),
    Search("lock", 1, "EARLY=1", "GARBAGE_AT_THE_FIRST_LOOK"),
    Search("lock", 1, mistake="UNBOUNDED"),
    #
    Search("ring", 1),
    Search("ring", 2),
    Search("ring", 2, "BATCH=2"),
    Search("ring", 1, "MESSAGES=1", quick=True),
    Search("ring", 1, mistake="LOCK_NOT_ROBUST"),
    Search("ring", 1, mistake="COMMIT_BEFORE_PAYLOAD", quick=True),
    Search("ring", 0, mistake="COMMIT_AFTER_UNLOCK"),
    Search("ring", 0, mistake="COPY_AFTER_COMMIT"),
    Search("ring", 1, mistake="COUNT_AFTER_COMMIT"),
    Search("ring", 1, mistake="COUNT_OUT_OF_ORDER"),
    #
    Search("count", 1),
    Search("count", 2),
    Search("count", 1, "COMMITS=1", quick=True),
    Search("count", 1, mistake="POSITION_BEFORE_PREVIOUS"),
    Search("count", 1, mistake="CURRENT_BEFORE_POSITION"),
    Search("count", 0, mistake="NO_SECOND_LOOK"),
    #
    Search("wake", 0, "PUTS=1 PUTS_TOO=1 HANDS_ON"),
    Search("wake", 0, "PUTS=1 PUTS_TOO=1 HANDS_ON", "HANDED_ON_WITH_WOKEN"),
    Search("wake", 0),
    Search("wake", 0, "PUTS=1 PUTS_TOO=1 EARLY=1"),
    Search("wake", 0, "PUTS=1 PUTS_TOO=0 CLOSERS=1"),
    Search("wake", 0, "PUTS=1 PUTS_TOO=0 LOOKERS=1"),
    Search("wake", 1, "PUTS=1 PUTS_TOO=1"),
    Search("wake", 2, "PUTS=1 PUTS_TOO=1"),
    Search("wake", 0, mistake="NO_FENCE", quick=True),
    Search("wake", 0, mistake="NO_SECOND_LOOK"),
    Search("wake", 0, mistake="NO_BATON", quick=True),
    Search("wake", 0, "PUTS=1 PUTS_TOO=1 EARLY=1", "NO_BATON_ON_LEAVING"),
    Search("wake", 0, mistake="WOKEN_CLEARED_BEFORE_SLEEPING"),
    Search("wake", 0, "EARLY=1", "NO_SLEEPER_IGNORED"),
    Search("wake", 0, "CLOSERS=1", "SEQUENCE_NOT_ADVANCED"),
    Search("wake", 0, "LOOKERS=1", "LOOKER_WITHOUT_BATON"),
    Search("wake", 1, mistake="UNBOUNDED"),
    #
    Search("space", 0, "CAPACITY=1"),
    Search("space", 1),
    Search("space", 1, "EARLY=1 PUTS_TOO=1"),
    Search("space", 2),
    Search("space", 0, "CAPACITY=1", "NO_FENCE"),
    Search("space", 0, mistake="NO_SECOND_LOOK"),
    Search("space", 1, mistake="NO_SLEEPER_IGNORED"),
    Search("space", 1, mistake="UNBOUNDED"),
    #
    Search("growth", 1),
    Search("growth", 1, "FAILS PRODUCERS=1 MESSAGES=3"),
    Search("growth", 2, "PRODUCERS=1 MESSAGES=3"),
    Search("growth", 2, "SETTLE PRODUCERS=1 MESSAGES=3"),
    Search("growth", 1, "ATTACH PRODUCERS=1 CONSUMERS=1 MESSAGES=3"),
    Search("growth", 0, "ANY_MAPPING"),
    Search("growth", 0, mistake="GENERATION_BEFORE_POSITION", quick=True),
    Search("growth", 0, mistake="LIMIT_IGNORES_THE_NEXT_AREA"),
    Search("growth", 0, mistake="RECORD_AFTER_GENERATION"),
    Search("growth", 0, mistake="PLACED_OVER_DRAINED"),
    Search("growth", 0, mistake="REAPED_BEFORE_THE_PUNCH"),
    Search("growth", 1, mistake="NO_TIDY"),
    Search("growth", 1, mistake="NO_REAP_AT_RECOVERY"),
    Search("growth", 0, mistake="STALE_PRODUCER_MAPPING"),
    Search("growth", 0, "ATTACH PRODUCERS=1 CONSUMERS=1 MESSAGES=3", "NO_AGREEMENT"),
    #
    Search("hold", 1),
    Search("hold", 2),
    Search("hold", 1, mistake="PUBLISHED_BEFORE_THE_PAYLOAD"),
    Search("hold", 1, mistake="LEASE_NOT_LOOKED_AT"),
    Search("hold", 1, mistake="CLEARED_UNSEEN"),
    Search("hold", 1, mistake="DEATH_NOT_PROVEN"),
    #
    Search("claim", 1, quick=True),
    Search("claim", 2, "TASKS=3"),
    Search("claim", 1, mistake="CLAIM_AFTER_COMMIT"),
    Search("claim", 1, mistake="CLAIMS_NOT_CANCELLED", quick=True),
    Search("claim", 2, mistake="OPENED_LOW_FIRST"),
    Search("claim", 1, mistake="LOCKS_NOT_VISITED"),
    Search("claim", 1, mistake="ANSWERS_NOT_TAKEN"),
    Search("claim", 1, mistake="RELEASED_BEFORE_THE_ANSWER"),
    Search("claim", 1, mistake="DEATH_NOT_PROVEN"),
    #
    Search("lend", 1, quick=True),
    Search("lend", 2),
    Search("lend", 1, mistake="POSITION_IGNORED", quick=True),
    Search("lend", 1, mistake="POSITION_BEFORE_THE_PROOF"),
    Search("lend", 1, mistake="HOLDER_AFTER_COMMIT"),
    Search("lend", 0, mistake="HOLDER_FIRST"),
    Search("lend", 1, mistake="LOCK_NOT_ROBUST"),
    #
    Search("watch", 0, "LEAVES=2"),
    Search("watch", 1),
    Search("watch", 2),
    Search("watch", 1, mistake="NO_SECOND_LOOK", quick=True),
    Search("watch", 1, mistake="WORD_NOT_CHANGED"),
    Search("watch", 1, mistake="NEVER_HANDED_ON"),
    Search("watch", 0, "LEAVES=2", "LEFT_WITHOUT_HANDING_ON"),
    #
    Search("shutdown", 2, "IMMEDIATE=false"),
    Search("shutdown", 2, "IMMEDIATE=true"),
    Search("shutdown", 0, "IMMEDIATE=false", "SHUTDOWN_AFTER_POSITION", quick=True),
]

if __name__ == "__main__":
    sys.exit(main())

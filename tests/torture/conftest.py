"""Running trials in processes of their own, and telling at the end what came of them."""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tally import CAUGHT, Tally

HERE = Path(__file__).parent
STRIDE = int(os.environ.get("SHMRING_STRIDE", "1"))
LONGEST = 3600  # seconds for a part of one trial: most take one or two, none ten minutes

# What the summary tells, by heading, in the order in which it came.
TOLD = pytest.StashKey[dict[str, list[str]]]()
TOTAL = pytest.StashKey[dict[str, Tally]]()

Run = Callable[..., Tally]


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> None:
    """Instead of the suite's: all rings here are anonymous, and over minutes it would
    take the names of other runs for ours, and remove them."""


@pytest.fixture(autouse=True)
def no_limit_for_a_test() -> None:
    """Each trial watches itself, kill by kill."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from walking import build_stepper

    return build_stepper(tmp_path_factory.mktemp("stepper"))


@pytest.fixture(scope="session")
def other_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a build of `builds.py` when it is first asked for."""
    from builds import BUILDS

    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("build") / name.replace(" ", "-")
            made[name] = BUILDS[name].make(folder)
        return made[name]

    return build


@pytest.fixture
def run_trial(stepper: Path, other_build: Callable[[str], Path]) -> Run:
    """Run a trial, in as many parts as there are processors, and add up its tallies."""
    from registry import TRIALS

    def run(name: str, build: str | None = None, stride: int = STRIDE) -> Tally:
        trial = TRIALS[name]
        cpus = len(os.sched_getaffinity(0))
        parts = 4 * cpus if trial.sleeps else cpus
        path = [str(HERE.parent), *filter(None, sys.path)]
        if build is not None:
            path.insert(0, str(other_build(build)))
        command = [sys.executable, str(HERE / "drive.py"), str(stepper), str(stride)]
        if trial.shared_memory is not None:
            mount = f"mount -t tmpfs -o size={trial.shared_memory} none /dev/shm"
            command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"', *command]
        processes = [
            subprocess.Popen(
                [*command, str(part), str(parts), name],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for part in range(parts)
        ]
        tally = Tally(name)
        try:
            for process in processes:
                said, errors = process.communicate(timeout=LONGEST)
                if process.returncode in (1, 32) and ("unshare:" in errors or "mount:" in errors):
                    pytest.skip(f"no mount namespace to be had here: {errors.strip()}")
                if process.returncode != 0:
                    pytest.fail(f"{name} ended with {process.returncode}:\n{errors}", pytrace=False)
                tally.add(Tally.from_dict(json.loads(said)))
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        return tally

    return run


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str, Tally, str], None]:
    """Have a tally told in the summary, under a heading, in these words."""

    def note(heading: str, tally: Tally, line: str) -> None:
        stash = request.config.stash
        stash.setdefault(TOLD, collections.defaultdict(list))[heading].append(line)
        stash.setdefault(TOTAL, {}).setdefault(heading, Tally("in all")).add(tally)

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    totals = config.stash.get(TOTAL, {})
    for heading, lines in config.stash.get(TOLD, {}).items():
        total = totals[heading]
        every = "" if STRIDE == 1 or heading == CAUGHT else f" (one in {STRIDE} only)"
        terminalreporter.section(f"torture: {heading}{every}", sep="-")
        for line in lines:
            terminalreporter.write_line(line)
        if heading != CAUGHT:
            terminalreporter.write_line(
                f"In all {total.tried:,} tried in {len(lines)} operations: "
                f"{total.harms_in_words()}"
                + (f"; {total.beside:,} in libc beside the one meant" if total.beside else "")
                + (f"; {total.missed:,} not come to" if total.missed else "")
            )

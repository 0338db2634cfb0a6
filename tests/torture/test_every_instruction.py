"""Each operation of the built extension, killed before each of its instructions.

A victim is forked with its rings open and warm, and taken by `stepper.c`
(ptrace) to its n-th instruction in the extension, or in what the extension
calls in libc; there it gets SIGKILL.  Then another process looks, in turns by the
handle and mappings that the victim had, and by a handle opened afresh.  What may
be there is said by the operation; that it is whole, counted, in order, in memory
that is accounted for, and that puts and gets go on at once, is checked after
every kill.

The interpreter's own instructions are run through.  A system call is one
instruction: what the kernel does in the middle of it is not seen here.  The
summary tells what was tried; SHMRING_STRIDE=n takes every n-th.

    stepper.c walking.py        to the n-th instruction of a process
    tally.py looking.py         what must not be after a kill, and looking for it
    trials.py                   the loop of all kills
    operations.py claims.py wakes.py shortage.py successions.py    what is killed
    duels.py                    two processes stepped against each other
    builds.py                   other builds, broken ones among them
    drive.py registry.py        a trial in a process of its own
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable

import pytest

pytest.importorskip("shmring._handle")


from registry import KILLINGS, STEPPINGS
from tally import CAUGHT, CORRUPTED, HUNG, KILLED, LEAKED, LOST, STEPPED, TORN, Tally
from trials import Trial

from shmring import backend

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(backend != "ring", reason="the compiled ring is what is tortured"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("gcc") is None,
        reason="steps x86-64 instructions, by a program that gcc compiles",
    ),
]

Run = Callable[..., Tally]
Tell = Callable[[str, Tally, str], None]


def each(trials: list[Trial]) -> pytest.MarkDecorator:
    """One test a trial, marked with the faults that it shows."""
    marked = [
        pytest.param(trial, id=trial.name, marks=pytest.mark.fault(*trial.faults))
        for trial in trials
    ]
    return pytest.mark.parametrize("trial", marked)


def no_harm_in(tally: Tally) -> None:
    assert not tally.harms, "\n".join([tally.line(), *tally.notes])
    assert tally.tried > 0
    assert tally.missed <= 3 + tally.tried / 20, tally.line()  # where time decides


@each(KILLINGS)
def test_killed_before_every_instruction(trial: Trial, run_trial: Run, tell: Tell) -> None:
    tally = run_trial(trial.name)
    tell(KILLED, tally, tally.line())
    no_harm_in(tally)


@each(STEPPINGS)
def test_two_processes_stepped_against_each_other(trial: Trial, run_trial: Run, tell: Tell) -> None:
    tally = run_trial(trial.name, trial.build)
    tell(STEPPED, tally, tally.line())
    no_harm_in(tally)


@pytest.mark.parametrize(
    ("build", "name", "kind"),
    [
        pytest.param("commit before the payload", "put", TORN, marks=pytest.mark.fault(1)),
        pytest.param("lock not robust", "put", CORRUPTED, marks=pytest.mark.fault(1)),
        pytest.param("lock not robust", "get", CORRUPTED, marks=pytest.mark.fault(2)),
        pytest.param("claim after the commit", "claim", LOST, marks=pytest.mark.fault(10)),
        pytest.param(
            "reaped before the punch", "get that moves on", LEAKED, marks=pytest.mark.fault(8)
        ),
        pytest.param(
            "reaped before the punch",
            "a consumer moves on, a producer grows",
            CORRUPTED,
            marks=pytest.mark.fault(8),
        ),
        pytest.param(
            "no second look before sleeping",
            "a consumer sleeps, a producer wakes it",
            HUNG,
            marks=pytest.mark.fault(3),
        ),
    ],
)
def test_a_broken_build_is_caught(
    build: str, name: str, kind: str, run_trial: Run, tell: Tell
) -> None:
    """The tool finds what it is for: each mistake, and as what it is."""
    tally = run_trial(name, build, stride=1)
    tell(CAUGHT, tally, f"{build}: {tally.line()}")
    assert tally.harms.keys() == {kind}, "\n".join([tally.line(), *tally.notes])

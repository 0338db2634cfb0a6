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
    operations.py claims.py     what is killed: on a ring, with claims,
    lending.py                  with blocks that are lent,
    wakes.py holders.py         beside sleepers, behind a lock,
    shortage.py endings.py      on a full /dev/shm, in shutdown,
    successions.py              and twice in a row
    duels.py                    two processes stepped against each other
    builds.py                   other builds, broken ones among them
    drive.py registry.py        a trial in a process of its own
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable

import pytest

from shmring import backend

if backend != "ring":
    pytest.skip("the compiled ring is what is tortured", allow_module_level=True)

from claims import CLAIMS
from duels import DUELS
from endings import ENDINGS
from holders import HOLDERS
from lending import LENDING
from operations import AREAS, GETS, IN_PLACE, PUTS, RECOVERIES
from shortage import SHORTAGE
from successions import SUCCESSIONS
from tally import (
    BROKEN,
    CAUGHT,
    CORRUPTED,
    HUNG,
    KILLED,
    LEAKED,
    LOST,
    MISCOUNTED,
    STEPPED,
    TORN,
    Tally,
)
from trials import Trial
from wakes import WAKERS, WOKEN

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("gcc") is None,
        reason="steps x86-64 instructions, by a program that gcc compiles",
    ),
]

Run = Callable[..., Tally]
Tell = Callable[[str, Tally, str], None]
Kill = Callable[[Trial], None]


def each(*trials: Trial) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trial", trials, ids=lambda trial: trial.name)


def no_harm_in(tally: Tally) -> None:
    assert not tally.harms, "\n".join([tally.line(), *tally.notes])
    assert tally.tried > 0
    assert tally.missed <= 3 + tally.tried / 50, tally.line()  # where time decides the way


@pytest.fixture
def kill(run_trial: Run, tell: Tell) -> Kill:
    """Kill an operation before every instruction; whatever is left must be right."""

    def everywhere(trial: Trial) -> None:
        tally = run_trial(trial.name, trial.build)
        tell(KILLED, tally, tally.line())
        no_harm_in(tally)

    return everywhere


@pytest.mark.fault(1)
@each(*PUTS)
def test_a_producer_killed_leaves_all_or_nothing(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(2)
@each(*GETS)
def test_a_consumer_killed_took_it_or_left_it(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(9)
@each(*IN_PLACE)
def test_killed_while_it_writes_or_reads_in_place(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(8)
@each(*AREAS)
def test_killed_on_the_way_to_another_area(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(4, 8)
@each(*RECOVERIES, *SUCCESSIONS)
def test_killed_while_making_good_what_a_death_left(trial: Trial, kill: Kill) -> None:
    kill(trial)


@each(*ENDINGS)
def test_killed_while_it_shuts_the_ring_down(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(10, 11)
@each(*CLAIMS)
def test_a_task_is_queued_or_claimed_or_answered(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(51)
@each(*LENDING)
def test_killed_with_a_block_it_gives_it_back(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(3)
@each(*WAKERS)
def test_a_waker_killed_leaves_no_sleeper_behind(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(6, 7)
@each(*WOKEN)
def test_a_woken_one_killed_takes_no_wake_with_it(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(5)
@each(*HOLDERS)
def test_a_waiter_for_a_lock_killed_holds_no_process_up(trial: Trial, kill: Kill) -> None:
    kill(trial)


@pytest.mark.fault(21)
@each(*SHORTAGE)
def test_killed_where_shared_memory_is_full(trial: Trial, kill: Kill) -> None:
    kill(trial)


@each(*DUELS)
def test_stepped_against_each_other_nothing_is_lost(
    trial: Trial, run_trial: Run, tell: Tell
) -> None:
    tally = run_trial(trial.name, trial.build)
    tell(STEPPED, tally, tally.line())
    no_harm_in(tally)


@pytest.mark.parametrize(
    ("build", "name", "kind"),
    [
        ("commit before the payload", "put", TORN),
        ("commit before the payload", "put, the general way", TORN),
        ("commit before the count", "get", MISCOUNTED),
        ("lock not robust", "put", CORRUPTED),
        ("lock not robust", "get", CORRUPTED),
        ("claim after the commit", "claim", LOST),
        ("reaped before the punch", "get that moves on", LEAKED),
        ("reaped before the punch", "a consumer moves on, a producer grows", CORRUPTED),
        ("no second look before sleeping", "a consumer sleeps, a producer wakes it", HUNG),
        ("no second look of a producer", "a producer sleeps, a consumer wakes it", HUNG),
        ("shutdown after the position", "a consumer looks, a message comes and a shutdown", BROKEN),
        ("lent after the commit", "get lent, and keep", LEAKED),
        ("taken out of a message", "get lent", CORRUPTED),
        ("no baton", "two consumers sleep, a batch comes for both", HUNG),
        ("no baton", "a waiter and a consumer sleep, a message comes", HUNG),
    ],
)
def test_a_broken_build_is_caught(
    build: str, name: str, kind: str, run_trial: Run, tell: Tell
) -> None:
    """The tool finds what it is for: each mistake, and as what it is."""
    tally = run_trial(name, build, stride=1)
    tell(CAUGHT, tally, f"{build}: {tally.line()}")
    assert tally.harms.keys() == {kind}, "\n".join([tally.line(), *tally.notes])

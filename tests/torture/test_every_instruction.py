"""Each operation of the built extension, killed before each of its instructions.

A victim is forked from this process with a ring open and warm, and walked by
`stepper.c` (ptrace) through one operation.  Before its n-th instruction in the
extension, or in what the extension calls in libc, it gets SIGKILL.  Then this
process looks: by its own handle and mappings, which the victim left behind,
and in turns by a handle opened afresh.  What may be there is said by the
operation; that it is whole, counted, in order, in memory that is accounted
for, and that puts and gets go on at once, is checked after every kill.

The interpreter's own instructions are run through.  A system call is one
instruction: what the kernel does in the middle of it is not seen here.
`--durations=0 -s` prints what was tried; SHMRING_STRIDE=n takes every n-th.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import gc
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from operations import (
    AT_ONCE,
    OPERATIONS,
    SMALL,
    Operation,
    Stage,
    accounts_of_memory,
    message,
    opened_afresh,
    ring_with,
    settle_accounts,
    victim_of,
)

from shmring import Ring
from shmring.errors import Empty
from support import wait_for

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("gcc") is None,
        reason="steps x86-64 instructions, by a program that gcc compiles",
    ),
]

SOON = 0.3  # seconds in which a sleeper whose waker died has its message; a slice without load
PATIENCE = 60  # seconds without a finished kill, after which this is a hang
EXTENSION = ("_core", "_handle", "_ring")
STRIDE = int(os.environ.get("SHMRING_STRIDE", "0"))  # 0: as each operation says


# ---- the walk ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> None:
    """Instead of the suite's: all rings here are anonymous, and over minutes it would
    take the names of other runs for ours, and remove them."""


@pytest.fixture(scope="module")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    built = tmp_path_factory.mktemp("stepper") / "stepper.so"
    source = Path(__file__).with_name("stepper.c")
    include = sysconfig.get_paths()["include"]
    subprocess.run(
        [
            "gcc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-fPIC",
            "-shared",
            f"-I{include}",
            str(source),
            "-o",
            str(built),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("stepper", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_inside(text_to_walk())
    return module


def text_to_walk() -> list[tuple[int, int]]:
    """The text of the extension, then that of libc and of the kernel's clock."""
    found: dict[str, tuple[int, int]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, mode, *_, name = line.split(maxsplit=5)
        if "x" in mode:
            low, _, high = addresses.partition("-")
            found[name.rsplit("/", 1)[-1]] = (int(low, 16), int(high, 16))
    own = [
        r
        for name, r in found.items()
        if name.startswith(tuple(f"{e}." for e in EXTENSION))
        and name.endswith(f"{sysconfig.get_config_var('EXT_SUFFIX')}")
    ]
    assert len(own) == len(EXTENSION), sorted(found)
    return own + [r for name, r in found.items() if name.startswith(("libc.so", "libc-", "[vdso]"))]


@pytest.fixture
def quiet() -> Iterator[None]:
    """One CPU for all: the hand-over to the victim is then quickest, and nothing spins."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    gc.collect()
    gc.disable()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.enable()
    os.sched_setaffinity(0, cpus)


@pytest.mark.fault(1, 2, 4, 8, 9)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@pytest.mark.usefixtures("quiet")
def test_killed_before_every_instruction(operation: Operation, stepper: ModuleType) -> None:
    began = time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    spare = Ring.create(**SMALL)
    stage = operation.prepare()
    length, _, status, _, entries = stepper.walk(
        victim_of(stepper, operation, stage, spare), -1, None
    )
    assert status == 0, f"the operation itself failed: {status:#x}"
    outcomes[settle_accounts(operation, stage, stage.ring, idle=True) + ", unharmed"] += 1
    stage.ring.close()
    step = STRIDE or operation.step
    tried = 0
    at = 1
    while True:
        watch_for_a_hang()
        stage = operation.prepare()
        stops, killed, status, address, _ = stepper.walk(
            victim_of(stepper, operation, stage, spare), at, entries
        )
        ring = opened_afresh(stage.ring) if tried % 2 else stage.ring
        try:
            outcomes[settle_accounts(operation, stage, ring, idle=tried % 100 == 0)] += 1
            assert killed or status == 0
        except Exception as error:
            error.add_note(
                f"{operation.name}: killed before {at} of about {length}, at {place(address)};"
                f" {'a fresh handle' if tried % 2 else 'the old handle'} looked"
            )
            raise
        finally:
            if ring is not stage.ring:
                ring.close()
            stage.ring.close()
        if not killed:
            break
        tried += 1
        at += step
    spare.close()
    took = time.monotonic() - began
    every = "every one" if step == 1 else f"one in {step}"
    print(
        f"\n{operation.name}: {tried} kills ({every} of {stops} instructions) in {took:.1f} s; "
        + "; ".join(f"{what or 'nothing to see'}: {n}" for what, n in sorted(outcomes.items())),
        file=sys.stderr,
    )


@pytest.mark.fault(4, 8)
@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        ("put with growth", "put", (211, 37)),
        ("put, growth of a dead one", "put", (211, 37)),
        ("get that moves on", "get", (101, 61)),
        ("get, move of a dead one", "get", (101, 61)),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_killed_while_making_good_what_a_kill_left(
    first: str, second: str, apart: tuple[int, int], stepper: ModuleType
) -> None:
    """Two kills: the second one in the operation that meets what the first one left."""
    began = time.monotonic()
    by_name = {operation.name: operation for operation in OPERATIONS}
    one, two = by_name[first], by_name[second]
    spare = Ring.create(**SMALL)
    tried = 0
    both = Operation(
        f"{first}, then {second}",
        one.prepare,
        two.act,
        puts=[*one.puts, *(m for m in two.puts if m not in one.puts)],
        gets=one.gets + two.gets,
    )
    follow = two if not two.puts else Operation(two.name, two.prepare, lambda r: r.put(message(98)))
    if two.puts:
        both.puts = [*one.puts, message(98)]
    with one.prepare().ring as ring:
        entries = stepper.walk(victim_of(stepper, one, Stage(ring), spare), -1, None)[4]
    at, first_killed = 1, True
    while first_killed:
        then, second_killed, later = 1, True, None
        while second_killed:
            watch_for_a_hang()
            stage = one.prepare()
            _, first_killed, _, _, _ = stepper.walk(
                victim_of(stepper, one, stage, spare), at, entries
            )
            if not first_killed:
                stage.ring.close()
                break
            if later is None:  # a walk of its own, to find out where it comes inside
                later = stepper.walk(victim_of(stepper, follow, stage, spare), -1, None)[4]
                stage.ring.close()
                continue
            _, second_killed, _, address, _ = stepper.walk(
                victim_of(stepper, follow, stage, spare), then, later
            )
            try:
                settle_both(both, stage)
            except Exception as error:
                error.add_note(
                    f"{both.name}: killed before instructions {at} and {then}, at {place(address)}"
                )
                raise
            finally:
                stage.ring.close()
            tried += 1
            then += apart[1]
        at += apart[0]
    spare.close()
    print(
        f"\n{both.name}: {tried} pairs of kills in {time.monotonic() - began:.1f} s",
        file=sys.stderr,
    )


def settle_both(both: Operation, stage: Stage) -> None:
    """Each of the two messages may be there or not."""
    there = stage.ring.qsize()
    ways = [[], both.puts[:1], both.puts[1:], both.puts]
    found: list[bytes] = []
    begun = time.monotonic()
    stage.ring.put(b"after", timeout=AT_ONCE)
    while not found or found[-1] != b"after":
        found += stage.ring.get_many(block=False)
        assert time.monotonic() - begun < AT_ONCE
    assert len(found) == there + 1
    found.pop()
    expected = [[*stage.held[gone:], *way] for gone in range(both.gets + 1) for way in ways]
    assert found in expected, "torn, lost, doubled or out of order"
    now = stage.ring.statistics()
    assert not now.poisoned
    assert now.messages_put == now.messages_taken
    assert now.messages_put - stage.put - 1 == len([m for m in found if m in both.puts])
    accounts_of_memory(stage.ring, idle=False)


def watch_for_a_hang() -> None:
    """Instead of pytest's limit for a whole test."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)


class Sleeper(threading.Thread):
    """Another consumer: one get, by a handle of its own."""

    def __init__(self, ring: Ring) -> None:
        super().__init__(daemon=True)
        self.ring = opened_afresh(ring)
        self.got: bytes | None = None
        self.when = 0.0
        self.start()
        wait_for(lambda: in_futex(f"/proc/self/task/{self.native_id}"), what="the sleeper to sleep")

    def run(self) -> None:
        with contextlib.suppress(Empty):
            self.got = self.ring.get(timeout=PATIENCE)
        self.when = time.monotonic()

    def awaited(self, limit: float) -> float:
        """The seconds until it had its message; the ring is closed."""
        begun = time.monotonic()
        self.join(limit)
        assert self.got is not None, f"the sleeper had nothing within {limit} s"
        self.ring.close()
        return max(0.0, self.when - begun)


def in_futex(process: str) -> bool:
    try:
        return Path(process, "syscall").read_text().startswith("202 ")
    except OSError:
        return False


@pytest.mark.fault(3)
@pytest.mark.usefixtures("quiet")
def test_a_waker_killed_leaves_no_sleeper_behind(stepper: ModuleType) -> None:
    began = time.monotonic()
    operation = Operation(
        "put that wakes", lambda: ring_with(0), lambda r: r.put(message(99)), [message(99)]
    )
    outcomes: collections.Counter[str] = collections.Counter()
    entries: list[int] | None = None
    spare = Ring.create(**SMALL)
    longest = 0.0
    at, killed, stops = 0, True, 0
    while killed or at == 0:
        watch_for_a_hang()
        with operation.prepare().ring as ring:
            sleeper = Sleeper(ring)
            stops, killed, status, address, entries = stepper.walk(
                victim_of(stepper, operation, Stage(ring), spare), at or -1, entries
            )
            try:
                assert killed or status == 0
                committed = ring.statistics().messages_put == 1
                if not committed:
                    ring.put(message(99), timeout=AT_ONCE)
                longest = max(longest, sleeper.awaited(SOON if committed else AT_ONCE))
                assert sleeper.got == message(99)
                assert ring.qsize() == 0
            except Exception as error:
                error.add_note(f"killed before instruction {at}, at {place(address)}")
                raise
            outcomes[f"put {int(committed)}"] += 1
        killed = killed or at == 0  # the first walk only finds the way
        at = at + (STRIDE or 1) if at else 1
    spare.close()
    print(
        f"\n{operation.name}: {outcomes.total() - 1} kills in {stops} instructions"
        f" in {time.monotonic() - began:.1f} s;"
        f" {dict(outcomes)}; longest sleep {longest * 1000:.0f} ms",
        file=sys.stderr,
    )


@pytest.mark.fault(7)
@pytest.mark.usefixtures("quiet")
def test_a_woken_one_killed_takes_no_wake_with_it(stepper: ModuleType) -> None:
    began = time.monotonic()
    operation = Operation(
        "get that is woken", lambda: ring_with(0), lambda r: r.get(timeout=PATIENCE), gets=1
    )
    outcomes: collections.Counter[str] = collections.Counter()
    entries: list[int] | None = None
    spare = Ring.create(**SMALL)
    longest = 0.0
    at, killed, stops = 0, True, 0
    while killed or at == 0:
        watch_for_a_hang()
        with operation.prepare().ring as ring:
            victim = victim_of(stepper, operation, Stage(ring), spare)
            over = threading.Event()
            sleepers: list[Sleeper] = []

            def feed(
                ring: Ring = ring,
                victim: int = victim,
                over: threading.Event = over,
                sleepers: list[Sleeper] = sleepers,
            ) -> None:
                while not in_futex(f"/proc/{victim}"):
                    if over.wait(0.0002):
                        return
                sleepers.append(Sleeper(ring))
                ring.put(message(0))

            feeder = threading.Thread(target=feed)
            feeder.start()
            stops, killed, status, address, entries = stepper.walk(victim, at or -1, entries)
            died = time.monotonic()
            over.set()
            feeder.join()
            try:
                assert killed or status == 0
                fed = bool(sleepers)
                sleeper = sleepers[0] if fed else Sleeper(ring)
                if not fed:
                    ring.put(message(0), timeout=AT_ONCE)
                    longest = max(longest, sleeper.awaited(SOON))
                    outcome = "killed before it slept"
                else:
                    sleeper.join(SOON)
                    longest = max(longest, sleeper.when - died)
                    outcome = "the other one took it" if sleeper.got else "taken"
                    if not sleeper.got:
                        assert ring.statistics().messages_taken == 1, "a wake was lost"
                        ring.put(message(0), timeout=AT_ONCE)
                    sleeper.awaited(SOON)
                assert sleeper.got == message(0)
                assert ring.qsize() == 0
            except Exception as error:
                error.add_note(f"killed before instruction {at}, at {place(address)}")
                raise
            outcomes[outcome] += 1
        killed = killed or at == 0  # the first walk only finds the way
        at = at + (STRIDE or 1) if at else 1
    spare.close()
    print(
        f"\n{operation.name}: {outcomes.total() - 1} kills in {stops} instructions"
        f" in {time.monotonic() - began:.1f} s;"
        f" {dict(outcomes)}; longest sleep {longest * 1000:.0f} ms",
        file=sys.stderr,
    )


def place(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        low, _, high = addresses.partition("-")
        if int(low, 16) <= address < int(high, 16):
            return f"{name[0] if name else '?'}+{address - int(low, 16) + int(offset, 16):#x}"
    return hex(address)

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
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shmring import Ring, segment
from shmring.errors import Empty, Full

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("gcc") is None,
        reason="steps x86-64 instructions, by a program that gcc compiles",
    ),
]

_handle = pytest.importorskip("shmring._handle")
LAYOUT = _handle.LAYOUT
PAGE = os.sysconf("SC_PAGESIZE")
OWNER_DIED = 0x40000000
AT_ONCE = 1.0  # seconds in which puts and gets must go on
SOON = 0.3  # seconds in which a sleeper whose waker died has its message; a slice without load
PATIENCE = 60  # seconds without a finished kill, after which this is a hang
EXTENSION = ("_core", "_handle", "_ring")
STRIDE = int(os.environ.get("SHMRING_STRIDE", "0"))  # 0: as each operation says

ALL_OF_ONE = 7  # a ring of one page holds so many messages of 500 bytes


def message(number: int, length: int = 100) -> bytes:
    """Different from all others in every word."""
    words = -(-length // 8)
    return struct.pack(f"<{words}Q", *(number << 32 | i for i in range(words)))[:length]


# ---- the ring, seen from outside ---------------------------------------------------------


def word(ring: Ring, offset: int, value: int | None = None) -> int:
    """A 64-bit word of the header, read or written past all locks."""
    if value is not None:
        os.pwrite(ring.fileno(), struct.pack("<Q", value), offset)
    return int(struct.unpack("<Q", os.pread(ring.fileno(), 8, offset))[0])


WRITE_POSITION = LAYOUT["PRODUCERS_OFFSET"] + 8
WRITE_GENERATION = LAYOUT["PRODUCERS_OFFSET"] + 16
READ_GENERATION = LAYOUT["CONSUMERS_OFFSET"] + 16
REAPED = LAYOUT["CONSUMERS_OFFSET"] + 24
LOCKS = {"producers": LAYOUT["PRODUCERS_OFFSET"], "consumers": LAYOUT["CONSUMERS_OFFSET"]}


def forget_owner(ring: Ring, side: str) -> None:
    """Leave the lock as the kernel leaves it when its owner dies."""
    os.pwrite(ring.fileno(), struct.pack("<I", OWNER_DIED), LOCKS[side])


def lock_word(ring: Ring, side: str) -> int:
    return int(struct.unpack("<I", os.pread(ring.fileno(), 4, LOCKS[side]))[0])


def living_bytes(ring: Ring) -> int:
    first, last = word(ring, REAPED), word(ring, WRITE_GENERATION)
    return sum(
        word(ring, LAYOUT["AREAS_OFFSET"] + 32 * (g % LAYOUT["AREA_COUNT"]) + 8)
        for g in range(first, last + 1)
    )


class _Descriptor:
    """What multiprocessing would carry to a child."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        return os.dup(self.fd)


def opened_afresh(ring: Ring) -> Ring:
    other = Ring.__new__(Ring)
    assert other._open(os.dup(ring.fileno()), segment.pid_namespace(), 1)
    other._enrol()
    return other


# ---- an operation -------------------------------------------------------------------------


@dataclass
class Stage:
    """One ring, prepared; `held` is what is in it, `put` how many ever were."""

    ring: Ring
    held: list[bytes] = field(default_factory=list)
    put: int = 0

    def fill(self, count: int, length: int = 100) -> Stage:
        for _ in range(count):
            self.held.append(message(self.put, length))
            self.ring.put_nowait(self.held[-1])
            self.put += 1
        return self

    def take(self, count: int) -> Stage:
        for _ in range(count):
            assert self.ring.get_nowait() == self.held.pop(0)
        return self


@dataclass
class Operation:
    name: str
    prepare: Callable[[], Stage]
    act: Callable[[Ring], Any]
    puts: list[bytes] = field(default_factory=list)  # what it puts: any number, from the first
    one_by_one: bool = True  # else all or nothing
    gets: int = 0  # how many it takes at most
    may_abort: bool = False  # what it put may be counted and never delivered
    warm: Callable[[Ring], Any] | None = None  # in the victim, before the walk
    step: int = 1  # every instruction, or every so many


def victim_of(stepper: ModuleType, operation: Operation, stage: Stage, spare: Ring) -> int:
    pid = os.fork()
    if pid != 0:
        return pid
    code = 3
    try:
        spare.put_nowait(b"")  # the thread finds out who it is
        spare.get_nowait()
        if operation.warm is not None:
            operation.warm(stage.ring)
        stepper.traceme()
        operation.act(stage.ring)
        code = 0
    finally:
        os._exit(code)


def settle_accounts(operation: Operation, stage: Stage, ring: Ring, idle: bool) -> str:
    """Look at what the victim left, go on, and say what had come of its operation."""
    before = ring.statistics()
    assert not before.poisoned
    assert before.messages == before.messages_put - before.messages_taken == ring.qsize()
    locked = [side for side in LOCKS if lock_word(ring, side) & OWNER_DIED]

    begun = time.monotonic()
    after = message(1 << 20)
    ring.put(after, timeout=AT_ONCE)
    found: list[bytes] = []
    while not found or found[-1] != after:
        try:
            found += ring.get_many(block=idle, timeout=AT_ONCE)
        except Empty:
            raise AssertionError(f"{len(found)} messages, and not the last one") from None
    took = time.monotonic() - begun
    assert took < AT_ONCE, f"stalled for {took:.2f} s"
    found.pop()

    put = [m for m in found if m in operation.puts]
    rest = [m for m in found if m not in operation.puts]
    assert found == rest + put, "out of order"
    assert put == operation.puts[: len(put)], "torn, or out of order"
    if not operation.one_by_one:
        assert len(put) in (0, len(operation.puts)), "part of a batch"
    gone = len(stage.held) - len(rest)
    assert rest == stage.held[gone:], "torn, lost or doubled"
    assert gone <= operation.gets, f"{gone} messages are gone"

    now = ring.statistics()
    assert now.messages == 0
    assert now.messages_put == now.messages_taken, "counts disagree when all is taken"
    assert now.used_bytes == 0
    if operation.may_abort:
        assert now.messages_put - stage.put - 1 in (len(put), len(put) + 1)
    else:
        assert before.messages_put == stage.put + len(put)
        assert now.messages_put == before.messages_put + 1
        assert before.messages_taken == stage.put - len(stage.held) + gone
    assert now.recoveries <= before.recoveries + 2

    if before.growths != now.growths or now.max_capacity != now.capacity or idle:
        accounts_of_memory(ring, idle)
    did = []
    if operation.puts:
        did.append(f"put {len(put)}")
    if operation.gets:
        did.append(f"took {gone}")
    return ", ".join(did) + (f" ({' and '.join(locked)} died locked)" if locked else "")


def accounts_of_memory(ring: Ring, idle: bool) -> None:
    if idle:
        with contextlib.suppress(Empty):
            ring.get(timeout=0.1)  # a slice with nothing to do gives back what is not needed
        ring.put(b"x")
        assert ring.get(timeout=AT_ONCE) == b"x"
        assert living_bytes(ring) <= 2 * ring.capacity
    for side in LOCKS:  # a growth or a punch that was cut short is made good by recovery
        assert lock_word(ring, side) == 0
    held = os.fstat(ring.fileno()).st_blocks * 512
    assert held <= living_bytes(ring) + LAYOUT["HEADER_BYTES"], (
        f"{held} bytes are held for {living_bytes(ring)} of living areas"
    )


# ---- the operations ------------------------------------------------------------------------

SMALL = {"capacity": 4096}
GROWING = {"capacity": 4096, "max_capacity": 1 << 20}


def ring_with(count: int, length: int = 100, **shape: int) -> Stage:
    return Stage(Ring.create(**(shape or SMALL))).fill(count, length)


def wrapped() -> Stage:
    """The next frame goes over the end of the area."""
    stage = Stage(Ring.create(**SMALL)).fill(ALL_OF_ONE, 500).take(ALL_OF_ONE - 1)
    stage.fill(2, 80)
    return stage


def two_areas() -> Stage:
    """All of the first area was taken; the next message lies in the second."""
    stage = Stage(Ring.create(**GROWING)).fill(ALL_OF_ONE, 500)
    stage.fill(4, 500)
    return stage.take(ALL_OF_ONE)


def grown_and_empty() -> Stage:
    stage = Stage(Ring.create(**GROWING)).fill(3 * ALL_OF_ONE, 500)
    stage.take(3 * ALL_OF_ONE)
    return stage


def grown_behind(stage: Stage) -> Stage:
    """The victim's handle has not seen that the ring grew."""
    other = opened_afresh(stage.ring)
    while other.statistics().growths == 0:
        stage.held.append(message(stage.put, 500))
        other.put_nowait(stage.held[-1])
        stage.put += 1
    other.close()
    return stage


def died_locked(side: str, make: Callable[[], Stage]) -> Callable[[], Stage]:
    def prepare() -> Stage:
        stage = make()
        forget_owner(stage.ring, side)
        return stage

    return prepare


def growth_cut_short() -> Stage:
    """A producer died while it grew: pages that nobody knows of, a front, a half-written record."""
    stage = ring_with(3, **GROWING)
    os.posix_fallocate(stage.ring.fileno(), 1 << 16, 1 << 15)
    word(stage.ring, LAYOUT["AREAS_OFFSET"] + 32, 12345)
    for i, value in enumerate((7, 4096, time.monotonic_ns() + 10**9)):
        word(stage.ring, LAYOUT["PRODUCERS_OFFSET"] + 48 + 8 * i, value)
    forget_owner(stage.ring, "producers")
    return stage


def moving_cut_short() -> Stage:
    """A consumer died after moving on, before giving back; a lease and a claim lie about."""
    stage = two_areas()
    word(stage.ring, READ_GENERATION, 1)
    read = word(stage.ring, LAYOUT["CONSUMERS_OFFSET"] + 8)
    claim = LAYOUT["CLAIMS_OFFSET"]
    word(stage.ring, claim + 8, read)
    word(stage.ring, claim + 16, read + 136)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 16, 99)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 24, 0)
    word(stage.ring, LAYOUT["WAITING_OFFSET"] + 32, read)
    forget_owner(stage.ring, "consumers")
    return stage


def reserve_and_commit(ring: Ring) -> None:
    with ring.reserve(100) as view:
        view[:] = message(99)


def reserve_and_abort(ring: Ring) -> None:
    with contextlib.suppress(ZeroDivisionError), ring.reserve(100) as view:
        view[:] = message(99)
        raise ZeroDivisionError


def peek_and_consume(ring: Ring) -> None:
    with ring.peek() as view:
        assert len(view) == 100


def peek_and_leave(ring: Ring) -> None:
    with contextlib.suppress(ZeroDivisionError), ring.peek():
        raise ZeroDivisionError


def get_in_vain(ring: Ring) -> None:
    with contextlib.suppress(Empty):
        ring.get(timeout=0.09)


def put_in_vain(ring: Ring) -> None:
    with contextlib.suppress(Full):
        ring.put(message(99, 500), timeout=0.02)


BATCH = [message(99 + i, 60 + 40 * i) for i in range(5)]
LARGE_BATCH = [message(99 + i, 500) for i in range(2 * ALL_OF_ONE)]

OPERATIONS = [
    Operation("put", lambda: ring_with(3), lambda r: r.put(message(99)), [message(99)]),
    Operation("put over the end", wrapped, lambda r: r.put(message(99, 300)), [message(99, 300)]),
    Operation(
        "put_nowait",
        lambda: ring_with(3),
        lambda r: r.put_nowait(message(99)),
        [message(99)],
    ),
    Operation("get", lambda: ring_with(3), lambda r: r.get(), gets=1),
    Operation(
        "get over the end", lambda: wrapped().fill(1, 300).take(3), lambda r: r.get(), gets=1
    ),
    Operation(
        "put with growth",
        lambda: ring_with(ALL_OF_ONE, 500, **GROWING),
        lambda r: r.put(message(99, 500)),
        [message(99, 500)],
    ),
    Operation(
        "put_nowait with growth",
        lambda: ring_with(ALL_OF_ONE, 500, **GROWING),
        lambda r: r.put_nowait(message(99, 9000)),
        [message(99, 9000)],
    ),
    Operation(
        "put to an area grown by another",
        lambda: grown_behind(ring_with(ALL_OF_ONE, 500, **GROWING)),
        lambda r: r.put(message(99, 500)),
        [message(99, 500)],
    ),
    Operation("get that moves on", two_areas, lambda r: r.get(), gets=1),
    Operation(
        "reserve, commit",
        lambda: ring_with(3),
        reserve_and_commit,
        [message(99)],
        may_abort=True,
        warm=peek_and_leave,
    ),
    Operation(
        "reserve, abort",
        lambda: ring_with(3),
        reserve_and_abort,
        may_abort=True,
        warm=peek_and_leave,
    ),
    Operation("peek, consume", lambda: ring_with(3), peek_and_consume, gets=1, warm=peek_and_leave),
    Operation("peek, leave", lambda: ring_with(3), peek_and_leave, warm=peek_and_leave),
    Operation(
        "peek that moves on",
        two_areas,
        lambda r: r.peek().__enter__(),
        step=3,
    ),
    Operation(
        "put_many", lambda: ring_with(3), lambda r: r.put_many(BATCH), BATCH, one_by_one=False
    ),
    Operation(
        "put_many with growth",
        lambda: ring_with(3, 500, **GROWING),
        lambda r: r.put_many(LARGE_BATCH),
        LARGE_BATCH,
        step=3,
    ),
    Operation("get_many", lambda: ring_with(8), lambda r: r.get_many(), gets=8),
    Operation("get_many that moves on", two_areas, lambda r: r.get_many(), gets=4),
    Operation(
        "get of 9000 bytes", lambda: ring_with(2, 9000, capacity=1 << 16), lambda r: r.get(), gets=1
    ),
    Operation(
        "put, lock of a dead one",
        died_locked("producers", lambda: ring_with(3)),
        lambda r: r.put(message(99)),
        [message(99)],
    ),
    Operation(
        "get, lock of a dead one",
        died_locked("consumers", lambda: ring_with(3)),
        lambda r: r.get(),
        gets=1,
    ),
    Operation(
        "put, growth of a dead one", growth_cut_short, lambda r: r.put(message(99)), [message(99)]
    ),
    Operation("get, move of a dead one", moving_cut_short, lambda r: r.get(), gets=1),
    Operation("shrink", grown_and_empty, get_in_vain, step=7),
    Operation("get in vain", lambda: ring_with(0), get_in_vain, step=7),
    Operation("put in vain", lambda: ring_with(ALL_OF_ONE, 500), put_in_vain, step=7),
]


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
        while not in_futex(f"/proc/self/task/{self.native_id}"):
            time.sleep(0.0002)

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

"""What is called on mutated memory, and what may come of it.

A driver makes *batches* of reads: each is one operation on memory, or bytes, that were mutated
for it.  A batch is determined by the seed and its number, so that one which ends badly can be
run again alone.  What comes of a read is counted under the kind of mutation:

- ``right``: what was put, at its place; ``done``: an operation that returns no data;
- ``other``: bytes of the ring that are not what was put there: a length or a position led
  elsewhere in it, or the payload itself was mutated (there are no checksums);
- an exception, by name.

Anything else (another exception, bytes that did not stand in the file, a call without an end)
raises `Broken`.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any, Generic

from fuzz.mutations import HEADER_BYTES, Image, Mutation
from fuzz.scenes import OBJECTS, AnyHandle, Scene, open_queue, open_ring, queue_scenes, ring_scenes
from header import LOCKS, OWNER
from shmring._core.bytes_ring import BytesRing
from shmring._core.handle import counters
from shmring._core.object_ring import ObjectRing, Outgoing, watch
from shmring._core.wait import Bell, pass_on, ready_now, wait_rings
from shmring.diagnostics import snapshot
from shmring.errors import Empty, Full, ShmringError, ShutDown

BATCH = 2048  # reads,
MADE = 512  # of so many mutations
RENEWED = 128  # reads of one handle
STUCK_S = 0.25  # after which a call that waits for a lock without a time-out gets a signal,
STARVED_S = 30.0  # and after which one hangs that no lock explains

Tally = collections.Counter[tuple[str, str]]  # (kind of mutation, outcome)


class Broken(AssertionError):
    """What must not come of a mutation."""


class Interrupted(Exception):
    """What the signal makes of a call that waits for a lock without a time-out."""


ALLOWED = (ShmringError, Empty, Full, ShutDown, Interrupted)


class Patience:
    """For calls without a time-out: a lock word may name a living process, and that may hold it.

    A clock ticks all the while (so every call is interrupted now and then), and a tick that
    finds such a call waiting ends it, as Ctrl-C would.
    """

    def __init__(self) -> None:
        self._since = math.inf
        self._image: Image | None = None

    def start(self) -> None:
        """Let the clock tick; in the main thread; nothing else may use SIGALRM."""
        signal.signal(signal.SIGALRM, self._tick)
        signal.setitimer(signal.ITIMER_REAL, STUCK_S / 2, STUCK_S / 2)

    def stop(self) -> None:
        """No more ticks."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _tick(self, number: int, frame: object) -> None:
        waited = time.monotonic() - self._since
        if waited > STUCK_S and self._a_process_may_hold_a_lock():
            raise Interrupted
        if waited > STARVED_S:
            raise Broken("a call without a time-out waits for no process")

    def _a_process_may_hold_a_lock(self) -> bool:
        assert self._image is not None
        for at in LOCKS.values():
            owner = int.from_bytes(self._image.map[at : at + 4], "little") & OWNER
            with contextlib.suppress(OSError):
                os.kill(owner, 0)
                if owner:
                    return True
        return False

    def __call__(self, image: Image) -> Patience:
        self._image = image
        return self

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._since = math.inf


patience = Patience()


class Case(Generic[AnyHandle]):
    """One handle on mutated memory, and what an operation may want to know beside.

    Attributes:
        bits: random ones, fresh for each read.
    """

    def __init__(
        self, scene: Scene[AnyHandle], handle: AnyHandle, mutations: list[Mutation]
    ) -> None:
        self.image = scene.image
        self.handle = handle
        self.mutations = mutations
        self.bits = 0

    def disturb(self) -> None:
        """Mutate in the middle of an operation, every other time."""
        if self.bits & 1:
            self.image.apply(self.mutations[(self.bits >> 1) % len(self.mutations)])


# ---- operations ------------------------------------------------------------------------------

SIZES = (0, 40, 100, 1000, 4000, 4090, 5000, 8000, 16_000, 20_000)
BLOCK = b"%put% " * 3400

AnyCase = Case[Any]


def get(case: AnyCase) -> list[Any]:
    return [case.handle.get(False)]


def get_soon(case: AnyCase) -> list[Any]:
    return [case.handle.get(True, 0.0005)]


def get_many(case: AnyCase) -> list[Any]:
    return case.handle.get_many((None, 1, 3, 100)[case.bits & 3], False)


def asked(case: AnyCase) -> None:
    handle = case.handle
    handle._qsize()
    counters(handle)
    snapshot.waiters(handle)
    snapshot.holders(handle)
    snapshot.deaths(handle)
    handle._identity()
    handle._max_messages()
    handle._put_count()
    assert handle.max_capacity >= 0
    assert handle.capacity >= 0


def shut_down(case: AnyCase) -> None:
    with patience(case.image):
        case.handle._shutdown(case.bits & 1)


def attach(case: AnyCase) -> list[Any]:
    opener = open_ring if isinstance(case.handle, BytesRing) else open_queue
    case.handle = opener(case.image.fd)
    case.disturb()
    return [case.handle.get(False)]


def wait(case: AnyCase) -> None:
    handle = case.handle
    ready_now(handle)
    wait_rings([handle], (0, 0.0005)[case.bits & 1])
    bell = Bell()
    bell.ring()
    watch(handle, bell, True, None)
    pass_on(handle)


def put(case: AnyCase) -> None:
    case.handle.put(BLOCK[: SIZES[case.bits % len(SIZES)]], False)


def put_soon(case: AnyCase) -> None:
    case.handle.put(BLOCK[: SIZES[case.bits % len(SIZES)]], True, 0.0005)


def put_many(case: AnyCase) -> None:
    size = SIZES[case.bits % len(SIZES)]
    case.handle.put_many([BLOCK[:size]] * (1 + case.bits & 7), False)


def put_and_get(case: AnyCase) -> list[Any]:
    """A handle that goes on: what a mutation left in its own memory meets the next call."""
    taken: list[Any] = []
    for call in (put, get, get_many, put):
        with contextlib.suppress(*ALLOWED):
            taken += call(case) or ()
    return taken


def reserve(case: Case[BytesRing]) -> None:
    size = SIZES[case.bits % len(SIZES)]
    with patience(case.image), case.handle.reserve(size, False) as view:
        view[:] = BLOCK[:size]
        case.disturb()


def reserve_and_abort(case: Case[BytesRing]) -> None:
    with (
        contextlib.suppress(ZeroDivisionError),
        patience(case.image),
        case.handle.reserve(40, False) as view,
    ):
        case.disturb()
        view[1 // 0] = 1


def peek(case: Case[BytesRing]) -> list[bytes]:
    seen = b""
    with patience(case.image), case.handle.peek(False) as view:
        seen = bytes(view)
        case.disturb()
    return [seen]


def peek_and_abort(case: Case[BytesRing]) -> list[bytes]:
    seen = b""
    with (
        contextlib.suppress(ZeroDivisionError),
        patience(case.image),
        case.handle.peek(False) as view,
    ):
        seen = bytes(view)
        case.disturb()
        return [seen[: 1 // 0]]
    return [seen]


def claim(case: Case[ObjectRing]) -> list[Any]:
    """What a worker does, and then what a coordinator does after its death."""
    queue = case.handle
    taken = []
    with patience(case.image):
        try:
            slot = queue._claim_open()
            case.disturb()
            taken.append(queue.get(False))
            queue._claims()
            queue._claim_release(slot)
            taken.append(queue.get(False))
            queue._claim_close(slot)
            queue._claim_free(slot)
        except RuntimeError as error:
            if "claim" not in str(error):
                raise
    return taken


def join(case: Case[ObjectRing]) -> None:
    queue = case.handle
    queue._unfinished()
    queue._task_done()
    queue._join_all(0)


def put_object(case: Case[ObjectRing]) -> None:
    case.handle.put(OBJECTS[case.bits % len(OBJECTS)], False)


def put_objects(case: Case[ObjectRing]) -> None:
    position = case.handle._put_position({"id": 1}, False)
    assert position >= 0
    case.handle.put_many(OBJECTS, False)


def put_outgoing(case: Case[ObjectRing]) -> None:
    Outgoing(case.handle, OBJECTS[case.bits % len(OBJECTS)]).put()


ANY_OPERATION: dict[Callable[[AnyCase], list[Any] | None], float] = {
    get: 100,
    get_soon: 0.5,
    get_many: 12,
    asked: 6,
    shut_down: 1,
    attach: 2,
    wait: 0.5,
    put: 20,
    put_soon: 0.5,
    put_many: 4,
    put_and_get: 4,
}
RING_OPERATIONS = {**ANY_OPERATION, reserve: 4, reserve_and_abort: 1, peek: 5, peek_and_abort: 2}
QUEUE_OPERATIONS = {
    **ANY_OPERATION,
    claim: 3,
    join: 2,
    put_object: 4,
    put_objects: 1,
    put_outgoing: 1,
}


# ---- drivers ---------------------------------------------------------------------------------


class SceneDriver(Generic[AnyHandle]):
    """Mutates the files of scenes, and calls every operation on them."""

    def __init__(
        self,
        scenes: list[Scene[AnyHandle]],
        operations: dict[Callable[[Case[AnyHandle]], list[Any] | None], float],
    ) -> None:
        self.scenes = scenes
        self.operations = list(operations), list(operations.values())
        self.tally: Tally = collections.Counter()
        self.known = {
            scene.name: self._contents(scene) for scene in scenes if "reserved" not in scene.name
        }

    def _contents(self, scene: Scene[AnyHandle]) -> list[Any]:
        handle = scene.open()
        found: list[Any] = []
        with contextlib.suppress(Empty):
            while True:
                found += handle.get_many(block=False)
        handle._close()
        scene.image.reset()
        return found

    def batch(self, rng: random.Random, say: Callable[[str], None] | None = None) -> int:
        """Some reads of one scene; the handle is renewed now and then.  Returns how many."""
        scene = self.scenes[rng.randrange(len(self.scenes))]
        image = scene.image
        mutations = image.mutations(rng, MADE)
        operations = rng.choices(*self.operations, k=BATCH)
        handle: AnyHandle | None = None
        for turn in range(BATCH):
            if handle is None or turn % RENEWED == 0:
                if handle is not None:
                    handle._close()
                handle = scene.open(early=turn % (2 * RENEWED) == 0)
                case = Case(scene, handle, mutations)
            else:
                image.reset()
            case.bits = rng.getrandbits(32)
            mutation = mutations[turn % MADE]
            image.apply(mutation)
            operation = operations[turn]
            if say is not None:
                say(f"{scene.name}: {image.applied}: {operation.__name__}")
            try:
                outcome = self._outcome(case, operation, self.known.get(scene.name, []))
            except Exception as error:
                raise Broken(f"{scene.name}: {image.applied}: {operation.__name__}") from error
            self.tally[mutation.kind, outcome] += 1
            if case.handle is not handle:
                case.handle._close()
                case.handle = handle
            elif handle.closed:
                handle = None
        if handle is not None:
            handle._close()
        return BATCH

    def _outcome(
        self,
        case: Case[AnyHandle],
        operation: Callable[[Case[AnyHandle]], list[Any] | None],
        known: list[Any],
    ) -> str:
        try:
            taken = operation(case)
        except ALLOWED as error:
            return type(error).__name__
        except RuntimeError as error:
            if "claim" in str(error):
                return "RuntimeError (claims)"
            raise
        if not taken:
            return "done"
        if taken == known[: len(taken)]:
            return "right"
        if operation is put_and_get:
            return "other"  # what was put may lie across what was there
        for each in taken:
            if each not in known and type(each) is bytes and not self._stands(case, each):
                raise Broken(f"{len(each)} bytes from elsewhere: {each[:200]!r}")
        return "other"

    @staticmethod
    def _stands(case: Case[AnyHandle], data: bytes) -> bool:
        """Whether bytes stood in the file when they were taken, perhaps across an area's end."""
        if BLOCK.startswith(data):
            return True
        image = case.image
        for file in (*image.as_mutated(), image.map[:]):
            if file.find(data) >= 0:
                return True
            for capacity in (4096, 8192, 1 << 14, 1 << 15, 1 << 16):
                for offset in range(HEADER_BYTES, len(file) - capacity + 1, 4096):
                    area = file[offset : offset + capacity]
                    if (area[-len(data) :] + area[: len(data)]).find(data) >= 0:
                        return True
        return False

    def close(self) -> None:
        """The files go."""
        for scene in self.scenes:
            scene.close()


def ring_driver() -> SceneDriver[BytesRing]:
    """Rings of bytes."""
    return SceneDriver(ring_scenes(), RING_OPERATIONS)


def queue_driver() -> SceneDriver[ObjectRing]:
    """Queues of objects: trees, segments, pickles that are not mutated."""
    return SceneDriver(queue_scenes(), QUEUE_OPERATIONS)

"""Words that another process changes to and fro while they are read."""

from __future__ import annotations

import collections
import os
import random
import signal
from collections.abc import Callable
from typing import Any

from fuzz.drivers import (
    ALLOWED,
    Broken,
    Case,
    Tally,
    get,
    get_many,
    peek,
    put,
    put_and_get,
)
from fuzz.mutations import Image, Mutation
from fuzz.scenes import Scene, open_ring, queue_scenes, ring_scenes

BATCH = 4096
KINDS = (
    "frames",
    "frames",
    "tables of segments",
    "positions",
    "generations",
    "area records",
    "lease",
    "limits",
)
CHANGED_AT_A_TIME = 3


class RaceDriver:
    """A child writes and takes back mutations, as fast as it can; this process reads."""

    def __init__(self) -> None:
        self.scenes: list[Scene[Any]] = [
            *(scene for scene in ring_scenes() if scene.name in ("mixed", "grown")),
            *queue_scenes(),
        ]
        self.tally: Tally = collections.Counter()

    def batch(self, rng: random.Random, say: Callable[[str], None] | None = None) -> int:
        """Some reads beside one child.  Returns how many."""
        scene = self.scenes[rng.randrange(len(self.scenes))]
        image = scene.image
        kind = rng.choice([kind for kind in KINDS if image.has(kind)])
        mutations = [image.mutation(kind, rng) for _ in range(CHANGED_AT_A_TIME)]
        if say is not None:
            say(f"{scene.name}: {mutations}")
        operations = [get, get, get_many, put, put_and_get]
        if scene.opener is open_ring:
            operations.append(peek)
        begun, begin = os.pipe()
        child = os.fork()
        if child == 0:
            flip(image, mutations, begin)
        try:
            os.read(begun, 1)
            self._read(scene, kind, operations, rng)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(begun)
            os.close(begin)
        return BATCH

    def _read(
        self, scene: Scene[Any], kind: str, operations: list[Callable[..., Any]], rng: random.Random
    ) -> None:
        case: Case[Any] | None = None
        for _ in range(BATCH):
            try:
                if case is None:
                    case = Case(scene, scene.open(), [])
                case.bits = rng.getrandbits(32) & ~1
                rng.choice(operations)(case)
                outcome = "done"
            except ALLOWED as error:
                outcome = type(error).__name__
                if case is not None:
                    case.handle._close()
                    case = None
            except Exception as error:
                raise Broken(f"{scene.name}: {kind}") from error
            self.tally[kind, outcome] += 1
        if case is not None:
            case.handle._close()

    def close(self) -> None:
        """The files go."""
        for scene in self.scenes:
            scene.close()


def flip(image: Image, mutations: list[Mutation], begin: int) -> None:
    """Change words to and fro until this process is killed, or has no parent any more."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    parent, mapped = os.getppid(), image.map
    pokes = [poke for mutation in mutations for poke in mutation.pokes]
    os.write(begin, b"x")
    while os.getppid() == parent:
        for _ in range(1000):
            for begin, end, data in pokes:
                mapped[begin:end] = data
                mapped[begin:end] = image.whole[begin:end]
    os._exit(0)

"""What is changed in a ring's file: which words, and to what.

A *kind* of mutation is a list of spots (offset in the file, bytes).  A spot is overwritten with
a value that is near to what stands there, or extreme, or anything.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from header import BLOCKS_AT, LOCKS, OWNER_DIED, WAITERS
from shmring._core.ring import LAYOUT

Spot = tuple[int, int]

HEADER_BYTES = LAYOUT["HEADER_BYTES"]
FRAME_BYTES = LAYOUT["FRAME_BYTES"]
CLAIMS_BYTES = HEADER_BYTES - LAYOUT["CLAIMS_OFFSET"]
MULTI = 1 << 31  # as in cython/shmring/_core/object_ring.pyx

_WAITING = LAYOUT["WAITING_OFFSET"]
_PRODUCERS = LAYOUT["PRODUCERS_OFFSET"]
_CONSUMERS = LAYOUT["CONSUMERS_OFFSET"]
_JOINING = LAYOUT["JOINING_OFFSET"]
_AREAS = LAYOUT["AREAS_OFFSET"]
_CLAIMS = LAYOUT["CLAIMS_OFFSET"]

# What stands in every header, beside the areas and the claims; as in cython/shmring/_core/layout.h.
HEADER_SPOTS: dict[str, list[Spot]] = {
    "identity": [(0, 8), (8, 4), (12, 4), (40, 8), (48, 4), (52, 4)],
    "limits": [(16, 8), (24, 8), (32, 8)],
    "wait words": [(_WAITING, 4), (_WAITING + 4, 4), (_JOINING + 8, 4)],
    "end": [(_WAITING + 8, 4), (_WAITING + 12, 4)],  # shutdown, poisoned
    "lease": [(_WAITING + 16, 8), (_WAITING + 24, 8), (_WAITING + 32, 8)],
    "lock words": [(at, 4) for at in LOCKS.values()],
    "positions": [(_PRODUCERS + 8, 8), (_CONSUMERS + 8, 8)],
    "generations": [(_PRODUCERS + 16, 8), (_CONSUMERS + 16, 8), (_CONSUMERS + 24, 8)],
    "counts": [
        *((_PRODUCERS + at, 8) for at in (24, 32, 40)),
        *((_CONSUMERS + at, 8) for at in (32, 40, 48)),
        (_JOINING, 8),
    ],
    "advice": [
        *((_PRODUCERS + at, 8) for at in (48, 56, 64, 72)),
        (_PRODUCERS + 80, 4),
        (_PRODUCERS + 84, 4),
        (_CONSUMERS + 56, 8),
        (_CONSUMERS + 64, 8),
    ],
    "name": [(_JOINING + 12, 4), (_JOINING + 16, 8), (_JOINING + 24, 4), (_JOINING + 128, 8)],
    "claims": [(_CLAIMS + 8 * word, 8) for word in range(4 * 4) if word % 4 != 3],
    "witnesses": [
        (_PRODUCERS + 4, 4),
        (_CONSUMERS + 4, 4),
        *((LAYOUT["DEATHS_OFFSET"] + 8 * word, 8) for word in range(2 * LAYOUT["DEATH_COUNT"])),
        *((LAYOUT["WAITERS_OFFSET"] + 32 * record, 8) for record in range(LAYOUT["WAITER_COUNT"])),
        *((LAYOUT["WAITERS_OFFSET"] + 8 * word, 8) for word in range(4 * 4)),
    ],
    "any word": [(at, 8) for at in range(0, HEADER_BYTES, 8)],
}

# How often each kind is chosen.  Lock words cost a millisecond each: a call that meets one waits.
WEIGHTS = {
    "identity": 4,
    "limits": 8,
    "wait words": 4,
    "end": 3,
    "lease": 8,
    "lock words": 0.4,
    "positions": 16,
    "generations": 8,
    "counts": 6,
    "advice": 6,
    "name": 2,
    "area records": 14,
    "claims": 6,
    "blocks": 8,
    "witnesses": 4,
    "any word": 4,
    "random bytes": 6,
    "random header": 0.5,
    "frames": 30,
    "tables of segments": 12,
    "payload": 12,
}

_STEPS = (1, 2, 7, 8, 16, 24, 32, 40, 64, 4096, 8192, 16384)
_EXTREMES = (
    0,
    1,
    2,
    3,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)

_CHANGES: tuple[Callable[[random.Random, int], int], ...] = (
    lambda rng, old: old + rng.choice(_STEPS),
    lambda rng, old: old - rng.choice(_STEPS),
    lambda rng, old: old ^ 1 << rng.getrandbits(6),
    lambda rng, old: old ^ 1 << rng.getrandbits(4),
    lambda rng, old: rng.choice(_EXTREMES),
    lambda rng, old: rng.getrandbits(64),
    lambda rng, old: rng.getrandbits(1 + rng.getrandbits(6)),
    lambda rng, old: rng.getrandbits(16),
)


def _dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@functools.cache
def _lock_values() -> list[int]:
    missing, dead = (1 << 22) + 1, _dead_pid()
    names = [missing, dead, os.getpid(), os.getppid(), 1]
    flags = [0, WAITERS, OWNER_DIED, WAITERS | OWNER_DIED]
    return [name | flag for name in (*names, 0) for flag in flags]


@dataclass(frozen=True, slots=True)
class Mutation:
    """What is written where: pokes of one kind, made up beforehand."""

    kind: str
    pokes: tuple[tuple[int, int, bytes], ...]  # from, to, and what


class Image:
    """The file of a scene, mapped: mutated, and put back to what it was.

    Args:
        fd: of the file; its giver keeps it.
        spots: where there are frames, tables of segments and payload.
    """

    def __init__(self, fd: int, spots: dict[str, list[Spot]]) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.map = mmap.mmap(fd, self.size)
        self.whole = bytes(self.map)
        self.applied: list[Mutation] = []  # since the last reset
        self._spots = {**HEADER_SPOTS, **spots}
        self._lock_values = _lock_values()

    def reset(self) -> None:
        """What was mutated, and what the ring then wrote, is as before."""
        self.map[:] = self.whole
        self.applied.clear()

    def cut(self) -> None:
        """Growth is undone as well; no process may have mapped what was grown."""
        if os.fstat(self.fd).st_size != self.size:
            os.ftruncate(self.fd, self.size)

    def apply(self, mutation: Mutation) -> None:
        """Write a mutation into the file."""
        for begin, end, data in mutation.pokes:
            self.map[begin:end] = data
        self.applied.append(mutation)

    def as_mutated(self) -> Iterator[bytes]:
        """The file after each mutation, and before the first, whatever was made of it since."""
        image = bytearray(self.whole)
        yield bytes(image)
        for mutation in self.applied:
            for begin, end, data in mutation.pokes:
                image[begin:end] = data
            yield bytes(image)

    def has(self, kind: str) -> bool:
        """Whether there is anything of that kind to be changed here."""
        return bool(self._spots.get(kind)) or kind.startswith("random")

    def mutations(self, rng: random.Random, count: int) -> list[Mutation]:
        """`count` mutations of all kinds that this file has spots for, by their weights."""
        kinds = [kind for kind in WEIGHTS if self.has(kind)]
        chosen = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=count)
        return [self.mutation(kind, rng) for kind in chosen]

    def mutation(self, kind: str, rng: random.Random) -> Mutation:
        """One of that kind, of one to four pokes."""
        pokes = [self._poke(kind, rng)]
        while len(pokes) < 4 and not rng.getrandbits(2):
            pokes.append(self._poke(kind, rng))
        return Mutation(kind, tuple(pokes))

    def _poke(self, kind: str, rng: random.Random) -> tuple[int, int, bytes]:
        if kind == "random bytes":
            at = rng.randrange(self.size)
            data = rng.randbytes(min(1 + rng.getrandbits(5), self.size - at))
            return at, at + len(data), data
        if kind == "random header":  # all but its creator
            return _WAITING, HEADER_BYTES, rng.randbytes(HEADER_BYTES - _WAITING)
        offset, size = rng.choice(self._spots[kind])
        if kind == "lock words":
            new = rng.choice(self._lock_values)
        else:
            old = int.from_bytes(self.whole[offset : offset + size], "little")
            new = rng.choice(_CHANGES)(rng, old) % (1 << 8 * size)
        return offset, offset + size, new.to_bytes(size, "little")

    def close(self) -> None:
        """Unmap."""
        self.map.close()


def spots_of(fd: int) -> dict[str, list[Spot]]:
    """Where the frames of an intact ring stand, their tables and payload, and its areas."""
    image = os.pread(fd, os.fstat(fd).st_size, 0)

    def word(offset: int) -> int:
        return int.from_bytes(image[offset : offset + 8], "little")

    frames: list[Spot] = []
    tables: list[Spot] = []
    payload: list[Spot] = []
    written, last = word(_PRODUCERS + 8), word(_PRODUCERS + 16)
    position, generation = word(_CONSUMERS + 8), word(_CONSUMERS + 16)
    while position < written:
        while generation < last and word(_AREAS + 32 * ((generation + 1) % 64)) == position:
            generation += 1
        record = _AREAS + 32 * (generation % 64)
        capacity, offset = word(record + 8), word(record + 16)

        def at(ahead: int, position=position, capacity=capacity, offset=offset) -> int:
            return offset + (position + ahead) % capacity

        length = word(at(8))
        frames += [(at(0), 8), (at(8), 8), (at(8), 8), (at(16), 4), (at(20), 4), (at(24), 8)]
        if int.from_bytes(image[at(20) : at(20) + 4], "little") & MULTI:
            segments = word(at(FRAME_BYTES))
            tables += [(at(FRAME_BYTES + 8 * i), 8) for i in range(min(segments + 1, 8))]
        payload += [(at(FRAME_BYTES + i), 1) for i in range(min(length, 64))]
        position += (FRAME_BYTES + length + 7) // 8 * 8
    for spots in (frames, tables, payload):
        spots += 4 * spots[:8] + spots[8:16]  # what stands in front is read most
    living = range(word(_CONSUMERS + 24), last + 2)
    records = [_AREAS + 32 * (each % LAYOUT["AREA_COUNT"]) for each in living]
    table = word(BLOCKS_AT)
    blocks = [(BLOCKS_AT - 4, 4), (BLOCKS_AT, 8)]
    if table:
        blocks += [(table + 64 * block + at, 8) for block in range(4) for at in range(0, 48, 8)]
    return {
        "frames": frames,
        "tables of segments": tables,
        "payload": payload,
        "blocks": blocks,
        "area records": [(record + at, 8) for record in records for at in (0, 8, 16)],
    }

"""What a ring's file looked like before it was mutated, and what had it open.

Each scene is a real ring, brought about by its own operations.  A handle is opened on the
*early* image (so that it has yet to find out what came since) or on the whole one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fuzz.mutations import CLAIMS_BYTES, HEADER_BYTES, Image, spots_of
from header import WRITE_GENERATION, first_frame, word
from shmring import Ring
from shmring._core.bytes_ring import BytesRing, _set_lend_bytes
from shmring._core.object_ring import ObjectRing
from shmring._core.ring import LAYOUT
from shmring.errors import DecodeError, Empty, RingNotFound
from shmring.shm import segment

AnyHandle = TypeVar("AnyHandle", BytesRing, ObjectRing)

SMALL = 4096  # SMALL of bytes_ring.pyx: a longer message is taken in two visits
PLAIN, KIND_TREE, KIND_MANY = 1, 4, 7
OBJECTS: list[Any] = [
    b"raw",
    b"long and raw " * 400,
    {"id": 12, "name": "a name", "value": 1.5, "ok": True, "é": None},
    [f"{i:060}" for i in range(70)],
    {"pickled", "as", "sets", "are"},
    [bytearray(b"one"), bytearray(b"two" * 100), bytearray(b"three" * 30)],  # see encode_object
    [bytearray(b"head"), *(bytearray([65 + i]) * 900 for i in range(6))],
    [bytearray(b"x")] * 600,  # a table that fits no stack
    [
        bytearray(b"head"),
        bytearray(b"lent" * 1200),
        bytearray(b"one more"),
    ],  # where there are blocks
]


def is_segments(obj: Any) -> bool:
    """Whether an object travels as segments, out of band."""
    return type(obj) is list and all(type(each) is bytearray for each in obj)


def encode_object(obj: Any) -> tuple[int, list[Any]]:
    """The encoder of the queues here: (kind, segments)."""
    if is_segments(obj):
        return KIND_MANY, obj
    return PLAIN, [pickle.dumps(obj)]


_VETTED = {pickle.dumps(obj): obj for obj in OBJECTS if not is_segments(obj)}


def load_vetted(head: bytes) -> Any:
    """Pickle runs what it reads, so nothing mutated may come near it: only what we wrote."""
    if head not in _VETTED:
        raise pickle.UnpicklingError("mutated")
    return _VETTED[head]


def decode_object(kind: int, head: bytes, buffers: Any) -> Any:
    """The decoder of the queues here, for what `load_vetted` does not get."""
    if kind == KIND_MANY:
        return [bytearray(head), *buffers]
    if kind == PLAIN and not buffers and head in _VETTED:
        return _VETTED[head]
    raise DecodeError(f"{kind}, {len(head)} bytes, {len(buffers)} buffers")


def explain_decode(head: bytes, buffers: Any, error: BaseException) -> DecodeError:
    """What `load_vetted` raised, as a queue says it."""
    return DecodeError(f"{len(head)} bytes: {error}")


def _opened(handle: AnyHandle, fd: int) -> AnyHandle:
    if not handle._open(os.dup(fd), segment.pid_namespace(), 0):
        raise RingNotFound("not ready")
    return handle


def open_ring(fd: int) -> BytesRing:
    """A handle on the ring in `fd`, without a name and without an end to be enrolled.

    Raises:
        RingNotFound: its creator is not ready, or so the header says.
    """
    return _opened(BytesRing(), fd)


def open_queue(fd: int) -> ObjectRing:
    """As `open_ring`, for objects."""
    queue = ObjectRing()
    queue._set_codec(
        encode_object, decode_object, True, True, None, load_vetted, None, explain_decode
    )
    return _opened(queue, fd)


@dataclass(slots=True)
class Scene(Generic[AnyHandle]):
    """One file, what it held, and how it is opened."""

    name: str
    opener: Callable[[int], AnyHandle]
    keeper: Ring  # holds the file
    early: bytes = b""  # its header at an earlier time
    image: Image = field(init=False)

    def __post_init__(self) -> None:
        fd = self.keeper._fileno()
        self.image = Image(fd, spots_of(fd))
        self.early = self.early or self.image.whole[:HEADER_BYTES]

    def open(self, *, early: bool = False) -> AnyHandle:
        """A handle, opened when all was well; the file is whole afterwards."""
        self.image.reset()
        self.image.cut()
        if early:
            self.image.map[: len(self.early)] = self.early
        handle = self.opener(self.image.fd)
        self.image.reset()
        return handle

    def close(self) -> None:
        """The file goes."""
        self.image.reset()
        self.image.close()
        self.keeper.close()


def messages(count: int, size: int = 40) -> list[bytes]:
    """Messages that can be told apart."""
    return [b"%06d " % number * (size // 7) for number in range(count)]


def _allocated(ring: Ring) -> Ring:
    segment.allocate(ring._fileno(), HEADER_BYTES - CLAIMS_BYTES, CLAIMS_BYTES)
    return ring


def _wrapped(put: Callable[[Any], object], get: Callable[[], object]) -> None:
    """So much passes that what is put next lies across the end of an area of 8 KiB."""
    for _ in range(3 * 8192 // 1064 - 1):
        put(b"w" * 1030)
        get()


def _mixed() -> Ring:
    ring = _allocated(Ring.create(8192))
    _wrapped(ring.put, ring.get)
    ring.put_many([*messages(6), b"", b"x", b"0123456789" * 450, *messages(3, 200)])
    return ring


def _grown() -> tuple[Ring, bytes]:
    """Three areas, the first of which is drained and not given back yet."""
    ring = _allocated(Ring.create(4096, max_capacity=1 << 16))
    ring.put_many(messages(40))
    early = os.pread(ring._fileno(), HEADER_BYTES, 0)
    ring.put_many(messages(60, 100))
    ring.put(b"y" * 6000)
    ring.put_many(messages(20))
    return ring, early


def _late() -> Ring:
    """Generations far from 0: grown and shrunk again and again."""
    ring = _allocated(Ring.create(4096, max_capacity=1 << 16))
    for _ in range(40):
        word(ring, LAYOUT["PRODUCERS_OFFSET"] + 80, 0, size=4)  # its patience: shrink at once
        ring.put(b"z" * 10_000)
        ring.get()
        ring.put(b"z")
        ring.get()
    ring.put_many(messages(30, 100))
    with contextlib.suppress(Empty):
        ring.get_many(3, block=False)
    assert word(ring, WRITE_GENERATION) > 4, word(ring, WRITE_GENERATION)
    return ring


def _reserved(owner_lives: bool) -> Ring:
    """A message, a reservation, one that was given up, and messages behind them."""
    ring = _allocated(Ring.create(4096))
    with contextlib.suppress(ZeroDivisionError), ring.reserve(20) as view:
        view[:] = bytes(1 // 0)
    view = ring.reserve(30)
    view.__enter__()[:] = b"r" * 30
    ring.put_many(messages(3))
    image = os.pread(ring._fileno(), HEADER_BYTES + 4096, 0)
    view.__exit__(None, None, None)
    os.pwrite(ring._fileno(), image, 0)
    if not owner_lives:
        at = first_frame(ring) + 56 + 24
        word(ring, at, word(ring, at) ^ 1 << 30)  # another start time: pid used again
    return ring


def _leased(owner_lives: bool) -> Ring:
    ring = _allocated(Ring.create(4096))
    ring.put_many(messages(5))
    with ring.peek():
        image = os.pread(ring._fileno(), HEADER_BYTES, 0)
    os.pwrite(ring._fileno(), image, 0)
    if not owner_lives:
        at = 128 + 16
        word(ring, at, word(ring, at) ^ 1 << 30)
    return ring


def ring_scenes() -> list[Scene[BytesRing]]:
    """Scenes of bytes."""
    grown, early = _grown()
    made = {
        "mixed": _mixed(),
        "empty": _allocated(Ring.create(4096, max_capacity=1 << 14)),
        "late": _late(),
        "reserved": _reserved(True),
        "reserved by the dead": _reserved(False),
        "leased": _leased(True),
        "leased by the dead": _leased(False),
    }
    return [
        Scene("grown", open_ring, grown, early),
        *(Scene(name, open_ring, ring) for name, ring in made.items()),
    ]


def queue_scenes() -> list[Scene[ObjectRing]]:
    """Scenes of objects: each kind of them in front, and all of them in a ring that grew."""
    scenes = [_of_objects(f"object {i}", [OBJECTS[i], *OBJECTS[:3]]) for i in range(len(OBJECTS))]
    lent = [OBJECTS[-1], OBJECTS[0], OBJECTS[-1], OBJECTS[-1]]
    return [
        *scenes,
        _of_objects("objects, lent", lent, grow=True),
        _of_objects("objects, grown", [*OBJECTS, *OBJECTS[:3]], grow=True),
    ]


def _of_objects(name: str, objects: list[Any], *, grow: bool = False) -> Scene[ObjectRing]:
    first, most = (4096, 1 << 18) if grow else (1 << 14, 1 << 14)
    ring = _allocated(Ring.create(first, max_capacity=most))
    queue = open_queue(ring._fileno())
    early = os.pread(ring._fileno(), HEADER_BYTES, 0)
    for _ in range(0 if grow else 15):  # so that what comes now lies across the end
        queue.put(b"w" * 1030)
        queue.get()
    before = _set_lend_bytes(SMALL)  # larger ones would make the images large
    for obj in objects:
        queue.put(obj, False)
    _set_lend_bytes(before)
    queue._close()
    return Scene(name, open_queue, ring, early)

"""The producers and consumers of a soak: what they put and get, until they are killed.

A message says of which stream it is, its number there, how long it is, and a
checksum of all that; so its receiver can tell whether it is whole.  It is
carried as bytes, as a tree of builtins, or as an object that is pickled and
whose buffer, if it is large, travels out of band.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import shmring
from accounts import TORN, Intent, Receipts
from shmring import Queue, Ring
from shmring.errors import Empty, Full
from support import wait_for

__all__ = [
    "DRAIN",
    "END",
    "LANES",
    "PAUSE",
    "RUN",
    "Lane",
    "Parcel",
    "consume",
    "open_up",
    "produce",
]

Handle = TypeVar("Handle")
Content = bytes | bytearray | memoryview

PAUSED_S = 60  # after which a pause has no end; of a second at most, but for stops
RUN, PAUSE, END, DRAIN = range(4)  # what the crew is told; END is for producers, DRAIN for all
PATIENCE_S = 0.5  # of a call; so each process looks that often at what it is told
BATCH_MOST = 16
MEBIBYTE = 1 << 20

_HEADER = struct.Struct("=IQI")
_SUM = struct.Struct("=I")
_NOISE = random.Random(0).randbytes(4 * MEBIBYTE)


# ---- messages -------------------------------------------------------------------------------


class Parcel:
    """An object of a class, which only pickle can carry, and with a buffer as arrays have."""

    def __init__(self, content: Content) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return Parcel, (pickle.PickleBuffer(self.content),)


def write(stream: int, number: int, length: int) -> bytes:
    """A message with a body of `length` bytes."""
    start = number * 8191 % (len(_NOISE) - length)
    head = _HEADER.pack(stream, number, length)
    body = memoryview(_NOISE)[start : start + length]
    return b"".join([head, _SUM.pack(zlib.crc32(body, zlib.crc32(head))), body])


def read(content: Content) -> tuple[int, int]:
    """Of which stream a message is, and its number; stream TORN if it is not whole."""
    front = _HEADER.size + _SUM.size
    if len(content) < front:
        return TORN, 0
    stream, number, length = _HEADER.unpack_from(content)
    (written,) = _SUM.unpack_from(content, _HEADER.size)
    view = memoryview(content)
    found = zlib.crc32(view[front:], zlib.crc32(view[: _HEADER.size]))
    return (stream, number) if found == written and len(content) == front + length else (TORN, 0)


def wrap(content: bytes, kind: int) -> Any:
    """The object that carries a message over a Queue."""
    if kind == 0:
        return content
    if kind == 1:
        return {"content": content, "length": len(content), "of": ("a", "tree", None, 1.5)}
    return Parcel(content)


def unwrap(carrier: Any) -> Content:
    """The message in it; whatever a torn carrier is, it gives a torn message."""
    if isinstance(carrier, dict):
        carrier = carrier.get("content")
    elif isinstance(carrier, Parcel):
        carrier = carrier.content
    return carrier if isinstance(carrier, bytes | bytearray | memoryview) else b""


def a_length(rng: random.Random) -> int:
    """Mostly small, seldom some MiB."""
    drawn = rng.random()
    if drawn < 0.9:
        return int(2 ** rng.uniform(0, 10))
    if drawn < 0.995:
        return int(2 ** rng.uniform(10, 16))
    return int(2 ** rng.uniform(16, 18 if drawn < 0.9995 else 21.5))


# ---- producers --------------------------------------------------------------------------------


class Producer(Generic[Handle]):
    """One stream on its way: each call is entered before and after."""

    def __init__(self, stream: int, intent: Intent, rng: random.Random) -> None:
        self.stream = stream
        self.rng = rng
        self._intent = intent
        self._next = 0

    def content(self, ahead: int = 0) -> bytes:
        """The next message, or one that is so many further."""
        return write(self.stream, self._next + ahead, a_length(self.rng))

    def put(self, count: int, call: Callable[[], object]) -> None:
        """Make a call that puts the next `count` messages, or as many as Full says."""
        self._intent.begin(self._next + count)
        try:
            call()
        except Full as full:
            count = getattr(full, "count", 0)
        self._next += count
        self._intent.end(self._next)


def put_objects(queue: Queue[Any], producer: Producer[Queue[Any]]) -> None:
    """One call of a Queue's producer."""
    rng = producer.rng
    drawn = rng.random()
    if drawn < 0.75:
        carrier = wrap(producer.content(), rng.randrange(3))
        producer.put(1, lambda: queue.put(carrier, timeout=PATIENCE_S))
    elif drawn < 0.8:
        carrier = wrap(producer.content(), rng.randrange(3))
        producer.put(1, lambda: queue.put_nowait(carrier))
    else:
        count = rng.randrange(1, BATCH_MOST + 1)
        carriers = [wrap(producer.content(ahead), rng.randrange(3)) for ahead in range(count)]
        producer.put(count, lambda: queue.put_many(carriers, timeout=PATIENCE_S))


class _ChangedMindError(Exception):
    """Ends a block without publishing or consuming."""


def put_bytes(ring: Ring, producer: Producer[Ring]) -> None:
    """One call of a Ring's producer."""
    rng = producer.rng
    drawn = rng.random()
    content = producer.content()
    if drawn < 0.3:
        producer.put(1, lambda: ring.put(content, timeout=PATIENCE_S))
    elif drawn < 0.5:
        count = rng.randrange(1, BATCH_MOST + 1)
        contents = [producer.content(ahead) for ahead in range(count)]
        producer.put(count, lambda: ring.put_many(contents, timeout=PATIENCE_S))
    else:
        keep = drawn < 0.9
        producer.put(int(keep), lambda: _write_in_place(ring, content, keep))


def _write_in_place(ring: Ring, content: bytes, keep: bool) -> None:
    half = len(content) // 2
    with (
        contextlib.suppress(_ChangedMindError),
        ring.reserve(len(content), timeout=PATIENCE_S) as view,
    ):
        view[:half] = content[:half]
        if not keep:
            raise _ChangedMindError  # what is half written must never be seen
        view[half:] = content[half:]


# ---- consumers --------------------------------------------------------------------------------


def get_objects(
    queue: Queue[Any], rng: random.Random, begin: Callable[[int], None]
) -> list[Content]:
    """One call of a Queue's consumer; `begin` is told how many messages it may take."""
    drawn = rng.random()
    if drawn < 0.6:
        begin(1)
        carriers = [queue.get(timeout=PATIENCE_S)]
    elif drawn < 0.9:
        most = rng.randrange(1, BATCH_MOST + 1)
        begin(most)
        carriers = queue.get_many(most, timeout=PATIENCE_S)
    else:
        if drawn < 0.95:
            shmring.wait([queue], PATIENCE_S)
        begin(1)
        carriers = [queue.get_nowait()]
    return [unwrap(carrier) for carrier in carriers]


def get_bytes(ring: Ring, rng: random.Random, begin: Callable[[int], None]) -> list[Content]:
    """One call of a Ring's consumer."""
    drawn = rng.random()
    if drawn < 0.3:
        begin(1)
        return [ring.get(timeout=PATIENCE_S)]
    if drawn < 0.5:
        most = rng.randrange(1, BATCH_MOST + 1)
        begin(most)
        return ring.get_many(most, timeout=PATIENCE_S)
    if drawn < 0.6:
        with contextlib.suppress(_ChangedMindError), ring.peek(timeout=PATIENCE_S) as view:
            bytes(view)
            raise _ChangedMindError
        return []
    begin(1)
    with ring.peek(timeout=PATIENCE_S) as view:
        return [bytes(view)]


def runs_of(messages: list[Content]) -> Iterator[tuple[int, int, int]]:
    """What was got, as (stream, first number, count)."""
    first: tuple[int, int] | None = None
    count = 0
    for message in messages:
        stream, number = read(message)
        if first is not None and (stream, number) == (first[0], first[1] + count) != (TORN, 0):
            count += 1
            continue
        if first is not None:
            yield *first, count
        first, count = (stream, number), 1
    if first is not None:
        yield *first, count


# ---- processes --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lane(Generic[Handle]):
    """A ring and its crew."""

    label: str
    create: Callable[[str], Handle]
    attach: Callable[[str, float], Handle]
    put: Callable[[Handle, Producer[Handle]], None]
    get: Callable[[Handle, random.Random, Callable[[int], None]], list[Content]]
    producers: int
    consumers: int


LANES: tuple[Lane[Any], ...] = (
    Lane(
        "Queue",
        lambda name: Queue(name=name, max_capacity=16 * MEBIBYTE),
        Queue.attach,
        put_objects,
        get_objects,
        producers=4,
        consumers=4,
    ),
    Lane(
        "Ring",
        lambda name: Ring.create(1 << 14, max_capacity=8 * MEBIBYTE, name=name),
        Ring.attach,
        put_bytes,
        get_bytes,
        producers=2,
        consumers=2,
    ),
)


def open_up(handle: Any, lane: Lane[Any], name: str, rng: random.Random, often: float) -> Any:
    """The same ring by another handle, as often as asked; it is left and attached to by name."""
    if rng.random() >= often:
        return handle
    handle.close()
    return lane.attach(name, 10.0)


def _orders(told: memoryview) -> Iterator[int]:
    """What the crew is told, on and on; ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.nice(0) < 0:
        os.nice(-os.nice(0))  # what the supervisor took is for itself
    parent = os.getppid()
    while os.getppid() == parent:
        yield told[0]


def produce(
    lane: Lane[Any], handle: Any, name: str, told: memoryview, stream: int, intent: Intent
) -> None:
    """Put until told to end.

    Args:
        handle: inherited from the parent; one time out of two it is used.
        told: the word in which the crew is told what to do.
    """
    # Not at the top: the tests of this file are collected without the extension too.
    from shmring._core import bytes_ring

    bytes_ring._set_lend_bytes(1 << 16)  # so that most of what is large is lent
    rng = random.Random(stream)
    producer: Producer[Any] = Producer(stream, intent, rng)
    handle = open_up(handle, lane, name, rng, 0.5)
    parent = os.getppid()
    for order in _orders(told):
        if order >= END:
            break
        if order == PAUSE:
            wait_for(lambda: told[0] != PAUSE or os.getppid() != parent, PAUSED_S)
            continue
        lane.put(handle, producer)
        handle = open_up(handle, lane, name, rng, 0.0005)
    handle.close()


def consume(
    lane: Lane[Any], handle: Any, name: str, told: memoryview, number: int, receipts: Receipts
) -> None:
    """Get until told to drain and nothing is left; arguments as for :func:`produce`."""
    rng = random.Random(number)
    handle = open_up(handle, lane, name, rng, 0.5)

    def begin(most: int) -> None:
        receipts.begin(time.monotonic_ns(), most)

    for order in _orders(told):
        try:
            messages = lane.get(handle, rng, begin)
        except Empty:
            messages = []
            if order == DRAIN and handle.qsize() == 0:
                break
        arrived = time.monotonic_ns()
        receipts.end(runs_of(messages), arrived)
        handle = open_up(handle, lane, name, rng, 0.0005)
    handle.close()

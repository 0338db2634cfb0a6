"""Mutated payloads for what decodes them: trees of builtins, and messages."""

from __future__ import annotations

import collections
import random
import struct
from collections.abc import Callable
from typing import Any, Protocol

from fuzz.drivers import Broken, Tally
from shmring._core.object_ring import decode_builtins as decode
from shmring._core.object_ring import encode_builtins as encode
from shmring.errors import DecodeError
from shmring.ipc.message import Message, MessageCodec, MessageType

BATCH = 8192

TREES: list[Any] = [
    {"id": 12, "name": "a name", "value": 1.5, "ok": True, "é": None},
    [[(1, 300, -70_000, 2**40), {"k": b"bytes"}], ["中😀"] * 3, "x" * 70],
    {number: [str(number)] for number in range(20)},
    {"deep": [[[[[[[[{"er": ((), (1,), (1, 2))}]]]]]]]]},
    ["a", "é", "中", "😀", "z" * 100, "é" * 40, b"", b"x" * 40, 2**62, -1, 1e300],
    {f"key {number}": number for number in range(12)},
    7,
    "text",
]

_LENGTHS = (0, 1, 2, 3, 16, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_INSERTED: list[bytes] = [
    *(bytes([tag]) for tag in (0, 1, 31, 32, 63, 0x40, 0x7F, *range(0x80, 0x100, 3))),
    *(bytes([tag]) for tag in range(0xC0, 0xD1)),
    *(struct.pack("<BI", tag, length) for tag in range(0xC8, 0xD0) for length in _LENGTHS),
    *(struct.pack("<I", length) for length in _LENGTHS),
    *(struct.pack("<Q", length) for length in (1 << 40, 1 << 63, (1 << 64) - 1)),
    *(bytes([byte]) for byte in range(0, 0x80, 3)),
    b"\x81\x01a",
    b"\x91" * 40,
    b"",
]


def spliced(bits: int, data: bytes) -> bytes:
    """Something put over, or into, or in the place of something else, where `bits` say."""
    at = (bits >> 16) % (len(data) + 1)
    new = _INSERTED[bits % len(_INSERTED)]
    left_out = len(new) if bits & 0x1000 else bits >> 13 & 7
    return data[:at] + new + data[at + left_out :]


class Decoder(Protocol):
    """What `PayloadDriver` attacks."""

    def __call__(self, data: bytes, /) -> object: ...


class PayloadDriver:
    """Mutates bytes that were encoded, and decodes them: an object, or DecodeError."""

    scenes = ()

    def __init__(self, decoders: dict[str, tuple[Decoder, list[bytes]]]) -> None:
        self.decoders = list(decoders.items())
        self.tally: Tally = collections.Counter()

    def batch(self, rng: random.Random, say: Callable[[str], None] | None = None) -> int:
        """Some reads of one decoder.  Returns how many."""
        kind, (decoder, encoded) = rng.choice(self.decoders)
        draw = rng.getrandbits
        objects = errors = 0
        for _ in range(BATCH):
            bits = draw(60)
            data = spliced(bits, encoded[(bits >> 32) % len(encoded)])
            while not bits >> 58:  # one of four times once more
                bits = draw(60)
                data = spliced(bits, data)
            if say is not None:
                say(f"{kind}: {data!r}")
            try:
                decoder(data)
                objects += 1
            except DecodeError:
                errors += 1
            except Exception as error:
                raise Broken(f"{kind}: {data!r}") from error
        self.tally[kind, "an object"] += objects
        self.tally[kind, "DecodeError"] += errors
        return BATCH

    def close(self) -> None:
        """Nothing to do."""


class TreeCodec:
    """Carries the data of messages as trees: a pickle runs what it reads."""

    def encode(self, obj: object) -> tuple[int, list[bytes | bytearray | memoryview]]:
        """(kind, segments), the first of them a tree."""
        return 4, [encode(obj)]

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> object:
        """The tree; what stands beside it is only looked at."""
        if kind != 4:
            raise DecodeError(f"kind={kind}")
        return decode(head), [bytes(each) for each in buffers]


def tree_driver() -> PayloadDriver:
    """The decoder of trees."""
    return PayloadDriver({"trees": (decode, [encode(tree) for tree in TREES])})


def message_driver() -> PayloadDriver:
    """Heads of messages."""
    codec = MessageCodec(TreeCodec())
    sent = [
        *(Message(kind, f"worker-{number}", 1.5) for number, kind in enumerate(MessageType)),
        Message(MessageType.DATA, "é" * 20, 2.5, TREES[0]),
        Message(MessageType.DATA, "", 2.5, TREES[1]),
        Message(MessageType.CONTROL, "coordinator", 3.5, TREES[2]),
    ]

    def of_head(data: bytes) -> object:
        return codec.decode(codec.KIND, data, [])

    heads = [bytes(codec.encode(message)[1][0]) for message in sent]
    return PayloadDriver({"heads": (of_head, heads)})

"""The last frames of a ring, waiting or taken, found in its file and decoded without running code.

Each frame bears its own position, so the frame in front of another one is found
by walking back over the words of the area until one of them says where it stands
and its length leads to the next.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import Any

from shmring._core.ring import LAYOUT
from shmring.errors import DecodeError, RingCorrupted
from shmring.ipc.message import MessageCodec
from shmring.observer.ring import BLOCK, FRAME, Area, Header, area_at, owner_in
from shmring.queues.codec import (
    KIND_BUILTINS,
    KIND_BYTES,
    KIND_MESSAGE,
    KIND_MSGPACK,
    KIND_PICKLE,
    KIND_USER,
    MsgpackCodec,
    PickleCodec,
)
from shmring.queues.pickle_errors import first_type_in

__all__ = ["LoggedFrame", "decoded", "last_frames"]

_MULTI = 0x80000000
_BLOCK_BYTES = 1 << 20
_MOST_WALKED = 64 << 20
_LENT = LAYOUT["LENT"]  # whole, and large segments lie in blocks of the file
_STATES = {
    LAYOUT["WHOLE"]: "waiting",
    LAYOUT["RESERVED"]: "reserved",
    LAYOUT["ABORTED"]: "aborted",
    _LENT: "waiting",
}
_IN_BLOCK, _INDEX_SHIFT = 1 << 63, 48  # of a segment's entry in the table
_KINDS = {
    KIND_BYTES: "bytes",
    KIND_PICKLE: "pickle",
    KIND_MSGPACK: "msgpack",
    KIND_USER: "codec of the user's",
    KIND_BUILTINS: "builtins",
    KIND_MESSAGE: "message",
}


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedFrame:
    """A frame as it stands in the file.

    Attributes:
        position: in the ring, in bytes since it was made.
        length: of the payload, in bytes.
        kind: the codec's number, with its flag for several segments.
        state: "waiting", "reserved", "aborted" or "taken".
        owner: the process that reserved it; None for one that was put whole.
        payload: the payload, or as much of it as was asked for.
    """

    position: int
    length: int
    kind: int
    state: str
    owner: int | None
    payload: bytes

    @property
    def codec(self) -> str:
        """What encoded it."""
        return _KINDS.get(self.kind & ~_MULTI, f"kind {self.kind & ~_MULTI}")


def last_frames(fd: int, header: Header, count: int, most_bytes: int) -> list[LoggedFrame]:
    """The last frames of a ring, the newest last; those that were taken as far as they still stand.

    Args:
        fd: a descriptor for reading.
        header: the ring's.
        count: how many at most.
        most_bytes: of each payload.

    Raises:
        RingCorrupted: the records of its areas make no sense.
    """
    found: list[LoggedFrame] = []
    end, walked = header["write_position"], 0
    generation, oldest = header["write_generation"], header["reaped"]
    if end % 8 or not 0 <= generation - oldest < LAYOUT["AREA_COUNT"]:
        raise RingCorrupted(f"position {end} in areas {oldest} to {generation} makes no sense")
    while len(found) < count and walked < _MOST_WALKED:
        area = area_at(header, generation)
        start = max(area.base, end - area.capacity)
        position = _frame_before(fd, area, start, end, _MOST_WALKED - walked)
        if position is None:
            if generation == oldest or end > area.base:
                break
            generation -= 1
            continue
        found.append(_read_frame(fd, area, position, header, most_bytes))
        walked += end - position
        end = position
    return found[::-1]


def _frame_before(fd: int, area: Area, start: int, end: int, most: int) -> int | None:
    """The position of the frame that ends at `end`; None if it is not found."""
    low = max(start, end - most)
    high = end
    while high > low:
        block_start = max(low, high - _BLOCK_BYTES)
        words = memoryview(_read(fd, area, block_start, high - block_start)).cast("Q")
        for index in range(len(words) - 1, -1, -1):
            position = block_start + 8 * index
            if words[index] == position and _ends_at(fd, area, position, end):
                return position
        high = block_start
    return None


def _ends_at(fd: int, area: Area, position: int, end: int) -> bool:
    data = _read(fd, area, position, FRAME.size)
    if end - position < FRAME.size or len(data) < FRAME.size:
        return False
    _, length, state, _, _ = FRAME.unpack(data)
    return state in _STATES and (FRAME.size + length + 7) // 8 * 8 == end - position


def _read(fd: int, area: Area, position: int, nbytes: int) -> bytes:
    """The bytes at a position: the area is a circle.  Short where the file is."""
    first = min(nbytes, area.capacity - position % area.capacity)
    data = os.pread(fd, first, area.place(position))
    if first < nbytes and len(data) == first:
        data += os.pread(fd, nbytes - first, area.offset)
    return data[: len(data) // 8 * 8] if nbytes % 8 == 0 else data


def _read_frame(fd: int, area: Area, position: int, header: Header, most_bytes: int) -> LoggedFrame:
    _, length, state, kind, owner = FRAME.unpack(_read(fd, area, position, FRAME.size))
    payload = _read(fd, area, position + FRAME.size, min(length, most_bytes))
    if state == _LENT and len(payload) == length:
        payload = _with_blocks(fd, header, position, payload, most_bytes)
    taken = position < header["read_position"]
    return LoggedFrame(
        position=position,
        length=length,
        kind=kind,
        state="taken" if taken else _STATES.get(state, "damaged"),
        owner=owner_in(owner)[0] or None,
        payload=payload,
    )


def _with_blocks(fd: int, header: Header, position: int, payload: bytes, most: int) -> bytes:
    """The payload with its lent segments in place; unchanged if one is gone or too large."""
    count = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or not 1 <= count <= (len(payload) - 8) // 8:
        return payload
    table = struct.unpack_from(f"<{count}Q", payload, 8)
    at = 8 + 8 * count
    parts = []
    for entry in table:
        if entry & _IN_BLOCK:
            index, length = (entry & ~_IN_BLOCK) >> _INDEX_SHIFT, entry & ((1 << _INDEX_SHIFT) - 1)
            part = _block_bytes(fd, header, position, index, min(length, most + 1))
            if len(part) != length:
                return payload
        else:
            part = payload[at : at + entry]
            at += entry
        parts.append(part)
        most -= len(part)
        if most < 0:
            return payload
    lengths = struct.pack(f"<{count + 1}Q", count, *map(len, parts))
    return lengths + b"".join(parts)


def _block_bytes(fd: int, header: Header, position: int, index: int, nbytes: int) -> bytes:
    """The first bytes of a block that the message at a position names; empty if it is another's."""
    limit = LAYOUT["MAX_CAPACITY"]
    if index >= LAYOUT["BLOCK_COUNT"] or not 0 < header["blocks_offset"] < limit:
        return b""
    record = os.pread(fd, BLOCK.size, header["blocks_offset"] + BLOCK.size * index)
    if len(record) < BLOCK.size:
        return b""
    _, named_by, offset, capacity = BLOCK.unpack(record)
    if named_by != position or capacity < nbytes or offset > limit:
        return b""
    return os.pread(fd, nbytes, offset)


class _Careful(PickleCodec):
    """Decodes everything but pickles, of which it names the first type unless they are trusted."""

    def __init__(self, trust: bool) -> None:
        super().__init__()
        self._trust = trust

    def decode(self, kind: int, head: bytes, buffers: Any) -> Any:
        if kind == KIND_PICKLE and not self._trust:
            named = first_type_in(head)
            what = f"a pickle of {named}" if named else "a pickle"
            raise DecodeError(f"{what}, {len(head)} bytes: --pickle unpickles it, which runs code")
        if kind == KIND_MSGPACK:
            return MsgpackCodec().decode(kind, head, buffers)
        return super().decode(kind, head, buffers)


def decoded(frame: LoggedFrame, *, unpickle: bool = False) -> Any:
    """The object in a frame.

    Args:
        frame: with its whole payload.
        unpickle: also decode pickles, which runs code of the sender's choosing.

    Raises:
        DecodeError: it is a pickle or of another codec, cut short, or damaged.
        ImportError: it is MessagePack, and msgspec is missing.
    """
    if len(frame.payload) < frame.length:
        raise DecodeError(f"only {len(frame.payload)} of {frame.length} bytes were read")
    if frame.state in ("reserved", "aborted"):
        raise DecodeError("it was never completed")
    kind = frame.kind & ~_MULTI
    head, buffers = frame.payload, []
    if frame.kind & _MULTI:
        head, *buffers = _segments(frame.payload)
    codec = _Careful(trust=unpickle)
    if kind == KIND_MESSAGE:
        return MessageCodec(codec).decode(kind, head, buffers)
    if kind not in (KIND_BYTES, KIND_PICKLE, KIND_MSGPACK, KIND_BUILTINS):
        raise DecodeError(f"a message of {frame.codec}: its codec is not known here")
    return codec.decode(kind, head, buffers)


def _segments(payload: bytes) -> list[Any]:
    """Head and buffers of a frame with several: a count and lengths of 8 bytes come first."""
    count = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or not 1 <= count <= (len(payload) - 8) // 8:
        raise DecodeError(f"a message of {len(payload)} bytes claims {count} segments")
    at = 8 + 8 * count
    segments: list[Any] = []
    for index in range(count):
        length = int.from_bytes(payload[8 + 8 * index : 16 + 8 * index], "little")
        if length & _IN_BLOCK:
            raise DecodeError("a large buffer was given back, or is too large to be read here")
        if length > len(payload) - at:
            raise DecodeError(f"segment {index} of {length} bytes reaches past the message")
        part = payload[at : at + length]
        segments.append(bytearray(part) if index else part)
        at += length
    return segments

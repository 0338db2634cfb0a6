"""Header of a ring, read through a descriptor that cannot write.

One ``pread`` copies the header; what it says is checked and never trusted.  The
names and types of :data:`_LAYOUT` are those of ``cython/shmring/_core/layout.h``;
what is not shown is skipped.
"""

from __future__ import annotations

import functools
import os
import struct
import time
from typing import Any, NamedTuple

from shmring._core import handle
from shmring._core.ring import LAYOUT
from shmring.errors import AccessRefused, LayoutMismatch, RingCorrupted
from shmring.observer.processes import KnownProcesses

__all__ = [
    "BLOCK",
    "FRAME",
    "Area",
    "Header",
    "area_at",
    "blocks_in",
    "deliveries_in",
    "facts_of",
    "front_owner",
    "header_in",
    "owner_in",
    "read_bytes",
]

_LAYOUT = {
    0: "magic:Q version:I 12x max_capacity:Q max_messages:Q pid_namespace:Q ready:I user_kind:I"
    " created_ns:Q creator:Q",
    LAYOUT["WAITING_OFFSET"]: "data_wait:I space_wait:I shutdown:I poisoned:I lease_owner:Q",
    LAYOUT["PRODUCERS_OFFSET"]: "producer_lock:I producer_holder:I write_position:Q"
    " write_generation:Q puts_before:Q puts:Q puts_at:Q 40x last_producer:I",
    LAYOUT["CONSUMERS_OFFSET"]: "consumer_lock:I consumer_holder:I read_position:Q"
    " read_generation:Q reaped:Q gets_before:Q gets:Q gets_at:Q 16x last_consumer:I",
    LAYOUT["JOINING_OFFSET"]: "12x recoveries:I token:Q 8x blocks_offset:Q",
}
_NAMES: list[str] = []
_FORMAT = "<"
for _offset, _words in _LAYOUT.items():
    _FORMAT += f"{_offset - struct.calcsize(_FORMAT)}x"
    for _word in _words.split():
        _name, _, _type = _word.rpartition(":")
        _NAMES += [_name] if _name else []
        _FORMAT += _type
_HEADER = struct.Struct(_FORMAT)

_READ_BYTES = LAYOUT["CLAIMS_OFFSET"]
_NAME_OFFSET, _NAME_BYTES = LAYOUT["JOINING_OFFSET"] + 128, 256
_DEATHS = struct.Struct(f"<{2 * LAYOUT['DEATH_COUNT']}Q")
_NO_DEATHS = bytes(_DEATHS.size)
_AREA = struct.Struct("<3Q")
_WAITER = struct.Struct("<QQIII4x")
_WAITERS = struct.Struct("<" + LAYOUT["WAITER_COUNT"] * f"Q{_WAITER.size - 8}x")  # their owners
_CLAIM = struct.Struct("<4Q")
FRAME = struct.Struct("<QQIIQ")
BLOCK = struct.Struct("<4Q32x")  # holder, position, offset, capacity

_PID_BITS = 22  # of an owner's word; the start time of the process stands above them
_TID_MASK, _OWNER_DIED = 0x3FFFFFFF, 0x40000000  # of a robust futex
_PRODUCERS_LOCK, _CONSUMERS_LOCK, _RESERVE, _PEEK = (handle.HELD[each] for each in range(4))
_KINDS = {1: "ring", 2: "queue"}


class Area(NamedTuple):
    """Where the frames from position `base` on stand in the file."""

    base: int
    capacity: int
    offset: int

    def place(self, position: int) -> int:
        """The offset in the file of the byte at a position."""
        return self.offset + position % self.capacity


class Header(dict[str, int]):
    """The words of a header by their names, and the bytes it was read from."""

    data: bytes


def read_bytes(fd: int) -> bytes:
    """The bytes of a header, but for its claims; fewer if the file is cut short."""
    return os.pread(fd, _READ_BYTES, 0)


def header_in(data: bytes, pid_namespace: int) -> Header:
    """The header in what was read, checked to be one.

    Args:
        data: from :func:`read_bytes`.
        pid_namespace: the inode of this process's.

    Raises:
        LayoutMismatch: it is not ready, of another version, or no ring.
        AccessRefused: it was made in another PID namespace.
    """
    if len(data) < _READ_BYTES:
        raise LayoutMismatch(f"not a ring: the file has {len(data)} bytes, too few for one")
    header = Header(zip(_NAMES, _HEADER.unpack_from(data), strict=True))
    header.data = data
    if header["magic"] not in (LAYOUT["MAGIC"], LAYOUT["BLOCK_MAGIC"]):
        raise LayoutMismatch(f"not a ring: it begins with {header['magic']:#x}")
    if header["ready"] != 1:
        raise LayoutMismatch("it is not ready: its creator has not finished it")
    if header["version"] != LAYOUT["VERSION"]:
        raise LayoutMismatch(
            f"version {header['version']} of the layout, this is version {LAYOUT['VERSION']}:"
            " use the same release of shmring in all processes"
        )
    if header["pid_namespace"] != pid_namespace:
        raise AccessRefused(
            "it was created in another PID namespace, where process ids mean other processes"
        )
    return header


def facts_of(header: Header, processes: KnownProcesses) -> dict[str, Any]:
    """The header as the fields of ``statistics()`` and a few more, for a listing."""
    now = time.monotonic_ns()
    written, read = header["write_position"], header["read_position"]
    puts = header["puts" if header["puts_at"] == written else "puts_before"]
    gets = header["gets" if header["gets_at"] == read else "gets_before"]
    dropped = header["shutdown"] == 2 or read > written
    waiters = _waiters(header, processes, now)
    area = area_at(header, header["write_generation"])
    creator, start_ticks = owner_in(header["creator"])
    created = header["created_ns"]
    return {
        "kind": _KINDS.get(header["user_kind"], "ring"),
        "id": _id_of(header.data[_NAME_OFFSET : _NAME_OFFSET + _NAME_BYTES], header["token"]),
        "age_seconds": max(0, now - created) / 1e9 if created else None,
        "owner": (
            {"pid": creator, "state": processes.state(creator, start_ticks)} if creator else None
        ),
        "capacity": area.capacity,
        "max_capacity": header["max_capacity"],
        "max_messages": header["max_messages"],
        "used_bytes": 0 if dropped else written - read,
        "messages": 0 if dropped else max(0, puts - gets),
        "messages_put": puts,
        "messages_taken": gets,
        "bytes_put": written,
        "growths": header["write_generation"],
        "recoveries": header["recoveries"],
        "consumers_waiting": header["data_wait"] & 1 != 0,
        "producers_waiting": header["space_wait"] & 1 != 0,
        "shut_down": header["shutdown"] != 0,
        "poisoned": header["poisoned"] != 0,
        "waiters": waiters,
        "holders": _holders(header, processes),
        "deaths": _deaths(header, now),
    }


def owner_in(word: int) -> tuple[int, int]:
    """(pid, start time in ticks) of an owner's word; 0 is no owner."""
    return word & ((1 << _PID_BITS) - 1), word >> _PID_BITS


def area_at(header: Header, generation: int) -> Area:
    """The record of an area; that it lies inside the file is not checked.

    Raises:
        RingCorrupted: no area can be like this.
    """
    at = LAYOUT["AREAS_OFFSET"] + 32 * (generation % LAYOUT["AREA_COUNT"])
    return _area_in(header.data[at : at + _AREA.size])


# These two are asked the same at each look.


@functools.lru_cache(1024)
def _area_in(record: bytes) -> Area:
    area = Area(*_AREA.unpack(record))
    size, least, most = area.capacity, LAYOUT["MIN_CAPACITY"], LAYOUT["MAX_CAPACITY"]
    if not least <= size <= most or size & (size - 1) or area.offset > most or area.base % 8:
        raise RingCorrupted(
            f"an area of {size} bytes at offset {area.offset}, from position {area.base} on, cannot"
            " be: the ring is damaged"
        )
    return area


@functools.lru_cache(1024)
def _id_of(name: bytes, token: int) -> str:
    given = name.split(b"\0", 1)[0]
    return os.fsdecode(given) if given else f"shmring-{token:016x}"


def _waiters(header: Header, processes: KnownProcesses, now: int) -> list[dict[str, Any]]:
    start = LAYOUT["WAITERS_OFFSET"]
    found = []
    for index, owner in enumerate(_WAITERS.unpack_from(header.data, start)):
        if not owner:
            continue
        _, since_ns, tid, call, reason = _WAITER.unpack_from(
            header.data, start + index * _WAITER.size
        )
        pid, start_ticks = owner_in(owner)
        if not since_ns or (state := processes.state(pid, start_ticks)) == "dead":
            continue
        found.append(
            {
                "pid": pid,
                "tid": tid,
                "state": state,
                "call": handle.CALLS.get(call, "unknown"),
                "waits_for": handle.REASONS.get(reason, "unknown"),
                "since_ns": since_ns,
                "seconds": max(0, now - since_ns) / 1e9,
            }
        )
    return sorted(found, key=lambda each: each["since_ns"])


def _holders(header: Header, processes: KnownProcesses) -> list[dict[str, Any]]:
    found = []
    for side, what in (("producer", _PRODUCERS_LOCK), ("consumer", _CONSUMERS_LOCK)):
        word, pid = header[f"{side}_lock"], header[f"{side}_holder"]
        if word & _OWNER_DIED:
            found.append({"pid": pid or None, "tid": None, "state": "dead", "holds": what})
        elif tid := word & _TID_MASK:
            # Before the pid is stored, the owner is taken for the first thread of its process.
            state = processes.state(pid or tid)
            found.append({"pid": pid or tid, "tid": tid, "state": state, "holds": what})
    if header["lease_owner"]:
        found.append(holder(header["lease_owner"], _PEEK, processes))
    return found


def holder(owner: int, what: str, processes: KnownProcesses) -> dict[str, Any]:
    """What a listing says of the owner of a reservation or a peek."""
    pid, start_ticks = owner_in(owner)
    state = processes.state(pid, start_ticks)
    return {"pid": pid or None, "tid": None, "state": state, "holds": what}


def front_owner(fd: int, header: Header, processes: KnownProcesses) -> dict[str, Any] | None:
    """The holder of the reservation in front; None if there is none."""
    read, written = header["read_position"], header["write_position"]
    if read >= written:
        return None
    area = area_at(header, header["read_generation"])
    frame = os.pread(fd, FRAME.size, area.place(read))
    if len(frame) < FRAME.size:
        return None
    position, _, state, _, owner = FRAME.unpack(frame)
    if position != read or state != LAYOUT["RESERVED"]:
        return None
    return holder(owner, _RESERVE, processes)


def _deaths(header: Header, now: int) -> list[dict[str, Any]]:
    if header.data.startswith(_NO_DEATHS, LAYOUT["DEATHS_OFFSET"]):
        return []
    words = _DEATHS.unpack_from(header.data, LAYOUT["DEATHS_OFFSET"])
    found = [
        {
            "pid": words[2 * held] or None,
            "held": handle.HELD[held],
            "when_ns": when_ns,
            "seconds": max(0, now - when_ns) / 1e9,
        }
        for held in range(LAYOUT["DEATH_COUNT"])
        if (when_ns := words[2 * held + 1])
    ]
    return sorted(found, key=lambda each: each["when_ns"])


def blocks_in(fd: int, header: Header) -> dict[str, int]:
    """The fields of ``statistics()`` on blocks for large buffers."""
    found = {"blocks": 0, "block_bytes": 0, "lent_bytes": 0}
    if 0 < header["blocks_offset"] < LAYOUT["MAX_CAPACITY"]:
        records = os.pread(fd, LAYOUT["BLOCK_COUNT"] * BLOCK.size, header["blocks_offset"])
        for holder, _, _, capacity in BLOCK.iter_unpack(records[: len(records) // 64 * 64]):
            found["blocks"] += capacity != 0
            found["block_bytes"] += capacity
            found["lent_bytes"] += capacity if holder else 0
    return found


def deliveries_in(fd: int, header: Header) -> dict[int, int]:
    """Bytes of messages that were taken and not acknowledged yet, by process."""
    nbytes = LAYOUT["CLAIM_COUNT"] * _CLAIM.size
    records = os.pread(fd, nbytes, LAYOUT["CLAIMS_OFFSET"])
    found: dict[int, int] = {}
    for owner, low, high, _ in _CLAIM.iter_unpack(records[: len(records) // 32 * 32]):
        taken = min(high, header["read_position"]) - low
        if owner and taken > 0:
            pid, _ = owner_in(owner)
            found[pid] = found.get(pid, 0) + taken
    return found

"""Registry of processes: one slot each, written by its owner alone, read by all.

*Dead* is proved by the kernel: no process has that pid any more, the one that
has it started at another time, or its pidfd shows that it has ended (a zombie
has).  *Silent* is a heartbeat older than a limit: hung, stopped or starved.  The
two are never mixed.

A heartbeat is one store of eight bytes by the process's own loop.  There is no
heartbeat thread, which would beat for a hung handler too.

Layout, little-endian words of eight bytes::

    header, 256 bytes:
      0 the storage's own        1 magic                 2 version
      3 slots ever used          7 the storage's own
    slot, 256 bytes:
      0 pid, 0 = never used      1 start time (ticks)    2 incarnation
      3 heartbeat (ns)           4 state                 5 waiting since (ns)
      6 task started (ns)        7 task + 1, 0 = none    8 tasks
      9 bytes                   10 messages             11 heartbeats
     12 role                    13 length of the id     14 length of waiting-on
     15 .. 23 process id, UTF-8, 72 bytes
     24 .. 31 what it waits on, UTF-8, 64 bytes, cut to fit

All-zero is a valid empty registry, so no process waits for its creator.  A slot
is allocated under a file lock, which the kernel releases when its holder is
killed; the pid is cleared first and stored last, so that a half-made slot is
free.  Words are stored with release and loaded with acquire
(``_core.locked_memory.Words``): a pid is read with the start time that belongs
to it.  A slot stays readable after its process has ended until another process
takes it, which happens only after ten seconds while there is room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from shmring.errors import (
    InvalidArgument,
    LayoutMismatch,
    RingExists,
    RingNotFound,
    ShmringError,
)
from shmring.process.liveness import is_process_dead, process_start_ticks
from shmring.shm.descriptors import close_own, identity_of, wait_for_lock

__all__ = [
    "MAX_PROCESS_ID_BYTES",
    "REGISTRY_BYTES",
    "REGISTRY_MAGIC",
    "SLOTS",
    "ProcessRole",
    "ProcessState",
    "Registry",
    "RegistryEntry",
    "RegistrySlot",
    "RegistryStorage",
    "SeenProcesses",
    "open_segment",
]

REGISTRY_MAGIC = int.from_bytes(b"SHMREGST", "little")
_VERSION = 1
_SLOT_WORDS = 32
SLOTS = 255
REGISTRY_BYTES = (SLOTS + 1) * _SLOT_WORDS * 8

_H_MAGIC, _H_VERSION, _H_USED = 1, 2, 3

_PID, _START, _INCARNATION, _HEARTBEAT, _STATE, _WAITING_SINCE = range(6)
_TASK_STARTED, _TASK, _TASKS, _BYTES, _MESSAGES, _HEARTBEATS = range(6, 12)
_ROLE, _ID_LENGTH, _ON_LENGTH = range(12, 15)
_ID_OFFSET, MAX_PROCESS_ID_BYTES = 15 * 8, 72
_ON_OFFSET, _ON_BYTES = 24 * 8, 64

_U64 = (1 << 64) - 1

# The slot of a dead process is not taken for this long while there are others.
_KEPT_NS = 10_000_000_000


class ProcessState(enum.IntEnum):
    """What a process is doing, by its own account."""

    STARTING = 0
    IDLE = 1
    WORKING = 2
    WAITING = 3
    EXITED = 4


class ProcessRole(enum.IntEnum):
    """What a process is to the others of its namespace."""

    PEER = 0
    COORDINATOR = 1
    WORKER = 2


# Other numbers in a slot were not written by shmring.
_STATES = {int(state): state for state in ProcessState}
_ROLES = {int(role): role for role in ProcessRole}


class RegistryStorage(Protocol):
    """The memory of a registry, and its lock."""

    @property
    def buffer(self) -> memoryview:
        """A writable view of at least ``REGISTRY_BYTES`` bytes, zero when new."""
        ...

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Exclude all other processes; the kernel releases the lock when its holder dies."""
        ...

    def close(self) -> None:
        """Close it; the last one to do so leaves nothing behind."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class RegistryEntry:
    """The content of one slot at one instant.

    Times are of ``time.monotonic_ns()``, which all processes share; 0 is never.
    """

    index: int
    pid: int
    start_ticks: int
    incarnation: int
    process_id: str
    role: ProcessRole
    state: ProcessState
    heartbeat_ns: int
    heartbeats: int
    waiting_on: str
    waiting_since_ns: int
    task: int | None
    task_started_ns: int
    tasks: int
    nbytes: int
    messages: int

    @property
    def key(self) -> int:
        """The number of this registration, unique in the registry; never 0."""
        return _key_of(self.index, self.incarnation)

    def is_dead(self) -> bool:
        """Whether the process has ended: it said so, or the kernel proves it."""
        return self.state is ProcessState.EXITED or is_process_dead(self.pid, self.start_ticks)

    def silent_for(self) -> float:
        """How long ago the last heartbeat was, in seconds."""
        return max(0.0, (time.monotonic_ns() - self.heartbeat_ns) / 1e9)

    def is_silent(self, limit: float) -> bool:
        """Whether no heartbeat came within `limit` seconds, which proves nothing."""
        return self.silent_for() > limit


class _PlainWords:
    """Words in a buffer without the extension: whole, and in no certain order.

    Only the lock of the storage orders them: several words are read under it.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer.cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value

    def copy(self, start: int, count: int) -> bytes:
        return self._words[start : start + count].tobytes()

    def release(self) -> None:
        self._words.release()


if TYPE_CHECKING:
    from shmring._core.locked_memory import Words

    _in_order: bool
else:
    try:
        from shmring._core.locked_memory import Words

        _in_order = True
    except ImportError:  # no extension: the fallback
        Words = _PlainWords
        _in_order = False


class RegistrySlot:
    """The calling process's own slot; get one from :meth:`Registry.register`.

    Attributes:
        key: the number of this registration, unique in the registry; never 0.
    """

    def __init__(self, words: Words, base: int) -> None:
        self._words = words
        self._base = base
        self.index = base // _SLOT_WORDS - 1
        self.incarnation = words[base + _INCARNATION]
        self.key = _key_of(self.index, self.incarnation)
        self.pid = os.getpid()

    def beat(self) -> None:
        """Store a heartbeat: to be called on every turn of the process's loop."""
        words, base = self._words, self._base
        words[base + _HEARTBEAT] = time.monotonic_ns()
        words[base + _HEARTBEATS] = (words[base + _HEARTBEATS] + 1) & _U64

    def set_role(self, role: ProcessRole) -> None:
        """Store what the process is to the others."""
        self._words[self._base + _ROLE] = role

    def idle(self) -> None:
        """Store that the process neither works nor waits."""
        words, base = self._words, self._base
        words[base + _WAITING_SINCE] = 0
        words[base + _TASK] = 0
        words[base + _STATE] = ProcessState.IDLE
        self.beat()

    def waiting(self, on: str) -> None:
        """Store that the process begins to wait on a queue; call :meth:`beat` while it does."""
        words, base = self._words, self._base
        _write_text(words, base, _ON_OFFSET, on.encode()[:_ON_BYTES])
        words[base + _ON_LENGTH] = min(len(on.encode()), _ON_BYTES)
        words[base + _WAITING_SINCE] = time.monotonic_ns()
        words[base + _STATE] = ProcessState.WAITING
        self.beat()

    def working(self, task: int) -> None:
        """Store that a task begins.

        Args:
            task: its number, from 0.
        """
        words, base = self._words, self._base
        words[base + _WAITING_SINCE] = 0
        words[base + _TASK_STARTED] = time.monotonic_ns()
        words[base + _TASK] = task + 1
        words[base + _STATE] = ProcessState.WORKING
        self.beat()

    def count(self, *, tasks: int = 0, nbytes: int = 0, messages: int = 0) -> None:
        """Add tasks answered, and bytes and messages sent or received."""
        words, base = self._words, self._base
        for word, more in ((_TASKS, tasks), (_BYTES, nbytes), (_MESSAGES, messages)):
            if more:
                words[base + word] = (words[base + word] + more) & _U64

    def release(self) -> None:
        """Store that the process leaves. The slot stays readable until it is taken again."""
        words, base = self._words, self._base
        # Not in a forked child, which holds this object too.
        if self.pid == os.getpid() and words[base + _INCARNATION] == self.incarnation:
            words[base + _TASK] = 0
            words[base + _WAITING_SINCE] = 0
            words[base + _STATE] = ProcessState.EXITED


class Registry:
    """The processes of a namespace.

    Args:
        storage: the memory of the registry; :meth:`close` closes it too.

    Raises:
        LayoutMismatch: the storage holds something else, or another version.
        InvalidArgument: the storage is too small.
    """

    def __init__(self, storage: RegistryStorage) -> None:
        self._storage = storage
        octets = storage.buffer
        if octets.nbytes < REGISTRY_BYTES:
            raise InvalidArgument(f"registry of {octets.nbytes} bytes: {REGISTRY_BYTES} are needed")
        self._words = Words(octets[:REGISTRY_BYTES])
        self._closed = False
        try:
            with storage.exclusive():
                if self._words[_H_MAGIC] == 0:
                    self._words[_H_VERSION] = _VERSION
                    self._words[_H_MAGIC] = REGISTRY_MAGIC
            magic, version = self._words[_H_MAGIC], self._words[_H_VERSION]
            if (magic, version) != (REGISTRY_MAGIC, _VERSION):
                raise LayoutMismatch(
                    f"registry with magic={magic:#x} version={version}: "
                    f"magic={REGISTRY_MAGIC:#x} version={_VERSION} expected"
                )
        except BaseException:
            self._words.release()
            raise

    def register(self, process_id: str, role: ProcessRole = ProcessRole.PEER) -> RegistrySlot:
        """Take a slot for the calling process: a free one, or one whose owner is dead.

        Args:
            process_id: the name of the process, 1 to 72 bytes of UTF-8.
            role: what it is to the others.

        Returns:
            the slot, which a forked child must not go on using.

        Raises:
            InvalidArgument: the name is empty or too long.
            ShmringError: all slots are held by the living.
        """
        encoded = process_id.encode()
        if not 0 < len(encoded) <= MAX_PROCESS_ID_BYTES:
            raise InvalidArgument(
                f"process_id={process_id!r} has {len(encoded)} bytes: "
                f"1 to {MAX_PROCESS_ID_BYTES} are possible"
            )
        pid = os.getpid()
        words = self._words
        with self._storage.exclusive():
            base = self._find_free()
            words[base + _PID] = 0
            words[base + _INCARNATION] = (words[base + _INCARNATION] + 1) & _U64
            for word in range(_HEARTBEAT, _SLOT_WORDS):
                words[base + word] = 0
            _write_text(words, base, _ID_OFFSET, encoded)
            words[base + _ID_LENGTH] = len(encoded)
            words[base + _ROLE] = role
            words[base + _START] = process_start_ticks(pid)
            words[base + _HEARTBEAT] = time.monotonic_ns()
            words[base + _PID] = pid
        return RegistrySlot(words, base)

    def entries(self) -> list[RegistryEntry]:
        """Every process whose slot was not taken again, dead ones included."""
        found = (self.entry(index) for index in range(self._used()))
        return [entry for entry in found if entry is not None]

    def entry(self, index: int) -> RegistryEntry | None:
        """The process of one slot; None if the slot is free or is being taken just now."""
        if not 0 <= index < SLOTS:
            raise InvalidArgument(f"slot index={index}: 0 to {SLOTS - 1} exist")
        base = (index + 1) * _SLOT_WORDS
        # One copy, which is then checked: another process may write meanwhile.
        with contextlib.nullcontext() if _in_order else self._storage.exclusive():
            copy = self._words.copy(base, _SLOT_WORDS)
            words = memoryview(copy).cast("Q")
            same = self._words[base + _INCARNATION] == words[_INCARNATION]
            if not words[_PID] or not same or words[_PID] != self._words[base + _PID]:
                return None
        return RegistryEntry(
            index=index,
            pid=words[_PID],
            start_ticks=words[_START],
            incarnation=words[_INCARNATION],
            process_id=_read_text(copy, _ID_OFFSET, words[_ID_LENGTH], MAX_PROCESS_ID_BYTES),
            role=_ROLES.get(words[_ROLE], ProcessRole.PEER),
            state=_STATES.get(words[_STATE], ProcessState.STARTING),
            heartbeat_ns=words[_HEARTBEAT],
            heartbeats=words[_HEARTBEATS],
            waiting_on=_read_text(copy, _ON_OFFSET, words[_ON_LENGTH], _ON_BYTES),
            waiting_since_ns=words[_WAITING_SINCE],
            task=words[_TASK] - 1 if words[_TASK] else None,
            task_started_ns=words[_TASK_STARTED],
            tasks=words[_TASKS],
            nbytes=words[_BYTES],
            messages=words[_MESSAGES],
        )

    def close(self) -> None:
        """Close this handle; twice is allowed. Slots are released by their owners."""
        if not self._closed:
            self._closed = True
            self._words.release()
            self._storage.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _used(self) -> int:
        return min(self._words[_H_USED], SLOTS)

    def _find_free(self) -> int:
        words, used = self._words, self._used()
        now = time.monotonic_ns()
        oldest: tuple[int, int] | None = None  # heartbeat and base of one that may be taken
        for index in range(used):
            base = (index + 1) * _SLOT_WORDS
            pid, heartbeat = words[base + _PID], words[base + _HEARTBEAT]
            if not pid:
                return base
            if oldest is not None and heartbeat >= oldest[0]:
                continue
            if words[base + _STATE] == ProcessState.EXITED or is_process_dead(
                pid, words[base + _START]
            ):
                oldest = heartbeat, base
        # The last words of the dead are kept as long as there is room.
        if oldest is not None and (used == SLOTS or now - oldest[0] > _KEPT_NS):
            return oldest[1]
        if used == SLOTS:
            raise ShmringError(
                f"all {SLOTS} slots of the registry are held by living processes: "
                "use another namespace for some of them"
            )
        self._words[_H_USED] = used + 1
        return (used + 1) * _SLOT_WORDS


class SeenProcesses:
    """The processes seen alive or proven dead so far, also after their slots were taken again.

    Attributes:
        last_seen: when each process was last seen, in seconds of ``time.monotonic()``.
    """

    def __init__(self) -> None:
        self.last_seen: dict[str, float] = {}
        self._proven_dead: dict[str, float] = {}  # when
        self._stood: dict[str, tuple[int, int, int]] = {}  # the slot in which each was seen alive

    def look(self, entries: list[RegistryEntry], dead: set[tuple[int, int]], when: float) -> None:
        """Note entries of other processes, read after `when`; `dead`: (index, incarnation)."""
        living = {each.process_id: each for each in entries if _key(each)[:2] not in dead}
        standing = {_key(each) for each in entries}
        ended = {each.process_id for each in entries}
        # A slot is taken again only from the dead.
        ended.update(each for each, slot in self._stood.items() if slot not in standing)
        for process_id in ended - living.keys():
            self._stood.pop(process_id, None)
            self._proven_dead[process_id] = when
        for process_id, entry in living.items():
            self._stood[process_id] = _key(entry)
            self.saw(process_id, entry.heartbeat_ns / 1e9, when)

    def saw(self, process_id: str, when: float, alive_at: float) -> None:
        """Note a sign of life that came at `when`; proofs of death before `alive_at` are void."""
        self.last_seen[process_id] = max(when, self.last_seen.get(process_id, 0.0))
        if alive_at >= self._proven_dead.get(process_id, math.inf):
            del self._proven_dead[process_id]

    def alive(self, since: float) -> list[str]:
        """The processes seen since then and not proven dead, sorted."""
        return sorted(
            process_id
            for process_id, seen in self.last_seen.items()
            if seen >= since and process_id not in self._proven_dead
        )


def _key(entry: RegistryEntry) -> tuple[int, int, int]:
    return entry.index, entry.incarnation, entry.pid


def _key_of(index: int, incarnation: int) -> int:
    return (incarnation << 8 | index) & _U64


def _write_text(words: Words, base: int, offset: int, text: bytes) -> None:
    start = base + offset // 8
    for at in range(0, len(text), 8):
        words[start + at // 8] = int.from_bytes(text[at : at + 8].ljust(8, b"\0"), sys.byteorder)


def _read_text(slot: bytes, offset: int, length: int, limit: int) -> str:
    return slot[offset : offset + min(length, limit)].decode("utf-8", "replace")


def open_segment(name: str, timeout: float = 10.0) -> RegistryStorage:
    """Open the registry of that name in /dev/shm; make it if there is none.

    The last process to close it removes the name; `timeout` bounds the race with it.

    Raises:
        RingNotFound: the race was lost until the deadline.
        AccessRefused: it is another user's, or of another PID namespace.
    """
    from shmring.shm import segment  # not on the fallback

    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(RingExists):
            return _SegmentStorage(name, segment.create_named(name, REGISTRY_BYTES))
        with contextlib.suppress(RingNotFound):
            return _SegmentStorage(name, segment.open_memory(name))
        if time.monotonic() >= deadline:
            raise RingNotFound(f"{name} could be neither made nor opened within {timeout:g} s")


class _SegmentStorage:
    """A registry in a named segment of shared memory."""

    def __init__(self, name: str, fd: int) -> None:
        self._name = name
        self._fd = fd
        self._identity = identity_of(fd)
        from shmring._core.locked_memory import MappedFile

        self.buffer = memoryview(MappedFile(fd, REGISTRY_BYTES))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        import fcntl

        # A lock of the open file description, not of the process: closing another descriptor does
        # not drop it. A description of its own excludes threads too. flock() guards the name.
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if identity_of(fd) != self._identity:
                raise OSError(errno.EBADF, f"the descriptor of {self._name} was closed and reused")

            def try_lock() -> bool:
                try:
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
                except BlockingIOError:
                    return False
                return True

            wait_for_lock(try_lock, self._name)
            try:
                yield
            finally:
                # Not left to close(): a child forked meanwhile has this description too.
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK))
        finally:
            os.close(fd)

    def close(self) -> None:
        from shmring.shm import segment

        self.buffer.release()
        close_own(self._fd, self._identity)
        segment.release(self._name, self._identity)


def _flock(kind: int) -> bytes:
    """``struct flock`` for the first byte: type, whence, start, length, pid."""
    return struct.pack("hhqqi", kind, os.SEEK_SET, 0, 1, 0)

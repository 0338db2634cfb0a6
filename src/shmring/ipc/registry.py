"""Registry of processes: one slot each, written by its owner alone, read by all.

*Dead* is proved by the kernel: no process has that pid any more, the one that
has it started at another time, or its pidfd shows that it has ended (a zombie
has).  *Silent* is a heartbeat older than a limit: hung, stopped or starved.  The
two are never mixed.

A heartbeat is one store of eight bytes by the process's own loop.  There is no
heartbeat thread, which would beat for a hung handler too.

All-zero is a valid empty registry, so no process waits for its creator.  A slot
is allocated under a file lock, which the kernel releases when its holder is
killed; the pid is cleared first and stored last, so that a half-made slot is
free.  A slot stays readable after its process has ended until another process
takes it, which happens only after ten seconds while there is room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import struct
import time
from collections.abc import Iterator
from typing import Protocol

from shmring.errors import InvalidArgument, LayoutMismatch, RingExists, RingNotFound, ShmringError
from shmring.ipc import slot as layout
from shmring.ipc.slot import (
    MAX_PROCESS_ID_BYTES,
    REGISTRY_BYTES,
    REGISTRY_MAGIC,
    SLOTS,
    ProcessRole,
    ProcessState,
    RegistrySlot,
    Words,
    key_of,
    take_slot,
)
from shmring.process.liveness import is_process_dead
from shmring.shm.descriptors import close_own, identity_of, wait_for_lock

__all__ = [
    "MAX_PROCESS_ID_BYTES",
    "REGISTRY_BYTES",
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

_VERSION = 1
# The slot of a dead process is not taken for this long while there are others.
_KEPT_NS = 10_000_000_000


class RegistryStorage(Protocol):
    """The memory of a registry, and its lock."""

    @property
    def buffer(self) -> memoryview:
        """A writable view of at least ``REGISTRY_BYTES`` bytes, zero when new."""

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Exclude all other processes; the kernel releases the lock when its holder dies."""

    def close(self) -> None:
        """Close it; the last one to do so leaves nothing behind."""


@dataclasses.dataclass(frozen=True, slots=True)
class RegistryEntry:
    """The content of one slot at one instant.

    Times are of ``time.monotonic_ns()``, which all processes share; 0 is never.

    Attributes:
        index: of the slot, 0 to 254.
        pid: its process.
        start_ticks: when that process started, in clock ticks since boot.
        incarnation: how often the slot was taken.
        process_id: the name that the process gave.
        role: what it is to the others.
        state: what it does, by its own account.
        heartbeat_ns: its last sign of life.
        heartbeats: how many there were.
        waiting_on: the queue that it waits on, or did last.
        waiting_since_ns: when it began to.
        task: the number of the task that it is at; None without one.
        task_item: the call of a chunk that it is at.
        task_started_ns: when it began the task.
        tasks: how many it has answered.
        nbytes: bytes sent and received.
        messages: messages sent and received.
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
    task_item: int
    task_started_ns: int
    tasks: int
    nbytes: int
    messages: int

    @property
    def key(self) -> int:
        """The number of this registration, unique in the registry; never 0."""
        return key_of(self.index, self.incarnation)

    def is_dead(self) -> bool:
        """Whether the process has ended: it said so, or the kernel proves it."""
        return self.state is ProcessState.EXITED or is_process_dead(self.pid, self.start_ticks)

    def silent_for(self) -> float:
        """How long ago the last heartbeat was, in seconds."""
        return max(0.0, (time.monotonic_ns() - self.heartbeat_ns) / 1e9)

    def is_silent(self, limit: float) -> bool:
        """Whether no heartbeat came in time, which proves nothing.

        Args:
            limit: in seconds.
        """
        return self.silent_for() > limit


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
                if self._words[layout.H_MAGIC] == 0:
                    self._words[layout.H_VERSION] = _VERSION
                    self._words[layout.H_MAGIC] = REGISTRY_MAGIC
            magic, version = self._words[layout.H_MAGIC], self._words[layout.H_VERSION]
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
        with self._storage.exclusive():
            return take_slot(self._words, self._find_free(), encoded, role)

    def entries(self) -> list[RegistryEntry]:
        """Every process whose slot was not taken again, dead ones included."""
        found = (self.entry(index) for index in range(self._used()))
        return [entry for entry in found if entry is not None]

    def entry(self, index: int) -> RegistryEntry | None:
        """The process of one slot; None if the slot is free or is being taken just now."""
        if not 0 <= index < SLOTS:
            raise InvalidArgument(f"slot index={index}: 0 to {SLOTS - 1} exist")
        base = (index + 1) * layout.SLOT_WORDS
        # One copy, which is then checked: another process may write meanwhile.
        with contextlib.nullcontext() if layout.IN_ORDER else self._storage.exclusive():
            copy = self._words.copy(base, layout.SLOT_WORDS)
            words = memoryview(copy).cast("Q")
            pid = words[layout.PID]
            same = self._words[base + layout.INCARNATION] == words[layout.INCARNATION]
            if not pid or not same or pid != self._words[base + layout.PID]:
                return None
        state = layout.STATES.get(words[layout.STATE], ProcessState.STARTING)
        waiting = state is ProcessState.WAITING
        return RegistryEntry(
            index=index,
            pid=pid,
            start_ticks=words[layout.START],
            incarnation=words[layout.INCARNATION],
            process_id=_read_text(
                copy, layout.ID_OFFSET, words[layout.ID_LENGTH], MAX_PROCESS_ID_BYTES
            ),
            role=layout.ROLES.get(words[layout.ROLE], ProcessRole.PEER),
            state=state,
            heartbeat_ns=words[layout.HEARTBEAT],
            heartbeats=words[layout.HEARTBEATS],
            waiting_on=_read_text(copy, layout.ON_OFFSET, words[layout.ON_LENGTH], layout.ON_BYTES),
            waiting_since_ns=words[layout.WAITING_SINCE] if waiting else 0,
            task=(words[layout.TASK] & layout.TASK_MASK) - 1 if words[layout.TASK] else None,
            task_item=words[layout.TASK] >> layout.ITEM_SHIFT,
            task_started_ns=words[layout.TASK_STARTED],
            tasks=words[layout.TASKS],
            nbytes=words[layout.BYTES],
            messages=words[layout.MESSAGES],
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
        return min(self._words[layout.H_USED], SLOTS)

    def _find_free(self) -> int:
        words, used = self._words, self._used()
        now = time.monotonic_ns()
        oldest: tuple[int, int] | None = None  # heartbeat and index of one that may be taken
        for index in range(used):
            base = (index + 1) * layout.SLOT_WORDS
            pid, heartbeat = words[base + layout.PID], words[base + layout.HEARTBEAT]
            if not pid:
                return index
            if oldest is not None and heartbeat >= oldest[0]:
                continue
            if words[base + layout.STATE] == ProcessState.EXITED or is_process_dead(
                pid, words[base + layout.START]
            ):
                oldest = heartbeat, index
        # The last words of the dead are kept as long as there is room.
        if oldest is not None and (used == SLOTS or now - oldest[0] > _KEPT_NS):
            return oldest[1]
        if used == SLOTS:
            raise ShmringError(
                f"all {SLOTS} slots of the registry are held by living processes: "
                "use another namespace for some of them"
            )
        return used


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

"""Slot of a process in a registry, and the layout of a registry.

Little-endian words of eight bytes::

    header, 256 bytes:
      0 the storage's own        1 magic                 2 version
      3 slots ever used          7 the storage's own
      8 .. 14 of a pool: its process, start time, tokens of task and answer queue,
        tasks taken in, answered, retried; 15 workers that died
    slot, 256 bytes:
      0 pid, 0 = never used      1 start time (ticks)    2 incarnation
      3 heartbeat (ns)           4 state                 5 waiting since (ns)
      6 task started (ns)        7 task + 1, 0 = none;   8 tasks
                                   from bit 40 the call of a chunk
      9 bytes                   10 messages             11 heartbeats
     12 role                    13 length of the id     14 length of waiting-on
     15 .. 23 process id, UTF-8, 72 bytes
     24 .. 31 what it waits on, UTF-8, 64 bytes, cut to fit

Words are stored with release and loaded with acquire
(``_core.locked_memory.Words``): a pid is read with the start time that belongs to it.
"""

from __future__ import annotations

import enum
import os
import sys
import time
from typing import TYPE_CHECKING

from shmring.process.liveness import process_start_ticks

__all__ = ["ProcessRole", "ProcessState", "RegistrySlot", "TaskWords", "Words", "take_slot"]

SLOT_WORDS = 32
SLOTS = 255
REGISTRY_MAGIC = int.from_bytes(b"SHMREGST", "little")
REGISTRY_BYTES = (SLOTS + 1) * SLOT_WORDS * 8

H_MAGIC, H_VERSION, H_USED = 1, 2, 3
H_POOL = 8  # the first of POOL_WORDS
POOL_WORDS = ("pid", "start", "tasks", "answers", "submitted", "answered", "retried", "died")

PID, START, INCARNATION, HEARTBEAT, STATE, WAITING_SINCE = range(6)
TASK_STARTED, TASK, TASKS, BYTES, MESSAGES, HEARTBEATS = range(6, 12)
ROLE, ID_LENGTH, ON_LENGTH = range(12, 15)
ID_OFFSET, MAX_PROCESS_ID_BYTES = 15 * 8, 72
ON_OFFSET, ON_BYTES = 24 * 8, 64

U64 = (1 << 64) - 1
ITEM_SHIFT = 40
ITEM_STEP = 1 << ITEM_SHIFT  # from one call of a chunk to the next
TASK_MASK = ITEM_STEP - 1


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
STATES = {int(state): state for state in ProcessState}
ROLES = {int(role): role for role in ProcessRole}


def write_text(words: Words, base: int, offset: int, text: bytes) -> None:
    start = base + offset // 8
    for at in range(0, len(text), 8):
        words[start + at // 8] = int.from_bytes(text[at : at + 8].ljust(8, b"\0"), sys.byteorder)


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


class _PlainTaskWords:
    """What a worker stores for every call, without the extension."""

    def __init__(
        self, words: _PlainWords, places: tuple[int, ...], idle: int, working: int
    ) -> None:
        self._words = words
        self._started, self._heartbeat, self._task, self._state, self._tasks = places
        self._idle = idle
        self._working = working

    def begin(self, task: int) -> None:
        words = self._words
        words[self._started] = words[self._heartbeat] = time.monotonic_ns()
        words[self._task] = task
        words[self._state] = self._working

    def end(self, calls: int) -> None:
        words = self._words
        words[self._task] = 0
        words[self._state] = self._idle
        words[self._heartbeat] = time.monotonic_ns()
        words[self._tasks] = (words[self._tasks] + calls) & U64


if TYPE_CHECKING:
    from shmring._core.locked_memory import TaskWords, Words

    IN_ORDER: bool
else:
    try:
        from shmring._core.locked_memory import TaskWords, Words

        IN_ORDER = True
    except ImportError:  # no extension: the fallback
        Words, TaskWords = _PlainWords, _PlainTaskWords
        IN_ORDER = False


class RegistrySlot:
    """The calling process's own slot; get one from :meth:`HighPerformanceIPC.register`.

    Attributes:
        key: the number of this registration, unique in the registry; never 0.
    """

    def __init__(self, words: Words, base: int) -> None:
        self._words = words
        self._base = base
        self.index = base // SLOT_WORDS - 1
        self.incarnation = words[base + INCARNATION]
        self.key = key_of(self.index, self.incarnation)
        self.pid = os.getpid()

    def beat(self) -> None:
        """Store a heartbeat: to be called on every turn of the process's loop."""
        words, base = self._words, self._base
        words[base + HEARTBEAT] = time.monotonic_ns()
        words[base + HEARTBEATS] = (words[base + HEARTBEATS] + 1) & U64

    def set_role(self, role: ProcessRole) -> None:
        """Store what the process is to the others.

        Args:
            role: the new one.
        """
        self._words[self._base + ROLE] = role

    def idle(self) -> None:
        """Store that the process neither works nor waits."""
        words, base = self._words, self._base
        words[base + TASK] = 0
        words[base + STATE] = ProcessState.IDLE
        self.beat()

    def waiting(self, on: str) -> None:
        """Store that the process begins to wait; call :meth:`beat` while it does.

        Args:
            on: the name of a queue; its first 64 bytes are kept.
        """
        words, base = self._words, self._base
        write_text(words, base, ON_OFFSET, on.encode()[:ON_BYTES])
        words[base + ON_LENGTH] = min(len(on.encode()), ON_BYTES)
        words[base + WAITING_SINCE] = time.monotonic_ns()
        words[base + STATE] = ProcessState.WAITING
        self.beat()

    def task_words(self) -> TaskWords:
        """What a worker stores for every call."""
        base = self._base
        places = (TASK_STARTED, HEARTBEAT, TASK, STATE, TASKS)
        return TaskWords(
            self._words,
            tuple(base + place for place in places),  # type: ignore[arg-type]
            ProcessState.IDLE,
            ProcessState.WORKING,
        )

    def count(self, *, tasks: int = 0, nbytes: int = 0, messages: int = 0) -> None:
        """Add to the counts of the slot.

        Args:
            tasks: answered.
            nbytes: bytes sent or received.
            messages: sent or received.
        """
        words, base = self._words, self._base
        for word, more in ((TASKS, tasks), (BYTES, nbytes), (MESSAGES, messages)):
            if more:
                words[base + word] = (words[base + word] + more) & U64

    def release(self) -> None:
        """Store that the process leaves. The slot stays readable until it is taken again."""
        words, base = self._words, self._base
        # Not in a forked child, which holds this object too.
        if self.pid == os.getpid() and words[base + INCARNATION] == self.incarnation:
            words[base + TASK] = 0
            words[base + WAITING_SINCE] = 0
            words[base + STATE] = ProcessState.EXITED


def take_slot(words: Words, index: int, encoded: bytes, role: ProcessRole) -> RegistrySlot:
    """Take a slot for the calling process; nothing else may take it meanwhile."""
    base = (index + 1) * SLOT_WORDS
    words[H_USED] = max(words[H_USED], index + 1)
    pid = os.getpid()
    words[base + PID] = 0
    words[base + INCARNATION] = (words[base + INCARNATION] + 1) & U64
    for word in range(HEARTBEAT, SLOT_WORDS):
        words[base + word] = 0
    write_text(words, base, ID_OFFSET, encoded)
    words[base + ID_LENGTH] = len(encoded)
    words[base + ROLE] = role
    words[base + START] = process_start_ticks(pid)
    words[base + HEARTBEAT] = time.monotonic_ns()
    words[base + PID] = pid
    return RegistrySlot(words, base)


def key_of(index: int, incarnation: int) -> int:
    return (incarnation << 8 | index) & U64

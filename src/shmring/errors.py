"""Exceptions.

Every exception of shmring's own is a :class:`ShmringError`.  Where the standard
library has a class for the same situation, it is a base as well, so that
existing ``except`` clauses keep working.  :data:`Full` and :data:`Empty` are
those of :mod:`queue`.
"""

from __future__ import annotations

import pickle
import sys
from queue import Empty, Full

__all__ = [
    "AccessRefused",
    "DecodeError",
    "Empty",
    "EncodeError",
    "Full",
    "InvalidArgument",
    "LayoutMismatch",
    "MemoryExceeded",
    "MessageTooLarge",
    "NotSupportedByFallback",
    "PeerDied",
    "RemoteError",
    "RingClosed",
    "RingCorrupted",
    "RingExists",
    "RingNotFound",
    "SchedulerNotFound",
    "SharedMemoryFull",
    "ShmringError",
    "ShutDown",
    "TaskTimeout",
    "WorkerDied",
]

_MOST_NAMED = 8  # of the dead, in one message


class ShmringError(Exception):
    """Base of shmring's own exceptions."""


class InvalidArgument(ShmringError, ValueError):
    """An argument has an impossible value; the text says what would be accepted."""


class MessageTooLarge(InvalidArgument):
    """A message can never fit: it is larger than ``max_capacity`` allows."""


class RingClosed(ShmringError, ValueError, OSError):
    """This handle has been closed; other handles on the same ring go on.

    A ValueError as from ``put`` and ``get`` of a closed multiprocessing.Queue,
    and an OSError as from its ``empty`` and from a closed SimpleQueue.
    """


class RingCorrupted(ShmringError):
    """Shared memory holds what shmring cannot have written.

    The ring is then poisoned: every process that uses it gets this exception
    instead of doubtful data.
    """


class LayoutMismatch(ShmringError):
    """The segment is not a ring, or was laid out by another version of shmring."""


class RingExists(ShmringError, FileExistsError, RuntimeError):
    """The name is in use, or is not ours to reclaim.

    A RuntimeError as well: HighPerformanceIPC promises one.
    """


class RingNotFound(ShmringError, FileNotFoundError, RuntimeError):
    """Nothing of that name exists, or it did not become ready before the deadline.

    A RuntimeError as well: HighPerformanceIPC promises one.
    """


class AccessRefused(ShmringError, PermissionError):
    """The segment is another user's, open to others, or of another PID namespace."""


class SharedMemoryFull(ShmringError, OSError):
    """The file system of shared memory has no room (ENOSPC)."""


class SchedulerNotFound(ShmringError, ConnectionError):
    """No Dask scheduler answers at an address, or it was lost.

    Attributes:
        address: where it was looked for.
        reason: what came instead of an answer.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address = address
        self.reason = reason

    def __str__(self) -> str:
        return f"no Dask scheduler answers at {self.address}: {self.reason}; is it running?"


class EncodeError(ShmringError, pickle.PicklingError):
    """An object could not be turned into bytes; nothing was put."""


class DecodeError(ShmringError, pickle.UnpicklingError):
    """A message was taken and its bytes could not be turned into an object.

    Attributes:
        items: the other messages of the same ``get_many``, which were decoded; any
            exception that leaves ``get_many`` after a message was taken has them.
    """

    items: list[object]

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.items = []


class PeerDied(ShmringError):
    """Every peer of a call is dead, and what the call waited for has not come.

    Attributes:
        pid: the process whose death was seen last.
        exitcode: as in :attr:`multiprocessing.Process.exitcode`; None where the
            system does not tell: it tells only the parent.
        deaths: ``(pid, exitcode)`` of every peer, the last one last.
        outcome: what has not come.
        count: of a ``put_many``: how many objects went in.
    """

    def __init__(
        self,
        pid: int,
        exitcode: int | None = None,
        deaths: tuple[tuple[int, int | None], ...] = (),
        outcome: str = "",
        count: int = 0,
    ) -> None:
        super().__init__(pid, exitcode, deaths, outcome, count)
        self.pid = pid
        self.exitcode = exitcode
        self.deaths = deaths or ((pid, exitcode),)
        self.outcome = outcome
        self.count = count

    @property
    def signal(self) -> int | None:
        """The number of the signal that killed the last one, or None."""
        return _signal_of(self.exitcode)

    def __str__(self) -> str:
        shown = self.deaths[-_MOST_NAMED:]
        text = ", ".join(f"process {pid} is dead ({_cause_of_death(how)})" for pid, how in shown)
        if len(shown) < len(self.deaths):
            text = f"{len(self.deaths) - len(shown)} others are dead, {text}"
        return f"{text}: {self.outcome}" if self.outcome else text


class WorkerDied(ShmringError):
    """A task was given up because each worker that ran it died.

    Attributes:
        task: the number of the task.
        pid: the worker that died last.
        exitcode: as in :attr:`multiprocessing.Process.exitcode`.
        attempts: how many workers ran the task.
    """

    def __init__(self, task: int, pid: int, exitcode: int | None, attempts: int) -> None:
        super().__init__(task, pid, exitcode, attempts)
        self.task = task
        self.pid = pid
        self.exitcode = exitcode
        self.attempts = attempts

    @property
    def signal(self) -> int | None:
        """The number of the signal that killed the worker, or None."""
        return _signal_of(self.exitcode)

    def __str__(self) -> str:
        return (
            f"task {self.task} was given up after {self.attempts} attempt(s): "
            f"worker process {self.pid} died ({_cause_of_death(self.exitcode)})"
            " (docs: kills#retries)"
        )


class TaskTimeout(ShmringError, TimeoutError):
    """A task ran longer than ``task_timeout`` and its worker was killed.

    Attributes:
        task: the number of the task.
        seconds: the limit.
    """

    def __init__(self, task: int, seconds: float) -> None:
        super().__init__(task, seconds)
        self.task = task
        self.seconds = seconds

    def __str__(self) -> str:
        return f"task {self.task} ran longer than task_timeout={self.seconds:g} s"


class MemoryExceeded(ShmringError, MemoryError):
    """A call outgrew ``max_memory_per_worker`` and its worker was killed.

    Attributes:
        task: the number of the task.
        pid: the worker.
        nbytes: its resident memory when it was looked at.
        limit: in bytes.
    """

    def __init__(self, task: int, pid: int, nbytes: int, limit: int) -> None:
        super().__init__(task, pid, nbytes, limit)
        self.task = task
        self.pid = pid
        self.nbytes = nbytes
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"task {self.task} grew its worker (process {self.pid}) to {self.nbytes} bytes of"
            f" resident memory: max_memory_per_worker={self.limit}"
        )


class RemoteError(ShmringError):
    """A handler raised an exception that cannot be pickled; the text describes it."""


class NotSupportedByFallback(ShmringError):
    """Only the compiled ring can do this; the text names the reason."""


if sys.version_info >= (3, 13):
    from queue import ShutDown
else:

    class ShutDown(Exception):
        """The queue was shut down, as ``queue.ShutDown`` of Python 3.13."""


def _signal_of(exitcode: int | None) -> int | None:
    return -exitcode if exitcode is not None and exitcode < 0 else None


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is None:
        return "exit code unknown"
    if exitcode < 0:
        return f"killed by signal {-exitcode}"
    return f"exit code {exitcode}"

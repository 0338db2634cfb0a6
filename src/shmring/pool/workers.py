"""The workers as their coordinator sees them: who is there, who is gone, who replaces whom.

Two kinds.  :class:`SpawnedWorkers` are children that the coordinator starts,
replaces, kills and joins; their end is proved by their sentinels.
:class:`VisitingWorkers` were started by somebody else; they are known from the
registry, and their end is proved by what stands there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from shmring.errors import InvalidArgument, ShmringError
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.ipc.registry import SLOTS, ProcessRole, ProcessState, RegistryEntry
from shmring.pool.worker import run_spawned_worker
from shmring.process.liveness import is_process_dead, is_process_stopped, process_start_ticks

__all__ = [
    "Departure",
    "SpawnedWorkers",
    "VisitingWorkers",
    "WorkerReport",
    "Workers",
    "interrupts_held",
]

# Workers that die one after another without having done anything: not tried for ever.
_MOST_FALSE_STARTS = 3
# How long a worker may take to stop, in seconds; one in a system call may be slow.
_MOST_STOPPING = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker, as it stood in the registry when it was last seen.

    ``state`` is "exited", "dead" or what the living one was doing; ``exitcode``
    is as in multiprocessing, None where the coordinator is not its parent.
    """

    worker_id: str
    pid: int
    tasks: int
    nbytes: int
    messages: int
    heartbeats: int
    state: str
    exitcode: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Departure:
    """A worker that has ended.

    ``clean`` says that it left by itself, as it does when nobody needs it;
    ``start_ticks`` tell it from one that has its PID now, 0 where that is not known;
    ``key`` tells it from other workers of its process, 0 where the process has ended.
    """

    worker_id: str
    pid: int
    start_ticks: int
    exitcode: int | None
    clean: bool
    key: int = 0

    def held(self, pid: int, start_ticks: int, key: int) -> bool:
        """Whether a claim was its own.

        Args:
            pid: of the claim's owner.
            start_ticks: when that process started; 0 where that is not known.
            key: of the worker; 0 where it died before it wrote it, or is about to.
        """
        known = self.start_ticks != 0 and start_ticks != 0
        if pid != self.pid or (known and start_ticks != self.start_ticks):
            return False
        if self.key != 0 and key != 0:
            return key == self.key
        return self.key == 0 or is_process_dead(pid, start_ticks)


class Workers(Protocol):
    """What the coordinator asks of either kind."""

    def start(self) -> None:
        """Have the workers that are needed."""
        ...

    def departed(self) -> list[Departure]:
        """Those that have ended since the last call; still to be :meth:`bury`-ed."""
        ...

    def bury(self, departure: Departure, useful: bool) -> None:
        """A departure has been dealt with: forget its process."""
        ...

    def strays(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """Of (pid, start ticks, key) with a claim slot, those that ended and were not seen to."""
        ...

    def living(self) -> list[RegistryEntry]:
        """Those in the registry that have not ended."""
        ...

    def to_dismiss(self) -> int:
        """How many SHUTDOWN messages are needed."""
        ...

    def exitcode_of(self, pid: int) -> int | None:
        """How one has ended, if that can be known; asked after its claims have been read."""
        ...

    def pids(self) -> tuple[int, ...]:
        """The processes that have not been buried."""
        ...

    def children(self) -> list[BaseProcess] | None:
        """Those whose end is the end of their process; None if the registry tells of it."""
        ...

    def all_gone(self) -> bool:
        """Whether nobody is left to be waited for."""
        ...

    def kill(self, seen: RegistryEntry) -> bool:
        """Kill one if it still is at the task of this look; False if not, or not ours."""
        ...

    def stop(self, grace: float) -> None:
        """Wait for all to end, and end those that do not."""
        ...

    def reports(self) -> list[WorkerReport]:
        """All workers that there were."""
        ...


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Block Ctrl-C in this thread, and in what it starts, until the block ends or the call.

    A worker that inherits it cannot die of Ctrl-C before it has learnt to ignore it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield lambda: None
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield release
    finally:
        release()


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """Keep a child stopped in the block, where the system can; bounded."""
    if not hasattr(signal, "SIGSTOP") or is_process_stopped(pid):
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + _MOST_STOPPING
        while not is_process_stopped(pid) and time.monotonic() < deadline:
            time.sleep(0.0005)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _start_servants(method: str) -> None:
    """Start what multiprocessing starts on the side, before Ctrl-C is blocked."""
    if method == "fork" or not hasattr(signal, "pthread_sigmask"):
        return
    from multiprocessing import forkserver, resource_tracker

    # Before 3.13 its start unblocks Ctrl-C, at whatever moment it is needed first.
    resource_tracker.ensure_running()
    if method == "forkserver":
        # It would hand the block on to the children of everybody else. Ours do without.
        forkserver.ensure_running()


class _Roll:
    """Everybody who ever stood in the registry as a worker of this run."""

    def __init__(self, ipc: HighPerformanceIPC) -> None:
        self._ipc = ipc
        # Those of an earlier run; a visitor may well have come before its coordinator.
        self._earlier = {entry.key for entry in self._entries() if entry.is_dead()}
        self.last_seen: dict[int, RegistryEntry] = {}

    def look(self) -> list[RegistryEntry]:
        """Read the registry; returns the workers that stand there, also dead ones."""
        found = [each for each in self._entries() if each.key not in self._earlier]
        for entry in found:
            self.last_seen[entry.key] = entry
        return found

    def report(self, exitcodes: dict[int, int | None]) -> list[WorkerReport]:
        """One row for each, with the exit codes of those that have one, by PID."""
        self.look()
        return [
            WorkerReport(
                worker_id=entry.process_id,
                pid=entry.pid,
                tasks=entry.tasks,
                nbytes=entry.nbytes,
                messages=entry.messages,
                heartbeats=entry.heartbeats,
                state=_state_of(entry),
                exitcode=exitcodes.get(entry.pid),
            )
            for entry in self.last_seen.values()
        ]

    def _entries(self) -> list[RegistryEntry]:
        return [each for each in self._ipc.registry_entries() if each.role is ProcessRole.WORKER]

    def stands(self, key: int) -> bool:
        """Whether a worker of this key has its slot in the registry."""
        index = key & 0xFF
        entry = self._ipc.registry_entry(index) if index < SLOTS else None
        return entry is not None and entry.key == key

    def is_at(self, seen: RegistryEntry) -> bool:
        """Whether a worker is at the task still at which it was seen."""
        entry = self._ipc.registry_entry(seen.index)
        return entry is not None and (entry.key, entry.task, entry.task_started_ns) == (
            seen.key,
            seen.task,
            seen.task_started_ns,
        )


def _state_of(entry: RegistryEntry) -> str:
    if entry.state is ProcessState.EXITED:
        return "exited"
    return "dead" if entry.is_dead() else entry.state.name.lower()


class SpawnedWorkers:
    """Children of the coordinator.

    Args:
        ipc: the coordinator's.
        number: how many are to work at a time.
        queue_name: the name of the task queue.
        handler: what they do.
        method: the start method; None is the default of the platform.
    """

    def __init__(
        self,
        ipc: HighPerformanceIPC,
        number: int,
        queue_name: str,
        handler: Callable[[Any], Any],
        method: str | None,
    ) -> None:
        self._ipc = ipc
        self._number = number
        self._queue_name = queue_name
        self._handler = handler
        self._context: Any = multiprocessing.get_context(method)
        self._roll = _Roll(ipc)
        self._processes: list[BaseProcess] = []
        self._exitcodes: dict[int, int | None] = {}
        self._names: dict[int, str] = {}
        self._false_starts = 0

    def start(self) -> None:
        """Start as many as are missing.

        Raises:
            InvalidArgument: the handler cannot be sent to a process.
            ShmringError: they keep dying before they have done anything.
        """
        while len(self._processes) < self._number:
            if self._false_starts >= _MOST_FALSE_STARTS:
                raise ShmringError(
                    f"{self._false_starts} workers in a row died before they answered or even "
                    f"took a task (exit codes {sorted(set(self._exitcodes.values()), key=repr)}): "
                    "can they import the module of the handler?"
                )
            self._start_one()

    def _start_one(self) -> None:
        worker_id = f"worker-{len(self._names)}"
        method = self._context.get_start_method()
        inherited = self._ipc if method == "fork" else None
        process = self._context.Process(
            target=run_spawned_worker,
            name=worker_id,
            args=(worker_id, self._queue_name, self._handler, self._ipc.namespace, inherited),
        )
        _start_servants(method)
        try:
            with interrupts_held():
                process.start()
                self._names[process.pid or 0] = worker_id
                self._processes.append(process)
        except (AttributeError, TypeError, ValueError) as error:
            raise self._unsendable(method, error) from error
        except Exception as error:
            if type(error).__name__ == "PicklingError":
                raise self._unsendable(method, error) from error
            raise

    def _unsendable(self, method: str, error: Exception) -> InvalidArgument:
        return InvalidArgument(
            f"handler={self._handler!r} cannot be sent to a worker started with {method!r} "
            f"({error}): use a function at the top level of a module"
        )

    def departed(self) -> list[Departure]:
        """Those that have ended since the last call; not reaped yet, so no PID can return."""
        self._roll.look()
        ended = set(connection.wait([each.sentinel for each in self._processes], 0))
        return [
            Departure(
                each.name, each.pid or 0, process_start_ticks(each.pid or 0), None, clean=False
            )
            for each in self._processes
            if each.sentinel in ended
        ]

    def bury(self, departure: Departure, useful: bool) -> None:
        """Reap one that has ended.

        Args:
            departure: from :meth:`departed`.
            useful: whether it had answered or claimed a task.
        """
        for process in list(self._processes):
            if process.pid == departure.pid:
                process.join()
                self._exitcodes[departure.pid] = process.exitcode
                self._processes.remove(process)
                process.close()
        self._false_starts = 0 if useful else self._false_starts + 1

    def strays(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """None: the sentinels tell of all.

        Args:
            holders: (pid, start ticks, key) of those that have a claim slot.
        """
        return []

    def exitcode_of(self, pid: int) -> int | None:
        """How one has ended, reaping it: only after its claims have been read.

        Args:
            pid: the worker.
        """
        for process in self._processes:
            if process.pid == pid:
                process.join()
                return process.exitcode
        return self._exitcodes.get(pid)

    def living(self) -> list[RegistryEntry]:
        """Those in the registry that have not ended."""
        pids = {process.pid for process in self._processes}
        return [each for each in self._roll.look() if each.pid in pids and not each.is_dead()]

    def pids(self) -> tuple[int, ...]:
        """The processes that were started and have not been reaped."""
        return tuple(process.pid for process in self._processes if process.pid)

    def to_dismiss(self) -> int:
        """One SHUTDOWN message for each that lives."""
        return len(self._processes)

    def children(self) -> list[BaseProcess]:
        """The processes that were started and have not been reaped."""
        return list(self._processes)

    def all_gone(self) -> bool:
        """Whether all have ended."""
        return len(connection.wait([each.sentinel for each in self._processes], 0)) == len(
            self._processes
        )

    def kill(self, seen: RegistryEntry) -> bool:
        """Kill one with SIGKILL if it still is at the task of this look.

        It is stopped first, so that what the second look shows is true at the kill.

        Args:
            seen: the worker, as it stood in the registry.

        Returns:
            whether it was killed.
        """
        for process in self._processes:
            if process.pid == seen.pid and process.is_alive():
                with _stopped(seen.pid):
                    if not self._roll.is_at(seen):
                        return False
                    process.kill()
                    return True
        return False

    def stop(self, grace: float) -> None:
        """Join all; terminate, then kill, those that do not end.

        Args:
            grace: how long to wait before each step, in seconds.
        """
        try:
            self._join(grace)
            for process in self._processes:
                process.terminate()
            self._join(min(grace, 1.0))
        finally:  # also after a second Ctrl-C
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()
                self._exitcodes[process.pid or 0] = process.exitcode
            self._roll.look()
            for process in self._processes:
                process.close()
            self._processes.clear()

    def _join(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def reports(self) -> list[WorkerReport]:
        """All workers that there were."""
        rows = self._roll.report(self._exitcodes)
        # One that died at once may have lost its slot to the next before anybody looked.
        seen = {row.pid for row in rows}
        rows += [
            WorkerReport(name, pid, 0, 0, 0, 0, "dead", self._exitcodes.get(pid))
            for pid, name in self._names.items()
            if pid not in seen
        ]
        return rows


class VisitingWorkers:
    """Workers that the caller starts, wherever it likes.

    Args:
        ipc: the coordinator's.
        number: how many are expected.
        patience: how long to do without any, in seconds.
    """

    def __init__(self, ipc: HighPerformanceIPC, number: int, patience: float) -> None:
        self._number = number
        self._patience = patience
        self._roll = _Roll(ipc)
        self._buried: set[int] = set()  # their keys
        self._last_company = time.monotonic()

    def start(self) -> None:
        """Starting is the caller's; only see to it that somebody is there.

        Raises:
            ShmringError: nobody has been for longer than the patience.
        """
        now = time.monotonic()
        if self.living():
            self._last_company = now
        elif now - self._last_company > self._patience:
            raise ShmringError(
                f"no worker has been attached for {self._patience:g} s: start some with "
                "worker_process(), or let the coordinator do it with spawn=True"
            )

    def departed(self) -> list[Departure]:
        """Those that have ended since the last call."""
        standing = {each.key for each in self._roll.look()}
        return [
            Departure(
                entry.process_id,
                entry.pid,
                entry.start_ticks,
                None,
                clean=entry.state is ProcessState.EXITED,
                key=key,
            )
            for key, entry in self._roll.last_seen.items()
            # A slot is taken again only from the dead: no longer standing proves it too.
            if key not in self._buried and (key not in standing or entry.is_dead())
        ]

    def bury(self, departure: Departure, useful: bool) -> None:
        """Forget one that has ended.

        Args:
            departure: from :meth:`departed`.
            useful: of no use here.
        """
        self._buried.add(departure.key)

    def strays(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """Those that ended, and lost their slot to the next before the coordinator looked.

        Args:
            holders: (pid, start ticks, key) of those that have a claim slot.
        """
        return [
            Departure(f"process {pid}", pid, start_ticks, None, clean=False, key=key)
            for pid, start_ticks, key in sorted(set(holders))
            if is_process_dead(pid, start_ticks) or (key != 0 and not self._roll.stands(key))
        ]

    def exitcode_of(self, pid: int) -> int | None:
        """Not known: the coordinator is not the parent.

        Args:
            pid: the worker.
        """
        return None

    def living(self) -> list[RegistryEntry]:
        """Those in the registry that have not ended."""
        return [each for each in self._roll.look() if not each.is_dead()]

    def pids(self) -> tuple[int, ...]:
        """The workers in the registry that have not ended."""
        return tuple(entry.pid for entry in self.living())

    def to_dismiss(self) -> int:
        """One SHUTDOWN message for each that lives, or may still come."""
        self.departed()
        return max(self._number - len(self._roll.last_seen), 0) + len(self.living())

    def children(self) -> None:
        """None: a worker may end, and say so in the registry, long before its process."""

    def all_gone(self) -> bool:
        """Whether as many as were expected have come, and all have gone."""
        living = self.living()
        return not living and len(self._roll.last_seen) >= self._number

    def kill(self, seen: RegistryEntry) -> bool:
        """Never: they are not ours."""
        return False

    def stop(self, grace: float) -> None:
        """Wait for all to go; they are not ours to end.

        Args:
            grace: how long, in seconds.
        """
        deadline = time.monotonic() + grace
        while not self.all_gone() and time.monotonic() < deadline:
            time.sleep(0.005)

    def reports(self) -> list[WorkerReport]:
        """All workers that there were."""
        return self._roll.report({})

"""Workers as the dispatcher sees them: started, found dead, replaced.

Two kinds. :class:`ChildWorkers` are started, replaced, killed and joined here; their
end is proved by their pidfds. :class:`ExternalWorkers` are started elsewhere; they
are known from the registry, and their end is proved by what stands there.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from shmring.errors import InvalidArgument, ShmringError
from shmring.ipc.registry import ProcessRole, ProcessState, RegistryEntry
from shmring.process.liveness import is_process_dead, is_process_stopped, process_start_ticks
from shmring.tasks.interrupts import interrupts_held, interrupts_put_off

__all__ = [
    "ChildWorkers",
    "Departure",
    "WorkerReport",
    "Workers",
]

_LOG = logging.getLogger("shmring")

# Workers that die one after another without having done anything: not tried for ever.
_MOST_FALSE_STARTS = 3
# A worker that something killed says less about the next one.
_KILLED_WEIGHT = 1 / 8
# Workers that are reported: those that were started last.
_MOST_RECORDS = 1024
# How long a worker may take to stop, in seconds; one in a system call may be slow.
_MOST_STOPPING = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker, as it stood in the registry when it was last seen.

    Attributes:
        worker_id: its name.
        pid: its process.
        tasks: how many it answered.
        heartbeats: how many it stored.
        state: "exited", "dead", or what the living one was doing.
        exitcode: as in multiprocessing; None where the coordinator is not its parent.
    """

    worker_id: str
    pid: int
    tasks: int
    heartbeats: int
    state: str
    exitcode: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Departure:
    """A worker that has ended.

    Attributes:
        worker_id: its name.
        pid: its process.
        start_ticks: when that process started; 0 where it is not known.
        clean: whether it left by itself, as it does when it is not needed.
        key: tells it from other workers of its process; 0 where the process has ended.
        item: the call of a chunk at which it was.
        useful: whether it had got as far as waiting for tasks.
    """

    worker_id: str
    pid: int
    start_ticks: int
    clean: bool
    key: int = 0
    item: int = 0
    useful: bool = False

    def held(self, pid: int, start_ticks: int, key: int) -> bool:
        """Whether a delivery was its own; `key` is 0 until its taker has written it."""
        known = self.start_ticks != 0 and start_ticks != 0
        if pid != self.pid or (known and start_ticks != self.start_ticks):
            return False
        if self.key != 0 and key != 0:
            return key == self.key
        return self.key == 0 or is_process_dead(pid, start_ticks)


class Workers(abc.ABC):
    """Workers, as they stand in the slots of a registry: what the dispatcher asks of them.

    Args:
        entries: reads all slots that were ever taken.
    """

    def __init__(self, entries: Callable[[], list[RegistryEntry]]) -> None:
        self._entries = entries
        # Those of an earlier run; an external worker may have come before its coordinator.
        self._earlier = {entry.key for entry in self._slots() if entry.is_dead()}
        self._last_seen: dict[int, RegistryEntry] = {}  # by key
        self._exitcodes: dict[int, int | None] = {}  # by pid

    def _slots(self) -> list[RegistryEntry]:
        return [each for each in self._entries() if each.role is ProcessRole.WORKER]

    def _look(self) -> list[RegistryEntry]:
        """The workers of this run that have a slot, also dead ones."""
        found = [each for each in self._slots() if each.key not in self._earlier]
        for entry in found:
            self._last_seen[entry.key] = entry
        return found

    def reports(self) -> list[WorkerReport]:
        """All workers that there were."""
        self._look()
        return [
            WorkerReport(
                worker_id=entry.process_id,
                pid=entry.pid,
                tasks=entry.tasks,
                heartbeats=entry.heartbeats,
                state=_state_of(entry),
                exitcode=self._exitcodes.get(entry.pid),
            )
            for entry in list(self._last_seen.values())
        ]

    @abc.abstractmethod
    def start(self, unanswered: int) -> None:
        """Have the workers that so many unanswered tasks need."""

    @abc.abstractmethod
    def departed(self) -> list[Departure]:
        """Those that have ended since the last call; still to be reaped."""

    @abc.abstractmethod
    def reap(self, departure: Departure, useful: bool) -> None:
        """Forget one whose deliveries have been read; `useful`: it had taken a task, or could."""

    def orphans(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """Of (pid, start ticks, key) with a delivery, those that ended and were not noticed."""
        return []

    @abc.abstractmethod
    def living(self) -> list[RegistryEntry]:
        """Those with a slot that have not ended."""

    @abc.abstractmethod
    def pids(self) -> tuple[int, ...]:
        """The processes that have not been reaped."""

    @abc.abstractmethod
    def to_dismiss(self) -> int:
        """How many STOP messages are needed."""

    @abc.abstractmethod
    def all_gone(self) -> bool:
        """Whether all have ended."""

    def exitcode_of(self, pid: int) -> int | None:
        """How one has ended, if that is known."""
        return None

    def signal(self, seen: RegistryEntry, signum: int) -> bool:
        """Signal one that still is at the call of this look; False if it is not, or is not ours."""
        return False

    def wait_for_one(self, seconds: float) -> None:
        """Wait until one more has ended, or for a moment."""
        time.sleep(min(seconds, 0.005))

    def stop(self, grace: float) -> None:
        """Wait for all to end, and end those that may be ended."""
        deadline = time.monotonic() + grace
        while not self.all_gone() and (left := deadline - time.monotonic()) > 0:
            self.wait_for_one(left)


def _call_of(entry: RegistryEntry) -> tuple[Any, ...]:
    return entry.key, entry.task, entry.task_item, entry.task_started_ns


def _state_of(entry: RegistryEntry) -> str:
    if entry.state is ProcessState.EXITED:
        return "exited"
    return "dead" if entry.is_dead() else entry.state.name.lower()


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
    """Start the helper processes of multiprocessing before Ctrl-C is blocked."""
    if method == "fork" or not hasattr(signal, "pthread_sigmask"):
        return
    from multiprocessing import forkserver, resource_tracker

    # Before 3.13 its start unblocks Ctrl-C, at whatever moment it is needed first.
    resource_tracker.ensure_running()
    if method == "forkserver":
        # It would pass the block on to every child that it forks, also for other callers.
        forkserver.ensure_running()


class ChildWorkers(Workers):
    """Children of this process.

    Args:
        entries: reads the slots.
        number: how many work at a time.
        target: what each runs, with the worker's name and its number as first arguments.
        args: what else it is called with.
        context: a context of multiprocessing.
        at_once: start all at the first task; otherwise as many as there are tasks.
        prefix: of their names.
        on_start: called with the name and the process of each that is started.
    """

    def __init__(
        self,
        entries: Callable[[], list[RegistryEntry]],
        number: int,
        target: Callable[..., None],
        args: tuple[Any, ...],
        context: Any,
        *,
        at_once: bool = True,
        prefix: str = "worker-",
        on_start: Callable[[str, int], object] | None = None,
    ) -> None:
        super().__init__(entries)
        self.number = number
        self.processes: dict[int, BaseProcess] = {}  # by index
        self._target = target
        self._args = args
        self._context = context
        self._at_once = at_once
        self._prefix = prefix
        self._on_start = on_start
        self._names: dict[int, str] = {}  # of those with an exit code
        self._count = 0
        self._start_ticks: dict[int, int] = {}
        self._false_starts = 0.0
        self._ends = _Ends()
        self._lock = threading.RLock()  # any thread that submits may start some
        self._starting = False
        self._refused = False  # the system did not start the last one

    @property
    def missing(self) -> bool:
        """Whether there are fewer than there may be."""
        return len(self.processes) < self.number

    def start(self, unanswered: int) -> None:
        started: list[BaseProcess] = []
        with self._lock:
            wanted = self.number if self._at_once and unanswered else min(self.number, unanswered)
            if self._starting or len(self.processes) >= wanted:
                return
            self._starting = True
            try:
                _start_servants(self._context.get_start_method())
                with interrupts_put_off(), interrupts_held():  # once: between forks time counts
                    self._start(wanted, started)
            finally:
                self._starting = False
                for each in started:
                    if self._on_start is not None:
                        self._on_start(each.name, each.pid or 0)

    def _start(self, wanted: int, started: list[BaseProcess]) -> None:
        while len(self.processes) < wanted:
            if self._false_starts >= _MOST_FALSE_STARTS:
                raise ShmringError(
                    f"{self._false_starts:g} workers in a row died before they answered or even "
                    f"took a task (exit codes {sorted(set(self._exitcodes.values()), key=repr)}): "
                    "can they import the module of the function?"
                )
            try:
                started.append(self._start_one())
                self._refused = False
            except OSError as error:
                if not self.processes:
                    raise
                if not self._refused:  # said once: each look at the workers tries again
                    _LOG.warning("%d of %d workers: %s", len(self.processes), wanted, error)
                self._refused = True
                return

    def _start_one(self) -> BaseProcess:
        worker_id = f"{self._prefix}{self._count}"
        self._count += 1
        index = next(each for each in range(self.number) if each not in self.processes)
        process: BaseProcess = self._context.Process(
            target=self._target, name=worker_id, args=(worker_id, index, *self._args)
        )
        try:
            process.start()
        except Exception as error:
            kinds = AttributeError, TypeError, ValueError
            if isinstance(error, kinds) or type(error).__name__ == "PicklingError":
                raise self._unsendable(error) from error
            raise
        self.processes[index] = process
        return process

    def _unsendable(self, error: Exception) -> InvalidArgument:
        method = self._context.get_start_method()
        return InvalidArgument(
            f"what the workers are to run cannot be sent to a worker started with {method!r} "
            f"({error}): handler and initializer are functions at the top level of a module, "
            "and their arguments can be pickled"
        )

    def departed(self) -> list[Departure]:
        ended = self._ended()
        if ended:
            self._look()
        return [self._departure(each) for each in ended]

    def _ended(self) -> list[BaseProcess]:
        if len(self._start_ticks) < len(self.processes):
            self._watch_new()
        return self._ends.ended()

    def _watch_new(self) -> None:
        """Watch those started of late; done as they start, it would delay the first result."""
        with self._lock:
            for process in self.processes.values():
                pid = process.pid or 0
                if pid not in self._start_ticks:
                    self._ends.add(process, self._context.get_start_method())
                    ticks = process_start_ticks(pid)
                    reaped = process._popen.returncode is not None  # type: ignore[attr-defined]
                    self._start_ticks[pid] = 0 if reaped else ticks

    def _departure(self, process: BaseProcess) -> Departure:
        pid = process.pid or 0
        seen = reversed(list(self._last_seen.values()))  # another thread may look too
        entry = next((each for each in seen if each.pid == pid), None)
        return Departure(
            process.name,
            pid,
            self._start_ticks.get(pid, 0),
            clean=entry is not None and entry.state is ProcessState.EXITED,
            item=entry.task_item if entry is not None else 0,
            useful=entry is not None and entry.state is not ProcessState.STARTING,
        )

    def reap(self, departure: Departure, useful: bool) -> None:
        """Reap one that has ended; what it started and left behind ends with it."""
        with self._lock:
            for index, process in list(self.processes.items()):
                if process.pid == departure.pid:
                    if not departure.clean:
                        self._signal_group(process, signal.SIGKILL)
                    process.join()
                    self._forget(process)
                    del self.processes[index]
        if useful or departure.clean:
            self._false_starts = 0.0
        else:
            killed = self._exitcodes.get(departure.pid) == -signal.SIGKILL
            self._false_starts += _KILLED_WEIGHT if killed else 1
        for records in (self._names, self._exitcodes, self._last_seen):
            while len(records) > _MOST_RECORDS:
                records.pop(next(iter(records)))

    def _forget(self, process: BaseProcess) -> None:
        pid = process.pid or 0
        self._names[pid] = process.name
        self._exitcodes[pid] = process.exitcode
        self._start_ticks.pop(pid, None)
        self._ends.remove(process)

    def exitcode_of(self, pid: int) -> int | None:
        """How one has ended, reaping it: only after its deliveries have been read."""
        for process in list(self.processes.values()):
            if process.pid == pid:
                self._signal_group(process, signal.SIGKILL)  # while its number cannot be another's
                process.join()
                return process.exitcode
        return self._exitcodes.get(pid)

    def living(self) -> list[RegistryEntry]:
        pids, seen = set(self.pids()), self._look()
        return [each for each in seen if each.pid in pids and each.state is not ProcessState.EXITED]

    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in list(self.processes.values()) if process.pid)

    def to_dismiss(self) -> int:
        return len(self.processes)

    def all_gone(self) -> bool:
        return len(self._ended()) == len(self.processes)

    def signal(self, seen: RegistryEntry, signum: int) -> bool:
        for process in list(self.processes.values()):
            if process.pid == seen.pid and process.is_alive():
                # One that a fork server reaps is not there any more, once it has ended.
                # It is stopped, so that what the second look shows is true at the signal.
                with contextlib.suppress(ProcessLookupError), _stopped(seen.pid):
                    if _call_of(seen) not in map(_call_of, self._slots()):
                        return False
                    os.kill(seen.pid, signum)
                    return True
        return False

    def signal_all(self, signum: int) -> None:
        """Send a signal to all of them, and to what they started."""
        self._watch_new()
        for process in list(self.processes.values()):
            self._signal_group(process, signum)

    def close(self) -> None:
        """Give back what starting and watching them took."""
        self._args = ()
        self._ends.close()

    def stop(self, grace: float) -> None:
        """Wait for all to end; terminate, then kill, those that do not: `grace` seconds each."""
        try:  # without reaping: until then a PID means what it meant
            super().stop(grace)
            if not self.all_gone():
                self.signal_all(signal.SIGTERM)
                super().stop(min(grace, 1.0))
        finally:  # also after a second Ctrl-C
            self._reap_all()

    def wait_for_one(self, seconds: float) -> None:
        self._ends.wait_for_one(seconds)

    def _reap_all(self) -> None:
        self._watch_new()
        self._look()
        for process in self.processes.values():
            if not self._departure(process).clean:
                self._signal_group(process, signal.SIGKILL)
            process.kill()
        for process in self.processes.values():
            process.join()
            self._forget(process)
        self.processes.clear()

    def _signal_group(self, process: BaseProcess, signum: int) -> None:
        """Send a signal to a worker and, if it leads a group of its own, to what it started."""
        pid = process.pid or 0
        with contextlib.suppress(ProcessLookupError, PermissionError):
            started = process_start_ticks(pid)
            if started and started == self._start_ticks.get(pid) and os.getpgid(pid) != pid:
                os.kill(pid, signum)
            # 0: reaped, by multiprocessing or the fork server. No process gets the number
            # as long as its group has members; with another start time one has got it.
            elif started in (0, self._start_ticks.get(pid)):
                os.killpg(pid, signum)

    def reports(self) -> list[WorkerReport]:
        rows = super().reports()
        # One that died at once may have lost its slot to the next before it was looked at.
        unseen = {pid: (name, "dead") for pid, name in list(self._names.items())}
        for process in list(self.processes.values()):
            unseen[process.pid or 0] = process.name, "starting"
        for row in rows:
            unseen.pop(row.pid, None)
        rows += [
            WorkerReport(name, pid, 0, 0, state, self._exitcodes.get(pid))
            for pid, (name, state) in unseen.items()
        ]
        return rows


class _Ends:
    """The children that have ended, by one system call however many there are.

    By pidfd where there is one: the sentinel of a forked or spawned child is a pipe,
    which what the child forked keeps open.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._fds: dict[BaseProcess, int] = {}

    def add(self, process: BaseProcess, method: str) -> None:
        fd = process.sentinel
        if method != "forkserver" and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # out of descriptors, or an old kernel
                fd = os.pidfd_open(process.pid or 0)
        self._selector.register(fd, selectors.EVENT_READ, process)
        self._fds[process] = fd

    def remove(self, process: BaseProcess) -> None:
        fd = self._fds.pop(process)
        self._selector.unregister(fd)
        if fd != process.sentinel:
            os.close(fd)

    def ended(self) -> list[BaseProcess]:
        if not self._fds:
            return []
        return [key.data for key, _ in self._selector.select(0)]

    def wait_for_one(self, seconds: float) -> None:
        """Wait until one more has ended."""
        ended = self.ended()
        connection.wait([fd for each, fd in self._fds.items() if each not in ended], seconds)

    def close(self) -> None:
        for process in list(self._fds):
            self.remove(process)
        self._selector.close()

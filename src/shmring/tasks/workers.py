"""Workers as the dispatcher sees them: started, found dead, replaced.

Two kinds. :class:`ChildWorkers` are started, replaced, killed and joined here; their
end is proved by their pidfds. :class:`ExternalWorkers` are started elsewhere; they
are known from the registry, and their end is proved by what stands there.
"""

from __future__ import annotations

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
from typing import Any, Protocol

from shmring.errors import InvalidArgument, ShmringError
from shmring.ipc.registry import SLOTS, ProcessRole, ProcessState, RegistryEntry
from shmring.process.liveness import is_process_dead, is_process_stopped, process_start_ticks
from shmring.tasks.interrupts import interrupts_held, interrupts_put_off

__all__ = [
    "ChildWorkers",
    "Departure",
    "SeenWorkers",
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


class Slots(Protocol):
    """The registry, as it is read here."""

    def entries(self) -> list[RegistryEntry]:
        """All slots that were ever taken."""
        ...

    def entry(self, index: int) -> RegistryEntry | None:
        """One slot."""
        ...


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
        """Whether a delivery was its own.

        Args:
            pid: of the process that took it.
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
    """What the dispatcher asks of either kind."""

    def start(self, unanswered: int) -> None:
        """Have the workers that so many unanswered tasks need."""
        ...

    def departed(self) -> list[Departure]:
        """Those that have ended since the last call; still to be reaped."""
        ...

    def reap(self, departure: Departure, useful: bool) -> None:
        """Forget one whose deliveries have been dealt with."""
        ...

    def orphans(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """Of (pid, start ticks, key) with a delivery, those that ended and were not noticed."""
        ...

    def living(self) -> list[RegistryEntry]:
        """Those with a slot that have not ended."""
        ...

    def to_dismiss(self) -> int:
        """How many STOP messages are needed."""
        ...

    def exitcode_of(self, pid: int) -> int | None:
        """How one has ended, if that can be known; asked after its deliveries have been read."""
        ...

    def pids(self) -> tuple[int, ...]:
        """The processes that have not been reaped."""
        ...

    def all_gone(self) -> bool:
        """Whether all have ended."""
        ...

    def kill(self, seen: RegistryEntry) -> bool:
        """Kill one if it still is at the call of this look; False if not, or not ours."""
        ...

    def signal(self, seen: RegistryEntry, signum: int) -> bool:
        """As :meth:`kill`, with another signal."""
        ...

    def stop(self, grace: float) -> None:
        """Wait for all to end, and end those that do not."""
        ...

    def reports(self) -> list[WorkerReport]:
        """All workers that there were."""
        ...


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


class SeenWorkers:
    """Every worker of this run that ever had a slot."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        # Those of an earlier run; an external worker may have come before its coordinator.
        self._earlier = {entry.key for entry in self._entries() if entry.is_dead()}
        self.last_seen: dict[int, RegistryEntry] = {}

    def look(self) -> list[RegistryEntry]:
        """Read the slots; returns the workers in them, also dead ones."""
        found = [each for each in self._entries() if each.key not in self._earlier]
        for entry in found:
            self.last_seen[entry.key] = entry
        return found

    def of_process(self, pid: int) -> RegistryEntry | None:
        """The worker of this process, as it was last seen."""
        for entry in reversed(list(self.last_seen.values())):  # another thread may look too
            if entry.pid == pid:
                return entry
        return None

    def report(self, exitcodes: dict[int, int | None]) -> list[WorkerReport]:
        """One row for each, with the exit codes of those that have one, by PID."""
        self.look()
        return [
            WorkerReport(
                worker_id=entry.process_id,
                pid=entry.pid,
                tasks=entry.tasks,
                heartbeats=entry.heartbeats,
                state=_state_of(entry),
                exitcode=exitcodes.get(entry.pid),
            )
            for entry in list(self.last_seen.values())
        ]

    def _entries(self) -> list[RegistryEntry]:
        return [each for each in self._slots.entries() if each.role is ProcessRole.WORKER]

    def has_slot(self, key: int) -> bool:
        """Whether a worker of this key has its slot still."""
        index = key & 0xFF
        entry = self._slots.entry(index) if index < SLOTS else None
        return entry is not None and entry.key == key

    def is_at(self, seen: RegistryEntry) -> bool:
        """Whether a worker is still at the call at which it was seen."""
        entry = self._slots.entry(seen.index)
        return entry is not None and (
            entry.key,
            entry.task,
            entry.task_item,
            entry.task_started_ns,
        ) == (seen.key, seen.task, seen.task_item, seen.task_started_ns)


def _state_of(entry: RegistryEntry) -> str:
    if entry.state is ProcessState.EXITED:
        return "exited"
    return "dead" if entry.is_dead() else entry.state.name.lower()


class ChildWorkers:
    """Children of this process.

    Args:
        slots: where they stand: the registry.
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
        slots: Slots,
        number: int,
        target: Callable[..., None],
        args: tuple[Any, ...],
        context: Any,
        *,
        at_once: bool = True,
        prefix: str = "worker-",
        on_start: Callable[[str, int], object] | None = None,
    ) -> None:
        self.number = number
        self.processes: dict[int, BaseProcess] = {}  # by index
        self._target = target
        self._args = args
        self._context = context
        self._at_once = at_once
        self._prefix = prefix
        self._on_start = on_start
        self._seen = SeenWorkers(slots)
        self._exitcodes: dict[int, int | None] = {}
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
        """Start as many as are missing.

        Raises:
            InvalidArgument: the arguments cannot be sent to a process.
            ShmringError: workers keep dying before they have done anything.
        """
        with self._lock:
            if self._starting:
                return  # called by what `on_start` calls: the caller goes on with it
            self._starting = True
            try:
                self._start(unanswered)
            finally:
                self._starting = False

    def _start(self, unanswered: int) -> None:
        wanted = self.number if self._at_once and unanswered else min(self.number, unanswered)
        if len(self.processes) < wanted:
            with interrupts_put_off(), interrupts_held():  # once: what runs between forks is slow
                self._start_up_to(wanted)

    def _start_up_to(self, wanted: int) -> None:
        while len(self.processes) < wanted:
            if self._false_starts >= _MOST_FALSE_STARTS:
                raise ShmringError(
                    f"{self._false_starts:g} workers in a row died before they answered or even "
                    f"took a task (exit codes {sorted(set(self._exitcodes.values()), key=repr)}): "
                    "can they import the module of the function?"
                )
            try:
                self._start_one()
                self._refused = False
            except OSError as error:
                if not self.processes:
                    raise
                if not self._refused:  # said once: each look at the workers tries again
                    _LOG.warning("%d of %d workers: %s", len(self.processes), wanted, error)
                self._refused = True
                return

    def _start_one(self) -> None:
        worker_id = f"{self._prefix}{self._count}"
        self._count += 1
        index = next(each for each in range(self.number) if each not in self.processes)
        method = self._context.get_start_method()
        process = self._context.Process(
            target=self._target, name=worker_id, args=(worker_id, index, *self._args)
        )
        _start_servants(method)
        try:
            process.start()
            self.processes[index] = process
            if self._on_start is not None:
                self._on_start(worker_id, process.pid or 0)
        except (AttributeError, TypeError, ValueError) as error:
            raise self._unsendable(method, error) from error
        except Exception as error:
            if type(error).__name__ == "PicklingError":
                raise self._unsendable(method, error) from error
            raise

    def _unsendable(self, method: str, error: Exception) -> InvalidArgument:
        return InvalidArgument(
            f"what the workers are to run cannot be sent to a worker started with {method!r} "
            f"({error}): handler and initializer are functions at the top level of a module, "
            "and their arguments can be pickled"
        )

    def departed(self) -> list[Departure]:
        """Those that have ended since the last call; not reaped here yet."""
        ended = self._ended()
        if not ended:
            return []
        self._seen.look()
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
        entry = self._seen.of_process(pid)
        return Departure(
            process.name,
            pid,
            self._start_ticks.get(pid, 0),
            clean=entry is not None and entry.state is ProcessState.EXITED,
            item=entry.task_item if entry is not None else 0,
            useful=entry is not None and entry.state is not ProcessState.STARTING,
        )

    def reap(self, departure: Departure, useful: bool) -> None:
        """Reap one that has ended; what it started and left behind ends with it.

        Args:
            departure: from :meth:`departed`.
            useful: whether it had answered or taken a task.
        """
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
        for records in (self._names, self._exitcodes, self._seen.last_seen):
            while len(records) > _MOST_RECORDS:
                records.pop(next(iter(records)))

    def _forget(self, process: BaseProcess) -> None:
        pid = process.pid or 0
        self._names[pid] = process.name
        self._exitcodes[pid] = process.exitcode
        self._start_ticks.pop(pid, None)
        self._ends.remove(process)

    def orphans(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """None: :meth:`departed` tells of all."""
        return []

    def exitcode_of(self, pid: int) -> int | None:
        """How one has ended, reaping it: only after its deliveries have been read.

        Args:
            pid: the worker.
        """
        for process in list(self.processes.values()):
            if process.pid == pid:
                self._signal_group(process, signal.SIGKILL)  # while its number cannot be another's
                process.join()
                return process.exitcode
        return self._exitcodes.get(pid)

    def living(self) -> list[RegistryEntry]:
        """Those with a slot that have not ended."""
        pids = {process.pid for process in list(self.processes.values())}
        return [
            each
            for each in self._seen.look()
            if each.pid in pids and each.state is not ProcessState.EXITED
        ]

    def pids(self) -> tuple[int, ...]:
        """The processes that were started and have not been reaped."""
        return tuple(process.pid for process in list(self.processes.values()) if process.pid)

    def to_dismiss(self) -> int:
        """One STOP message for each that lives."""
        return len(self.processes)

    def all_gone(self) -> bool:
        """Whether all have ended."""
        return len(self._ended()) == len(self.processes)

    def kill(self, seen: RegistryEntry) -> bool:
        """Kill one with SIGKILL if it still is at the call of this look.

        It is stopped first, so that what the second look shows is true at the kill.

        Args:
            seen: the worker, as it stood in its slot.

        Returns:
            whether it was killed.
        """
        return self.signal(seen, signal.SIGKILL)

    def signal(self, seen: RegistryEntry, signum: int) -> bool:
        """As :meth:`kill`, with another signal."""
        for process in list(self.processes.values()):
            if process.pid == seen.pid and process.is_alive():
                # One that a fork server reaps is not there any more, once it has ended.
                with contextlib.suppress(ProcessLookupError), _stopped(seen.pid):
                    if not self._seen.is_at(seen):
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
        """Give back what was used for starting them and looking after them."""
        self._args = ()
        self._ends.close()

    def stop(self, grace: float) -> None:
        """Wait for all to end; terminate, then kill, those that do not.

        Args:
            grace: how long to wait before each step, in seconds.
        """
        try:
            self._wait(grace)
            if not self.all_gone():
                self.signal_all(signal.SIGTERM)
                self._wait(min(grace, 1.0))
        finally:  # also after a second Ctrl-C
            self._reap_all()

    def wait_for_one(self, seconds: float) -> None:
        """Wait until one more has ended."""
        self._ends.wait_for_one(seconds)

    def _wait(self, seconds: float) -> None:
        """Wait for all to end, without reaping: until then a PID means what it meant."""
        deadline = time.monotonic() + seconds
        while not self.all_gone() and (left := deadline - time.monotonic()) > 0:
            self.wait_for_one(left)

    def _reap_all(self) -> None:
        self._watch_new()
        self._seen.look()
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
        """All workers that there were."""
        rows = self._seen.report(self._exitcodes)
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

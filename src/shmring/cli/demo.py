"""The main job: workers count the words of a tree of files, and the result is checked.

::

    find_files --> paths = tasks --> coordinator ==> count_words in each worker
                                          |                |
                  staged kill: a worker announces itself <-+   (with --kill)
                  in the data buffer, and is killed there
                                          |
                                          v
      count_plainly, one process ---> equal?      results, with the tasks = messages
                                                           |
                      multiprocessing.Queue and Queue: the same messages, timed

Nothing is printed here; :mod:`shmring.cli.main` does that.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import secrets
import signal
import stat
import statistics
import sysconfig
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple

from shmring import _backend as backends
from shmring.errors import Full, NotSupportedByFallback, ShmringError
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.pool.coordinator import Progress, Report, coordinator_process
from shmring.pool.task_loop import current_worker
from shmring.pool.worker import DATA_BUFFER
from shmring.pool.workers import WorkerReport, interrupts_held

__all__ = [
    "MOST_WORKERS",
    "Counted",
    "Outcome",
    "Rates",
    "Skipped",
    "compare_queues",
    "count_plainly",
    "count_words",
    "find_files",
    "find_sources",
    "run_demo",
]

# The registry has 255 slots; the dead keep theirs until somebody needs one.
MOST_WORKERS = 128

_WORD = re.compile(r"\w+")
_BLOCK_NBYTES = 1 << 20

_PID_NBYTES = 8
# How long a worker waits to be killed before it goes on after all, in seconds.
_STAGED_WAIT = 10.0

# The comparison: few messages are sent again and again, many are not all sent.
_LEAST_MESSAGES = 2000
_MOST_MESSAGES = 10_000
_MOST_NBYTES = 64 << 20
_RUNS = 5
_COMPARISON_TIMEOUT = 60.0

Tell = Callable[[str, int, int], object]


class Skipped(NamedTuple):
    """A file that was not counted, and why."""

    path: str
    reason: str


class Counted(NamedTuple):
    """What a worker answers: one string and one block of numbers, so that it is cheap to send.

    ``stamp`` is the size and the time of the last change, when the file was read.
    """

    path: str
    stamp: tuple[int, int]
    words: str
    numbers: bytes

    def counts(self) -> dict[str, int]:
        """How often each word stands in the file."""
        return dict(zip(self.words.split(), array("Q", self.numbers), strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Messages a second from one process to another; None if there was nothing to send."""

    messages: int
    shmring: float | None
    multiprocessing: float | None
    intact: bool

    @property
    def ratio(self) -> float | None:
        """How many times faster shmring was."""
        if self.shmring is None or not self.multiprocessing:
            return None
        return self.shmring / self.multiprocessing


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """All there is to be known about one run.

    Attributes:
        correct: the workers counted what a plain count counts, and each message
            of the comparison arrived as it was sent.
        files: how many files were counted.
        words: how many words they have.
        top: the ten most frequent ones.
        skipped: files that turned out to be no text, or not to be there.
        unchecked: what was counted, but changed before it could be counted again.
        workers: one row for each, the dead included.
        killed: how many were killed here.
        retried: how often a task was tried again.
        seconds: how long the workers took.
        plain_seconds: how long the plain count took.
        rates: the comparison.
    """

    correct: bool
    files: int
    words: int
    top: list[tuple[str, int]]
    skipped: list[Skipped]
    unchecked: list[str]
    workers: list[WorkerReport]
    killed: int
    retried: int
    seconds: float
    plain_seconds: float
    rates: Rates


def run_demo(files: list[str], workers: int, *, kill: bool, tell: Tell) -> Outcome:
    """Count the words of files, check the result, compare the queues.

    Args:
        files: from :func:`find_files`.
        workers: how many processes count, 1 to ``MOST_WORKERS``.
        kill: whether to kill one of them halfway.
        tell: called with a stage ("count", "check" or "compare"), how many
            steps of it are done, and of how many.

    Returns:
        what came out.

    Raises:
        NotSupportedByFallback: ``kill`` without the ring.
        ShmringError: the workers could not do it.
    """
    if kill and backends.backend != "ring":
        raise NotSupportedByFallback(
            "a worker cannot be killed safely on the fallback: its death may wedge the pipe"
        )
    report, killed = _count_in_workers(files, workers, kill, tell)
    counted = [each for each in report.results if isinstance(each, Counted)]
    skipped = [each for each in report.results if isinstance(each, Skipped)]

    began = time.monotonic()
    equal, unchecked = _check(counted, tell)
    plain_seconds = time.monotonic() - began
    rates = compare_queues(_messages(files, report.results), tell)

    total: collections.Counter[str] = collections.Counter()
    for each in counted:
        total.update(each.counts())
    return Outcome(
        correct=equal and rates.intact,
        files=len(counted),
        words=total.total(),
        top=total.most_common(10),
        skipped=skipped,
        unchecked=unchecked,
        workers=report.workers,
        killed=killed,
        retried=report.retried,
        seconds=report.seconds,
        plain_seconds=plain_seconds,
        rates=rates,
    )


# -- files --------------------------------------------------------------------------------


def find_sources() -> tuple[list[str], list[Skipped]]:
    """The sources of the standard library of this Python: text that every machine has.

    Returns:
        as :func:`find_files`, but nothing that was installed, and no byte code.
    """
    found, skipped = find_files(
        sysconfig.get_path("stdlib"), {"site-packages", "dist-packages", "__pycache__"}
    )
    return [path for path in found if path.endswith(".py")], skipped


def find_files(path: str, without: set[str] | None = None) -> tuple[list[str], list[Skipped]]:
    """The regular files under a path, in order.

    Links to files are followed, links to folders are not: they might lead round
    in a circle.

    Args:
        path: a folder, or one file.
        without: names of folders that are left out.

    Returns:
        the files, and what is none or cannot be looked into.

    Raises:
        FileNotFoundError: nothing is there.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"PATH {path!r} does not exist") from error
    except (OSError, ValueError) as error:  # a file taken for a folder, a circle, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileNotFoundError(f"PATH {path!r} cannot be found: {reason}") from error
    files: list[str] = []
    skipped: list[Skipped] = []
    if not is_folder:
        _sort_in(path, files, skipped)
        return files, skipped

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), _reason(error)))

    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = sorted(set(folders) - (without or set()))
        for name in folders:
            if os.path.islink(linked := os.path.join(folder, name)):
                skipped.append(Skipped(linked, "link to a folder"))
        for name in sorted(names):
            _sort_in(os.path.join(folder, name), files, skipped)
    return files, skipped


def _sort_in(path: str, files: list[str], skipped: list[Skipped]) -> None:
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        skipped.append(Skipped(path, _reason(error)))
        return
    if regular:
        files.append(path)
    else:
        skipped.append(Skipped(path, "not a regular file"))


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return f"unreadable: {error.strerror or type(error).__name__}"


# -- counting -----------------------------------------------------------------------------


def count_words(path: str) -> Counted | Skipped:
    """What the workers do.

    Args:
        path: the file.

    Returns:
        what was counted, or why not.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return Skipped(path, "not a regular file")
            counts: collections.Counter[str] = collections.Counter()
            empty = True
            while block := file.read(_BLOCK_NBYTES):
                empty = False
                # Looked at before the line is completed: a huge file of zeros is one line.
                if b"\0" in block:
                    return Skipped(path, "binary")
                # Between lines, neither a word nor a character can be cut.
                rest = file.readline()
                if b"\0" in rest:
                    return Skipped(path, "binary")
                counts.update(_WORD.findall((block + rest).decode("utf-8", "replace").lower()))
    except OSError as error:
        return Skipped(path, _reason(error))
    if empty:
        return Skipped(path, "empty")
    numbers = array("Q", counts.values()).tobytes()
    return Counted(path, _stamp(found), " ".join(counts), numbers)


def count_plainly(path: str) -> collections.Counter[str]:
    """The same without workers, queues and packing, for the check.

    Args:
        path: a text file.

    Returns:
        how often each word stands in it.
    """
    counts: collections.Counter[str] = collections.Counter()
    with open(path, encoding="utf-8", errors="replace") as file:
        while lines := file.readlines(_BLOCK_NBYTES):
            counts.update(_WORD.findall("".join(lines).lower()))
    return counts


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe that took the place of a file would be waited for, for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _check(counted: list[Counted], tell: Tell) -> tuple[bool, list[str]]:
    """Count again; returns whether all is equal, and what has changed since and tells nothing."""
    equal = True
    unchecked = []
    for done, each in enumerate(counted, 1):
        try:
            plain = count_plainly(each.path)
            unchanged = _stamp(os.stat(each.path)) == each.stamp
        except OSError:
            unchanged = False
        if not unchanged:
            unchecked.append(each.path)
        elif plain != each.counts():
            equal = False
        tell("check", done, len(counted))
    return equal, unchecked


# -- workers ------------------------------------------------------------------------------


def _count_in_workers(files: list[str], workers: int, kill: bool, tell: Tell) -> tuple[Report, int]:
    """Have the files counted; returns the report, and how many workers were killed here."""
    victim = files[len(files) // 2] if kill and files else None
    handler = count_words if victim is None else functools.partial(_count_or_die, victim=victim)

    def progress(now: Progress) -> None:
        tell("count", now.done, len(files))

    namespace = f"demo-{os.getpid()}-{secrets.token_hex(4)}"
    with HighPerformanceIPC("demo", namespace=namespace) as ipc, contextlib.ExitStack() as stack:
        executioner = stack.enter_context(_Executioner(ipc))
        release = stack.enter_context(interrupts_held())

        def tasks() -> Iterator[str]:
            # The first task is asked for when the workers have been started; they inherit that
            # Ctrl-C is blocked, and cannot die of it before they have learnt to ignore it.
            release()
            if victim is not None:
                executioner.start()
            yield from files

        report = coordinator_process(
            ipc, workers, tasks=tasks(), spawn=True, handler=handler, progress=progress
        )
    return report, executioner.killed


def _count_or_die(path: str, victim: str) -> Counted | Skipped:
    """With ``--kill``: whoever counts the victim first is killed with the task undone.

    It announces itself and waits, so that the shot cannot miss: a task takes a
    millisecond, and the worker is to be in the middle of one.
    """
    answer = count_words(path)
    worker = current_worker()
    if path == victim and worker is not None:
        announced = worker.ipc.read_shared_data(DATA_BUFFER, _PID_NBYTES)
        if not any(announced):  # or else this is the second attempt
            worker.ipc.write_shared_data(DATA_BUFFER, os.getpid().to_bytes(_PID_NBYTES, "little"))
            deadline = time.monotonic() + _STAGED_WAIT
            while time.monotonic() < deadline:
                worker.beat()
                time.sleep(0.01)
    return answer


class _Executioner:
    """Kills the worker that announces itself in the data buffer; a context manager.

    Args:
        ipc: the coordinator's.

    Attributes:
        killed: how many were.
    """

    def __init__(self, ipc: HighPerformanceIPC) -> None:
        self.killed = 0
        self._ipc = ipc
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="executioner")

    def start(self) -> None:
        """Begin to watch: not before the workers run, for a fork copies what a thread holds."""
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            memory = self._ipc.shared_memories.get(DATA_BUFFER)
            if memory is None:
                continue
            with contextlib.suppress(ShmringError, OSError):  # all is over, in either case
                pid = int.from_bytes(memory.read_data(_PID_NBYTES), "little")
                if pid:
                    os.kill(pid, signal.SIGKILL)
                    self.killed += 1
                    return

    def __enter__(self) -> _Executioner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()


# -- the comparison -----------------------------------------------------------------------


def _messages(tasks: list[str], results: list[Any]) -> list[Any]:
    """What went through the queues of the job, or the first part of it."""
    messages: list[Any] = []
    nbytes = 0
    for pair in zip(tasks, results, strict=True):
        messages += pair
        answer = pair[1]
        nbytes += len(answer.words) + len(answer.numbers) if isinstance(answer, Counted) else 0
        if len(messages) >= _MOST_MESSAGES or nbytes >= _MOST_NBYTES:
            break
    return messages


def compare_queues(messages: list[Any], tell: Tell) -> Rates:
    """Send the same messages to another process through either kind of queue, by turns.

    Args:
        messages: anything that can be pickled and compared; few are sent
            several times.
        tell: as for :func:`run_demo`.

    Returns:
        the medians of the rates.

    Raises:
        ShmringError: the other process died or stands still.
    """
    if not messages:
        return Rates(0, None, None, True)
    times = max(1, _LEAST_MESSAGES // len(messages))
    context = multiprocessing.get_context()
    ours: Any = backends.Queue()
    theirs: Any = context.Queue()
    here, there = context.Pipe()
    consumer = context.Process(
        target=_consume, args=(there, theirs, ours, messages, times), name="consumer"
    )
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    try:
        with interrupts_held():
            consumer.start()
        there.close()  # its death is then the end of the pipe
        for run in range(_RUNS + 1):
            for name, queue in (("theirs", theirs), ("ours", ours)):
                took = _send(queue, messages, times, here)
                if run:  # the first one warms up
                    seconds[name].append(took)
            tell("compare", run + 1, _RUNS + 1)
        intact = bool(_hear(here))
        consumer.join(_COMPARISON_TIMEOUT)
    except BaseException:
        if consumer.pid is not None:
            consumer.kill()
        for queue in (theirs, ours):  # nobody reads any more what a thread still writes
            queue.cancel_join_thread()
        raise
    finally:
        if consumer.pid is not None:
            consumer.join()
        here.close()
        theirs.close()
        ours.close()
    number = len(messages) * times
    return Rates(
        messages=number,
        shmring=number / statistics.median(seconds["ours"]),
        multiprocessing=number / statistics.median(seconds["theirs"]),
        intact=intact,
    )


def _send(queue: Any, messages: list[Any], times: int, here: Any) -> float:
    """One run: from the first put to the news that the last message was taken."""
    _hear(here)  # ready
    began = time.perf_counter()
    put = queue.put
    try:
        for message in itertools.chain.from_iterable(itertools.repeat(messages, times)):
            # A ring that may grow no more waits, and nobody might be there to make room.
            put(message, True, _COMPARISON_TIMEOUT)
    except Full as error:
        raise _standstill() from error
    _hear(here)  # done
    return time.perf_counter() - began


def _standstill() -> ShmringError:
    return ShmringError(
        f"the comparison stands still: no sign of its consumer for {_COMPARISON_TIMEOUT:g} s"
    )


def _hear(here: Any) -> Any:
    if not connection.wait([here], _COMPARISON_TIMEOUT):
        raise _standstill()
    try:
        return here.recv()
    except (EOFError, OSError) as error:
        raise ShmringError("the consumer of the comparison died") from error


def _consume(there: Any, theirs: Any, ours: Any, messages: list[Any], times: int) -> None:
    """The other side of the comparison; what arrives is looked at off the clock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    expected = messages * times
    intact = True
    with contextlib.suppress(BrokenPipeError):  # the other side has given up
        for _ in range(_RUNS + 1):
            for queue in (theirs, ours):
                get = queue.get
                there.send("ready")
                received = [get() for _ in expected]
                there.send("done")
                intact = intact and received == expected
        there.send(intact)

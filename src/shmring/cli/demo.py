"""The main job: workers count the words of a tree of files, and the result is checked.

::

    find_files --> {path: size} --> chunks of equal size
                                         |
                      +------------------+------------------+
                      | pool.map                            | map
                      v                                     v
         count_files in each worker             count_files, one process alone
                      |                                     |
                      +---> merged, timed ---> equal? <-----+
                               |
                               v
           words = messages: multiprocessing.Queue and Queue, timed

Nothing is printed here; :mod:`shmring.cli.demo_view` does that.
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
import signal
import stat
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, NamedTuple

from shmring import _backend as backends
from shmring.errors import Full, ShmringError
from shmring.pool.executor import ProcessPoolExecutor
from shmring.tasks.interrupts import interrupts_held
from shmring.tasks.workers import WorkerReport

__all__ = [
    "Outcome",
    "Part",
    "Rates",
    "Skipped",
    "compare_queues",
    "count_files",
    "find_files",
    "find_sources",
    "run_demo",
]

_WORD = re.compile(r"\w+")
# The words of a block stay in the cache of one core.
_BLOCK_NBYTES = 1 << 16
# More balance the load better, fewer merge sooner.
_CHUNKS_A_WORKER = 4

_RUNS = 5
# For the consumer of the comparison, in seconds.
_PATIENCE = 60.0

Tell = Callable[[str, int, int], object]


class Skipped(NamedTuple):
    """A file that was not counted or not checked, and why."""

    path: str
    reason: str


class _NoText(ValueError):
    """A file has no text in it."""


class Part(NamedTuple):
    """What a chunk of files contains."""

    counts: collections.Counter[str]
    stamps: dict[str, tuple[int, int]]  # size and last change of each file when it was read
    skipped: list[Skipped]


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
        if self.shmring is None or self.multiprocessing is None:
            return None
        return self.shmring / self.multiprocessing


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """All there is to be known about one run."""

    correct: bool  # one process alone counts the same, and every message arrived as it was sent
    files: int
    words: int
    top: list[tuple[str, int]]  # the ten most frequent words
    skipped: list[Skipped]
    unchecked: list[Skipped]  # they changed before they could be counted again
    workers: tuple[WorkerReport, ...]  # the dead included; none on the fallback
    killed: int
    retried: int
    seconds: float  # start and end of the pool included
    seconds_alone: float
    rates: Rates


def run_demo(
    files: dict[str, int], workers: int, messages: int, *, kill: bool, tell: Tell
) -> Outcome:
    """Count the words of files, check the result, compare the queues.

    Args:
        files: from :func:`find_files`.
        workers: how many processes count.
        messages: how many messages the comparison sends.
        kill: whether a worker is killed in the middle; not on the fallback.
        tell: called with a stage ("count", "check" or "compare"), how many
            steps of it are done, and of how many.
    """
    chunks = _chunks(files, workers * _CHUNKS_A_WORKER)

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        count = count_files
        if kill:
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            count = functools.partial(_count_and_die_once, stack.enter_context(folder))
        pool = stack.enter_context(_executor(workers))
        with interrupts_held():  # until the workers have been started
            results = stack.enter_context(contextlib.closing(pool.map(count, chunks)))
        total, parts = _merged(results, chunks, "count", tell)
    seconds = time.monotonic() - began
    found = pool.statistics() if isinstance(pool, ProcessPoolExecutor) else None

    began = time.monotonic()
    _, parts_alone = _merged(map(count_files, chunks), chunks, "check", tell)
    seconds_alone = time.monotonic() - began
    equal, unchecked = _compare(parts, parts_alone)

    words = itertools.islice(itertools.cycle(total.items()), max(1, messages // _RUNS))
    rates = compare_queues(list(words), tell)
    return Outcome(
        correct=equal and rates.intact,
        files=sum(len(part.stamps) for part in parts),
        words=total.total(),
        top=total.most_common(10),
        skipped=[each for part in parts for each in part.skipped],
        unchecked=unchecked,
        workers=found.workers if found else (),
        killed=found.died if found else 0,
        retried=found.retried if found else 0,
        seconds=seconds,
        seconds_alone=seconds_alone,
        rates=rates,
    )


def _executor(workers: int, retries: int = 2, **options: Any) -> Any:
    if backends.backend == "ring":
        return ProcessPoolExecutor(workers, max_retries=retries, **options)
    return futures.ProcessPoolExecutor(workers, **options)


# -- files --------------------------------------------------------------------------------


def find_sources() -> tuple[dict[str, int], list[Skipped]]:
    """The sources of the standard library of this Python: text that every machine has."""
    found, skipped = find_files(
        sysconfig.get_path("stdlib"), {"site-packages", "dist-packages", "__pycache__"}
    )
    return {path: size for path, size in found.items() if path.endswith(".py")}, skipped


def find_files(path: str, without: set[str] | None = None) -> tuple[dict[str, int], list[Skipped]]:
    """The regular files under a path, in order.

    Links to files are followed, links to folders are not: they might lead round
    in a circle.  Folders named in `without` are left out.

    Returns:
        The files with their sizes, and what is none or cannot be looked into.

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
    files: dict[str, int] = {}
    skipped: list[Skipped] = []

    def sort_in(path: str) -> None:
        try:
            files[path] = _regular(os.stat(path)).st_size
        except (OSError, _NoText) as error:
            skipped.append(Skipped(path, _reason(error)))

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), _reason(error)))

    if not is_folder:
        sort_in(path)
    for folder, folders, names in os.walk(path, onerror=unreadable) if is_folder else ():
        folders[:] = sorted(set(folders) - (without or set()))
        for name in folders:
            if os.path.islink(linked := os.path.join(folder, name)):
                skipped.append(Skipped(linked, "link to a folder"))
        for name in sorted(names):
            sort_in(os.path.join(folder, name))
    return files, skipped


def _regular(found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise _NoText("not a regular file")
    return found


def _reason(error: OSError | _NoText) -> str:
    if isinstance(error, _NoText):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "missing"
    return f"unreadable: {error.strerror or type(error).__name__}"


def _chunks(files: dict[str, int], number: int) -> list[list[str]]:
    """Share files out by size; neighbours stay together, since they share words."""
    share = max(1, sum(files.values())) / number
    before = itertools.accumulate(files.values(), initial=0)
    groups = itertools.groupby(zip(files, before, strict=False), lambda each: each[1] // share)
    return [[path for path, _ in group] for _, group in groups]


# -- counting -----------------------------------------------------------------------------


def count_files(paths: Iterable[str]) -> Part:
    """Count the words of files: what the workers do, and one process alone."""
    part = Part(collections.Counter(), {}, [])
    for path in paths:
        try:
            part.stamps[path] = _count_file(path, part.counts)
        except (OSError, _NoText) as error:
            part.skipped.append(Skipped(path, _reason(error)))
    return part


def _count_and_die_once(folder: str, paths: list[str]) -> Part:
    """With ``--kill``: the first worker that has counted a chunk is killed before it answers."""
    part = count_files(paths)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)  # of all workers, one can
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def _count_file(path: str, counts: collections.Counter[str]) -> tuple[int, int]:
    """Add the words of a file to `counts`, or nothing if it is no text; return its stamp."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        found = _regular(os.fstat(file.fileno()))
        if any(b"\0" in block for block in iter(lambda: file.read(_BLOCK_NBYTES), b"")):
            raise _NoText("binary")
        if file.tell() == 0:
            raise _NoText("empty")
        file.seek(0)
        while block := file.read(_BLOCK_NBYTES):
            # Between lines, neither a word nor a character can be cut.
            text = (block + file.readline()).decode("utf-8", "replace")
            counts.update(_WORD.findall(text.lower()))
    return found.st_size, found.st_mtime_ns


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe that took the place of a file would be waited for, for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _merged(
    results: Iterable[Part], chunks: list[list[str]], stage: str, tell: Tell
) -> tuple[collections.Counter[str], list[Part]]:
    """Add up the counts of the chunks."""
    total: collections.Counter[str] = collections.Counter()
    parts: list[Part] = []
    for part in results:
        total.update(part.counts)
        parts.append(part)
        done = sum(map(len, chunks[: len(parts)]))
        tell(stage, done, sum(map(len, chunks)))
    return total, parts


def _compare(parts: list[Part], parts_alone: list[Part]) -> tuple[bool, list[Skipped]]:
    """Whether both counted the same, and the files of which that cannot be known."""
    equal = True
    unchecked: list[Skipped] = []
    for part, alone in zip(parts, parts_alone, strict=True):
        changed = {path for path, stamp in part.stamps.items() if alone.stamps.get(path) != stamp}
        if not changed:
            equal = equal and part.counts == alone.counts
            continue
        for path in part.stamps:
            reason = "changed meanwhile" if path in changed else "counted with one that changed"
            unchecked.append(Skipped(path, reason))
    return equal, unchecked


# -- the comparison -----------------------------------------------------------------------


def compare_queues(messages: list[Any], tell: Tell) -> Rates:
    """Send the same messages to another process through either kind of queue, by turns.

    Raises:
        ShmringError: the other process died (on the fallback BrokenExecutor) or stands still.
    """
    if not messages:
        return Rates(0, None, None, True)
    queues: dict[str, Any] = {
        "multiprocessing": multiprocessing.Queue(),
        "shmring": backends.Queue(),
    }
    rates: dict[str, list[float]] = {name: [] for name in queues}
    intact = True
    with _executor(1, retries=0, initializer=_inherit, initargs=(queues, messages)) as pool:
        try:
            for run in range(_RUNS + 1):
                for name, queue in queues.items():
                    seconds, same = _send(pool, name, queue, messages)
                    intact = intact and same
                    if run:  # the first one warms up
                        rates[name].append(len(messages) / seconds)
                tell("compare", run + 1, _RUNS + 1)
        except BaseException as error:
            for process in list(pool._processes.values()):
                process.kill()
            if isinstance(error, Full | TimeoutError):
                raise ShmringError(f"the comparison stands still for {_PATIENCE:g} s") from error
            raise
        finally:
            for queue in queues.values():
                queue.cancel_join_thread()  # no process reads what a thread still writes
                queue.close()
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return Rates(messages=len(messages) * _RUNS, intact=intact, **medians)


def _send(pool: Any, name: str, queue: Any, messages: list[Any]) -> tuple[float, bool]:
    """One run: the time from the first put to the last get, and whether all came as sent."""
    with interrupts_held():  # until the consumer has been started
        received = pool.submit(_receive, name)
    began = time.monotonic()
    for message in messages:
        queue.put(message, True, _PATIENCE)
    ended, same = received.result(_PATIENCE)
    return ended - began, same


_inherited: dict[str, Any] = {}  # in the consumer: the queues, and what will come


def _inherit(queues: dict[str, Any], messages: list[Any]) -> None:
    _inherited.update(queues, messages=messages)


def _receive(name: str) -> tuple[float, bool]:
    """The other side of the comparison; what arrives is looked at off the clock."""
    get, messages = _inherited[name].get, _inherited["messages"]
    received = [get() for _ in messages]
    return time.monotonic(), received == messages

"""What an executor offers, whatever runs its tasks: a pool of processes, or Dask."""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, Literal, TypeVar, cast

from shmring.arguments import checked_int
from shmring.errors import InvalidArgument
from shmring.tasks.channel import SPREAD
from shmring.tasks.task_table import Failure, PartialResults

__all__ = ["Event", "PoolStatistics", "TaskCalls", "TaskExecutor"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a pool.

    Attributes:
        kind: "started", "left", "died", "retried", "timed out", "too large", "cancelled".
        worker: the name of the worker.
        pid: its process.
        task: the number of the task; None where it is about the worker alone.
    """

    kind: str
    worker: str
    pid: int
    task: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Counts of a pool.

    Attributes:
        submitted: tasks taken in; a chunk of ``map`` is one.
        answered: tasks that have a result or an exception.
        waiting: tasks that no worker has taken yet, as far as known.
        retried: how often a task was put back because its worker died.
        died: workers that ended without being told to.
        workers: one row for each worker that there was.
    """

    submitted: int
    answered: int
    waiting: int
    retried: int
    died: int
    workers: tuple[Any, ...]


class TaskCalls(abc.ABC):
    """The calls that schedule tasks."""

    _chunk_seconds = 0.005  # at which chunksize="auto" aims
    _max_workers: int
    _max_retries: int

    @abc.abstractmethod
    def _submit(
        self, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any] | int, retries: int
    ) -> Future[Any]:
        """Schedule a call, or a chunk of calls: a tuple of items, and flags."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Schedule ``fn(*args, **kwargs)``.

        Args:
            fn, args, kwargs: pickled by the calling thread.

        Returns:
            its future. An argument that cannot be pickled is the future's exception.

        Raises:
            RuntimeError: the pool was shut down.
            BrokenProcessPool: the pool is broken.
        """
        return self._submit(fn, args, kwargs, self._max_retries)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """The results of ``map(fn, *iterables)``, in order.

        Args:
            fn: called in the workers.
            iterables: read at once, or as results are taken if `buffersize` is given.
            timeout: seconds from now until the last result; None for ever.
            chunksize: how many calls travel together.
            buffersize: how many chunks may be ahead of the results that were taken.

        Returns:
            an iterator; closing it cancels what no worker has taken.

        Raises:
            TimeoutError: from the iterator.
            InvalidArgument: an impossible chunksize or buffersize.
        """
        if chunksize < 1:
            raise InvalidArgument(f"chunksize={chunksize}: chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise InvalidArgument(f"buffersize={buffersize}: buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        submit, retries = self._submit, self._max_retries
        ahead: Iterator[Future[Any]]
        if chunksize == 1:
            calls = zip(*iterables, strict=False)
            ahead = (submit(fn, args, {}, retries) for args in calls)
        else:
            spread = len(iterables) != 1
            items = zip(*iterables, strict=False) if spread else iter(iterables[0])
            # Tuples, also as results: garbage collection leaves those of simple objects alone.
            chunks = iter(lambda: tuple(itertools.islice(items, chunksize)), ())
            flags = SPREAD if spread else 0
            ahead = (submit(fn, chunk, flags, retries) for chunk in chunks)
        first = collections.deque(itertools.islice(ahead, buffersize))
        results = _results(ahead, first, deadline, buffersize is not None)
        next(results)
        if chunksize == 1:
            return results
        chained = cast("_Chained[T]", _Chained.from_iterable(_successful(results)))
        chained.chunks = results
        return chained

    def map_unordered(
        self,
        fn: Callable[[Any], T],
        iterable: Iterable[Any],
        *,
        chunksize: int | Literal["auto"] = "auto",
        buffersize: int | None = None,
        progress: bool | Callable[[int, int | None], object] = False,
    ) -> Iterator[T]:
        """The results of ``fn(item)`` for each item, in the order in which they come.

        Args:
            fn: called in the workers.
            iterable: may be endless: it is read as results are taken.
            chunksize: how many calls travel together; "auto" finds it while it runs.
            buffersize: how many chunks may be ahead of the results that were taken;
                None for four a worker.
            progress: True for a bar (extra ``pool``), or called with (done, total or None).

        Returns:
            an iterator; closing it cancels what no worker has taken.

        Raises:
            InvalidArgument: an impossible chunksize or buffersize.
            ImportError: `progress` is True and the extra is not installed.
        """
        from shmring.pool.stream import unordered

        return unordered(self, fn, iterable, chunksize, buffersize, progress)


class _TasksWithRetries(TaskCalls):
    """An executor with another number of retries: see :meth:`TaskExecutor.options`."""

    def __init__(self, executor: TaskExecutor, retries: int) -> None:
        self._executor = executor
        self._max_retries = checked_int(retries, "retries", 0)
        self._max_workers = executor._max_workers
        self._chunk_seconds = executor._chunk_seconds

    def _submit(self, fn: Any, args: Any, kwargs: Any, retries: int) -> Future[Any]:
        return self._executor._submit(fn, args, kwargs, retries)


class TaskExecutor(TaskCalls, Executor):
    """An executor that has each call answered once, whatever dies, or says why not."""

    def options(self, *, retries: int) -> TaskCalls:
        """The same executor, with another number of retries.

        Args:
            retries: how often a task whose worker died is tried again; 0 is at most once.

        Returns:
            an object with ``submit``, ``map`` and ``map_unordered``.

        Raises:
            InvalidArgument: a negative number.
        """
        return _TasksWithRetries(self, retries)

    @abc.abstractmethod
    def statistics(self) -> PoolStatistics:
        """Counts at this moment."""

    @abc.abstractmethod
    def _kill(self, signum: int) -> None:
        """End what runs, and shut down."""

    def terminate_workers(self) -> None:
        """Send SIGTERM to all workers, and shut down; running tasks fail."""
        self._kill(signal.SIGTERM)

    def kill_workers(self) -> None:
        """Send SIGKILL to all workers, and shut down; running tasks fail."""
        self._kill(signal.SIGKILL)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> Literal[False]:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            self.kill_workers()
        else:
            self.shutdown(wait=True)
        return False


class _Chained(itertools.chain[T]):
    """The results in chunks as single ones: no Python code runs between two of a chunk."""

    chunks: Generator[Any]

    def close(self) -> None:
        """Cancel what no worker has taken."""
        self.chunks.close()
        collections.deque(self, maxlen=0)  # what is left of the chunk that was begun


def _results(
    ahead: Iterator[Future[Any]],
    futures: collections.deque[Future[Any]],
    deadline: float | None,
    buffered: bool,
) -> Generator[Any]:
    """Take the results in order; if not all is submitted yet, submit one more for each."""
    try:
        yield  # up to here at once: one that was never begun would not cancel when it is closed
        while futures:
            future = futures.popleft()
            left = None if deadline is None else deadline - time.monotonic()
            try:
                last = [future.result(left)]
            except BaseException:
                future.cancel()
                raise
            del future
            if buffered:
                futures.extend(itertools.islice(ahead, 1))
            yield last.pop()  # what was taken is kept by its taker alone
    finally:
        for each in futures:
            each.cancel()


def _successful(chunks: Generator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """Results of chunks, up to the first call that failed: its exception is raised."""
    with contextlib.closing(chunks):
        for results in chunks:
            if type(results) is not PartialResults:
                yield results
                continue
            for index, each in enumerate(results):
                if isinstance(each, Failure):
                    yield results[:index]
                    raise each.error

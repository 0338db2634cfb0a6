"""ProcessPoolExecutor: the interface of concurrent.futures over the dispatcher.

::

    submit(), map() in any thread                     worker processes
        |                                               ^          |
        v                     task queue                |          |
    Dispatcher.submit() ------------------------------>-+          | answer queue
        ^                                                          v
        |  requeue, replace, time out                       manager thread
        +---------------------------------------------------- finishes futures
"""

from __future__ import annotations

import collections
import itertools
import logging
import multiprocessing
import operator
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Literal, TypeVar

from shmring._backend import backend
from shmring.arguments import checked_timeout
from shmring.errors import InvalidArgument, NotSupportedByFallback
from shmring.pool.future import TaskFuture
from shmring.tasks.channel import SPREAD, FunctionReferences
from shmring.tasks.task_table import Failure, Task, TaskCancelled

__all__ = ["ProcessPoolExecutor"]

T = TypeVar("T")

MOST_WORKERS = 128  # a queue has so many places for deliveries


class ProcessPoolExecutor(Executor):
    """Runs calls in worker processes, as ``concurrent.futures.ProcessPoolExecutor``.

    What differs on purpose: a worker that dies is replaced and its unanswered task runs
    again; a task fails alone, with :class:`~shmring.WorkerDied`, when it was tried too
    often. The pool breaks (``BrokenProcessPool``) only if an initializer fails, or
    workers keep dying before they have done anything.

    Args:
        max_workers: how many processes, at most 128; None for one a CPU.
        mp_context: a context of multiprocessing; None for the default.
        initializer: called in each worker before its first task.
        initargs: its arguments.
        max_tasks_per_child: a worker is replaced after so many tasks; the start method
            is then "spawn" unless `mp_context` says otherwise.
        max_retries: how often a task whose worker died is tried again. A call that
            must not run twice: ``pool.options(retries=0).submit(...)``.
        task_timeout: seconds that a call may take, also inside a chunk; then its worker
            is killed with the processes it started, and the call fails with TaskTimeout.
        max_memory_per_worker: bytes of resident memory. A worker above it is replaced
            between two tasks; a call that outgrows it fails with MemoryExceeded
            (extra ``pool``).
        on_event: called with an Event: see ``Event.kind``; by the thread of the pool, or by
            the one whose submit() starts workers. What it raises is logged.

    Raises:
        InvalidArgument: (a ValueError) an impossible number.
        TypeError: an argument of the wrong type.
        NotSupportedByFallback: the ring is not there.
    """

    _chunk_seconds = 0.005  # at which chunksize="auto" aims

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        max_retries: int = 2,
        task_timeout: float | None = None,
        max_memory_per_worker: int | None = None,
        on_event: Callable[[Any], object] | None = None,
    ) -> None:
        if backend != "ring":
            raise NotSupportedByFallback(
                "ProcessPoolExecutor: a pipe cannot tell what a dead worker had taken; "
                "use concurrent.futures.ProcessPoolExecutor here"
            )
        if max_workers is None:
            max_workers = min(_cpu_count(), MOST_WORKERS)
        if max_workers <= 0:
            raise InvalidArgument(f"max_workers={max_workers}: max_workers must be greater than 0")
        if max_workers > MOST_WORKERS:
            raise InvalidArgument(f"max_workers={max_workers}: max_workers must be <= 128")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, not {initializer!r}")
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event must be a callable, not {on_event!r}")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError(f"max_tasks_per_child={max_tasks_per_child!r} must be an integer")
            if max_tasks_per_child <= 0:
                raise InvalidArgument(f"max_tasks_per_child={max_tasks_per_child} must be >= 1")
        check_retries("max_retries", max_retries)
        if max_memory_per_worker is not None:
            max_memory_per_worker = operator.index(max_memory_per_worker)
            if max_memory_per_worker < 1 << 20:
                raise InvalidArgument(
                    f"max_memory_per_worker={max_memory_per_worker}: bytes, at least 1 MiB"
                )
            _import_psutil()
        if mp_context is None:
            method = "spawn" if max_tasks_per_child is not None else None
            mp_context = multiprocessing.get_context(method)
        forks = mp_context.get_start_method(allow_none=False) == "fork"
        if forks and max_tasks_per_child is not None:
            raise InvalidArgument(
                "max_tasks_per_child is incompatible with the 'fork' start method: a worker is"
                " replaced while other threads run; supply mp_context"
            )
        from shmring.pool.manager import Manager

        self._max_workers = max_workers
        self._mp_context = mp_context
        self._max_retries = max_retries
        self._references = FunctionReferences()
        self._manager = Manager(
            max_workers,
            mp_context,
            at_once=forks,
            task_timeout=checked_timeout(task_timeout, "task_timeout"),
            on_event=on_event,
            memory_limit=max_memory_per_worker,
            setting={
                "initializer": initializer,
                "initargs": initargs,
                "max_tasks": max_tasks_per_child,
                "memory_limit": max_memory_per_worker,
                "log_level": logging.getLogger().getEffectiveLevel(),
            },
        )
        self._finalizer = weakref.finalize(self, self._manager.close, False)
        self._finalizer.atexit = False

    # -- tasks -----------------------------------------------------------------------------

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

    def _submit(
        self, fn: Callable[..., T], args: Any, kwargs: dict[str, Any] | int, retries: int
    ) -> TaskFuture[Any]:
        manager = self._manager
        future: TaskFuture[Any] = TaskFuture(manager.dispatcher)
        task = Task(self._references.get(fn), args, kwargs, future._finish, retries)
        future._task = task
        manager.submit(task)
        return future

    def options(self, *, retries: int) -> PoolView:
        """The same pool, with another number of retries.

        Args:
            retries: how often a task whose worker died is tried again; 0 is at most once.

        Returns:
            an object with ``submit`` and ``map``.

        Raises:
            InvalidArgument: a negative number.
        """
        return PoolView(self, retries)

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
        return self._map(fn, iterables, timeout, chunksize, buffersize, self._max_retries)

    def _map(
        self,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        retries: int,
    ) -> Iterator[T]:
        if chunksize < 1:
            raise InvalidArgument(f"chunksize={chunksize}: chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise InvalidArgument(f"buffersize={buffersize}: buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        if chunksize == 1:
            calls = zip(*iterables, strict=False)
            ahead = (self._submit(fn, args, {}, retries) for args in calls)
        else:
            spread = len(iterables) != 1
            items = zip(*iterables, strict=False) if spread else iter(iterables[0])
            chunks = iter(lambda: list(itertools.islice(items, chunksize)), [])
            flags = SPREAD if spread else 0
            ahead = (self._submit(fn, chunk, flags, retries) for chunk in chunks)
        first = collections.deque(itertools.islice(ahead, buffersize))
        results = _results(ahead, first, deadline, chunksize > 1, buffersize is not None)
        next(results)
        return results

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

        return unordered(self, fn, iterable, chunksize, buffersize, progress, self._max_retries)

    # -- what goes on ----------------------------------------------------------------------

    def statistics(self) -> Any:
        """PoolStatistics at this moment: tasks, retries, deaths, one row a worker."""
        return self._manager.statistics()

    @property
    def _processes(self) -> dict[int, Any]:
        """The workers by pid, as in the standard library's class."""
        return {each.pid or 0: each for each in list(self._manager.workers.processes.values())}

    @property
    def _broken(self) -> Any:
        return self._manager.broken or False

    # -- the end ---------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; what was submitted is done, unless it is cancelled.

        Args:
            wait: return when all is done and the workers have ended.
            cancel_futures: cancel what no worker has taken.
        """
        self._finalizer.detach()
        for task in self._manager.close(cancel_futures):
            task.done(Failure(TaskCancelled()))
        if wait:
            self._manager.join()

    def terminate_workers(self) -> None:
        """Send SIGTERM to all workers, and shut down; running tasks fail."""
        self._kill(signal.SIGTERM)

    def kill_workers(self) -> None:
        """Send SIGKILL to all workers, and shut down; running tasks fail."""
        self._kill(signal.SIGKILL)

    def _kill(self, signum: int) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        self._manager.kill(signum)
        self._manager.join()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> Literal[False]:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            self.kill_workers()
        else:
            self.shutdown(wait=True)
        return False


class PoolView:
    """A pool with another number of retries: see :meth:`ProcessPoolExecutor.options`."""

    def __init__(self, pool: ProcessPoolExecutor, retries: int) -> None:
        check_retries("retries", retries)
        self._pool = pool
        self._retries = retries

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As :meth:`ProcessPoolExecutor.submit`."""
        return self._pool._submit(fn, args, kwargs, self._retries)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As :meth:`ProcessPoolExecutor.map`."""
        return self._pool._map(fn, iterables, timeout, chunksize, buffersize, self._retries)


def _results(
    ahead: Iterator[TaskFuture[Any]],
    futures: collections.deque[TaskFuture[Any]],
    deadline: float | None,
    chunked: bool,
    buffered: bool,
) -> Iterator[Any]:
    """Take the results in order; if not all is submitted yet, submit one more for each."""
    try:
        yield  # up to here at once: one that was never begun would not cancel when it is closed
        while futures:
            future = futures.popleft()
            left = None if deadline is None else deadline - time.monotonic()
            try:
                value = future.result(left)
            except BaseException:
                future.cancel()
                raise
            del future
            if buffered:
                futures.extend(itertools.islice(ahead, 1))
            if not chunked:
                last = [value]
                del value  # what was taken is kept by its taker alone
                yield last.pop()
            elif type(value) is list:
                yield from value
            else:
                for each in value:
                    if isinstance(each, Failure):
                        raise each.error
                    yield each
    finally:
        for each in futures:
            each.cancel()


def check_retries(name: str, value: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: an int is needed, not {type(value).__name__}")
    if value < 0:
        raise InvalidArgument(f"{name}={value}: at least 0 is needed")


def _cpu_count() -> int:
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0))


def _import_psutil() -> Any:
    try:
        import psutil
    except ImportError:
        raise ImportError(
            'max_memory_per_worker needs psutil: pip install "shmring[pool]"'
        ) from None
    return psutil

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

import logging
import multiprocessing
import os
import weakref
from collections.abc import Callable
from typing import Any

from shmring._backend import backend
from shmring.arguments import checked_int, checked_timeout
from shmring.errors import InvalidArgument, NotSupportedByFallback
from shmring.pool.future import TaskFuture
from shmring.pool.interface import TaskExecutor
from shmring.tasks.channel import FunctionReferences

__all__ = ["ProcessPoolExecutor"]

MOST_WORKERS = 128  # a queue has so many places for deliveries


class ProcessPoolExecutor(TaskExecutor):
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
        max_memory_per_worker: bytes of resident memory, as RSS in ``ps``: also what the
            worker shares, of its parent's memory, of libraries and of shared arrays. A
            worker above it is replaced between two tasks; a call that outgrows it fails
            with MemoryExceeded (extra ``pool``).
        on_event: called with an Event: see ``Event.kind``; by the thread of the pool, or by
            the one whose submit() starts workers. What it raises is logged.

    Raises:
        InvalidArgument: (a ValueError) an impossible number.
        TypeError: an argument of the wrong type.
        NotSupportedByFallback: the ring is not there.
    """

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
            max_tasks_per_child = checked_int(max_tasks_per_child, "max_tasks_per_child", 1)
        if max_memory_per_worker is not None:
            max_memory_per_worker = checked_int(
                max_memory_per_worker, "max_memory_per_worker", 1 << 20
            )
            try:
                import psutil  # noqa: F401  # of use in the workers and the dispatcher
            except ImportError:
                raise ImportError(
                    'max_memory_per_worker needs psutil: pip install "shmring[pool]"'
                ) from None
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
        self._max_retries = checked_int(max_retries, "max_retries", 0)
        self._references = FunctionReferences()
        self._manager = Manager(
            max_workers,
            mp_context,
            task_timeout=checked_timeout(task_timeout, "task_timeout"),
            on_event=on_event,
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

    def _submit(
        self, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any] | int, retries: int
    ) -> TaskFuture[Any]:
        manager = self._manager
        function = self._references.get(fn)
        future: TaskFuture[Any] = TaskFuture(manager.dispatcher, function, args, kwargs, retries)
        manager.submit(future)
        return future

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
        self._manager.close(cancel_futures)
        if wait:
            self._manager.join()

    def _kill(self, signum: int) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        self._manager.kill(signum)
        self._manager.join()


def _cpu_count() -> int:
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0))

"""Results in the order in which they come, from an iterable that may be endless."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

from shmring.arguments import checked_int
from shmring.tasks.task_table import Failure

if TYPE_CHECKING:
    from shmring.pool.interface import TaskCalls

__all__ = ["unordered"]

_LARGEST_CHUNK = 1024
_CHUNKS_A_WORKER = 4


def unordered(
    pool: TaskCalls,
    fn: Callable[[Any], Any],
    iterable: Iterable[Any],
    chunksize: Any,
    buffersize: int | None,
    progress: Any,
) -> Iterator[Any]:
    """See :meth:`~shmring.pool.interface.TaskCalls.map_unordered`."""
    if chunksize != "auto":
        chunksize = checked_int(chunksize, "chunksize", 1)
    if buffersize is None:
        buffersize = _CHUNKS_A_WORKER * pool._max_workers
    buffersize = checked_int(buffersize, "buffersize", 1)
    total = len(iterable) if isinstance(iterable, Sized) else None
    stream = _Stream(pool, fn, iter(iterable), chunksize, buffersize)
    bar = _Bar() if progress and not callable(progress) else None
    results = stream.results(bar or progress or None, total)
    next(results)
    return results


class _Stream:
    """One call of :func:`unordered`."""

    def __init__(
        self,
        pool: TaskCalls,
        fn: Callable[[Any], Any],
        items: Iterator[Any],
        chunksize: Any,
        ahead: int,
    ) -> None:
        self._pool = pool
        self._fn = fn
        self._items = items
        self._adapts = chunksize == "auto"
        self._size = 1 if self._adapts else chunksize
        self._ahead = ahead
        self._open: dict[Any, int] = {}
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._since = time.monotonic()
        self._count = 0

    def results(
        self, report: Callable[[int, int | None], object] | None, total: int | None
    ) -> Iterator[Any]:
        taken = 0
        try:
            self._fill()
            yield  # up to here at once, so that closing it always cancels
            while self._open:
                future = self._done.get()
                size = self._open.pop(future)
                values = future.result()
                if self._adapts:
                    self._adapt(size)
                self._fill()
                for value in values:
                    if isinstance(value, Failure):
                        raise value.error
                    yield value
                taken += len(values)
                if report is not None:
                    report(taken, total)
        finally:
            for future in self._open:
                future.cancel()
            if report is not None and hasattr(report, "close"):
                report.close()

    def _fill(self) -> None:
        while len(self._open) < self._ahead:
            chunk = tuple(itertools.islice(self._items, self._size))
            if not chunk:
                return
            future = self._pool._submit(self._fn, chunk, 0, self._pool._max_retries)
            self._open[future] = len(chunk)
            future.add_done_callback(self._done.put)

    def _adapt(self, size: int) -> None:
        """Choose the size by what one worker did of late."""
        self._count += size
        now = time.monotonic()
        seconds, target = now - self._since, self._pool._chunk_seconds
        if seconds < target:
            if self._count > 16 * self._size:
                self._size = min(self._size * 4, _LARGEST_CHUNK)
            return
        rate = self._count / seconds / self._pool._max_workers
        self._size = max(1, min(int(rate * target), self._size * 4, _LARGEST_CHUNK))
        self._since, self._count = now, 0


class _Bar:
    """A progress bar of rich."""

    def __init__(self) -> None:
        try:
            from rich.progress import Progress
        except ImportError:
            raise ImportError('progress=True needs rich: pip install "shmring[pool]"') from None
        self._progress = Progress()
        self._bar = self._progress.add_task("tasks", total=None)
        self._progress.start()

    def __call__(self, done: int, total: int | None) -> None:
        self._progress.update(self._bar, completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()

"""``wait`` on queues, processes, connections and sockets at once.

On queues alone the caller sleeps in the kernel on all of them
(``futex_waitv``; where there is none, in slices of 2 ms).  Beside files it looks
at the files in slices that grow to 8 ms; after that, a thread sleeps on the files
and rings a bell, until `wait` returns.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterable
from multiprocessing import connection
from typing import Any

from shmring._core.handle import RingHandle
from shmring._core.wait import Bell, wait_rings
from shmring.arguments import checked_timeout
from shmring.errors import InvalidArgument
from shmring.process.threads import are_greenlets

__all__ = ["wait"]

_FIRST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.008


def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """Wait until at least one of several objects is ready.

    As ``multiprocessing.connection.wait``, and on queues and rings too: one is
    ready when a ``get`` would return at once, because a message can be taken or
    because it was shut down.  Another consumer may be faster: take with
    ``get_nowait``.

    Args:
        object_list: queues, rings, processes (ready when ended), connections,
            sockets, sentinels: anything with ``fileno()``, or a descriptor.
        timeout: seconds to wait; None for ever.

    Returns:
        The objects that are ready, in the order given; empty when time ran out.

    Raises:
        RingClosed: a queue is closed, or is being closed by another thread.
        InvalidArgument: nothing to wait for, and no time-out.
    """
    objects = list(object_list)
    timeout = checked_timeout(timeout)
    if not objects and timeout is None:
        raise InvalidArgument("object_list is empty: this would wait for ever")
    rings = list({id(each): each for each in objects if isinstance(each, RingHandle)}.values())
    files = {id(each): _descriptor(each) for each in objects if not isinstance(each, RingHandle)}
    fds = set(files.values())
    found: list[RingHandle] = []
    open_files: set[Any] = set()
    if not fds:
        found = wait_rings(rings, timeout)
    elif rings:
        found, open_files = _wait_mixed(rings, fds, timeout)
    else:
        open_files.update(connection.wait(fds, timeout))
    ready = {*map(id, found), *(key for key, fd in files.items() if fd in open_files)}
    return [each for each in objects if id(each) in ready]


def _descriptor(obj: Any) -> int:
    if isinstance(obj, int):
        return obj
    if hasattr(obj, "fileno"):
        return int(obj.fileno())
    if hasattr(obj, "sentinel"):
        return int(obj.sentinel)
    raise TypeError(
        f"cannot wait for {type(obj).__name__}: neither a queue nor a process, and no fileno()"
    )


def _wait_mixed(
    rings: list[RingHandle], fds: set[int], timeout: float | None
) -> tuple[list[RingHandle], set[int]]:
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    bell = Bell()
    poller = _poller(fds)
    watcher: _FileWatcher | None = None
    pause = _FIRST_PAUSE
    try:
        while True:
            open_files = {fd for fd, _ in poller.poll(0)}
            left = deadline - time.monotonic()
            if open_files or left <= 0:
                return wait_rings(rings, 0), open_files
            limit = left if watcher is not None else min(left, pause)
            ready = wait_rings(rings, None if limit == float("inf") else limit, bell)
            if ready:
                return ready, {fd for fd, _ in poller.poll(0)}
            if watcher is not None:  # it rang; if no file is ready, start anew
                watcher.stop()
                watcher, pause = None, _FIRST_PAUSE
            elif pause >= _LONGEST_PAUSE:
                watcher = _FileWatcher.start(fds, bell)
            else:
                pause = min(2 * pause, _LONGEST_PAUSE)
    finally:
        if watcher is not None:
            watcher.stop()


def _poller(fds: Iterable[int]) -> select.poll:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return poller


class _FileWatcher:
    """A thread that sleeps until one of the files is ready, and then rings the bell."""

    @classmethod
    def start(cls, fds: set[int], bell: Bell) -> _FileWatcher | None:
        """Start one; None where no thread or descriptor is to be had, and slices must do."""
        if are_greenlets():
            return None
        try:
            end = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:
            return None
        try:
            return cls(fds, bell, end)
        except RuntimeError:
            os.close(end)
            return None

    def __init__(self, fds: set[int], bell: Bell, end: int) -> None:
        self._end = end
        self._poller = _poller({*fds, end})
        self._bell = bell
        self._thread = threading.Thread(target=self._run, name="shmring-wait", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._poller.poll()
        self._bell.ring()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        try:
            os.eventfd_write(self._end, 1)
            self._thread.join()
        finally:
            os.close(self._end)

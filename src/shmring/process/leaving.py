"""The end of a process: every open handle is left, in forked children too.

multiprocessing's finalizers run in its children as well as at the end of a
program, but only in the process that registered them.  They are registered
again in each forked child, whether multiprocessing or ``os.fork`` made it.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from shmring.errors import ShmringError

__all__ = ["Exit", "Leaver", "adopted_by_forks", "close_dropped", "end_thread_at_exit"]

T = TypeVar("T")


class Leaver(Protocol):
    """An object that holds a named block, and can leave it without a warning."""

    def _leave(self) -> None: ...


_exiting = 0  # the process that runs its finalizers


def adopted_by_forks(kind: type[T], method: str) -> weakref.WeakSet[T]:
    """A set of objects whose method each forked child calls, before it runs anything else."""
    members: weakref.WeakSet[T] = weakref.WeakSet()

    def adopt_all() -> None:
        for each in list(members):
            getattr(each, method)()

    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=adopt_all)
    return members


class Exit:
    """Have `holder` leave when this process ends, if it still exists then.

    Args:
        holder: kept by a weak reference; one that is collected leaves by itself.
        priority: higher ones leave first.

    Attributes:
        pid: the process in which the holder is open.
    """

    def __init__(self, holder: Leaver, priority: int = 0) -> None:
        self._holder = weakref.ref(holder)
        self._priority = priority
        self._finalize: Any = None
        self._renew()
        _exits.add(self)
        multiprocessing.util.register_after_fork(self, Exit._renew)

    def _renew(self) -> None:
        holder = self._holder()
        if holder is not None:
            self.pid = os.getpid()
            self._finalize = multiprocessing.util.Finalize(
                holder, _leave, args=(self._holder,), exitpriority=self._priority
            )

    def cancel(self) -> None:
        """Forget the holder, which has left already."""
        self._holder = lambda: None  # type: ignore[assignment]
        self._finalize.cancel()


def _leave(reference: weakref.ref[Leaver]) -> None:
    global _exiting
    holder = reference()
    if holder is not None:
        _exiting = os.getpid()
        holder._leave()


def end_thread_at_exit() -> None:
    """Raise SystemExit, about which threading is silent, in a thread that outlives the handles.

    To be called where a handle proves to be closed.
    """
    if _exiting == os.getpid() and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def close_dropped(handle: object, close: Callable[[], object], way_out: str = "close()") -> None:
    """Close a handle that was dropped open, for its ``__del__``, and warn.

    A class with ``_may_be_dropped`` is for programs that close no queues: no warning.
    """
    dropped = repr(handle)
    with contextlib.suppress(BufferError, OSError, ShmringError):  # a view may still exist
        close()  # first: where warnings are errors the last line raises
    if getattr(handle, "_may_be_dropped", False):
        return
    warnings.warn(
        f"{dropped} was dropped open: call {way_out}", ResourceWarning, stacklevel=3, source=handle
    )


_exits = adopted_by_forks(Exit, "_renew")

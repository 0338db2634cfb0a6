"""The processes without which waiting is in vain, and the proof that all of them are dead.

A process is known by its number and the time it started, so that a later one
of the same number is not taken for it.  That it is dead is proved as on the
board (:mod:`shmring.process.liveness`), or its parent knows how it ended: of our own
child the system tells without reaping it (``waitid`` with ``WNOWAIT``), and of
one that was reaped the object that was given remembers it (``exitcode`` of a
multiprocessing.Process, which looks itself, or ``returncode`` of a Popen).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from shmring.errors import InvalidArgument, NotSupportedByFallback, PeerDied
from shmring.process.liveness import is_process_dead, process_start_ticks

__all__ = ["PeerWatch"]

_PARENT_IS_TOLD = hasattr(os, "waitid") and hasattr(os, "WNOWAIT")


class PeerWatch:
    """A timeout, and the processes beside which it is waited.

    One a call: whoever is found alive is asked again after a slice of the
    wait, one process a slice, however many there are.

    Args:
        peers: objects with a ``pid`` (multiprocessing.Process, subprocess.Popen,
            entries of the board) or numbers.  A number alone that was given to
            another process before this call means that one.
        timeout: what the caller of `get` or `put` gave.

    Raises:
        InvalidArgument: no process at all, one that was not started, an impossible number.
        NotSupportedByFallback: a number alone, on Windows.
    """

    SLICE = 0.04  # the longest sleep between two looks, in seconds

    __slots__ = ("_dead", "_living", "timeout")

    def __init__(self, peers: Iterable[Any], timeout: float | None = None) -> None:
        self.timeout = timeout
        self._living = [_Peer(each) for each in peers]
        self._dead: list[_Peer] = []
        if not self._living:
            raise InvalidArgument("peers is empty: name the processes to watch, or give None")

    @property
    def proven(self) -> bool:
        """Whether :meth:`all_dead` has found all of them dead."""
        return not self._living

    def all_dead(self) -> bool:
        """Whether every one of them is proven dead."""
        fallen = []
        while self._living and self._living[-1].has_ended():
            fallen.append(self._living.pop())
        self._dead += reversed(fallen)  # the first of these was seen alive longest
        return not self._living

    @property
    def pivot(self) -> tuple[int, int]:
        """One that was alive at the last look: its pid, and when it started (0: unknown)."""
        peer = self._living[-1]
        return peer.pid, peer.start_ticks or 0

    def error(self, outcome: str, count: int = 0) -> PeerDied:
        """What to raise now.

        Args:
            outcome: what has not come.
            count: how many objects were put.
        """
        deaths = tuple((each.pid, each.exitcode) for each in self._dead)
        return PeerDied(*deaths[-1], deaths, outcome, count)


class _Peer:
    """One of them."""

    __slots__ = ("_process", "exitcode", "pid", "start_ticks")

    def __init__(self, process: Any) -> None:
        pid = process if isinstance(process, int) else getattr(process, "pid", "none")
        if pid is None:
            raise InvalidArgument(f"peers: {process!r} has not been started")
        if not isinstance(pid, int):
            raise TypeError(f"peers are processes or pids: {process!r} has no pid")
        if not 0 < pid < 1 << 31:
            raise InvalidArgument(f"peers: pid={pid} is no process")
        if sys.platform == "win32" and isinstance(process, int):
            raise NotSupportedByFallback(
                f"peers=[{process!r}]: Windows does not prove by a number that a process is dead; "
                "give the object that started it"
            )
        self.pid = pid
        self.exitcode: int | None = None
        self._process = process
        self.start_ticks: int | None = getattr(process, "start_ticks", None)

    def has_ended(self) -> bool:
        if self.start_ticks is None:
            self.start_ticks = process_start_ticks(self.pid)
        self.exitcode = self._ask()
        if self.exitcode is None and is_process_dead(self.pid, self.start_ticks):
            self.exitcode = self._ask()  # of a child that ended between the two questions
            return True
        return self.exitcode is not None

    def _ask(self) -> int | None:
        """How it ended, if it has and we may know."""
        if _PARENT_IS_TOLD:
            try:
                told = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # another's child, or reaped
                told = None
            if told is not None and process_start_ticks(self.pid) == self.start_ticks:
                return told.si_status if told.si_code == os.CLD_EXITED else -told.si_status
        elif hasattr(self._process, "poll"):
            self._process.poll()  # as subprocess itself would
        return _remembered(self._process)


def _remembered(process: Any) -> int | None:
    """The exit code that an object knows."""
    for name in ("exitcode", "returncode"):
        code = getattr(process, name, None)
        if isinstance(code, int):
            return code
    return None

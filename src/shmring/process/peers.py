"""Peer polling: the processes beside which a call waits, and the proof that all are dead.

A process is known by its pid and start time, so that a later process of the
same pid is not taken for it.  Its death is proved by the kernel
(:mod:`shmring.process.liveness`), or its exit code is known: of a child of this
process the system tells it without reaping it (``waitid`` with ``WNOWAIT``);
that of a reaped one stands in its Process (``exitcode``) or Popen
(``returncode``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from multiprocessing import connection
from typing import Any

from shmring.errors import InvalidArgument, NotSupportedByFallback, PeerDied
from shmring.process.liveness import is_process_dead, process_start_ticks

__all__ = ["PeerPoll"]

_FORK_SERVER_S = 0.5
_HAS_WAITID = hasattr(os, "waitid") and hasattr(os, "WNOWAIT")


class PeerPoll:
    """A timeout, and the processes without which waiting is in vain; one for each call.

    A living process is asked again after a slice of the wait, one process a
    slice, however many there are.

    Args:
        peers: objects with a ``pid`` (multiprocessing.Process, subprocess.Popen,
            entries of the registry) or pids.  A pid alone means the process
            that has it now.
        timeout: seconds, as given to `get` or `put`.

    Raises:
        InvalidArgument: no process at all, one that was not started, an impossible pid.
        NotSupportedByFallback: a pid alone, on Windows.
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
        found_dead = []
        while self._living and self._living[-1].has_ended():
            found_dead.append(self._living.pop())
        self._dead += reversed(found_dead)  # the first of these was seen alive longest
        return not self._living

    @property
    def living_peer(self) -> tuple[int, int]:
        """The pid and start time (0: unknown) of a peer that was alive at the last look."""
        peer = self._living[-1]
        return peer.pid, peer.start_ticks or 0

    def error(self, outcome: str, count: int = 0) -> PeerDied:
        """The exception to raise when all are dead; `outcome` says what has not come."""
        deaths = tuple((each.pid, each.exitcode) for each in self._dead)
        return PeerDied(*deaths[-1], deaths, outcome, count)


class _Peer:
    """One process."""

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
        self.exitcode = self._find_exitcode()
        if self.exitcode is None and is_process_dead(self.pid, self.start_ticks):
            self._await_exitcode()
            self.exitcode = self._find_exitcode()  # a child may have ended in between
            return True
        return self.exitcode is not None

    def _await_exitcode(self) -> None:
        """A fork server tells how its child has ended, a little after the kernel does."""
        sentinel = getattr(self._process, "sentinel", None)
        if isinstance(sentinel, int):
            connection.wait([sentinel], _FORK_SERVER_S)

    def _find_exitcode(self) -> int | None:
        """Its exit code; None while it lives, or where the system does not tell."""
        if _HAS_WAITID:
            try:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # no child of this process, or reaped
                found = None
            if found is not None and process_start_ticks(self.pid) == self.start_ticks:
                return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        elif hasattr(self._process, "poll"):
            self._process.poll()  # as subprocess itself would
        for name in ("exitcode", "returncode"):
            code = getattr(self._process, name, None)
            if isinstance(code, int):
                return code
        return None

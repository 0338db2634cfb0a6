"""Proof that a process has ended, by the kernel alone.

A stopped, hung or starved process is not dead; a zombie is; a process that got
the pid of an earlier one is not the earlier one.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

_proof: Callable[[int, int], bool] | None
try:
    from shmring._core import ring

    _proof = ring.is_dead
except ImportError:  # the fallback, which proves it itself
    _proof = None

__all__ = ["is_process_dead", "is_process_stopped", "process_start_ticks"]


def process_start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0: no such process, or unknown.

    Together with its pid it identifies the process.
    """
    try:
        return int(_stat_fields(pid)[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_process_dead(pid: int, start_ticks: int = 0) -> bool:
    """Whether the kernel proves that a process has ended; never on Windows.

    Without its :func:`process_start_ticks` a later process of the same pid is
    taken for it.
    """
    if pid <= 0 or pid > 0x7FFFFFFF:
        return True
    if sys.platform == "win32":
        return False  # os.kill(pid, 0) would send Ctrl-C there
    if _proof is not None:
        return _proof(pid, start_ticks)
    if not hasattr(os, "pidfd_open"):
        return _is_gone(pid)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # out of descriptors, or a kernel without pidfd
        return _is_gone(pid) or _is_another(pid, start_ticks)
    try:
        # Read after pidfd_open: start time and pidfd are of one process, or it is dead.
        if _is_another(pid, start_ticks):
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(pidfd)


def is_process_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or by a debugger."""
    try:
        return _stat_fields(pid)[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def _stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat, from the state on."""
    # Of its first thread: qemu-user makes up /proc/PID/stat for the process that reads its own.
    with open(f"/proc/{pid}/task/{pid}/stat", "rb") as stat:
        # The name of the program, in parentheses, may hold spaces and parentheses.
        return stat.read().rpartition(b")")[2].split()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    try:
        fields = _stat_fields(pid)
        return fields[0] == b"Z" and int(fields[17]) <= 1  # the first thread may end before others
    except (OSError, ValueError, IndexError):
        return False


def _is_another(pid: int, start_ticks: int) -> bool:
    now = process_start_ticks(pid)
    return bool(start_ticks and now and now != start_ticks)

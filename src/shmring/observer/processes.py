"""States and commands of processes; what the kernel answered counts for a while."""

from __future__ import annotations

import time
from typing import Literal

from shmring.process.liveness import is_process_dead, is_process_stopped

__all__ = ["KnownProcesses", "State"]

State = Literal["alive", "stopped", "dead"]

_MOST = 10_000


class KnownProcesses:
    """States and commands of processes.

    Args:
        kept_s: how long an answer counts, in seconds.
    """

    def __init__(self, kept_s: float) -> None:
        self._kept_s = kept_s
        self._states: dict[tuple[int, int], tuple[float, State]] = {}
        self._commands: dict[int, tuple[float, str]] = {}

    def state(self, pid: int, start_ticks: int = 0) -> State:
        """Whether a process lives; without its start time a later one of that pid counts."""
        now = time.monotonic()
        until, state = self._states.get((pid, start_ticks), (0.0, "dead"))
        if until > now:
            return state
        if is_process_dead(pid, start_ticks):
            state = "dead"
        else:
            state = "stopped" if is_process_stopped(pid) else "alive"
        if len(self._states) >= _MOST:
            self._states.clear()
        self._states[pid, start_ticks] = now + self._kept_s, state
        return state

    def command(self, pid: int) -> str:
        """The command line of a process, its words between spaces; empty if unknown."""
        now = time.monotonic()
        until, command = self._commands.get(pid, (0.0, ""))
        if until > now:
            return command
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read(4096).rstrip(b"\0").split(b"\0")
        except OSError:
            words = []
        command = b" ".join(words).decode("utf-8", "replace")
        if len(self._commands) >= _MOST:
            self._commands.clear()
        self._commands[pid] = now + self._kept_s, command
        return command

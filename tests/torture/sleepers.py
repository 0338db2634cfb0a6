"""Processes that sleep in a call, until another process wakes them."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path

from looking import PATIENCE
from support import wait_for
from walking import die_some_day, end

__all__ = ["Sleeper", "is_dead", "sleeps", "wait_until_asleep"]

LOOK_EVERY = 0.0003  # seconds
FUTEX = "202 "  # its number on x86-64, as /proc tells in which call a process sleeps


def sleeps(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/syscall").read_text().startswith(FUTEX)
    except OSError:
        return False


def is_dead(pid: int) -> bool:
    """Whether it has ended; it may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until_asleep(pid: int, or_else: Callable[[], object] = lambda: False) -> None:
    wait_for(
        lambda: sleeps(pid) or or_else(), PATIENCE, f"process {pid} to sleep", every=LOOK_EVERY
    )


class Sleeper:
    """A process that makes one call, and tells when it returned, and what.

    Args:
        call: returns a bytes object; what it raises shows as no answer.
        on_command: it does not begin before `start`.
    """

    def __init__(self, call: Callable[[], bytes], on_command: bool = False) -> None:
        self._near, far = os.pipe()
        begin, self._begin = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                die_some_day()
                os.read(begin, 1)
                said = call()
                os.write(far, struct.pack("<d", time.monotonic()) + said)
            finally:
                os._exit(0)
        os.close(far)
        os.close(begin)
        if not on_command:
            self.start()

    def start(self) -> None:
        """Have it begin, and wait until it sleeps or has its answer."""
        os.write(self._begin, b"!")
        wait_until_asleep(self.pid, lambda: self.has_answered() or is_dead(self.pid))

    def has_answered(self, timeout: float = 0.0) -> bool:
        """Whether its call has returned, waiting for that so many seconds."""
        return bool(select.select([self._near], [], [], timeout)[0])

    def answer(self, timeout: float) -> tuple[float, bytes] | None:
        """When its call returned, and what; None if not in time.  To be asked once."""
        said = os.read(self._near, 1 << 16) if self.has_answered(timeout) else b""
        return (struct.unpack("<d", said[:8])[0], said[8:]) if said else None

    def close(self) -> None:
        end(self.pid)
        os.close(self._near)
        os.close(self._begin)

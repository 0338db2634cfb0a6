"""A child under ptrace: taken to an instruction, or seen to sleep and to be woken.

Only the thread that traces may ask for anything, and no other may wait for
the child meanwhile.  No register is read, so this holds on every processor.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from support import wait_for

_TRACEME, _SINGLESTEP, _DETACH, _SYSCALL = 0, 9, 17, 24
_SET_OPTIONS, _SEIZE, _INTERRUPT, _SYSCALL_INFO = 0x4200, 0x4206, 0x4207, 0x420E
_TRACE_SYSCALLS = 1  # a stop at a system call says so in its signal
_EXIT_OF_SYSCALL = 2
_WALL = 0x40000000  # waits for a thread that is not ours, too

if sys.platform == "linux":  # elsewhere it can be imported, and does nothing
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    _libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: object = None, data: object = None) -> None:
    if _libc.ptrace(request, pid, address, data) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request:#x}, {pid}): {os.strerror(error)}")


def stop_to_be_traced() -> None:
    """In the child: be traced by the parent, and stand here until it is `Traced`."""
    _ptrace(_TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


class Traced:
    """A process, or a thread of one, that stands still until it is told to go on.

    Args:
        task: its id.  A child that calls `stop_to_be_traced`, or with `seize` any thread of a
            child, wherever it is.
        seize: whether it knows nothing of it.
    """

    def __init__(self, task: int, *, seize: bool = False) -> None:
        self.task = task
        if seize:
            _ptrace(_SEIZE, task, None, _TRACE_SYSCALLS)
            _ptrace(_INTERRUPT, task)
        self._wait()
        if not seize:
            _ptrace(_SET_OPTIONS, task, None, _TRACE_SYSCALLS)

    def _wait(self) -> None:
        status = os.waitpid(self.task, _WALL)[1]
        assert os.WIFSTOPPED(status), f"{self.task} has ended: {status}"

    def step_while(self, on_the_way: Callable[[], object], most: int = 1_000_000) -> None:
        """One instruction after the other, until it is there."""
        for _ in range(most):
            if not on_the_way():
                return
            _ptrace(_SINGLESTEP, self.task)
            self._wait()
        raise AssertionError(f"{most} instructions, and not there")

    def step_under(self, held: Callable[[], bool], deep: int) -> None:
        """Until so many instructions have been executed while a lock was held; it is held then."""
        left = deep

        def goes_on() -> bool:
            nonlocal left
            left -= held()
            return left >= 0

        self.step_while(goes_on)

    def _to_system_call(self) -> tuple[bool, int]:
        """On to where a system call begins or ends: whether it ends, and with what."""
        _ptrace(_SYSCALL, self.task)
        self._wait()
        info = ctypes.create_string_buffer(88)
        _ptrace(_SYSCALL_INFO, self.task, len(info), info)
        return info.raw[0] == _EXIT_OF_SYSCALL, struct.unpack_from("<q", info.raw, 24)[0]

    def fall_asleep(self, marked: Callable[[], object]) -> None:
        """Go on into the first system call that sleeps when it is marked as asleep."""
        while True:
            ends, _ = self._to_system_call()
            if ends or not marked():
                continue
            _ptrace(_SYSCALL, self.task)
            wait_for(lambda: state_of(self.task) in "St", what="it to sleep, or to stop")
            if state_of(self.task) == "S":
                return
            self._wait()

    def woken(self) -> bool:
        """Wait for the end of that call: whether a wake ended it, and not its time.

        It stands there, and has done nothing yet.
        """
        self._wait()
        info = ctypes.create_string_buffer(88)
        _ptrace(_SYSCALL_INFO, self.task, len(info), info)
        assert info.raw[0] == _EXIT_OF_SYSCALL
        return struct.unpack_from("<q", info.raw, 24)[0] >= 0

    def wait_for_its_end(self) -> None:
        """It is killed where it stands; its process would wait for us to know."""
        assert not os.WIFSTOPPED(os.waitpid(self.task, _WALL)[1])

    def let_go(self, number: int = 0) -> None:
        """It goes on by itself, or with a signal."""
        _ptrace(_DETACH, self.task, None, number)


def state_of(task: int) -> str:
    """R, S, T, Z ... as /proc has it."""
    return Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[0]

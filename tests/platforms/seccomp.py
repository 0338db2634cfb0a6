"""Refuse system calls of this process and its children, as an old kernel or a container does."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import platform
import struct

MACHINES = ("x86_64", "aarch64")
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF, 32 bits
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # with an errno in the lower half
NUMBER_AT, ARGUMENTS_AT = 0, 16  # in struct seccomp_data; eight bytes an argument

# name: the number on x86_64, and on aarch64
NUMBERS = {
    "fallocate": (285, 47),
    "futex_waitv": (449, 449),
    "get_robust_list": (274, 100),
    "getcpu": (309, 168),
    "kcmp": (312, 272),
    "linkat": (265, 37),
    "madvise": (28, 233),
    "memfd_create": (319, 279),
    "open": (2, 0xFFFFFFFF),  # which aarch64 does not have, and glibc does not call
    "openat": (257, 56),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "process_vm_readv": (310, 270),
    "ptrace": (101, 117),
    "sched_setaffinity": (203, 122),
    "unshare": (272, 97),
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A system call, and the error that it gives.

    Args:
        call: its name.
        error: an errno.
        argument: of the calls with a certain argument only: its index,
        bits: refused where it has one of these,
        equals: or is this number.
    """

    call: str
    error: int = errno.ENOSYS
    argument: int | None = None
    bits: int = 0
    equals: int | None = None

    def steps(self) -> list[bytes]:
        """Instructions that come with the number of the call loaded, and leave it so."""
        number = NUMBERS[self.call][MACHINES.index(platform.machine())]
        refuse = [_step(RETURN, REFUSE | self.error)]
        if self.argument is not None:
            jump = JUMP_ANY_BIT if self.equals is None else JUMP_EQUAL
            refuse = [
                _step(LOAD, ARGUMENTS_AT + 8 * self.argument),
                _step(jump, self.equals or self.bits, otherwise=1),
                *refuse,
                _step(LOAD, NUMBER_AT),
            ]
        return [_step(JUMP_EQUAL, number, otherwise=len(refuse)), *refuse]


def _step(code: int, value: int, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, 0, otherwise, value)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def refuse(*refusals: Refusal) -> None:
    """From now on, here and in every child.

    Raises:
        OSError: this kernel takes no filters.
    """
    steps = [_step(LOAD, NUMBER_AT)]
    for refusal in refusals:
        steps += refusal.steps()
    steps.append(_step(RETURN, ALLOW))
    program = _Program(len(steps), b"".join(steps))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    address = ctypes.addressof(program)
    if (
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, address, 0, 0) != 0
    ):
        error = ctypes.get_errno()
        raise OSError(error, f"no filter of system calls: {os.strerror(error)}")

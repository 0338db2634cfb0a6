"""Errors and log lines of the compiled ring, for what the system refuses."""

from __future__ import annotations

import contextlib
import errno
import os

from shmring.errors import MessageTooLarge, RingCorrupted, SharedMemoryFull

__all__ = [
    "corrupted",
    "name_is_gone",
    "system_error",
    "too_large",
    "warn_full",
    "warn_name_is_gone",
]

_TEXTS = {
    errno.ENOSPC: "no room to grow for this message: enlarge /dev/shm (for containers: --shm-size)"
    " (docs: containers#no-room)",
    errno.EFBIG: "RLIMIT_FSIZE does not allow the ring to grow for this message",
    errno.EBADF: "the ring's file descriptor was closed, or reused, behind its back",
}
_RUN_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def system_error(number: int) -> OSError:
    """The exception for a system call that failed in a put or a get."""
    text = _TEXTS.get(number, os.strerror(number))
    if number in _RUN_OUT:
        text += " while mapping a grown area; nothing is lost, try again"
    kind = SharedMemoryFull if number in (errno.ENOSPC, errno.EFBIG) else OSError
    return kind(number, text)


def corrupted(found: str | None, written: int, read: int) -> RingCorrupted:
    """The exception for a poisoned ring: what was found, and the positions now."""
    text = {
        "owner": "a lock word names a thread that does not exist",
        "positions": "impossible positions",
        "frame": f"the frame at position {read} is not one that shmring wrote",
        "area": "the record of an area points outside the file",
        None: "poisoned for an unknown reason",
    }[found]
    return RingCorrupted(f"{text} (written up to {written}, read up to {read}); recreate the ring")


def too_large(length: int, limit: int, largest: int) -> MessageTooLarge:
    """The exception for a message that a ring of at most `limit` bytes can never hold."""
    return MessageTooLarge(
        f"a message of {length} bytes can never fit: max_capacity is {limit} bytes, of which one"
        f" message may take {largest}; create the queue or ring with a larger max_capacity= (a"
        " queue's is half of shared memory unless given: enlarge /dev/shm, for containers with"
        " --shm-size) (docs: containers#no-room)"
    )


def _warn(text: str, *args: object) -> None:
    # A put or a get goes on without its warning, where descriptors have run out or a filter raises.
    with contextlib.suppress(Exception):
        import logging  # not at the top: a child pays for it before its first message

        logging.getLogger("shmring").warning(text, *args)


def warn_full(limit: int | None) -> None:
    """Log that a put cannot grow the ring and waits: at `limit` bytes, or (None) without memory."""
    why = "the file system of shared memory is full"
    if limit is not None:
        why = f"max_capacity={limit} (unless given, half of shared memory) is reached"
    _warn(
        "%s: put waits for a reader; enlarge /dev/shm (for containers: --shm-size)"
        " or bound the queue with maxsize or max_capacity (docs: containers#no-room)",
        why,
    )


def name_is_gone(fd: int) -> bool:
    """Whether the last name of a file was removed; False if the descriptor tells nothing."""
    try:
        return os.fstat(fd).st_nlink == 0
    except OSError:
        return False


def warn_name_is_gone(name: bytes, token: int) -> None:
    """Log that a process waits on a ring to which no other can attach any more."""
    label = os.fsdecode(name) if name else f"shmring-{token:016x}"
    _warn(
        "/dev/shm/%s was removed while this process waits for a message in it: only processes that"
        " have it open already can put one; unless one of them does, make the queue anew",
        label,
    )

"""Files in shared memory that may be shmring's: named ones, and those that processes have open."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from shmring.errors import AccessRefused, RingNotFound
from shmring.shm import segment

__all__ = ["SharedFile", "find_files", "find_named"]

_ANONYMOUS = (f"{segment.DIRECTORY}/", "/memfd:shmring")


class SharedFile(NamedTuple):
    """A file of this user in shared memory.

    Attributes:
        path: where it can be opened: in /dev/shm or in /proc/PID/fd.
        name: in /dev/shm; None: it is anonymous.
        pids: the processes that have it open.
    """

    path: str
    name: str | None
    pids: list[int]

    def open(self) -> int:
        """Open it for reading alone; return the descriptor."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self.path, flags if self.name is None else flags | os.O_NOFOLLOW)


def find_files() -> Iterator[tuple[tuple[int, int], SharedFile]]:
    """Each file of this user with its device and inode, the named ones first.

    A file comes as soon as it is found; its ``pids`` are complete at the end.

    Raises:
        AccessRefused: /proc is not mounted, or /dev/shm cannot be read.
    """
    user = os.geteuid()
    found: dict[tuple[int, int], SharedFile] = {}
    for name in segment.names():
        path = f"{segment.DIRECTORY}/{name}"
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_uid == user:
                key = status.st_dev, status.st_ino
                found[key] = SharedFile(path, name, [])
                yield key, found[key]
    for pid, number, status in _open_files():
        if status.st_uid == user:
            key = status.st_dev, status.st_ino
            if key not in found:
                found[key] = SharedFile(f"/proc/{pid}/fd/{number}", None, [])
                yield key, found[key]
            pids = found[key].pids
            if pid not in pids:
                pids.append(pid)


def find_named(name: str) -> tuple[tuple[int, int], SharedFile]:
    """The file of that name, with its device and inode; its processes are not looked for.

    Raises:
        RingNotFound: there is none.
        AccessRefused: it is no regular file of this user.
        InvalidArgument: no file can have that name.
    """
    path = f"{segment.DIRECTORY}/{segment.check_name(name)}"
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise RingNotFound(
            errno.ENOENT, f"{path} does not exist: shmring ls shows what does"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise AccessRefused(errno.EACCES, f"{path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise AccessRefused(
            errno.EACCES,
            f"{path} belongs to user {status.st_uid}, this process runs as {os.geteuid()}",
        )
    return (status.st_dev, status.st_ino), SharedFile(path, name, [])


def _open_files() -> Iterator[tuple[int, str, os.stat_result]]:
    """Process, descriptor and status of each file in shared memory that may be written through it.

    An observer's descriptor may not: it is no user of the file.
    """
    if not os.path.isdir("/proc/self/fd"):
        raise AccessRefused(
            errno.ENOENT, "/proc is not mounted: it shows the open files of processes"
        )
    for pid in sorted(int(each) for each in os.listdir("/proc") if each.isdigit()):
        # It has ended, or is another user's.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            for number in os.listdir(folder):
                try:
                    # No stat of other files: they may be on a server that does not answer.
                    shared = os.readlink(number, dir_fd=folder).startswith(_ANONYMOUS)
                    if shared and os.lstat(number, dir_fd=folder).st_mode & stat.S_IWUSR:
                        yield pid, number, os.stat(number, dir_fd=folder)
                except OSError:  # it is closed by now
                    continue

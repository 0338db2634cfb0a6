"""Files in shared memory that may be shmring's: named ones, and those that processes have open."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator

from shmring.errors import AccessRefused, RingNotFound
from shmring.shm import segment

__all__ = ["SharedFile", "find_files", "find_named"]

_ANONYMOUS = (f"{segment.DIRECTORY}/", "/memfd:shmring")


@dataclasses.dataclass(slots=True)
class SharedFile:
    """A file of this user in shared memory.

    Attributes:
        path: where it can be opened: in /dev/shm or in /proc/PID/fd.
        name: in /dev/shm; None: it is anonymous.
        pids: the processes that have it open.
    """

    path: str
    name: str | None
    pids: list[int] = dataclasses.field(default_factory=list)

    def open(self) -> int:
        """Open it for reading alone; return the descriptor."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self.path, flags if self.name is None else flags | os.O_NOFOLLOW)


def find_files() -> dict[tuple[int, int], SharedFile]:
    """The files of this user, by device and inode, the named ones first.

    Raises:
        AccessRefused: /proc is not mounted, or /dev/shm cannot be read.
    """
    found: dict[tuple[int, int], SharedFile] = {}
    for name in segment.names():
        path = f"{segment.DIRECTORY}/{name}"
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                found[status.st_dev, status.st_ino] = SharedFile(path, name)
    for pid, path in _open_files():
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if status.st_uid == os.geteuid():
                key = status.st_dev, status.st_ino
                file = found.setdefault(key, SharedFile(path, None))
                if pid not in file.pids:
                    file.pids.append(pid)
    return found


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
    return (status.st_dev, status.st_ino), SharedFile(path, name)


def _open_files() -> Iterator[tuple[int, str]]:
    """(pid, path) of each file in shared memory that a process of this user has open."""
    if not os.path.isdir("/proc/self/fd"):
        raise AccessRefused(
            errno.ENOENT, "/proc is not mounted: it shows the open files of processes"
        )
    for pid in sorted(int(each) for each in os.listdir("/proc") if each.isdigit()):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for number in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{number}"
                with contextlib.suppress(OSError):
                    if os.readlink(path).startswith(_ANONYMOUS) and _is_writable(path):
                        yield pid, path


def _is_writable(path: str) -> bool:
    """Whether a descriptor may write; an observer's may not, and is no user of the file."""
    return os.lstat(path).st_mode & stat.S_IWUSR != 0

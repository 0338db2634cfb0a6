"""Shared memory of the fallback: ordinary files, mapped, in a folder of this user.

The kernel releases an ``flock`` when its last holder ends, however it ends.  So
a file that no process holds is what a crash left::

    shmring-UID/
      .lock     LOCK_EX while a name is made, opened or removed, or a block is read or written
      NAME      LOCK_SH while a process has it open or mapped

On Windows a file that is open cannot be removed, which serves as the shared lock.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shmring.arguments import checked_int, checked_timeout
from shmring.errors import AccessRefused, InvalidArgument, RingClosed, RingExists, RingNotFound
from shmring.shm.block import NamedBlock
from shmring.shm.descriptors import close_own, identity_at, identity_of, wait_for_lock

__all__ = ["SharedFile", "SharedMemoryManager", "cleanup_stale", "fallback_folder", "locked"]

_LOCK_NAME = ".lock"
_POLL_S = 0.005
_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def fallback_folder() -> Path:
    """The folder of this user's files, made if it is missing.

    AccessRefused if another user made it, or others may enter it.
    """
    user = os.getuid() if sys.platform != "win32" else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"shmring-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if sys.platform != "win32":
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise AccessRefused(
                f"{folder} is not a folder of user {os.getuid()} alone (mode "
                f"{stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}): remove it, or set TMPDIR"
            )
    return folder


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

    def _remove_unused(path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def _remove_unused(path: Path) -> bool:
        """Remove a file that no process holds; False if one does."""
        try:
            fd = os.open(path, _FLAGS)
        except FileNotFoundError:
            return True
        try:
            if not _try_lock(fd):
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(fd)


_this_thread = threading.local()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude all other threads and processes that use the folder; ShmringError after 10 s."""
    if getattr(_this_thread, "has_lock", False):  # also where a finalizer runs inside
        yield
        return
    # A description of its own: threads and forked children exclude one another too.
    fd = os.open(folder / _LOCK_NAME, _FLAGS | os.O_CREAT, 0o600)
    try:
        wait_for_lock(lambda: _try_lock(fd), str(folder))
        _this_thread.has_lock = True
        try:
            yield
        finally:
            _this_thread.has_lock = False
            _unlock(fd)  # not left to close(): a child forked meanwhile has the description too
    finally:
        os.close(fd)


class SharedFile:
    """A mapped file of :func:`fallback_folder`, which goes when the last process closes it."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self._fd = os.open(path, _FLAGS | (os.O_CREAT | os.O_EXCL if size else 0), 0o600)
        try:
            if sys.platform != "win32":
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if size:
                os.ftruncate(self._fd, size)
            self._buffer: memoryview | None = memoryview(mmap.mmap(self._fd, 0))
            self._identity = identity_of(self._fd)
        except BaseException:
            os.close(self._fd)
            _remove_unused(path)
            raise

    @classmethod
    def create(cls, name: str, size: int) -> SharedFile:
        """Make a file of zeros; RingExists if a living process has one of that name."""
        _sweep_once()
        path = fallback_folder() / name
        with locked(path.parent):
            if not _remove_unused(path):
                raise RingExists(f"{path} exists and is in use: choose another name")
            return cls(path, size)

    @classmethod
    def attach(cls, name: str, timeout: float = 0.0) -> SharedFile:
        """Open a file of another process; RingNotFound if there was none until the deadline."""
        timeout = checked_timeout(timeout)
        deadline = time.monotonic() + timeout
        path = fallback_folder() / name
        while True:
            with locked(path.parent):
                if not _remove_unused(path):
                    return cls(path)
            if time.monotonic() >= deadline:
                raise RingNotFound(f"{path} did not exist within {timeout:g} s: create it first")
            time.sleep(_POLL_S)

    @classmethod
    def create_or_attach(cls, name: str, size: int) -> SharedFile:
        """Open a file, or make it of that size."""
        with locked(fallback_folder()):
            try:
                return cls.create(name, size)
            except RingExists:
                return cls.attach(name)

    @property
    def buffer(self) -> memoryview:
        """The whole file, writable; RingClosed after :meth:`close`."""
        if self._buffer is None:
            raise RingClosed(f"{self.path} has been closed by this handle")
        return self._buffer

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Exclude all other threads and processes; see :func:`locked`."""
        return locked(self.path.parent)

    def close(self, remove: bool = False) -> None:
        """Let go; twice is allowed. The name goes with the last one, or now if it is to.

        Views of the buffer that live on keep the memory mapped.
        """
        if self._buffer is None:
            return
        self._buffer = None
        close_own(self._fd, self._identity)
        # On Windows a file that others have open cannot be removed.
        with contextlib.suppress(FileNotFoundError, PermissionError), locked(self.path.parent):
            if remove and self.is_named():
                self.path.unlink()
            _remove_unused(self.path)

    def is_named(self) -> bool:
        """Whether its name still leads to this file, and not to a later one."""
        return identity_at(self.path) == self._identity


def cleanup_stale() -> list[str]:
    """Remove the files that crashed runs left; return their names."""
    folder = fallback_folder()
    with locked(folder):
        names = sorted(each.name for each in folder.iterdir() if each.name != _LOCK_NAME)
        return [each for each in names if _remove_unused(folder / each)]


_sweep_once = functools.cache(cleanup_stale)  # when a process creates its first name


class SharedMemoryManager(NamedBlock):
    """As :class:`shmring.SharedMemoryManager`, in a file; a name has at most 200 bytes."""

    _most_name_bytes = 200
    _not_in_names = "/\\\0"

    def write_data(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy a contiguous bytes-like object into the block, under the lock."""
        source = memoryview(data).cast("B")
        with self._part(source.nbytes, offset) as part:
            part[:] = source

    def read_data(self, length: int, offset: int = 0) -> bytes:
        """Copy `length` bytes out of the block, under the lock."""
        with self._part(length, offset) as part:
            return bytes(part)

    @contextlib.contextmanager
    def _part(self, length: int, offset: int) -> Iterator[memoryview]:
        length, offset = checked_int(length, "length"), checked_int(offset, "offset")
        if min(length, offset) < 0 or offset + length > self.size:
            raise InvalidArgument(
                f"offset={offset}, length={length}: not inside the block's {self.size} bytes"
            )
        view = self._view()
        with self._memory.exclusive():
            yield view[offset : offset + length]

    def _open(self, new: bool) -> None:
        name = f"{self.name}.memory"
        file = SharedFile.create(name, self.size) if new else SharedFile.attach(name)
        found = file.buffer.nbytes
        if found < self.size:
            file.close()
            raise InvalidArgument(f"{self.name} has {found} bytes: size={self.size} was asked for")
        self._memory = file

    def _is_named(self) -> bool:
        return self._memory.is_named()  # type: ignore[no-any-return]

    def _view(self) -> memoryview:
        return self._attached().buffer  # type: ignore[no-any-return]

    def _detach(self, remove: bool) -> None:
        file, self._memory = self._memory, None
        file.close(remove)

"""Shared memory of the fallback: ordinary files, mapped, in a folder of our own.

``multiprocessing.shared_memory`` would bring its resource tracker, which
removes segments that others still use, and names that outlive a kill.  Here
every process that has a file open holds a shared ``flock`` on it: whoever
closes last may have it alone and removes it, and a file that nobody holds is
what a crash left behind and is reclaimed.  A second file, NAME.lock, carries
the lock that excludes; it is opened anew for each use, so that threads and
forked children exclude one another as well.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import operator
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shmring.arguments import checked_timeout
from shmring.errors import (
    AccessRefused,
    InvalidArgument,
    RingClosed,
    RingExists,
    RingNotFound,
)
from shmring.process.leaving import end_thread_at_exit
from shmring.shm.descriptors import close_own, identity_of, wait_for_lock

if TYPE_CHECKING:
    import numpy

__all__ = ["SharedFile", "SharedMemoryManager", "cleanup_stale", "fallback_folder"]

_MAX_NAME_BYTES = 200


def fallback_folder() -> Path:
    """The folder of this user's files, made if it is missing.

    Returns:
        a folder that nobody else may enter.

    Raises:
        AccessRefused: somebody else was there first.
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


def check_name(name: str) -> str:
    """Refuse what cannot be the name of a file.

    Args:
        name: what was asked for.

    Returns:
        the same name.

    Raises:
        InvalidArgument: it is empty, too long, or has a slash or a NUL.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: a str is needed, not {type(name).__name__}")
    if not name or len(name.encode()) > _MAX_NAME_BYTES or set(name) & set("/\\\0"):
        raise InvalidArgument(
            f"name={name!r}: 1 to {_MAX_NAME_BYTES} bytes without slash and NUL are possible"
        )
    if name in (".", ".."):
        raise InvalidArgument(f"name={name!r} is taken by the file system")
    return name


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int, shared: bool) -> bool:
        # No shared locks here: a file in use cannot be removed anyway, which serves as one.
        if shared:
            return True
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(fd: int, shared: bool) -> bool:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


_LOOK_S = 1.0  # longer than anybody looks whether a file can be removed, unless he is stopped
_OPEN_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_OPEN_FLAGS |= getattr(os, "O_BINARY", 0)


class SharedFile:
    """A mapped file that goes when the last process closes it; storage for a registry too.

    Made by :meth:`create`, :meth:`attach` or :meth:`create_or_attach`.
    """

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path = path
        self._fd = fd
        self._identity = identity_of(fd)
        self._map: mmap.mmap | None = mmap.mmap(fd, size)
        self._buffer: memoryview | None = memoryview(self._map)

    @classmethod
    def create(cls, name: str, size: int) -> SharedFile:
        """Make a new file of zeros; what a crash left under that name is reclaimed.

        Args:
            name: its name in :func:`fallback_folder`.
            size: in bytes.

        Returns:
            the file, mapped.

        Raises:
            RingExists: a living process has a file of that name.
        """
        path = fallback_folder() / check_name(name)
        _sweep_once()
        while True:
            try:
                fd = os.open(path, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                if not _remove_if_unused(path):
                    raise RingExists(f"{path} exists and is in use") from None
                continue
            try:
                # Between open and flock a cleaner may take the file for a left-over.
                if _try_lock(fd, shared=True) and _is_still(path, fd):
                    os.ftruncate(fd, size)
                    return cls(path, fd, size)
            except BaseException:
                os.close(fd)
                _remove_if_unused(path)
                raise
            os.close(fd)

    @classmethod
    def attach(cls, name: str, timeout: float = 0.0) -> SharedFile:
        """Open a file that another process made.

        Args:
            name: its name in :func:`fallback_folder`.
            timeout: how long to wait for its creator, in seconds.

        Returns:
            the file, mapped in its whole size.

        Raises:
            RingNotFound: there was none, or only what a crash left, until the deadline.
        """
        path = fallback_folder() / check_name(name)
        timeout = checked_timeout(timeout)
        deadline = time.monotonic() + timeout
        while True:
            attached = cls._attach_once(path)
            if attached is not None:
                return attached
            if time.monotonic() >= deadline:
                raise RingNotFound(f"{path} did not exist within {timeout:g} s")
            time.sleep(0.005)

    @classmethod
    def _attach_once(cls, path: Path) -> SharedFile | None:
        if _remove_if_unused(path):
            return None
        try:
            fd = os.open(path, _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(fd).st_size
            # Size 0: its creator is between open and ftruncate.
            if _try_lock(fd, shared=True) and _is_still(path, fd) and size:
                return cls(path, fd, size)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    @classmethod
    def create_or_attach(cls, name: str, size: int, timeout: float = 10.0) -> SharedFile:
        """Open a file, whoever comes first makes it.

        Args:
            name: its name in :func:`fallback_folder`.
            size: in bytes, if it is to be made.
            timeout: bound of the race with those who close it, in seconds.

        Returns:
            the file, mapped.

        Raises:
            RingNotFound: the race was lost until the deadline.
        """
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(RingExists):
                return cls.create(name, size)
            with contextlib.suppress(RingNotFound):
                return cls.attach(name)
            if time.monotonic() >= deadline:
                raise RingNotFound(f"{name} could be neither made nor opened within {timeout:g} s")
            time.sleep(0.001)

    @property
    def buffer(self) -> memoryview:
        """The whole file, writable.

        Raises:
            RingClosed: after :meth:`close`.
        """
        if self._buffer is None:
            raise RingClosed(f"{self.path} has been closed by this handle")
        return self._buffer

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude all other threads and processes; released by the kernel on death.

        Raises:
            ShmringError: the holder did not let go within ten seconds.
        """
        fd = os.open(self._lock_path(), _OPEN_FLAGS | os.O_CREAT, 0o600)
        try:
            wait_for_lock(lambda: _try_lock(fd, shared=False), str(self.path))
            try:
                yield
            finally:
                # Not left to close(): a child forked meanwhile has this description too.
                _unlock(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go; the last one removes the file. Closing twice is allowed.

        Views of the buffer that live on keep the memory mapped.
        """
        if self._buffer is None:
            return
        self._buffer = self._map = None
        close_own(self._fd, self._identity)
        _remove_if_unused(self.path)

    def unlink(self) -> None:
        """Remove the names now; whoever has the file open goes on."""
        # On Windows a file in use stays until the last one closes it.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if self.is_named():
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    self._lock_path().unlink()
                self.path.unlink()

    def is_named(self) -> bool:
        """Whether its name still leads to this file."""
        return _is_still(self.path, self._fd)

    def _lock_path(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")


def _is_still(path: Path, fd: int) -> bool:
    """Whether the name still is this file, not a later one or none."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def cleanup_stale() -> list[str]:
    """Remove what crashed runs left: files of ours that no process has open.

    Returns:
        the names that were removed.
    """
    folder = fallback_folder()
    names = [each.name for each in folder.iterdir() if each.suffix != ".lock"]
    return [each for each in sorted(names) if _remove_if_unused(folder / each)]


_swept = False


def _sweep_once() -> None:
    """The first name that a process creates pays for the crashes before it."""
    global _swept
    if not _swept:
        _swept = True
        cleanup_stale()


def _remove_if_unused(path: Path) -> bool:
    """Remove a file that nobody holds; False only if somebody does."""
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        return True
    removed = False
    deadline = time.monotonic() + _LOOK_S
    try:
        while not _try_lock(fd, shared=False):
            if _try_lock(fd, shared=True):  # with those who keep it
                return not _is_still(path, fd)
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0005)  # somebody else looks as well
        if sys.platform != "win32" and _is_still(path, fd):
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        removed = True
    finally:
        os.close(fd)
    if sys.platform == "win32":
        # Only now: a file that is open, by us or by others, cannot be removed there.
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            return False
        with contextlib.suppress(PermissionError):
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
    return removed


class SharedMemoryManager:
    """A block of memory with a name, which several processes read and write.

    Not ``multiprocessing.managers.SharedMemoryManager``, which is a server of
    anonymous blocks.  On the fallback the block is a file of
    :func:`fallback_folder`, locked with ``flock`` (Windows: ``msvcrt.locking``).

    Args:
        name: 1 to 200 bytes without a slash.
        size: in bytes, at least 1.

    Raises:
        InvalidArgument: an impossible name or size.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = check_name(name)
        try:
            self.size = operator.index(size)
        except TypeError:
            raise TypeError(f"size={size!r}: an int is needed, not {type(size).__name__}") from None
        if self.size <= 0:
            raise InvalidArgument(f"size={self.size}: at least 1 byte is needed")
        self._file: SharedFile | None = None
        self._not_found: str | None = None  # why unpickling could not attach
        self._creator_pid = 0

    def create(self) -> bool:
        """Make the block, full of zeros.

        Returns:
            False if the name is in use; what a crash left is reclaimed.
        """
        self._make_way()
        try:
            self._file = SharedFile.create(f"{self.name}.memory", self.size)
        except RingExists:
            return False
        self._creator_pid = os.getpid()
        return True

    def connect(self) -> bool:
        """Open a block that another process made.

        Returns:
            False if there is none.

        Raises:
            InvalidArgument: there is one, and it is smaller than ``size``.
        """
        self._make_way()
        try:
            attached = SharedFile.attach(f"{self.name}.memory")
        except RingNotFound:
            return False
        found = attached.buffer.nbytes
        if found < self.size:
            attached.close()
            raise InvalidArgument(f"{self.name} has {found} bytes: size={self.size} was asked for")
        self._file = attached
        return True

    def is_current(self) -> bool:
        """Whether who connects now gets the block that is open here.

        False after its name was removed, also where another block bears it by now.
        """
        return self._file is not None and self._file.is_named()

    def write_data(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy bytes into the block, under its lock.

        Args:
            data: any contiguous buffer.
            offset: where, in bytes.

        Raises:
            InvalidArgument: negative, or past the end.
            RingClosed: not created or connected, or cleaned up.
        """
        source = memoryview(data).cast("B")
        offset = operator.index(offset)  # once: an object may answer otherwise the second time
        self._check_range(offset, source.nbytes)
        shared = self._opened()
        with shared.exclusive():
            shared.buffer[offset : offset + source.nbytes] = source

    def read_data(self, length: int, offset: int = 0) -> bytes:
        """Copy bytes out of the block, under its lock.

        Args:
            length: how many bytes.
            offset: from where, in bytes.

        Returns:
            a copy.

        Raises:
            InvalidArgument: negative, or past the end.
            RingClosed: not created or connected, or cleaned up.
        """
        offset, length = operator.index(offset), operator.index(length)
        self._check_range(offset, length)
        shared = self._opened()
        with shared.exclusive():
            return bytes(shared.buffer[offset : offset + length])

    def as_array(self, dtype: Any, shape: Any, offset: int = 0) -> numpy.ndarray[Any, Any]:
        """View the block as a numpy array, without a copy and without the lock.

        Args:
            dtype: of the elements.
            shape: an int or a tuple of ints, in elements.
            offset: where it begins, in bytes.

        Returns:
            a writable view, which keeps the memory mapped, also after :meth:`cleanup`.

        Raises:
            InvalidArgument: negative, or past the end; elements that are Python objects.
            ImportError: numpy is not installed.
        """
        try:
            import numpy
        except ImportError:
            raise ImportError('as_array needs numpy: pip install "shmring[numpy]"') from None
        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise InvalidArgument(f"dtype={kind}: Python objects cannot live in shared memory")
        try:
            sides: tuple[int, ...] = (operator.index(shape),)
        except TypeError:
            sides = tuple(operator.index(side) for side in shape)
        if any(side < 0 for side in sides):
            raise InvalidArgument(f"shape={shape}: no side can be negative")
        offset = operator.index(offset)
        self._check_range(offset, kind.itemsize * math.prod(sides))
        return numpy.ndarray(sides, kind, self._opened().buffer, offset)

    def cleanup(self) -> None:
        """Close; the creator removes the name too. Calling it twice is allowed."""
        if self._file is None:
            return
        if self._creator_pid == os.getpid():  # not its forked children
            self._file.unlink()
        self._creator_pid = 0
        self._file.close()
        self._file = None

    def __enter__(self) -> SharedMemoryManager:
        return self

    def __exit__(self, *exc_info: object) -> Literal[False]:
        self.cleanup()
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (self.name, self.size)

    def _opened(self) -> SharedFile:
        if self._file is None:
            end_thread_at_exit()
            if self._not_found is not None:
                raise RingNotFound(errno.ENOENT, self._not_found)
            raise RingClosed(f"shared memory {self.name!r}: call create() or connect() first")
        return self._file

    def _make_way(self) -> None:
        """Let go of a block that has gone; RingExists if it has not."""
        if self.is_current():
            raise RingExists(f"shared memory {self.name!r} is open already: call cleanup() first")
        self.cleanup()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise InvalidArgument(f"offset={offset} length={length}: neither can be negative")
        if offset + length > self.size:
            raise InvalidArgument(
                f"offset={offset} length={length} ends past the size={self.size} "
                f"of shared memory {self.name!r}"
            )


def _attached(name: str, size: int) -> SharedMemoryManager:
    memory = SharedMemoryManager(name, size)
    if not memory.connect():  # an error here would kill the receiver of a task
        memory._not_found = (
            f"shared memory {name!r} does not exist (any more); the sender keeps its block until"
            " the receiver has unpickled this one"
        )
    return memory

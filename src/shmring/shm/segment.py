"""Blocks of shared memory: anonymous, named, or the user's own; access and removal.

An anonymous block has no name in the file system (``O_TMPFILE``), so nothing is
left when every process is killed.  A named block is a file in /dev/shm.  Every
process that maps one holds ``flock(LOCK_SH)`` on its open file description,
which the kernel drops with the last descriptor *and* the last mapping of that
description.  So an exclusive lock that is granted proves that no process is
left.  The last one out, the reclaiming of a crashed run's name, and
:func:`cleanup_stale` all use this test.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time

from shmring._core.ring import LAYOUT
from shmring.arguments import checked_name
from shmring.errors import AccessRefused, RingExists, RingNotFound, SharedMemoryFull
from shmring.shm.descriptors import identity_at, identity_of

__all__ = [
    "DIRECTORY",
    "MEMORY_MAGIC",
    "allocate",
    "check_name",
    "check_namespace",
    "cleanup_stale",
    "create_anonymous",
    "create_named",
    "default_max_capacity",
    "is_named",
    "link",
    "names",
    "open_block",
    "open_memory",
    "open_named",
    "pid_namespace",
    "reclaim",
    "release",
    "unlink",
]

DIRECTORY = "/dev/shm"
MEMORY_MAGIC = 0x4D454D204D485300  # plain memory: SharedMemoryManager and the registry

_NAMESPACE_OFFSET = 56  # in plain memory; a ring has a place of its own

# /dev/shm is missing, no tmpfs, read-only, or closed to this process.
_NO_PLACE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EOPNOTSUPP, errno.EISDIR),
        *(errno.EROFS, errno.EACCES, errno.EPERM),
    }
)
_RUN_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not about access

_POLL_S = 0.002
_CLEANER_S = 1.0  # another process may hold the exclusive lock this long


def check_name(name: str) -> str:
    """Return `name`, or raise InvalidArgument if no file in /dev/shm can bear it."""
    return checked_name(name, 255)


def pid_namespace() -> int:
    """The inode of this process's PID namespace; 0 where /proc does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def default_max_capacity() -> int:
    """Bytes to which an unbounded queue may grow.

    Half of the smallest of /dev/shm, physical memory and the cgroup's limit: a
    memory cgroup kills where an allocation should fail.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        shm = os.statvfs(DIRECTORY)
        limits.append(shm.f_blocks * shm.f_frsize)
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as limit:
        limits.append(int(limit.read()))
    half = min(each for each in limits if each > 0) // 2
    return max(1 << (half.bit_length() - 1), 1 << 20)


def create_anonymous(size: int) -> int:
    """Make a block of `size` bytes without a name; return its descriptor.

    No memory is allocated yet, see :func:`allocate`.  Where /dev/shm is missing or
    takes no files, the block is a memfd, which cannot be named later.
    """
    try:
        fd = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise _explained(error, size) from None
        try:
            fd = os.memfd_create("shmring", os.MFD_CLOEXEC)
        except OSError as refused:
            raise _explained(refused, size) from None
    try:
        os.ftruncate(fd, size)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _explained(error, size) from None
        raise
    return fd


def allocate(fd: int, offset: int, size: int) -> None:
    """Back a range of a block with pages, so that touching it cannot fail later.

    Raises:
        SharedMemoryFull: there is no room; nothing was written.
    """
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        raise _explained(error, size) from None


def _explained(error: OSError, size: int) -> OSError:
    if error.errno == errno.ENOSPC:
        return SharedMemoryFull(
            errno.ENOSPC,
            f"{size} bytes of shared memory do not fit into {_where()}: close what is not needed,"
            " run shmring.cleanup_stale(), or enlarge it (for containers: --shm-size)"
            " (docs: containers#no-room)",
        )
    if error.errno == errno.EFBIG:
        return SharedMemoryFull(
            errno.EFBIG, f"{size} bytes of shared memory are more than RLIMIT_FSIZE allows"
        )
    if error.errno in _RUN_OUT:
        return error
    return OSError(
        error.errno,
        f"{size} bytes of shared memory cannot be had from {_where()}:"
        f" {os.strerror(error.errno or 0)}; mount a writable tmpfs there (for containers:"
        " --shm-size), or allow memfd_create and fallocate in the sandbox",
    )


def _where() -> str:
    """The place of shared memory and its size, for errors."""
    try:
        found = os.statvfs(DIRECTORY)
    except OSError as error:
        return f"{DIRECTORY} ({os.strerror(error.errno or 0)})"
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return f"{DIRECTORY} ({total} bytes, {free} of them free)"


def _path(name: str) -> str:
    return f"{DIRECTORY}/{name}"


def is_named(fd: int, name: str) -> bool:
    """Whether a process that opens the name now gets the block behind `fd`."""
    found = identity_at(_path(name))
    return found is not None and found == identity_of(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def link(fd: int, name: str) -> None:
    """Give an anonymous, complete block a name; one left by a crashed run is reclaimed.

    Raises:
        RingExists: the name is in use.
        AccessRefused: no name can be given here: the block is a memfd, /dev/shm
            takes no files, or /proc is missing.
        RingNotFound: the block was unlinked.
    """
    path = _path(check_name(name))
    _lock(fd, fcntl.LOCK_SH)
    for _ in range(10):  # another process may be faster each time
        try:
            # With src_dir_fd Python calls linkat(), which follows the link in /proc; link() does
            # not. The path is absolute, so the descriptor itself is not used.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
            return
        except FileExistsError:
            if is_named(fd, name):
                return
            if not reclaim(name):
                raise RingExists(
                    errno.EEXIST,
                    f"{path} exists and is in use, or is not ours: choose another name",
                ) from None
        except OSError as error:
            why = _why_nameless(fd, error)
            if why is not None:
                raise AccessRefused(
                    error.errno,
                    f"{path} cannot be made: {why}; hand it to processes as an argument, or mount"
                    f" a writable tmpfs at {DIRECTORY}, and /proc",
                ) from None
            if error.errno == errno.ENOENT:
                raise RingNotFound(
                    errno.ENOENT,
                    f"{path} was unlinked, and a block without links cannot be named again:"
                    " hand it to processes as an argument",
                ) from None
            raise
    raise RingExists(errno.EEXIST, f"{path} keeps being created by others: choose another name")


def _why_nameless(fd: int, error: OSError) -> str | None:
    """Why no block can be named here; None if `error` has another reason."""
    if error.errno == errno.EXDEV:
        return f"the block is outside {DIRECTORY} (a memfd)"
    if not os.path.isdir(DIRECTORY):
        return f"there is no {DIRECTORY}"
    if error.errno == errno.ENOENT and not os.path.lexists(f"/proc/self/fd/{fd}"):
        return "/proc is not mounted"
    return os.strerror(error.errno or 0) if error.errno in _NO_PLACE - {errno.ENOENT} else None


def create_named(name: str, size: int, header: bytes = b"") -> int:
    """Make a named block of `size` bytes that begins with `header`; return its descriptor.

    The name appears when the block is complete; see :func:`release`.
    """
    check_name(name)
    fd = create_anonymous(size)
    try:
        allocate(fd, 0, size)
        os.pwrite(fd, header or struct.pack("<Q", MEMORY_MAGIC), 0)
        os.pwrite(fd, struct.pack("<Q", pid_namespace()), _NAMESPACE_OFFSET)
        link(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_named(name: str, timeout: float = 0.0) -> int:
    """Open a named block, waiting up to `timeout` seconds for it; return its descriptor.

    Raises:
        RingNotFound: there is none.
        AccessRefused: it is not a regular file of this user, closed to others.
    """
    path = _path(check_name(name))
    deadline = time.monotonic() + timeout
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                raise RingNotFound(
                    errno.ENOENT,
                    f"{path} does not exist{f' after {timeout} s' if timeout else ''}:"
                    " create it first, or attach with a timeout",
                ) from None
        except OSError as error:
            raise _not_opened(error, path) from None
        else:
            try:
                _check_access(fd, path)
                if _lock(fd, fcntl.LOCK_SH):
                    if is_named(fd, name):
                        return fd
                elif time.monotonic() >= deadline + _CLEANER_S:
                    raise AccessRefused(
                        errno.EACCES, f"{path} is held by a cleaner that does not end"
                    )
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was removed meanwhile
        time.sleep(_POLL_S)


def _not_opened(error: OSError, path: str) -> OSError:
    if error.errno in _RUN_OUT:
        return error
    return AccessRefused(error.errno, f"{path} cannot be opened: {os.strerror(error.errno or 0)}")


def open_memory(name: str) -> int:
    """Open a block of :func:`create_named`, as :func:`open_named`.

    Refused where it was made in another PID namespace: its locks and slots name
    their owners by pid.
    """
    fd = open_named(name)
    try:
        check_namespace(fd, _path(name))
    except AccessRefused:
        os.close(fd)
        raise
    return fd


def check_namespace(fd: int, path: str) -> None:
    """Raise AccessRefused if a block of plain memory was made in another PID namespace."""
    start = os.pread(fd, _NAMESPACE_OFFSET + 8, 0).ljust(_NAMESPACE_OFFSET + 8, b"\0")
    (magic,), (namespace,) = struct.unpack("<Q", start[:8]), struct.unpack("<Q", start[-8:])
    if magic == MEMORY_MAGIC and namespace != pid_namespace():
        raise AccessRefused(
            errno.EACCES,
            f"{path} was created in another PID namespace, where process ids mean other"
            " processes: share the namespace (for containers: --pid)"
            " (docs: containers#pid-namespaces)",
        )


def open_block(block: object) -> int:
    """Open the file behind a user's multiprocessing.shared_memory.SharedMemory block."""
    name = getattr(block, "name", None)
    size = getattr(block, "size", None)
    if not isinstance(name, str) or not isinstance(size, int):
        raise TypeError(f"buffer must be a SharedMemory block, not {type(block).__name__}")
    try:
        fd = os.open(_path(name.lstrip("/")), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise RingNotFound(
            errno.ENOENT, f"the SharedMemory block {name!r} is not in {DIRECTORY}: was it unlinked?"
        ) from None
    except OSError as error:
        raise _not_opened(error, _path(name)) from None
    _check_access(fd, _path(name))
    return fd


def _check_access(fd: int, path: str) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise AccessRefused(errno.EACCES, f"{path} is not a regular file")
    if found.st_uid != os.geteuid():
        raise AccessRefused(
            errno.EACCES,
            f"{path} belongs to user {found.st_uid}, this process runs as {os.geteuid()}"
            " (docs: containers#users)",
        )
    if found.st_mode & 0o077:
        raise AccessRefused(
            errno.EACCES,
            f"{path} has mode {stat.S_IMODE(found.st_mode):o}: it must be closed to others (600)",
        )


def reclaim(name: str) -> bool:
    """Remove a block of ours that no process has open; True if the name is free now."""
    return _remove_if_stale(name) or not os.path.lexists(_path(name))


def _remove_if_stale(name: str) -> bool:
    """Remove a block of ours that no process has open; True if this call removed it.

    Only regular files of this user that begin with one of our magic numbers are
    removed, and only under the exclusive lock.
    """
    path = _path(name)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        _check_access(fd, path)
        (magic,) = struct.unpack("<Q", os.pread(fd, 8, 0).ljust(8, b"\0"))
        if magic not in (LAYOUT["MAGIC"], MEMORY_MAGIC) or not _lock(fd, fcntl.LOCK_EX):
            return False
        if not is_named(fd, name):  # another cleaner was faster, and the name may be in use again
            return False
        os.unlink(path)
    except (AccessRefused, FileNotFoundError):
        return False
    finally:
        os.close(fd)
    return True


# Blocks that this process left while others had them open: {name: identity}.
_left: dict[str, tuple[int, int]] = {}
_left_by = 0  # the process that left them
_MOST_LEFT = 100


def release(name: str, identity: tuple[int, int]) -> None:
    """After unmapping and closing: remove the name, if no other process has the block open.

    If one has, this is tried again when this process ends: it may be a daemon of
    this process, which is terminated then and does not leave by itself.  A newer
    block of that name, with another (st_dev, st_ino), is left alone.
    """
    global _left_by
    if identity_at(_path(name)) != identity or reclaim(name):
        return
    if _left_by != os.getpid():
        import multiprocessing.util  # 5 ms, which only few need

        _left_by = os.getpid()
        _left.clear()
        # A priority below 0: after the daemons.
        multiprocessing.util.Finalize(None, _release_again, exitpriority=-100)
    if len(_left) >= _MOST_LEFT:
        del _left[next(iter(_left))]
    _left[name] = identity


def _release_again() -> None:
    for name, identity in list(_left.items()):
        with contextlib.suppress(OSError):
            release(name, identity)


def unlink(name: str, identity: tuple[int, int] | None = None) -> None:
    """Remove the name at once; processes that have the block open go on.

    Raises:
        RingNotFound: it does not exist, or names another block than `identity`.
    """
    path = _path(check_name(name))
    if identity is None or identity_at(path) == identity:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            return
    raise RingNotFound(errno.ENOENT, f"{path} does not exist (any more)")


def cleanup_stale() -> list[str]:
    """Remove the named blocks of shmring that no living process has open.

    Live blocks, and files of other programs and users, are left alone.

    Returns:
        The names that this call removed; another process may remove some meanwhile.

    Raises:
        AccessRefused: /dev/shm cannot be read.
    """
    return [name for name in names() if _remove_if_stale(name)]


def names() -> list[str]:
    """The names of the files in /dev/shm, sorted; none where there is no such folder."""
    try:
        with os.scandir(DIRECTORY) as entries:
            return sorted(each.name for each in entries if each.is_file(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _not_opened(error, DIRECTORY) from None

"""Listing of shared memory, for ``shmring ls``.

Anonymous blocks are found among the open files of this user's processes.  A look
changes nothing: no name is kept alive, and none that the dead left is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from shmring._core.handle import RingHandle, counters, user_kind
from shmring._core.ring import LAYOUT
from shmring.diagnostics import snapshot
from shmring.errors import AccessRefused, ShmringError
from shmring.ipc.registry import REGISTRY_BYTES, REGISTRY_MAGIC, Registry, RegistryEntry
from shmring.process.liveness import is_process_stopped
from shmring.shm import segment

__all__ = ["listing"]

_KINDS = {1: "ring", 2: "queue"}
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK


def listing() -> list[dict[str, Any]]:
    """The blocks of shmring in shared memory that this user may read.

    Returns:
        For each block: ``name`` (None: anonymous), ``kind`` ("ring", "queue",
        "registry" or "memory"), ``nbytes`` (of memory that it takes), ``pids`` (that
        have it open) and ``stopped`` (those of them that are stopped); of rings and
        queues the fields of ``statistics()``, of a registry ``processes``; ``error``
        where it cannot be read.
    """
    return [each for block in _blocks() if (each := _look_into(block)) is not None]


@dataclasses.dataclass(slots=True)
class _Block:
    path: str
    name: str | None
    pids: list[int] = dataclasses.field(default_factory=list)


def _blocks() -> list[_Block]:
    """Files of this user that may be shmring's, the named ones first."""
    found: dict[tuple[int, int], _Block] = {}
    for name in segment.names():
        path = f"{segment.DIRECTORY}/{name}"
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                found[status.st_dev, status.st_ino] = _Block(path, name)
    for pid, path in _open_files():
        with contextlib.suppress(OSError):
            status = os.stat(path)
            key = status.st_dev, status.st_ino
            block = found.setdefault(key, _Block(path, None))
            if pid not in block.pids:
                block.pids.append(pid)
    return list(found.values())


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
                    if os.readlink(path).startswith((f"{segment.DIRECTORY}/", "/memfd:shmring")):
                        yield pid, path


def _look_into(block: _Block) -> dict[str, Any] | None:
    """The description of one block; None if it is not shmring's."""
    try:
        fd = os.open(block.path, _OPEN if block.name is None else _OPEN | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        words = struct.unpack("<8Q", os.pread(fd, 64, 0).ljust(64, b"\0"))
        shown: dict[str, Any] = {
            "name": block.name,
            "kind": "memory",
            "nbytes": os.fstat(fd).st_blocks * 512,
            "pids": block.pids,
            "stopped": [pid for pid in block.pids if is_process_stopped(pid)],
        }
        try:
            if words[0] in (LAYOUT["MAGIC"], LAYOUT["BLOCK_MAGIC"]):
                shown["kind"] = "ring"
                shown |= _ring(os.dup(fd))
            elif words[0] != segment.MEMORY_MAGIC:
                return None
            elif words[1] == REGISTRY_MAGIC:
                shown["kind"] = "registry"
                segment.check_namespace(fd, block.path)
                shown["processes"] = _processes(fd)
        except (ShmringError, OSError, ValueError) as error:
            shown["error"] = str(error)
        return shown


def _ring(fd: int) -> dict[str, Any]:
    ring = RingHandle()
    try:
        if not ring._open(fd, segment.pid_namespace(), 0):
            return {"error": "it is not ready: its creator has not finished it"}
        return {
            "kind": _KINDS.get(user_kind(ring), "ring"),
            **counters(ring),
            "waiters": snapshot.waiters(ring),
            "holders": snapshot.holders(ring),
            "deaths": snapshot.deaths(ring),
        }
    finally:
        ring._close()


class _ReadStorage:
    """The memory of a registry that is only read."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, REGISTRY_BYTES)
        self.buffer = memoryview(self._map)

    def exclusive(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self.buffer.release()
        self._map.close()


def _processes(fd: int) -> list[dict[str, Any]]:
    with Registry(_ReadStorage(fd)) as registry:
        return [_process(entry) for entry in registry.entries()]


def _process(entry: RegistryEntry) -> dict[str, Any]:
    state = entry.state.name.lower()
    if state != "exited" and entry.is_dead():
        state = "dead"
    elif state != "exited" and is_process_stopped(entry.pid):
        state = "stopped"
    return {
        "process_id": entry.process_id,
        "pid": entry.pid,
        "role": entry.role.name.lower(),
        "state": state,
        "waits_for": entry.waiting_on if entry.waiting_since_ns else None,
        "since_ns": entry.waiting_since_ns
        or (entry.task_started_ns if entry.task is not None else 0),
        "task": entry.task,
        "tasks": entry.tasks,
        "silent_seconds": entry.silent_for(),
    }

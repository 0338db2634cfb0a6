"""Registries and the slots of pools, read from one copy."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import Any

from shmring.errors import LayoutMismatch
from shmring.ipc.registry import REGISTRY_BYTES, Registry, RegistryEntry
from shmring.ipc.slot import H_POOL, POOL_WORDS
from shmring.observer.processes import KnownProcesses
from shmring.shm import segment

__all__ = ["registry_facts"]

_POOL = struct.Struct(f"<{len(POOL_WORDS)}Q")


class _Copy:
    """The memory of a registry, copied once."""

    def __init__(self, data: bytes) -> None:
        self.buffer = memoryview(bytearray(data))

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self.buffer.release()


def registry_facts(fd: int, path: str, processes: KnownProcesses) -> dict[str, Any]:
    """What a registry says of its processes; of a pool also what is known of its tasks.

    Raises:
        AccessRefused: it was made in another PID namespace.
        LayoutMismatch: it is of another version, or cut short.
    """
    segment.check_namespace(fd, path)
    data = os.pread(fd, REGISTRY_BYTES, 0)
    if len(data) < REGISTRY_BYTES:
        raise LayoutMismatch(f"registry of {len(data)} bytes: {REGISTRY_BYTES} expected")
    with Registry(_Copy(data)) as registry:
        shown = [_process(entry, processes) for entry in registry.entries()]
    facts: dict[str, Any] = {"kind": "registry", "processes": shown}
    pool = dict(zip(POOL_WORDS, _POOL.unpack_from(data, 8 * H_POOL), strict=True))
    if pool["pid"]:
        facts |= {
            "kind": "pool",
            "id": f"pool-{pool['pid']}-{pool['tasks']:016x}",
            "owner": {"pid": pool["pid"], "state": processes.state(pool["pid"], pool["start"])},
            "tasks": {
                "submitted": pool["submitted"],
                "answered": pool["answered"],
                "unanswered": max(0, pool["submitted"] - pool["answered"]),
                "running": sum(
                    each["task"] is not None and each["state"] in ("working", "stopped")
                    for each in shown
                ),
                "retried": pool["retried"],
            },
            "died": pool["died"],
            "queues": [f"shmring-{pool[each]:016x}" for each in ("tasks", "answers")],
        }
    return facts


def _process(entry: RegistryEntry, processes: KnownProcesses) -> dict[str, Any]:
    state = entry.state.name.lower()
    if state != "exited":
        known = processes.state(entry.pid, entry.start_ticks)
        state = state if known == "alive" else known
    since_ns = entry.waiting_since_ns or (entry.task_started_ns if entry.task is not None else 0)
    return {
        "process_id": entry.process_id,
        "pid": entry.pid,
        "role": entry.role.name.lower(),
        "state": state,
        "waits_for": entry.waiting_on if entry.waiting_since_ns else None,
        "since_ns": since_ns,
        "seconds": max(0, time.monotonic_ns() - since_ns) / 1e9 if since_ns else None,
        "task": entry.task,
        "tasks": entry.tasks,
        "messages": entry.messages,
        "heartbeats": entry.heartbeats,
        "silent_seconds": entry.silent_for(),
    }

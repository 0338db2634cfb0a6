"""Workers that the caller of a coordinator starts, wherever it likes.

They are known from the registry, and their end is proved by what stands there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from shmring.errors import ShmringError
from shmring.ipc.registry import RegistryEntry
from shmring.ipc.slot import ProcessState
from shmring.process.liveness import is_process_dead
from shmring.tasks.workers import Departure, Workers

__all__ = ["ExternalWorkers"]


class ExternalWorkers(Workers):
    """Workers that the caller starts: they are waited for, and neither killed nor replaced.

    Args:
        entries: reads the registry of the namespace.
        number: how many are expected.
        patience: how long to do without any, in seconds.
    """

    def __init__(
        self, entries: Callable[[], list[RegistryEntry]], number: int, patience: float
    ) -> None:
        super().__init__(entries)
        self._number = number
        self._patience = patience
        self._reaped: set[int] = set()  # their keys
        self._last_company = time.monotonic()

    def start(self, unanswered: int) -> None:
        now = time.monotonic()
        if self.living():
            self._last_company = now
        elif now - self._last_company > self._patience:
            raise ShmringError(
                f"no worker has been attached for {self._patience:g} s: start some with "
                "worker_process(), or let the coordinator do it with spawn=True"
            )

    def departed(self) -> list[Departure]:
        standing = {each.key for each in self._look()}
        return [
            Departure(
                entry.process_id,
                entry.pid,
                entry.start_ticks,
                clean=entry.state is ProcessState.EXITED,
                key=key,
                useful=entry.tasks > 0,
            )
            for key, entry in self._last_seen.items()
            # A slot is taken again only from the dead: no longer standing proves it too.
            if key not in self._reaped and (key not in standing or entry.is_dead())
        ]

    def reap(self, departure: Departure, useful: bool) -> None:
        self._reaped.add(departure.key)

    def orphans(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        standing = {0, *(each.key for each in self._entries())}
        return [
            Departure(f"process {pid}", pid, start_ticks, clean=False, key=key)
            for pid, start_ticks, key in sorted(set(holders))
            if is_process_dead(pid, start_ticks) or key not in standing
        ]

    def living(self) -> list[RegistryEntry]:
        return [each for each in self._look() if not each.is_dead()]

    def pids(self) -> tuple[int, ...]:
        return tuple(entry.pid for entry in self.living())

    def to_dismiss(self) -> int:
        """One STOP message for each that lives, or may still come."""
        return len(self.living()) + max(self._number - len(self._last_seen), 0)

    def all_gone(self) -> bool:
        """Whether as many as were expected have come, and all have gone."""
        return not self.living() and len(self._last_seen) >= self._number

"""Workers that the caller of a coordinator starts, wherever it likes.

They are known from the registry, and their end is proved by what stands there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from shmring.errors import ShmringError
from shmring.ipc.registry import RegistryEntry
from shmring.ipc.slot import ProcessState
from shmring.process.liveness import is_process_dead
from shmring.tasks.workers import Departure, SeenWorkers, Slots, WorkerReport

__all__ = ["ExternalWorkers"]


class ExternalWorkers:
    """Workers that the caller starts, wherever it likes.

    Args:
        slots: the registry of the namespace.
        number: how many are expected.
        patience: how long to do without any, in seconds.
    """

    def __init__(self, slots: Slots, number: int, patience: float) -> None:
        self._number = number
        self._patience = patience
        self._seen = SeenWorkers(slots)
        self._reaped: set[int] = set()  # their keys
        self._last_company = time.monotonic()

    def start(self, unanswered: int) -> None:
        """Only check that there are any: starting them is the caller's part.

        Raises:
            ShmringError: there have been none for longer than the patience.
        """
        now = time.monotonic()
        if self.living():
            self._last_company = now
        elif now - self._last_company > self._patience:
            raise ShmringError(
                f"no worker has been attached for {self._patience:g} s: start some with "
                "worker_process(), or let the coordinator do it with spawn=True"
            )

    def departed(self) -> list[Departure]:
        """Those that have ended since the last call."""
        standing = {each.key for each in self._seen.look()}
        return [
            Departure(
                entry.process_id,
                entry.pid,
                entry.start_ticks,
                clean=entry.state is ProcessState.EXITED,
                key=key,
                useful=entry.tasks > 0,
            )
            for key, entry in self._seen.last_seen.items()
            # A slot is taken again only from the dead: no longer standing proves it too.
            if key not in self._reaped and (key not in standing or entry.is_dead())
        ]

    def reap(self, departure: Departure, useful: bool) -> None:
        """Forget one that has ended.

        Args:
            departure: from :meth:`departed`.
            useful: of no use here.
        """
        self._reaped.add(departure.key)

    def orphans(self, holders: Iterable[tuple[int, int, int]]) -> list[Departure]:
        """Those that ended, and lost their slot to the next before the coordinator looked.

        Args:
            holders: (pid, start ticks, key) of those that have a claim slot.
        """
        return [
            Departure(f"process {pid}", pid, start_ticks, clean=False, key=key)
            for pid, start_ticks, key in sorted(set(holders))
            if is_process_dead(pid, start_ticks) or (key != 0 and not self._seen.has_slot(key))
        ]

    def exitcode_of(self, pid: int) -> int | None:
        """Not known: the coordinator is not the parent.

        Args:
            pid: the worker.
        """
        return None

    def living(self) -> list[RegistryEntry]:
        """Those with a slot that have not ended."""
        return [each for each in self._seen.look() if not each.is_dead()]

    def pids(self) -> tuple[int, ...]:
        """The workers with a slot that have not ended."""
        return tuple(entry.pid for entry in self.living())

    def to_dismiss(self) -> int:
        """One STOP message for each that lives, or may still come."""
        self.departed()
        return max(self._number - len(self._seen.last_seen), 0) + len(self.living())

    def all_gone(self) -> bool:
        """Whether as many as were expected have come, and all have gone."""
        living = self.living()
        return not living and len(self._seen.last_seen) >= self._number

    def kill(self, seen: RegistryEntry) -> bool:
        """Never: they are not ours."""
        return False

    def signal(self, seen: RegistryEntry, signum: int) -> bool:
        """Never: they are not ours."""
        return False

    def stop(self, grace: float) -> None:
        """Wait for all to go; they are not ours to end.

        Args:
            grace: how long, in seconds.
        """
        deadline = time.monotonic() + grace
        while not self.all_gone() and time.monotonic() < deadline:
            time.sleep(0.005)

    def reports(self) -> list[WorkerReport]:
        """All workers that there were."""
        return self._seen.report({})

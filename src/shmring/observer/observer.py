"""Observer: all rings, queues, registries and pools of this user, looked at again and again.

It opens files for reading alone, takes no lock and joins nothing: no name lives
longer, no record is freed, nothing is recovered for being looked at.

::

    /dev/shm, /proc/*/fd  --seldom-->  files --+
                                               +--> facts of each, with rates since the last look
    headers, registries  --every look----------+
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import Any, Self

from shmring._core.ring import LAYOUT
from shmring.errors import RingNotFound, ShmringError
from shmring.ipc.slot import REGISTRY_MAGIC
from shmring.observer.files import SharedFile, find_files, find_named
from shmring.observer.processes import KnownProcesses
from shmring.observer.ring import (
    blocks_in,
    deliveries_in,
    facts_of,
    front_owner,
    header_in,
    read_bytes,
)
from shmring.shm import segment

__all__ = ["Observer", "listing"]

_MOST_SCANNING = 0.003  # of the time; what looking for files may take
_RATE_S = 0.03  # for a rate that is measured between two looks
_UNKNOWN = frozenset({0})  # pids
_GETS = frozenset({"a message", "the end of a peek", "the end of a reserve"})


class _Known:
    """A file that is looked at."""

    def __init__(self, file: SharedFile, fd: int, kind: str) -> None:
        self.file = file
        self.fd = fd
        self.kind = kind  # "ring", "registry" or "memory", by its first words
        self.users: frozenset[int] = frozenset()  # the pids of the file
        self.producers: set[int] = set()
        self.consumers: set[int] = set()
        self.when = 0.0  # of the last look
        self.put = 0
        self.taken = 0
        self.data = b""  # of the header, at the last look
        self.facts: dict[str, Any] = {}  # of that header


class Observer:
    """What stands in shared memory, named and anonymous.

    Args:
        name: look at the file of this name alone, and do not look for its processes.
        scan_s: seconds between two searches for files; each look searches when 0.
            A search that takes long is repeated less often.
    """

    def __init__(self, name: str | None = None, *, scan_s: float = 0.0) -> None:
        self.processes = KnownProcesses(max(scan_s, 0.01))
        self._name = name
        self._scan_s = scan_s
        self._scan_due = 0.0
        self._known: dict[tuple[int, int], _Known] = {}
        self._namespace = segment.pid_namespace()

    def look(self, *, detail: bool = True) -> list[dict[str, Any]]:
        """Look at everything now.

        Args:
            detail: also find what takes further system calls for each ring: the
                reservation in front, and deliveries.

        Returns:
            For each file ``name`` (None: anonymous), ``id`` (the name, or the one
            that it would get), ``kind`` ("ring", "queue", "registry", "pool" or
            "memory"), ``nbytes`` (of memory that it takes), ``pids`` (that have
            it open) and ``stopped`` (those of them that are stopped); of rings
            and queues the fields of ``statistics()``, ``max_messages``, ``owner``
            and ``age_seconds``, ``producers`` and ``consumers`` (processes that
            were seen at it), ``put_rate`` and ``rate`` (messages put and taken a
            second since the last look; None at the first), ``deliveries``; of
            registries and pools ``processes``; of pools ``tasks``, ``died``,
            ``queues``; ``error`` where it cannot be read.

        Raises:
            AccessRefused: /dev/shm cannot be read, /proc is not mounted, or the
                name is another user's.
            RingNotFound: there is no file of the name that was given.
        """
        if time.monotonic() >= self._scan_due:
            self._scan()
        users = frozenset[int]().union(*(known.users for known in self._known.values()))
        stopped = {pid for pid in users if self.processes.state(pid) == "stopped"}
        return [self._facts(known, stopped, detail) for known in self._known.values()]

    def begin(self) -> float:
        """Look at each ring when it is found, so that the next look has rates.

        Returns:
            When the last one was found, by ``time.monotonic``; 0.0: there is none.

        Raises:
            AccessRefused: as for :meth:`look`.
        """
        self._scan(begin=True)
        return max((known.when for known in self._known.values()), default=0.0)

    def sample(self) -> None:
        """See which processes put and take just now; cheap, and measures no rate."""
        for known in self._known.values():
            if known.kind == "ring":
                with contextlib.suppress(ShmringError, OSError):
                    header = header_in(read_bytes(known.fd), self._namespace)
                    self._note_roles(known, header, [])

    def descriptor(self, identifier: str) -> int:
        """The descriptor of a ring that the last look found, by name or ``id``.

        Raises:
            RingNotFound: there is none.
        """
        for known in self._known.values():
            if known.kind == "ring" and identifier in (known.file.name, known.facts.get("id")):
                return known.fd
        raise RingNotFound(f"{identifier} is not there (any more)")

    def close(self) -> None:
        """Close the files."""
        for known in self._known.values():
            os.close(known.fd)
        self._known.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _scan(self, *, begin: bool = False) -> None:
        began, cpu = time.monotonic(), time.thread_time()
        found = set()
        for key, file in find_files() if self._name is None else [find_named(self._name)]:
            found.add(key)
            known = self._known.pop(key, None) or _opened(file, key)
            if known is not None:
                known.file = file
                self._known[key] = known  # in the order of the search
                if begin and known.kind == "ring":
                    with contextlib.suppress(ShmringError, OSError):
                        self._ring_facts(known, False)
        for key in self._known.keys() - found:
            os.close(self._known.pop(key).fd)
        for known in self._known.values():
            known.users = frozenset(known.file.pids)
        spent = time.thread_time() - cpu
        self._scan_due = began + max(self._scan_s, spent / _MOST_SCANNING if self._scan_s else 0)

    def _facts(self, known: _Known, stopped: set[int], detail: bool) -> dict[str, Any]:
        file = known.file
        status = os.fstat(known.fd)
        facts: dict[str, Any] = {
            "name": file.name,
            "id": file.name or f"anonymous-{status.st_ino}",
            "kind": known.kind,
            "nbytes": status.st_blocks * 512,
            "pids": file.pids,
            "stopped": sorted(stopped & known.users) if stopped else [],
        }
        try:
            if known.kind == "ring":
                facts |= self._ring_facts(known, detail)
            elif known.kind == "registry":
                from shmring.observer.registry import registry_facts  # 10 ms that rings do not need

                facts |= registry_facts(known.fd, file.path, self.processes)
        except (ShmringError, OSError, ValueError) as error:
            facts["error"] = error.strerror if isinstance(error, OSError) else str(error)
            facts["error"] = facts["error"] or str(error)
        if file.name is not None:
            facts["id"] = file.name
        return facts

    def _ring_facts(self, known: _Known, detail: bool) -> dict[str, Any]:
        now = time.monotonic()
        data = read_bytes(known.fd)
        if data == known.data and not detail and _is_at_rest(known.facts):
            known.facts["age_seconds"] += now - known.when
            known.facts["put_rate"] = known.facts["rate"] = 0.0
            known.when = now
            return known.facts
        header = header_in(data, self._namespace)
        facts = facts_of(header, self.processes)
        facts |= blocks_in(known.fd, header)
        put, taken, passed = facts["messages_put"], facts["messages_taken"], now - known.when
        measured = known.when != 0.0 and passed > 0
        facts["put_rate"] = max(0, put - known.put) / passed if measured else None
        facts["rate"] = max(0, taken - known.taken) / passed if measured else None
        known.when, known.put, known.taken = now, put, taken
        if detail:
            front = front_owner(known.fd, header, self.processes)
            if front is not None:
                facts["holders"].append(front)
            facts["deliveries"] = deliveries_in(known.fd, header)
            known.consumers |= facts["deliveries"].keys()
        self._note_roles(known, header, facts["waiters"])
        for role, seen in (("producers", known.producers), ("consumers", known.consumers)):
            if known.users:
                seen &= known.users
            facts[role] = sorted(seen)
        known.data, known.facts = data, facts
        return facts

    @staticmethod
    def _note_roles(known: _Known, header: dict[str, int], waiters: list[dict[str, Any]]) -> None:
        for each in waiters:
            if each["waits_for"] == "room":
                known.producers.add(each["pid"])
            elif each["waits_for"] in _GETS:
                known.consumers.add(each["pid"])
        known.producers |= {header["last_producer"], header["producer_holder"]} - _UNKNOWN
        known.consumers |= {header["last_consumer"], header["consumer_holder"]} - _UNKNOWN


def _is_at_rest(facts: dict[str, Any]) -> bool:
    """Whether nothing but rates and the age changes in facts while the header does not."""
    return bool(
        facts.get("owner")
        and facts["owner"]["state"] == "alive"
        and facts["age_seconds"] is not None
        and not any(facts[each] for each in ("waiters", "holders", "deaths", "blocks"))
    )


def _opened(file: SharedFile, key: tuple[int, int]) -> _Known | None:
    """The file, open; None if it is not shmring's, or has gone."""
    try:
        fd = file.open()
    except OSError:
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != key:
            return None
        words = struct.unpack("<2Q", os.pread(fd, 16, 0).ljust(16, b"\0"))
        if words[0] in (LAYOUT["MAGIC"], LAYOUT["BLOCK_MAGIC"]):
            kind = "ring"
        elif words[1] == REGISTRY_MAGIC and words[0] in (0, segment.MEMORY_MAGIC):
            kind = "registry"
        elif words[0] == segment.MEMORY_MAGIC:
            kind = "memory"
        else:
            return None
        undo.pop_all()
        return _Known(file, fd, kind)


def listing(rate_s: float = _RATE_S) -> list[dict[str, Any]]:
    """What stands in shared memory now, with rates.

    Args:
        rate_s: seconds between the two looks that the rates are measured by.

    Returns:
        As :meth:`Observer.look`.

    Raises:
        AccessRefused: /dev/shm cannot be read, or /proc is not mounted.
    """
    with Observer(scan_s=2 * rate_s + 1.0) as observer:
        until = observer.begin() + rate_s
        while (left := until - time.monotonic()) > 0:  # which processes put and take
            time.sleep(min(left, rate_s / 10))
            observer.sample()
        return observer.look()

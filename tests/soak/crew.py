"""One ring of a soak: the processes that use it, their replacements, accounts of what they do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from accounts import Accounts, Intent, Receipts, unexplained
from flow import MILLISECOND, Flow
from shmring.errors import Empty
from workload import Lane, consume, produce

__all__ = ["Crew", "Member"]

STALL_MOST_NS = 2000 * MILLISECOND
ENDING_S = 60  # that the crew has to end, and to drain the ring
TICK_S = 0.05
_fork = multiprocessing.get_context("fork")


@dataclass(eq=False)
class Member:
    """One process of a crew."""

    process: BaseProcess
    stream: int  # 0 is a consumer
    receipts: Receipts | None
    newest: dict[int, int] = field(default_factory=dict)
    stopped_ns: int = 0  # since when; 0 is running
    killed: bool = False  # and perhaps not dead yet


class Crew:
    """A ring, the processes that use it, and the accounts of what they do."""

    def __init__(self, lane: Lane[Any], told: memoryview, numbers: Iterator[int]) -> None:
        self.lane = lane
        self.name = f"soak-{os.getpid()}-{lane.label}"
        self.handle = lane.create(self.name)
        self.accounts = Accounts()
        self.flow = Flow()
        self.members: list[Member] = []
        self.failures: list[str] = []
        self.largest = self.given_back = 0
        self._capacity = self.handle.capacity
        self._told = told
        self._numbers = numbers
        for _ in range(lane.producers):
            self._start(produces=True)
        for _ in range(lane.consumers):
            self._start(produces=False)

    def _start(self, produces: bool) -> None:
        number = next(self._numbers)
        record: Intent | Receipts = Intent() if produces else Receipts()
        process = _fork.Process(
            target=produce if produces else consume,
            args=(self.lane, self.handle, self.name, self._told, number, record),
            daemon=True,
        )
        if isinstance(record, Intent):
            self.accounts.open(number, record, time.monotonic_ns())
            self.members.append(Member(process, number, None))
        else:
            self.members.append(Member(process, 0, record))
        process.start()

    # ---- while it runs --------------------------------------------------------------------

    def look(self) -> None:
        """Read what was received; replace the dead."""
        self._read_all()
        self.flow.look(time.monotonic_ns())
        capacity = self.handle.capacity
        self.given_back += capacity < self._capacity
        self.largest = max(self.largest, capacity)
        self._capacity = capacity
        for member in [m for m in self.members if m.process.exitcode is not None]:
            if not member.killed:
                self.failures.append(f"{self._title(member)} ended: {member.process.exitcode}")
            self._remove(member)
            self._start(produces=bool(member.stream))

    def kill(self, member: Member) -> None:
        """SIGKILL; :meth:`look` finds it dead, and puts another in its place."""
        member.killed = True
        member.process.kill()

    def stop(self, member: Member) -> None:
        """SIGSTOP."""
        member.stopped_ns = time.monotonic_ns()
        _signal(member, signal.SIGSTOP)

    def go_on(self, member: Member) -> None:
        """SIGCONT, if it is stopped and was not killed meanwhile."""
        if member.stopped_ns:
            _signal(member, signal.SIGCONT)
            self.flow.stopped(member.stopped_ns, time.monotonic_ns())
            member.stopped_ns = 0

    def _read(self, member: Member) -> None:
        if member.receipts is not None:
            self.flow.arrived(self.accounts.read(member.receipts, member.newest))

    def _remove(self, member: Member) -> None:
        member.process.kill()
        member.process.join()
        killed = time.monotonic_ns()
        if member.stopped_ns:
            self.flow.stopped(member.stopped_ns, killed)
            member.stopped_ns = 0
        self._read(member)
        if member.receipts is None:
            self.accounts.intents[member.stream].settle()
        else:
            cut = member.receipts.cut_short(killed)
            if cut is not None:
                self.accounts.cuts.append(cut)
            member.receipts.close()
        member.process.close()
        self.members.remove(member)

    def _title(self, member: Member) -> str:
        role = f"producer {member.stream}" if member.stream else "a consumer"
        return f"{self.lane.label}: {role} (pid {member.process.pid})"

    # ---- at the end -----------------------------------------------------------------------

    def ended(self, producers: bool) -> None:
        """Wait for the processes that were told to end."""
        deadline = time.monotonic() + ENDING_S
        for member in [m for m in self.members if not producers or m.stream]:
            while member.process.exitcode is None and time.monotonic() < deadline:
                member.process.join(TICK_S)
                self._read_all()
            if member.process.exitcode is None:
                _signal(member, signal.SIGABRT)  # faulthandler says where it was
                member.process.join(1)
            if member.process.exitcode != (-signal.SIGKILL if member.killed else 0):
                self.failures.append(f"{self._title(member)} ended: {member.process.exitcode}")
            self._remove(member)

    def _read_all(self) -> None:
        for member in self.members:
            self._read(member)

    def judge(self) -> None:
        """What is missing, and what is too much; afterwards the ring is idle and small."""
        accounts, statistics = self.accounts, self.handle.statistics()
        wrong = {
            "messages torn": accounts.torn,
            "messages received twice": accounts.duplicates,
            "messages received that were never put": accounts.beyond(),
            "times a message out of order": accounts.disordered,
            "messages left in the ring": statistics.messages,
            "is how poisoned the ring is": int(statistics.poisoned),
            "messages put and not taken": statistics.messages_put - statistics.messages_taken,
        }
        lost = unexplained(accounts.gaps(), accounts.cuts)
        wrong[f"messages lost, for example in {lost[:3]}"] = sum(count for _, count in lost)
        if self.flow.longest > STALL_MOST_NS:
            wrong["ms without any message"] = self.flow.longest // MILLISECOND
        if self.lane.label == "Queue":  # a Ring counts aborted reservations as well
            wrong["messages more than were put"] = max(
                0, statistics.messages_put - accounts.perhaps_put
            )
            wrong["messages less than were put"] = max(
                0, accounts.surely_put - statistics.messages_put
            )
        with contextlib.suppress(Empty):
            self.handle.get(timeout=0.3)  # an idle slice gives back what is not needed
        from header import blocks  # not at the top: it needs the extension

        held = os.fstat(self.handle._fileno()).st_blocks * 512
        held -= sum(capacity for *_, capacity in blocks(self.handle))
        if held > 4 * self.handle.capacity + 12_288:
            wrong[f"bytes held for a capacity of {self.handle.capacity}"] = held
        self.failures += [f"{self.lane.label}: {n} {what}" for what, n in wrong.items() if n]

    def close(self) -> None:
        """Kill what is left, and leave the ring."""
        for member in list(self.members):
            self._remove(member)
        if not self.handle.closed:
            self.handle.close()

    def report(self, seconds: float) -> Iterator[str]:
        """What happened, for a reader."""
        accounts, flow, statistics = self.accounts, self.flow, self.handle.statistics()
        missing = sum(gap.count for gap in accounts.gaps())
        yield (
            f"{self.lane.label}: {accounts.received:,} messages received in order,"
            f" {accounts.received / seconds:,.0f}/s,"
            f" {statistics.bytes_put / seconds / 1e6:,.0f} MB/s"
        )
        yield (
            f"  taken by a get that a kill cut short: {missing}"
            f" (of at most {sum(cut.most for cut in accounts.cuts)} in {len(accounts.cuts)} gets)"
        )
        yield (
            f"  lost otherwise: {sum(n for _, n in unexplained(accounts.gaps(), accounts.cuts))},"
            f" doubled: {accounts.duplicates}, torn: {accounts.torn},"
            f" out of order: {accounts.disordered}"
        )
        yield (
            f"  growths and returns: {statistics.growths} (up to {self.largest >> 10} KiB;"
            f" seen to give back {self.given_back} times); lock owners found dead:"
            f" {statistics.recoveries}"
        )
        yield (
            f"  longest time without a message: {flow.longest / MILLISECOND:.0f} ms"
            f" ({flow.longest_whole / MILLISECOND:.0f} ms where a process was stopped)"
        )
        yield f"  times between two arrivals: {flow.histogram()}"


def _signal(member: Member, number: int) -> None:
    assert member.process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it is dead: look() finds that out
        os.kill(member.process.pid, number)

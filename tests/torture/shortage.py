"""Killed on a full /dev/shm, which is a small one of the trial's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from looking import AT_ONCE, Finding, check_memory, locks_of_the_dead, message
from operations import BATCH, MIDDLE, RingStage, full_of_one, outcome_of
from shmring import Ring
from shmring.errors import Full
from shmring.shm.segment import DIRECTORY
from tally import DOUBLED, LEAKED, LOST, Harm
from trials import Operation

__all__ = ["SHORTAGE"]

SHARED_MEMORY = 256 << 10  # bytes


def free_pages() -> int:
    return os.statvfs(DIRECTORY).f_bavail


@dataclass
class FullStage(RingStage):
    """A ring that has to grow, and a ballast that leaves it a few pages only."""

    ballast: int = -1
    left: int = 0

    def settle(self, thorough: bool) -> Finding:
        """First with no more room than the victim had, then with enough."""
        locked = locks_of_the_dead(self.ring)
        if self.ring.get(timeout=AT_ONCE) != self.held[0]:
            raise Harm(LOST, "the message in front")
        after = message(1 << 19)
        self.ring.put(after, timeout=AT_ONCE)  # into the room of the one that was taken
        check_memory(self.ring, thorough=False)
        if self.ring.statistics().growths == 0 and free_pages() != self.left:
            raise Harm(LEAKED, f"{free_pages()} pages are free, {self.left} were")
        os.ftruncate(self.ballast, 0)
        self.more, self.gets = [after], 1
        account = self.account(thorough)
        if account.gone != 1:
            raise Harm(DOUBLED, "what was taken is still there")
        return Finding(outcome_of(account.put[0], len(self.puts), 0, 0), locked)

    def close(self) -> None:
        super().close()
        os.close(self.ballast)


def full_stage(pages: int, *puts: bytes) -> Callable[[], FullStage]:
    """All of the ring is full, and /dev/shm but for so many pages."""

    def prepare() -> FullStage:
        stage = FullStage(**vars(full_of_one()))
        stage.puts = puts
        stage.ballast = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR, 0o600)
        page = os.sysconf("SC_PAGESIZE")
        size = (free_pages() - pages) * page
        os.posix_fallocate(stage.ballast, 0, size)
        stage.left = free_pages()
        assert stage.left == pages, f"{stage.left} pages are free"
        return stage

    return prepare


def shortage(
    name: str, pages: int, act: Callable[[Ring], object], *puts: bytes, sleeps: bool = False
) -> Operation:
    def tried(stage: FullStage) -> None:
        with contextlib.suppress(Full):
            act(stage.ring)

    return Operation(
        name,
        full_stage(pages, *puts),
        tried,
        sleeps=sleeps,
        shared_memory=SHARED_MEMORY,
    )


SHORTAGE = [
    shortage("put_nowait, no room to grow", 0, lambda r: r.put_nowait(MIDDLE)),
    shortage("put, no room to grow", 0, lambda r: r.put(MIDDLE, timeout=0.05), sleeps=True),
    shortage("put_many, less room than wished", 1, lambda r: r.put_many(BATCH), *BATCH),
]

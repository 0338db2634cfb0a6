"""Blocks: a sender and a receiver of large buffers, killed; each block comes back, whole."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from looking import (
    AT_ONCE,
    LOCKS,
    Finding,
    living_bytes,
    lock_word,
    locks_of_the_dead,
    message,
    opened_afresh,
    sort_out,
    word,
)
from operations import forget_owner, outcome_of
from shmring import Queue
from shmring._core import bytes_ring
from shmring._core.ring import LAYOUT
from shmring.errors import Empty
from tally import BROKEN, HUNG, LEAKED, Harm
from trials import Operation, Stage

__all__ = ["LENDING"]

LENT_BYTES = 4096  # walked through faster than what is lent otherwise
BUFFER = 2 * LENT_BYTES
ALL = 4  # blocks of 64 KiB in half of max_capacity
BLOCKS_AT = LAYOUT["JOINING_OFFSET"] + 32


class Sheet:
    """An object with one large buffer."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Sheet, (pickle.PickleBuffer(self.data),)


def sheet(number: int) -> Sheet:
    return Sheet(bytearray(message(number, BUFFER)))


def is_lent(got: Sheet) -> bool:
    return type(got.data) is memoryview


@dataclass
class Desk(Stage):
    """A queue of sheets.

    Args:
        queue: the handle that the victim uses.
        held: what is in it.
        puts: what the victim puts.
        gets: how many it takes at most.
    """

    queue: Queue[Any]
    held: list[bytes] = field(default_factory=list)
    puts: Sequence[bytes] = ()
    gets: int = 0
    kept: list[Sheet] = field(default_factory=list)
    older: Queue[Any] | None = None

    def fill(self, *numbers: int) -> Desk:
        for number in numbers:
            self.queue.put(sheet(number))
            self.held.append(message(number, BUFFER))
        return self

    def turn_over(self, count: int) -> Desk:
        """So many blocks have memory, and are free."""
        self.queue.put_many([sheet(number) for number in range(count)])
        self.kept = [self.queue.get(timeout=AT_ONCE) for _ in range(count)]
        self.kept.clear()
        return self

    def keep(self) -> None:
        self.kept.append(self.queue.get())

    def afresh(self) -> None:
        self.queue = opened_afresh(self.queue)

    def settle(self, thorough: bool) -> Finding:
        locked = locks_of_the_dead(self.queue)
        if self.queue.statistics().poisoned:
            raise Harm(BROKEN, "the queue was declared broken")
        # More than there are blocks: those of the dead are looked for.
        more = [message(900 + i, BUFFER) for i in range(ALL + 1)]
        for one in more:
            self.queue.put(Sheet(bytearray(one)), timeout=AT_ONCE)
        found = []
        with contextlib.suppress(Empty):
            while True:
                found.append(bytes(self.queue.get(timeout=0).data))
        gone, (there, _) = sort_out(found, self.held, self.puts, more)
        if gone > self.gets or found[-len(more) :] != more:
            raise Harm(HUNG, f"{gone} are gone, and {len(found)} came")
        self.check_blocks()
        said = outcome_of(there, len(self.puts), gone, self.gets)
        return Finding(said, locked)

    def check_blocks(self) -> None:
        """All of them can be had again, and each page is accounted for."""
        deadline = time.monotonic() + AT_ONCE
        lent = 0
        while lent < ALL:
            if time.monotonic() > deadline:
                raise Harm(LEAKED, f"{ALL - lent} blocks do not come back")
            kept = []
            for number in range(ALL):
                self.queue.put(sheet(number), timeout=AT_ONCE)
                kept.append(self.queue.get(timeout=AT_ONCE))
            lent = sum(map(is_lent, kept))
            if [bytes(each.data) for each in kept] != [message(i, BUFFER) for i in range(ALL)]:
                raise Harm(BROKEN, "two of them share a block")
            kept.clear()
            time.sleep(0.01)
        for side in LOCKS:
            if lock_word(self.queue, side) != 0:
                raise Harm(HUNG, f"the {side}' lock is held by no process")
        at = word(self.queue, BLOCKS_AT)
        size = LAYOUT["BLOCKS_BYTES"] // LAYOUT["BLOCK_COUNT"]
        memory = sum(word(self.queue, at + size * i + 24) for i in range(LAYOUT["BLOCK_COUNT"]))
        memory += living_bytes(self.queue) + LAYOUT["HEADER_BYTES"] + LAYOUT["BLOCKS_BYTES"]
        held = os.fstat(self.queue._fileno()).st_blocks * 512
        if held > memory:
            raise Harm(LEAKED, f"{held} bytes are held for {memory} of areas and blocks")

    def close(self) -> None:
        self.kept.clear()
        self.queue.close()
        if self.older is not None:
            self.older.close()


def desk() -> Desk:
    bytes_ring._set_lend_bytes(LENT_BYTES)
    return Desk(Queue(max_capacity=2 * ALL << 16))


def with_free_block() -> Desk:
    return desk().turn_over(2).fill(1)


def with_messages() -> Desk:
    return desk().fill(1, 2)


def idle_blocks() -> Desk:
    stage = desk().turn_over(3)
    at = word(stage.queue, BLOCKS_AT)
    for i in range(3):
        word(stage.queue, at + 64 * i + 40, 1)  # freed long ago
    return stage


def left_by_dead_sender() -> Desk:
    """It died with its block's position stored, and the lock held."""
    stage = desk().turn_over(2).fill(1)
    at = word(stage.queue, BLOCKS_AT)
    for i in range(2):
        if word(stage.queue, at + 64 * i) == 0:
            word(stage.queue, at + 64 * i, (1 << 22) - 2)  # a pid that is none
            word(stage.queue, at + 64 * i + 8, word(stage.queue, LAYOUT["PRODUCERS_OFFSET"] + 8))
    forget_owner(stage.queue, "producers")
    stage.older, stage.queue = stage.queue, opened_afresh(stage.queue)  # which looks for the dead
    return stage


def get_in_vain(stage: Desk) -> None:
    """For a slice, after which memory is given back."""
    with contextlib.suppress(Empty):
        stage.queue.get(timeout=0.13)


def operation(
    name: str, prepare: Callable[[], Desk], act: Callable[[Desk], object], **promise: Any
) -> Operation:
    def staged() -> Desk:
        stage = prepare()
        for what, value in promise.items():
            setattr(stage, what, value)
        return stage

    return Operation(name, staged, act)


NEW = message(99, BUFFER)


def put(stage: Desk) -> None:
    stage.queue.put(Sheet(bytearray(NEW)))


LENDING = [
    operation("put lent", with_free_block, put, puts=[NEW]),
    operation("put lent, the first block", desk, put, puts=[NEW]),
    operation("put lent, lock of a dead one", left_by_dead_sender, put, puts=[NEW]),
    operation("get lent", with_messages, lambda stage: stage.queue.get(), gets=1),
    operation("get lent, and keep", with_messages, Desk.keep, gets=1),
    operation("blocks that are not used go", idle_blocks, get_in_vain),
]

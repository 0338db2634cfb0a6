"""Killed while it shuts a ring down."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from typing import Any

from claims import small_queue
from looking import AT_ONCE, Finding, check_memory, locks_of_the_dead, message, sort_out
from operations import GROWING, RingStage
from shmring import Queue, Ring
from shmring._core.ring import LAYOUT
from shmring.errors import ShutDown
from tally import BROKEN, HUNG, LEAKED, LOST, Harm
from trials import Operation

__all__ = ["ENDINGS"]

SHUTDOWN = LAYOUT["WAITING_OFFSET"] + 8
OPEN, DRAINS, SHUT = range(3)


class EndingStage(RingStage):
    """The ring goes on as before, or it is drained, or it is shut; and can be shut again."""

    def settle(self, thorough: bool) -> Finding:
        state = struct.unpack("<I", os.pread(self.ring._fileno(), 4, SHUTDOWN))[0]
        if state == OPEN:
            found = super().settle(thorough)
            self.ring.shutdown(immediate=True)
            return Finding("open", found.locked)
        locked = locks_of_the_dead(self.ring)
        must_be_shut(lambda: self.ring.put(message(7), timeout=AT_ONCE))
        if state == DRAINS:
            left = [self.ring.get(timeout=AT_ONCE) for _ in range(self.ring.qsize())]
            if sort_out(left, self.held)[0]:
                raise Harm(LOST, f"{len(self.held) - len(left)} of what was to be drained")
        must_be_shut(lambda: self.ring.get(timeout=AT_ONCE))
        self.ring.shutdown(immediate=True)  # makes good what of this was not done
        must_be_shut(lambda: self.ring.get(timeout=AT_ONCE))
        if self.ring.qsize():
            raise Harm(HUNG, f"{self.ring.qsize()} messages that no process will get")
        check_memory(self.ring, thorough=False)
        held = os.fstat(self.ring._fileno()).st_blocks * 512
        if isinstance(self.ring, Queue) and held > LAYOUT["HEADER_BYTES"]:
            raise Harm(LEAKED, f"{held} bytes are held for a header")
        return Finding("drains" if state == DRAINS else "shut", locked)


def must_be_shut(call: Callable[[], object]) -> None:
    with contextlib.suppress(ShutDown):
        call()
        raise Harm(BROKEN, "a ring that is shut down was used")


def ending(name: str, make: Callable[[], Any], immediate: bool) -> Operation:
    return Operation(
        name,
        lambda: EndingStage(make()).fill(9, 500),
        lambda stage: stage.ring.shutdown(immediate=immediate),
    )


ENDINGS = [
    ending("shutdown", lambda: Ring.create(**GROWING), immediate=False),
    ending("shutdown, immediate", lambda: Ring.create(**GROWING), immediate=True),
    ending("shutdown of a queue, immediate", small_queue, immediate=True),
]

"""Mutated headers under the classes that programs use: names, pickles, attaching, ends."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import random
from collections.abc import Callable
from typing import Any

from fuzz.drivers import ALLOWED, Broken, Tally, patience
from fuzz.mutations import Image, spots_of
from fuzz.scenes import messages
from shmring import JoinableQueue, Queue, Ring
from support import SHARED_MEMORY, own_name

BATCH = 16

AnyQueue = Any


def attach(handle: AnyQueue, name: str) -> None:
    with type(handle).attach(name) as other:
        other.get(False)


def attach_as_another(handle: AnyQueue, name: str) -> None:
    other: Any = Ring if isinstance(handle, Queue) else Queue
    other.attach(name).close()


def pickled(handle: AnyQueue, name: str) -> None:
    with pickle.loads(pickle.dumps(handle)) as other:
        other.statistics()


def asked(handle: AnyQueue, name: str) -> None:
    handle.statistics()
    handle.qsize()
    repr(handle)
    if isinstance(handle, Queue):
        handle.empty()
        handle.full()


def named(handle: AnyQueue, name: str) -> None:
    assert handle.name


def unlinked(handle: AnyQueue, name: str) -> None:
    handle.unlink()


def used(handle: AnyQueue, name: str) -> None:
    with contextlib.suppress(*ALLOWED):
        handle.put(b"x" * 3000, False)
    handle.get(False)
    handle.get_many(block=False)


def shut_down(handle: AnyQueue, name: str) -> None:
    handle.shutdown(immediate=True)
    handle.put(b"x", False)


def joined(handle: AnyQueue, name: str) -> None:
    if isinstance(handle, JoinableQueue):
        handle.task_done()
        handle.join(0)


OPERATIONS = (
    attach,
    attach,
    attach_as_another,
    pickled,
    asked,
    named,
    unlinked,
    used,
    used,
    shut_down,
    joined,
)
MAKERS: tuple[Callable[[str], AnyQueue], ...] = (
    lambda name: Ring.create(4096, max_capacity=1 << 16, name=name),
    lambda name: Queue(codec="bytes", max_capacity=1 << 17, name=name),
    lambda name: JoinableQueue(7, codec="bytes", max_capacity=1 << 17, name=name),
)


class HandleDriver:
    """Makes a named ring or queue, mutates it, calls one method, and closes."""

    scenes = ()

    def __init__(self) -> None:
        self.tally: Tally = collections.Counter()
        self.made = 0

    def batch(self, rng: random.Random, say: Callable[[str], None] | None = None) -> int:
        """Some reads, each of a file of its own.  Returns how many."""
        for _ in range(BATCH):
            self.made += 1
            name = own_name(f"fuzz-{self.made}")
            handle = rng.choice(MAKERS)(name)
            fd = os.dup(handle._fileno())
            handle.put_many(messages(5))
            image = Image(fd, spots_of(fd))
            mutation = image.mutations(rng, 1)[0]
            operation = rng.choice(OPERATIONS)
            if say is not None:
                say(f"{handle!r}: {mutation}: {operation.__name__}")
            image.apply(mutation)
            try:
                with patience(image):
                    operation(handle, name)
                outcome = "done"
            except ALLOWED as error:
                outcome = type(error).__name__
            except Exception as error:
                if not (operation is joined and isinstance(error, ValueError)):
                    raise Broken(f"{handle!r}: {mutation}: {operation.__name__}") from error
                outcome = "ValueError (task_done)"
            finally:
                with contextlib.suppress(*ALLOWED):
                    handle.close()
                image.close()
                _remove(fd)
                os.close(fd)
            self.tally[mutation.kind, outcome] += 1
        return BATCH

    def close(self) -> None:
        """Nothing to do."""


def _remove(fd: int) -> None:
    """Whatever the file is called by now: the name stands in the header that was mutated."""
    wanted = os.fstat(fd)
    if wanted.st_nlink:
        for path in SHARED_MEMORY.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    path.unlink()

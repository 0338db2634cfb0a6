"""Messages, and the loops that send, receive and check them.

The loops call the transport's own methods with nothing in between, as a program
would.  The messages of a pool all differ, so one that is lost, doubled or out of
order moves all later ones; it is enough to check the first and last of each turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BATCH", "STOP", "Work", "WrongContent", "arrays", "bytes_of", "records", "small_dicts"]

BATCH = 100
STOP = b"stop"  # shorter than any message

_POOL = 251  # a prime: no batch and no page holds a whole number of turns
_LARGE = 1 << 16  # bytes; from this size on the pool is small


class WrongContent(AssertionError):
    """What arrived is not what was sent: the one thing that fails a benchmark."""


@dataclass(frozen=True, eq=False)
class Work:
    """Messages to be sent.

    Attributes:
        name: for tables.
        kind: "bytes", "object" or "array".
        pool: the distinct messages.
        nbytes: the size of one message; 0 for objects.
        count: messages in a run of some tenths of a second on shmring; slower
            transports get a share of it, and rates are compared.
        sums: the sum of each array of the pool.
    """

    name: str
    kind: str
    pool: Sequence[Any]
    nbytes: int
    count: int
    sums: Sequence[float] = ()


def bytes_of(nbytes: int = 64, count: int = 500_000) -> Work:
    """Messages of at least 5 bytes that begin with their number."""
    indices = range(_POOL if nbytes <= _LARGE else 4)
    pool = [index.to_bytes(4, "little") + bytes([index]) * (nbytes - 4) for index in indices]
    return Work(f"{nbytes} B bytes", "bytes", pool, nbytes, count)


def small_dicts(count: int = 100_000) -> Work:
    """Small records, as dicts."""
    pool = [
        {"id": index, "name": f"task-{index}", "value": index * 0.5, "ok": True}
        for index in range(_POOL)
    ]
    return Work("small dict", "object", pool, 0, count)


@dataclass(frozen=True)
class Record:
    """A record that is no builtin."""

    id: int
    name: str
    value: float
    ok: bool


def records(count: int = 100_000) -> Work:
    """The same records as objects of a class, which only pickle carries."""
    return Work("small object", "object", [Record(**one) for one in small_dicts().pool], 0, count)


def arrays(nbytes: int, count: int) -> Work:
    """float32 arrays whose sums are exact in float32 and all differ.

    The pool is small, so that the producer's cache is not what is measured.
    """
    pool = []
    for index in range(4):
        array = (np.arange(nbytes // 4) % 8).astype(np.float32)
        array[0] = index
        pool.append(array)
    sums = [float(array.sum(dtype=np.float64)) for array in pool]
    return Work(f"{nbytes >> 20} MiB float32", "array", pool, nbytes, count, sums)


# ---- loops ----------------------------------------------------------------------------------


def send_each(put: Callable[[Any], object], pool: Sequence[Any], count: int) -> None:
    """Put `count` messages, one call each."""
    turns, rest = divmod(count, len(pool))
    for _ in range(turns):
        for message in pool:
            put(message)
    for message in pool[:rest]:
        put(message)


def receive_each(get: Callable[[], Any], pool: Sequence[Any], count: int) -> None:
    """Get `count` messages, one call each."""
    turns, rest = divmod(count, len(pool))
    between = range(len(pool) - 2)
    for _ in range(turns):
        first = get()
        for _ in between:
            message = get()
        message = get()
        if first != pool[0] or message != pool[-1]:
            raise WrongContent(f"a turn began with {first!r:.80} and ended with {message!r:.80}")
    for expected in pool[:rest]:
        message = get()
        if message != expected:
            raise WrongContent(f"{message!r:.80} came, {expected!r:.80} was expected")


def receive_any(get: Callable[[], Any], pool: Sequence[Any]) -> int:
    """Get bytes until `STOP`, in any order of several producers; return how many."""
    expected = frozenset(pool)
    messages = iter(get, STOP)
    received = 0
    while turn := list(itertools.islice(messages, len(pool))):
        received += len(turn)
        if turn[0] not in expected or turn[-1] not in expected:
            raise WrongContent(f"a turn began with {turn[0]!r:.80} and ended with {turn[-1]!r:.80}")
    return received


def send_batches(put_many: Callable[[Any], object], pool: Sequence[Any], count: int) -> None:
    """Put `count` messages, a multiple of BATCH, that many a call."""
    line = [*pool, *pool]
    batches = [line[start : start + BATCH] for start in range(len(pool))]
    start = 0
    for _ in range(count // BATCH):
        put_many(batches[start])
        start = (start + BATCH) % len(pool)


def receive_batches(get_many: Callable[[], Any], pool: Sequence[Any], count: int) -> None:
    """Get `count` messages, as many a call as are there."""
    taken = 0
    size = len(pool)
    while taken < count:
        messages = get_many()
        first = pool[taken % size]
        taken += len(messages)
        if messages[0] != first or messages[-1] != pool[(taken - 1) % size]:
            raise WrongContent(f"a batch that ends at message {taken} is not what was sent")
    if taken != count:
        raise WrongContent(f"{taken} messages came, {count} were sent")


def receive_sums(take_sum: Callable[[], float], sums: Sequence[float], count: int) -> None:
    """Take `count` arrays; each must add up to the sum of the one that was sent."""
    for index in range(count):
        total, expected = take_sum(), sums[index % len(sums)]
        if total != expected:
            raise WrongContent(f"array {index} adds up to {total}, not to {expected}")

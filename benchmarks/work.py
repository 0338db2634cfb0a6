"""What is sent: a pool of distinct messages, in turn, and loops that send and receive them.

The loops call what the transport gave them, with nothing in between, as a user
would.  Checking is cheap so that it does not hide what is measured, but blind
to nothing that a queue can do wrong: the messages of a pool all differ, so one
that is lost, doubled or out of order moves all later ones away from where the
first and the last of each turn are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = [
    "BATCH",
    "STOP",
    "Record",
    "Work",
    "WrongContent",
    "arrays",
    "bytes_of",
    "receive_any",
    "receive_batches",
    "receive_each",
    "receive_sums",
    "records",
    "send_batches",
    "send_each",
    "small_dicts",
]

Kind = Literal["bytes", "object", "array"]

BATCH = 100
STOP = b"stop"  # nothing that is sent as a message: shorter than any

_POOL = 251  # a prime: no batch and no page holds a whole number of turns
_LARGE = 1 << 16  # bytes: from here on a few messages of a kind, as with arrays


class WrongContent(AssertionError):
    """What arrived is not what was sent: the one thing that fails a benchmark."""


@dataclass(frozen=True, eq=False)
class Work:
    """Messages to be sent.

    Attributes:
        name: for the reader.
        kind: what a transport must be able to carry.
        pool: the distinct messages.
        nbytes: the size of one, where that means something.
        count: how many make a run of some tenths of a second on shmring;
            slower transports are given a share of it, and rates are compared.
        sums: for arrays, what each adds up to.
    """

    name: str
    kind: Kind
    pool: Sequence[Any]
    nbytes: int
    count: int
    sums: Sequence[float] = ()


def bytes_of(nbytes: int = 64, count: int = 500_000) -> Work:
    """`bytes`, the number in front.

    Args:
        nbytes: the size of one, at least 5.
        count: see `Work`.
    """
    indices = range(_POOL if nbytes <= _LARGE else 4)
    pool = [index.to_bytes(4, "little") + bytes([index]) * (nbytes - 4) for index in indices]
    return Work(f"{nbytes} B bytes", "bytes", pool, nbytes, count)


def small_dicts(count: int = 100_000) -> Work:
    """A small record, as a program would send it."""
    pool = [
        {"id": index, "name": f"task-{index}", "value": index * 0.5, "ok": True}
        for index in range(_POOL)
    ]
    return Work("small dict", "object", pool, 0, count)


@dataclass(frozen=True)
class Record:
    """What is no builtin."""

    id: int
    name: str
    value: float
    ok: bool


def records(count: int = 100_000) -> Work:
    """The same record as an object of a class, which only pickle carries."""
    pool = [Record(**one) for one in small_dicts().pool]
    return Work("small object", "object", pool, 0, count)


def arrays(nbytes: int, count: int) -> Work:
    """float32 arrays, whose sums are exact in float32 and all differ.

    The pool is small, so that what is measured is not the producer's cache.
    """
    pool, sums = [], []
    for index in range(4):
        array = (np.arange(nbytes // 4) % 8).astype(np.float32)
        array[0] = index
        pool.append(array)
        sums.append(float(array.sum(dtype=np.float64)))
    return Work(f"{nbytes >> 20} MiB float32", "array", pool, nbytes, count, sums)


# ---- one call a message ---------------------------------------------------------------------


def send_each(put: Callable[[Any], object], pool: Sequence[Any], count: int) -> None:
    """Put `count` messages, one call each."""
    turns, rest = divmod(count, len(pool))
    for _ in range(turns):
        for message in pool:
            put(message)
    for message in pool[:rest]:
        put(message)


def receive_each(get: Callable[[], Any], pool: Sequence[Any], count: int) -> None:
    """Get `count` messages; the first and the last of each turn must be what was sent."""
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
    """Get bytes until `STOP`, in whatever order several producers sent them; return how many.

    The first and the last of each turn must be among what was sent.
    """
    expected = frozenset(pool)
    messages = iter(get, STOP)
    received = 0
    while turn := list(itertools.islice(messages, len(pool))):
        received += len(turn)
        if turn[0] not in expected or turn[-1] not in expected:
            raise WrongContent(f"a turn began with {turn[0]!r:.80} and ended with {turn[-1]!r:.80}")
    return received


# ---- many a call ----------------------------------------------------------------------------


def send_batches(put_many: Callable[[Any], object], pool: Sequence[Any], count: int) -> None:
    """Put `count` messages, a multiple of BATCH, that many a call."""
    line = [*pool, *pool]
    batches = [line[start : start + BATCH] for start in range(len(pool))]
    start = 0
    for _ in range(count // BATCH):
        put_many(batches[start])
        start = (start + BATCH) % len(pool)


def receive_batches(get_many: Callable[[], Any], pool: Sequence[Any], count: int) -> None:
    """Get `count` messages, as many a call as are there; both ends of each batch are checked."""
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


# ---- arrays ---------------------------------------------------------------------------------


def receive_sums(take_sum: Callable[[], float], sums: Sequence[float], count: int) -> None:
    """Take `count` arrays, each of which must add up to what its original does."""
    for index in range(count):
        total = take_sum()
        if total != sums[index % len(sums)]:
            raise WrongContent(
                f"array {index} adds up to {total}, not to {sums[index % len(sums)]}"
            )

"""Messages, and the loops that send, receive and check them.

The loops call the methods of the transport directly, as a program would.  All messages of
a pool differ, so one that is lost, doubled or out of order shifts all later ones: it is
enough to check the first and the last message of each pass through the pool.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

with contextlib.suppress(ImportError):  # only arrays need it
    import numpy as np

BATCH = 100
STOP = b"stop"  # shorter than any message

_POOL = 251  # a prime: no batch and no page holds a whole number of passes
_LARGE_BYTES = 1 << 16  # from this size on the pool is small


class WrongContent(AssertionError):
    """What arrived is not what was sent."""


@dataclass(frozen=True, eq=False)
class Work:
    """Messages to send."""

    name: str  # for tables
    kind: str  # "bytes", "object" or "array"
    pool: Sequence[Any]  # the distinct messages
    nbytes: int  # of a message; 0 for objects
    count: int  # of a run of some tenths of a second on shmring
    sums: Sequence[float] = ()  # of each array in the pool


def bytes_of(nbytes: int = 64, count: int = 500_000) -> Work:
    """Return messages of at least 5 bytes that begin with their number."""
    indices = range(_POOL if nbytes <= _LARGE_BYTES else 4)
    pool = [index.to_bytes(4, "little") + bytes([index]) * (nbytes - 4) for index in indices]
    return Work(f"{nbytes} B bytes", "bytes", pool, nbytes, count)


def small_dicts(count: int = 120_000) -> Work:
    """Return small records as dicts."""
    pool = [
        {"id": index, "name": f"task-{index}", "value": index * 0.5, "ok": True}
        for index in range(_POOL)
    ]
    return Work("small dict", "object", pool, 0, count)


@dataclass(frozen=True)
class Record:
    """A record that is not a builtin."""

    id: int
    name: str
    value: float
    ok: bool


def records(count: int = 80_000) -> Work:
    """Return the same records as objects of a class, which only pickle encodes."""
    return Work("small object", "object", [Record(**one) for one in small_dicts().pool], 0, count)


def arrays(nbytes: int, count: int) -> Work:
    """Return float32 arrays with distinct sums that are exact in float32.

    The pool is small: a large one would measure the producer's cache.
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
    passes, rest = divmod(count, len(pool))
    for _ in range(passes):
        for message in pool:
            put(message)
    for message in pool[:rest]:
        put(message)


def send_each_timed(put: Callable[[Any], object], pool: Sequence[Any], count: int) -> list[int]:
    """The same; return the nanoseconds that each call took."""
    clock = time.perf_counter_ns
    took = []
    for message in itertools.islice(itertools.cycle(pool), count):
        start = clock()
        put(message)
        took.append(clock() - start)
    return took


def receive_each(get: Callable[[], Any], pool: Sequence[Any], count: int) -> None:
    """Get `count` messages, one call each."""
    passes, rest = divmod(count, len(pool))
    between = range(len(pool) - 2)
    for _ in range(passes):
        first = get()
        for _ in between:
            message = get()
        message = get()
        if first != pool[0] or message != pool[-1]:
            raise WrongContent(f"a pass began with {first!r:.80} and ended with {message!r:.80}")
    for expected in pool[:rest]:
        message = get()
        if message != expected:
            raise WrongContent(f"{message!r:.80} came, {expected!r:.80} was expected")


def receive_any(get: Callable[[], Any], pool: Sequence[Any]) -> int:
    """Get bytes of several producers until `STOP`; return how many."""
    expected = frozenset(pool)
    messages = iter(get, STOP)
    received = 0
    while some := list(itertools.islice(messages, len(pool))):
        received += len(some)
        if some[0] not in expected or some[-1] not in expected:
            raise WrongContent(f"{some[0]!r:.80} or {some[-1]!r:.80} was never sent")
    return received


def receive_any_batches(
    get_many: Callable[[], Any], put: Callable[[Any], object], pool: Sequence[Any]
) -> int:
    """The same with as many a call as are there; a `STOP` too many is put back."""
    expected = frozenset(pool)
    received = 0
    while True:
        messages = get_many()
        ended = STOP in messages
        if ended:
            place = messages.index(STOP)
            for _ in messages[place + 1 :]:
                put(STOP)
            del messages[place:]
        received += len(messages)
        if messages and (messages[0] not in expected or messages[-1] not in expected):
            raise WrongContent(f"{messages[0]!r:.80} or {messages[-1]!r:.80} was never sent")
        if ended:
            return received


def send_batches(put_many: Callable[[Any], object], pool: Sequence[Any], count: int) -> None:
    """Put `count` messages, a multiple of BATCH, that many a call."""
    twice = [*pool, *pool]
    batches = [twice[start : start + BATCH] for start in range(len(pool))]
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
    """Take `count` arrays and compare each sum with that of the array sent."""
    for index in range(count):
        total, expected = take_sum(), sums[index % len(sums)]
        if total != expected:
            raise WrongContent(f"array {index} adds up to {total}, not to {expected}")

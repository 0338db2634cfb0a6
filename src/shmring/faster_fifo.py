"""A stand-in for the package faster-fifo: its class, methods, arguments and time-outs.

>>> from shmring.faster_fifo import Empty, Full, Queue
>>> queue = Queue(max_size_bytes=1_000_000)
>>> queue.put_many([1, 2, 3])
>>> queue.get_many(max_messages_to_get=100)
[1, 2, 3]
"""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from queue import Empty, Full
from types import SimpleNamespace
from typing import Any

from shmring import _backend
from shmring.errors import NotSupportedByFallback

__all__ = ["Empty", "Full", "Queue"]

_TIMEOUT = 10.0  # of a blocking call that names none, as in faster-fifo
_UNBOUNDED = 1_000_000_000


class Queue:
    """faster_fifo.Queue on a :class:`shmring.Queue`.

    It differs in three ways: a killed process does not block the others; `max_size_bytes`
    is rounded up to a power of two; a message that can never fit raises MessageTooLarge.

    Args:
        max_size_bytes: bytes that it holds at most.
        loads, dumps: a serializer in place of pickle; ``dumps`` returns bytes.  A
            subclass may define both as methods instead.
    """

    def __init__(
        self,
        max_size_bytes: int = 1_000_000,
        loads: Callable[[Any], Any] | None = None,
        dumps: Callable[[Any], bytes] | None = None,
    ) -> None:
        self.max_size_bytes = max_size_bytes
        own = {"loads": loads, "dumps": dumps}
        vars(self).update({name: each for name, each in own.items() if each is not None})
        codec: Any = "pickle"
        if self.loads != Queue.loads or self.dumps != Queue.dumps:
            codec = SimpleNamespace(loads=self.loads, dumps=self.dumps)
        self._queue: Any = _Unwatched(codec=codec, max_capacity=max_size_bytes)
        self._closed = multiprocessing.RawValue(ctypes.c_bool, False)

    @staticmethod
    def loads(msg_bytes: Any) -> Any:
        """Decode a message."""
        return pickle.loads(msg_bytes)

    @staticmethod
    def dumps(obj: Any) -> bytes:
        """Encode a message."""
        return bytes(ForkingPickler.dumps(obj))

    def put(self, x: Any, block: bool = True, timeout: float = _TIMEOUT) -> None:
        """Put one object; Full if it finds no room in time."""
        self._queue.put(x, block, timeout)

    def put_nowait(self, x: Any) -> None:
        """Put one object, or raise Full at once."""
        self._queue.put(x, False)

    def put_many(self, xs: Iterable[Any], block: bool = True, timeout: float = _TIMEOUT) -> None:
        """Put objects under one lock; Full, with ``count``, if not all find room in time."""
        self._queue.put_many(xs, block, timeout)

    def put_many_nowait(self, xs: Iterable[Any]) -> None:
        """Put objects, or raise Full at once."""
        self._queue.put_many(xs, False)

    def get(self, block: bool = True, timeout: float = _TIMEOUT) -> Any:
        """Take one object; Empty if none comes in time."""
        return self._queue.get(block, timeout)

    def get_nowait(self) -> Any:
        """Take one object, or raise Empty at once."""
        return self._queue.get(False)

    def get_many(
        self,
        block: bool = True,
        timeout: float = _TIMEOUT,
        max_messages_to_get: int = _UNBOUNDED,
    ) -> list[Any]:
        """Wait for an object, then take what is there; Empty if none comes in time."""
        taken: list[Any] = self._queue.get_many(max_messages_to_get, block, timeout)
        return taken

    def get_many_nowait(self, max_messages_to_get: int = _UNBOUNDED) -> list[Any]:
        """Take what is there, or raise Empty at once."""
        return self.get_many(False, max_messages_to_get=max_messages_to_get)

    def qsize(self) -> int:
        """Objects in the queue."""
        return self._queue.qsize()  # type: ignore[no-any-return]

    def empty(self) -> bool:
        """Whether there is no object in the queue."""
        return self._queue.empty()  # type: ignore[no-any-return]

    def full(self) -> bool:
        """Whether one more object of the usual size would exceed `max_size_bytes`."""
        try:
            found = self._queue.statistics()
        except NotSupportedByFallback:
            return False  # a pipe does not tell its bytes
        usual = found.bytes_put / max(1, found.messages_put)
        return bool(found.used_bytes + usual > self.max_size_bytes)

    def close(self) -> None:
        """Tell every process that asks :meth:`is_closed`; put and get go on."""
        self._closed.value = True

    def is_closed(self) -> bool:
        """Whether a process has called :meth:`close`."""
        return self._closed.value

    def join_thread(self) -> None:
        """Do nothing: there is no thread."""

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread."""


class _Unwatched(_backend.Queue[Any]):
    """A queue that programs drop, for close() means another thing to them."""

    _may_be_dropped = True

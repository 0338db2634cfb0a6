"""A multiprocessing context whose queues are shmring's.

>>> import shmring
>>> ctx = shmring.get_context("spawn")
>>> queue = ctx.Queue()
>>> isinstance(queue, shmring.Queue)
True
>>> queue.close()

Everything else of the context is multiprocessing's.  So are the queues inside
``Pool``, ``Manager`` and ``concurrent.futures``, which use private names of
them and poll their pipes.  A shmring queue goes to these as an argument, and
through their queues.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import sys
from typing import Any

from shmring._backend import JoinableQueue, Queue, SimpleQueue
from shmring.drop_in import STOCK_INSIDE

__all__ = ["get_context"]


class QueueMethods:
    """The methods that replace multiprocessing's."""

    stock: multiprocessing.context.BaseContext  # the context that this one stands for

    def defaults(self) -> dict[str, Any]:
        """Options of the queues that are made here, where the caller gives none."""
        return {}

    def Queue(self, maxsize: int = 0, **options: Any) -> Queue[Any]:
        """A :class:`shmring.Queue`; `options` are those of its constructor."""
        return Queue(maxsize, ctx=self.stock, **{**self.defaults(), **options})

    def JoinableQueue(self, maxsize: int = 0, **options: Any) -> JoinableQueue[Any]:
        """A :class:`shmring.JoinableQueue`; `options` are those of its constructor."""
        return JoinableQueue(maxsize, ctx=self.stock, **{**self.defaults(), **options})

    def SimpleQueue(self, **options: Any) -> Any:
        """A :class:`shmring.SimpleQueue`; `options` are those of its constructor.

        The standard library's own pools get the standard library's.
        """
        if not options and sys._getframe(1).f_globals.get("__name__") in STOCK_INSIDE:
            return self.stock.SimpleQueue()
        return SimpleQueue(ctx=self.stock, **{**self.defaults(), **options})

    def Pool(self, *args: Any, **options: Any) -> Any:
        """multiprocessing's Pool, with the standard library's queues inside."""
        return self.stock.Pool(*args, **options)

    def get_context(self, method: str | None = None) -> Any:
        """This context, or the same kind of another start method."""
        return self if method is None else context_with(type(self).__bases__[0], method)

    def __reduce__(self) -> tuple[Any, ...]:
        return context_with, (type(self).__bases__[0], self.stock.get_start_method())


_contexts: dict[tuple[type, str], Any] = {}


def context_with(methods: type[QueueMethods], method: str | None) -> Any:
    """The context of a start method with these methods; the same object each time."""
    stock = multiprocessing.get_context(method)
    key = methods, stock.get_start_method()
    if key not in _contexts:
        kind = type(stock)
        ours = type(kind.__name__, (methods, kind), {"__module__": __name__, "stock": stock})
        _contexts.setdefault(key, ours())
    return _contexts[key]


def get_context(method: str | None = None) -> Any:
    """A multiprocessing context whose Queue, JoinableQueue and SimpleQueue are shmring's.

    Args:
        method: "fork", "spawn" or "forkserver"; None is the default, which is
            then fixed, as by :func:`multiprocessing.get_context`.

    Returns:
        A ``multiprocessing.context.BaseContext``; the same object for the same
        start method.

    Raises:
        ValueError: this platform has no such start method.
    """
    return context_with(QueueMethods, method)

"""shmring's queues in place of multiprocessing's, for a program that imports only the latter.

``multiprocessing.Queue`` and its like are methods of the contexts, of which each
program may hold references already.  So the code of the three functions is
exchanged, not the functions: every reference leads to shmring, and back.

Children: a forked one has the exchanged code.  Others unpickle the *preparation
data* of multiprocessing before they import the main module; an entry of it does
the exchange there.
"""

from __future__ import annotations

import multiprocessing.context
import sys
from multiprocessing import spawn
from types import CodeType, FunctionType
from typing import Any

from shmring import _backend

__all__ = ["STOCK_INSIDE", "install", "uninstall"]

# These modules make a SimpleQueue and then read private names of its pipe.
STOCK_INSIDE = frozenset({"multiprocessing.pool", "concurrent.futures.process"})


def install() -> bool:
    """Make ``multiprocessing``'s Queue, JoinableQueue and SimpleQueue those of shmring.

    This holds for the functions of the module and of every context, also where
    they were imported before, in this process and in every child that
    multiprocessing starts from now on.  ``Pool``, ``Manager`` and
    ``concurrent.futures`` keep the standard library's queues inside; classes that
    inherit from ``multiprocessing.queues.Queue`` are left alone.  Twice is once.

    Returns:
        Whether they are shmring's now; not on the fallback, whose queues are
        multiprocessing's anyway.
    """
    if _backend.backend != "ring":
        return False
    if not _stock:
        replacements = {"Queue": _queue, "JoinableQueue": _joinable, "SimpleQueue": _simple}
        for name, ours in replacements.items():
            function: FunctionType = getattr(multiprocessing.context.BaseContext, name)
            _stock[name] = function.__code__
            function.__code__ = ours.__code__
        _preparation.append(spawn.get_preparation_data)
        spawn.get_preparation_data = _preparation_data
    return True


def uninstall() -> None:
    """Undo :func:`install` in this process; queues and children that exist keep what they have."""
    for name, code in _stock.items():
        getattr(multiprocessing.context.BaseContext, name).__code__ = code
    _stock.clear()
    if _preparation:
        stock = _preparation.pop()
        if spawn.get_preparation_data is _preparation_data:
            spawn.get_preparation_data = stock


_stock: dict[str, CodeType] = {}
_preparation: list[Any] = []  # the stock function, while it is replaced


# The code of these three runs as a method of a context, with the globals of
# multiprocessing.context: it imports what it names.


def _queue(self: Any, maxsize: int = 0) -> Any:
    from shmring._backend import Queue

    return Queue(maxsize, ctx=self.get_context())


def _joinable(self: Any, maxsize: int = 0) -> Any:
    from shmring._backend import JoinableQueue

    return JoinableQueue(maxsize, ctx=self.get_context())


def _simple(self: Any) -> Any:
    from shmring.drop_in import simple_queue

    return simple_queue(self)


def simple_queue(context: Any) -> Any:
    """The SimpleQueue for the caller of a context's method: the stock one for stock pools."""
    caller = sys._getframe(2).f_globals.get("__name__")
    if caller in STOCK_INSIDE:
        from multiprocessing.queues import SimpleQueue as Stock

        return Stock(ctx=context.get_context())
    from shmring._backend import SimpleQueue

    return SimpleQueue(ctx=context.get_context())


class _InChild:
    """An entry of the preparation data: unpickled, it installs."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The child gets this path only after it has unpickled all of the data.
        program = f"import sys; sys.path[:] = {sys.path!r}; import shmring; shmring.install()"
        return exec, (program,)


def _preparation_data(name: str) -> dict[str, Any]:
    data: dict[str, Any] = _preparation[0](name)
    if sys._getframe(1).f_globals.get("__name__") == "multiprocessing.forkserver":
        # The server would import the main module for its children, with the stock queues.
        data.pop("init_main_from_path", None)
    data["shmring"] = _InChild()
    return data

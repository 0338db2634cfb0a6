"""Explanations of failed pickles: the part that cannot travel, the type that arrived.

Python 3.14 adds such notes to a pickling error; without this module the errors of
3.11 to 3.13 would name neither the part nor the way to it.  A search costs at
most as much as the failed attempt; where the search itself fails, the answer is
None and the first error stands.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import pickletools
import reprlib
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["first_type_in", "unpicklable_part"]

_MOST_PARTS = 1_000_000  # looked at on the way to the part: 0.1 s
_MOST_OPCODES = 2_000
_MOST_HEAD_BYTES = 1 << 20

_ATOMS = frozenset({int, float, complex, bool, str, bytes, bytearray, type(None)})
# Named in many pickles before the type of the object.
_HELPERS = frozenset(
    {"copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__", "builtins.getattr"}
)


def unpicklable_part(obj: Any, reducers: Mapping[type, Any]) -> str | None:
    """The part of `obj` that pickle fails on, such as ".connection['lock'] (a lock)".

    None if it is `obj` itself, or was not found.
    """
    try:
        pickler = _TracingPickler(reducers)
        try:
            pickler.dump(obj)
        except Exception:
            part = pickler.last
        else:
            return None  # this attempt succeeded
        if part is None or part is obj:
            return None
        way = _way_to(part, obj)
        if isinstance(part, type | types.FunctionType):
            what = f"{type(part).__name__} {part.__qualname__}"
        else:
            what = type(part).__qualname__
        return f"{way} (a {what})" if way else f"a {what} inside it"
    except Exception:
        return None


class _TracingPickler(pickle.Pickler):
    """A pickler without output that remembers the object begun last."""

    def __init__(self, reducers: Mapping[type, Any]) -> None:
        super().__init__(_NoOutput(), protocol=5, buffer_callback=lambda buffer: False)
        self.dispatch_table = reducers
        self.last: Any = None

    def reducer_override(self, obj: Any) -> Any:
        self.last = obj
        return NotImplemented


class _NoOutput:
    def write(self, data: Any) -> int:
        return len(data)


def _way_to(wanted: Any, obj: Any) -> str | None:
    """The shortest way by items and attributes; None if there is none, or it is long."""
    seen = {id(obj)}
    ahead: deque[tuple[Any, Any]] = deque([(obj, None)])  # an object, and the way to it
    left = _MOST_PARTS
    while ahead:
        here, way = ahead.popleft()
        for label, part in _parts(here):
            if part is wanted:
                return _spelled((label, way))
            left -= 1
            if left < 0:
                return None
            if type(part) not in _ATOMS and id(part) not in seen:
                seen.add(id(part))
                ahead.append((part, (label, way)))
    return None


def _parts(obj: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of an object, each with a label: a str (an attribute) or [a key]."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield [key], value
            yield "key", key
    elif isinstance(obj, list | tuple | set | frozenset | deque):
        for index, value in enumerate(obj):
            yield [index], value
    if isinstance(obj, types.MethodType):
        yield "__self__", obj.__self__
    elif isinstance(obj, functools.partial):
        for name in ("func", "args", "keywords"):
            yield name, getattr(obj, name)
    elif not isinstance(obj, type | types.ModuleType | types.FunctionType):
        yield from getattr(obj, "__dict__", {}).items()
        for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
            if hasattr(obj, name):
                yield name, getattr(obj, name)
        yield "__class__", type(obj)


def _spelled(way: Any) -> str:
    spelled = ""
    while way is not None:
        label, way = way
        step = f".{label}" if isinstance(label, str) else f"[{reprlib.repr(label[0])}]"
        spelled = step + spelled
    return spelled if len(spelled) < 300 else f"{spelled[:140]} … {spelled[-140:]}"


def first_type_in(head: bytes) -> str | None:
    """The first class or function that a pickle names, found without running it."""
    recent: list[str] = []  # STACK_GLOBAL takes the last two strings
    memo: list[str | None] = []
    try:
        opcodes = pickletools.genops(head[:_MOST_HEAD_BYTES])
        for _, (opcode, argument, _position) in zip(range(_MOST_OPCODES), opcodes, strict=False):
            name = opcode.name
            found = None
            if name == "GLOBAL":
                found = str(argument).replace(" ", ".")
            elif name == "STACK_GLOBAL":
                found = ".".join(recent[-2:])
            elif name == "MEMOIZE":
                memo.append(recent[-1] if recent else None)
            elif name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
                recent.append(memo[argument] or "")
            elif isinstance(argument, str):
                recent.append(argument)
            if found is not None and found not in _HELPERS:
                return found
    except Exception:  # cut off, or no pickle at all
        return None
    return None

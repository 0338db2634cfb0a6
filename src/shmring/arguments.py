"""Checks of arguments that many calls share; the compiled calls check theirs in wait.pyx."""

from __future__ import annotations

import operator
import os
from typing import overload

from shmring.errors import InvalidArgument

__all__ = ["checked_int", "checked_maxsize", "checked_name", "checked_timeout"]


@overload
def checked_timeout(timeout: float, name: str = ...) -> float: ...


@overload
def checked_timeout(timeout: float | None, name: str = ...) -> float | None: ...


def checked_timeout(timeout: float | None, name: str = "timeout") -> float | None:
    """Return a timeout as it counts: below 0 is 0, as in multiprocessing.

    Args:
        timeout: in seconds; None is without end.
        name: of the argument, for the error.

    Raises:
        InvalidArgument: it is NaN.
    """
    if timeout is None or timeout >= 0:
        return timeout
    if timeout < 0:
        return 0.0
    raise InvalidArgument(f"{name}={timeout!r}: a number of seconds, or None to wait for ever")


def checked_int(value: object, name: str, least: int | None = None) -> int:
    """Return an integer, asked for once: an object may answer otherwise the second time.

    Args:
        value: anything with ``__index__``.
        name: of the argument, for the error.
        least: the smallest value that is possible; None for any.

    Raises:
        TypeError: it is no integer.
        InvalidArgument: it is below `least`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r}: an int is needed, not {type(value).__name__}") from None
    if least is not None and number < least:
        raise InvalidArgument(f"{name}={number}: at least {least} is needed")
    return number


def checked_maxsize(maxsize: object, most: int = (1 << 63) - 1) -> int:
    """Return how many messages a queue may hold; 0 or less is without a bound, and 0.

    Args:
        maxsize: as given.
        most: what the queue can count to.

    Raises:
        TypeError: it is no integer.
        InvalidArgument: it is above `most`.
    """
    bound = max(0, checked_int(maxsize, "maxsize"))
    if bound > most:
        raise InvalidArgument(f"maxsize={bound}: at most {most} messages, or 0 for no bound")
    return bound


def checked_name(name: str, most_bytes: int, forbidden: str = "/\0") -> str:
    """Return a name that a file can bear.

    Args:
        name: as given.
        most_bytes: its greatest length.
        forbidden: the characters that it may not have.

    Raises:
        TypeError: it is no str.
        InvalidArgument: it is empty, too long, "." or "..", or has such a character.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: a str is needed, not {type(name).__name__}")
    if not 0 < len(os.fsencode(name)) <= most_bytes or {*name} & {*forbidden}:
        raise InvalidArgument(
            f"name={name[:300]!r}: 1 to {most_bytes} bytes, none of them in {forbidden!r}"
        )
    if name in (".", ".."):
        raise InvalidArgument(f"name={name!r} is taken by the file system")
    return name

"""What a timeout of a caller means; for compiled calls see cython/shmring/_core/deadline.pyx."""

from __future__ import annotations

from typing import overload

from shmring.errors import InvalidArgument

__all__ = ["checked_timeout"]


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

"""Common parts of the commands: exit statuses, errors of one line, numbers for people."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CLOSED_PIPE",
    "IMPOSSIBLE",
    "INTERRUPTED",
    "WRONG",
    "Stop",
    "age",
    "amount",
    "cores",
    "cut",
    "dump",
    "many",
    "need_ring",
    "printable",
    "show",
    "size",
    "width",
]

WRONG = 1  # what was asked for failed, or is not there
IMPOSSIBLE = 2  # the command line, or what it asks of this back end
INTERRUPTED = 130  # as a shell says of SIGINT
CLOSED_PIPE = 141  # as a shell says of SIGPIPE


class Stop(Exception):
    """The end of the command: a text for stderr, and the exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def need_ring(command: str) -> None:
    """Raise Stop on the fallback, which has nothing to look at."""
    from shmring import _backend

    if _backend.backend != "ring":
        raise Stop(
            f"{command} needs the ring, this is the fallback: a pipe shows nothing"
            " (shmring doctor says why)",
            IMPOSSIBLE,
        )


def printable(name: str) -> str:
    """A name, without characters that would move the cursor."""
    if name.isprintable():
        return name
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)


def many(number: int, what: str) -> str:
    """A number and a noun, in the plural if need be."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def amount(number: float) -> str:
    """A count in at most five characters: 7, 1.2k, 34M."""
    if number < 999.5:
        return f"{number:.0f}"
    units = iter("kMGTPEZYRQ")  # the last ones for the rates of a damaged ring
    unit = ""
    while number >= 999.5:
        number /= 1000
        unit = next(units)
    return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"


def size(nbytes: int) -> str:
    """A number of bytes, in KiB, MiB or GiB."""
    if nbytes < 1 << 20:
        return f"{nbytes / 1024:.0f} KiB"
    if nbytes < 1 << 30:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes / (1 << 30):.1f} GiB"


def age(seconds: float) -> str:
    """A time in at most four characters: 7s, 12m, 3h, 200d."""
    for limit, unit, length in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds / 86_400:.0f}d"


def width() -> int | None:
    """The columns of the terminal; None where the output is none."""
    if not sys.stdout.isatty():
        return None
    # Not shutil's, which imports compressors.
    with contextlib.suppress(ValueError, OSError):
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(1).columns or 80
    return 80


def cut(line: str, columns: int | None) -> str:
    """The line, cut to the columns of a terminal."""
    if columns is None or len(line) <= columns:
        return line
    return line[: max(0, columns - 1)] + "…"


def show(lines: Iterable[str]) -> None:
    """Print lines, cut to the terminal."""
    columns = width()
    for line in lines:
        print(cut(line, columns))
    sys.stdout.flush()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def dump(value: Any) -> str:
    """A value as one line of JSON."""
    import json

    return json.dumps(value, ensure_ascii=True)

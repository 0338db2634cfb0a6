"""``shmring ls``, ``watch`` and ``rm``: what stands in shared memory, as lines of text."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from shmring import _backend as backends
from shmring.cli.common import (
    IMPOSSIBLE,
    WRONG,
    Stop,
    age,
    amount,
    cut,
    dump,
    need_ring,
    printable,
    show,
    size,
    width,
)

__all__ = [
    "COLUMNS",
    "fill_of",
    "find_block",
    "findings",
    "ls",
    "rm",
    "row_of",
    "table_lines",
    "watch",
]

# Title, and how wide; the last ones go first where the terminal is narrow.  The name gets the rest.
COLUMNS = [
    ("KIND", 9),
    ("MSGS", 6),
    ("FILL", 5),
    ("MSG/S", 6),
    ("WAIT", 5),
    ("OWNER", 8),
    ("DIED", 5),
    ("AGE", 5),
    ("PUT", 4),
    ("GET", 4),
    ("OPEN", 5),
]
_LEAST_NAME = 24


def ls(options: argparse.Namespace) -> int:
    """Show every ring, queue, registry and pool of this user."""
    need_ring("ls")
    from shmring.observer.observer import listing

    found = listing()
    if options.json:
        print(dump(found))
        return 0
    if not found:
        print(_no_place() or "nothing of ours in shared memory")
        return 0
    show(table_lines(found))
    return 0


def table_lines(found: list[dict[str, Any]], about: str = "") -> Iterator[str]:
    """The table, and below each row what stands out and contains `about`."""
    columns = width()
    name_width = max(_LEAST_NAME, *(len(_label(each)) for each in found))
    yield row_of(None, name_width, columns)
    for block in found:
        yield row_of(block, name_width, columns)
        yield from (f"    {line}" for line in findings(block) if about in line)


def row_of(block: dict[str, Any] | None, name_width: int, columns: int | None) -> str:
    """One line of the table; None is its head.

    Args:
        block: from an observer.
        name_width: what the longest name takes.
        columns: of the terminal; columns that do not fit are left out.
    """
    name_width, count, form = _layout(name_width, columns)
    if block is None:
        name, cells = "NAME", tuple(title for title, _ in COLUMNS)
    else:
        name, cells = _label(block), _cells(block)
    return cut(name, name_width).ljust(name_width) + form % cells[:count]


@functools.lru_cache
def _layout(name_width: int, columns: int | None) -> tuple[int, int, str]:
    """The width of names, how many columns fit behind them, and the form of these."""
    shown = COLUMNS
    if columns is not None:
        name_width = min(name_width, max(_LEAST_NAME, columns - sum(each[1] for each in COLUMNS)))
        while len(shown) > 1 and name_width + sum(each[1] for each in shown) > columns:
            shown = shown[:-1]
    return name_width, len(shown), "".join(f" %{wide - 1}s" for _, wide in shown)


def _label(block: dict[str, Any]) -> str:
    return printable(block["id"]) + (" *" if block["name"] is None else "")


def _cells(block: dict[str, Any]) -> tuple[str, ...]:
    """What stands in each of the columns."""
    messages = fill = rate = waiting = owner = died = made = put = get = "-"
    if (known := block.get("owner")) is not None:
        owner = str(known["pid"]) if known["state"] == "alive" else known["state"]
    if block.get("age_seconds") is not None:
        made = age(block["age_seconds"])
    if "messages" in block:
        messages, fill = amount(block["messages"]), f"{100 * fill_of(block):.0f}%"
        rate = "-" if block["rate"] is None else amount(block["rate"])
        put, get = str(len(block["producers"])), str(len(block["consumers"]))
        waiting, died = str(len(block["waiters"])), str(block["recoveries"])
    elif "tasks" in block:
        messages, died = amount(block["tasks"]["unanswered"]), str(block["died"])
    if "processes" in block:
        waiting = str(sum(each["waits_for"] is not None for each in block["processes"]))
    opened = str(len(block["pids"]))
    return block["kind"], messages, fill, rate, waiting, owner, died, made, put, get, opened


def fill_of(block: dict[str, Any]) -> float:
    """How full a ring is, 0 to 1: of its messages if they are bounded, else of its bytes."""
    if block["max_messages"]:
        return float(min(1.0, block["messages"] / block["max_messages"]))
    return float(min(1.0, block["used_bytes"] / max(1, block["max_capacity"])))


def findings(block: dict[str, Any]) -> Iterator[str]:
    """The lines on what stands out: errors, waiters, holders, deaths, processes."""
    if "error" in block:
        yield printable(block["error"])
    if not block["pids"]:
        yield f"open nowhere, {size(block['nbytes'])}: shmring rm --stale removes it"
    if block["stopped"]:
        yield f"open in stopped process {', '.join(map(str, block['stopped']))}"
    if block.get("poisoned"):
        yield "poisoned: every call raises RingCorrupted"
    elif block.get("shut_down"):
        yield "shut down: puts are refused"
    for each in block.get("waiters", ()):
        waits = f"waits in {each['call']} for {each['waits_for']}"
        yield f"{_named(each)} {waits}, {each['seconds']:.1f} s"
    for each in block.get("holders", ()):
        yield f"{_named(each)} holds {each['holds']}"
    for each in block.get("deaths", ()):
        yield f"{_named(each)} died holding {each['held']}, {each['seconds']:.1f} s ago"
    if "tasks" in block:
        tasks = block["tasks"]
        yield (
            f"{tasks['running']} tasks running, {tasks['unanswered']} unanswered,"
            f" {tasks['answered']} answered, {tasks['retried']} retried"
        )
        yield f"tasks travel by {', answers by '.join(block['queues'])}"
    for each in block.get("processes", ()):
        doing = each["state"]
        if each["waits_for"] is not None:
            doing += f", waits for {printable(each['waits_for'])}"
        if each["task"] is not None:
            doing += f", at task {each['task']}"
        if each["seconds"] is not None:
            doing += f", {each['seconds']:.1f} s"
        yield f"{printable(each['process_id'])} (process {each['pid']}) {doing}"


def _named(each: dict[str, Any]) -> str:
    name = "an unknown process" if each["pid"] is None else f"process {each['pid']}"
    state = each.get("state", "alive")
    return name if state == "alive" else f"{name} ({state})"


def _no_place() -> str | None:
    """The line to print where there is no /dev/shm; None where there is one."""
    if backends.backend != "ring":
        return None
    from shmring.shm.segment import DIRECTORY

    return None if os.path.isdir(DIRECTORY) else f"there is no {DIRECTORY}: nothing to look at"


# -- one ring ---------------------------------------------------------------------------------


def find_block(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What an observer found under a name, or the id of an anonymous ring.

    Raises:
        Stop: there is nothing of that name; the text says what there is.
    """
    for block in found:
        if name in (block["name"], block["id"]):
            return block
    from shmring.observer.files import find_named

    find_named(name)  # says why, unless it is none of ours
    raise Stop(f"{printable(name)} is not shmring's: shmring ls shows what is", WRONG)


def watch(options: argparse.Namespace) -> int:
    """Print one line about a ring each interval."""
    need_ring("watch")
    from shmring.observer.observer import Observer

    with Observer() as observer:
        named = _find_ring(observer.look(), options.name)["name"]
        with Observer(named, scan_s=options.interval) as one:
            due = time.monotonic()
            one.look()
            for _ in itertools.count() if options.count is None else range(options.count):
                due = max(time.monotonic(), due + options.interval)
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    block = _find_ring(one.look(), options.name)
                except FileNotFoundError:
                    raise Stop(f"{printable(options.name)} has gone", WRONG) from None
                if options.json:
                    print(dump(block), flush=True)
                else:
                    show([_line_of(block)])
    return 0


def _find_ring(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    block = find_block(found, name)
    if "messages" not in block and "error" not in block:
        raise Stop(f"{printable(name)} is a {block['kind']}, not a ring", IMPOSSIBLE)
    return block


def _line_of(block: dict[str, Any]) -> str:
    if "error" in block:
        return f"{time.strftime('%H:%M:%S')}  {printable(block['error'])}"
    sleeping = len(block["waiters"])
    return (
        f"{time.strftime('%H:%M:%S')}  {block['put_rate'] or 0:.0f} put/s"
        f"  {block['rate'] or 0:.0f} taken/s  {block['messages']} messages"
        f"  {100 * fill_of(block):.1f} % full  {sleeping} waiting"
    )


# -- removal -----------------------------------------------------------------------------------


def rm(options: argparse.Namespace) -> int:
    """Remove names from shared memory."""
    if options.stale == bool(options.names):
        raise Stop("give names, or --stale (see shmring rm --help)", IMPOSSIBLE)
    if options.names:
        need_ring("rm NAME")
        outcome = _removed(options.names, options.force)
    else:
        outcome = {"removed": backends.cleanup_stale(), "refused": {}}
    if options.json:
        print(dump(outcome))
    else:
        for name in outcome["removed"]:
            print(f"removed {printable(name)}")
        if options.stale and not outcome["removed"]:
            print(_no_place() or "nothing to remove")
    for name, why in outcome["refused"].items():
        print(f"shmring: {printable(name)}: {printable(why)}", file=sys.stderr)
    return WRONG if outcome["refused"] else 0


def _removed(names: list[str], force: bool) -> dict[str, Any]:
    from shmring.observer.files import find_named
    from shmring.observer.observer import Observer
    from shmring.shm import segment

    with Observer() as observer:
        found = {each["name"]: each for each in observer.look() if each["name"] is not None}
    removed: list[str] = []
    refused: dict[str, str] = {}
    for name in names:
        try:
            identity, _ = find_named(name)
            if name not in found:
                refused[name] = "it is not shmring's"
            elif force:
                segment.unlink(name, identity)
                removed.append(name)
            elif segment.reclaim(name):
                removed.append(name)
            else:
                pids = ", ".join(map(str, found[name]["pids"])) or "a process that has ended since"
                refused[name] = (
                    f"it is open in {pids}: end them, or take the name away from them by --force"
                )
        except (OSError, ValueError) as error:
            refused[name] = str(error.strerror if isinstance(error, OSError) else error)
    return {"removed": removed, "refused": refused}

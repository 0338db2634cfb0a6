"""``shmring inspect NAME|PID``: one ring with its last messages, or all that a process has open."""

from __future__ import annotations

import argparse
import reprlib
from typing import Any

from shmring.cli.common import WRONG, Stop, age, dump, many, need_ring, printable, show, size
from shmring.cli.listing import fill_of, find_block, findings, table_lines

__all__ = ["facts_lines", "inspect"]

_MOST_DECODED = 1 << 20  # bytes of a message that is decoded
_HEX_BYTES = 64
_SHOWN = ("position", "length", "kind", "codec", "state", "owner")  # of a frame


def inspect(options: argparse.Namespace) -> int:
    """Show a ring, a registry or a pool by name, or what a process has open by pid."""
    need_ring("inspect")
    from shmring.observer.observer import Observer

    with Observer() as observer:
        found = observer.look()
        if options.target.isdecimal() and not any(each["id"] == options.target for each in found):
            return _process(int(options.target), observer, found, options)
        block = find_block(found, options.target)
        frames = []
        if "messages" in block and "error" not in block:
            frames = _frames(observer.descriptor(block["id"]), options)
        commands = {pid: observer.processes.command(pid) for pid in block["pids"]}
    if options.json:
        print(dump({**block, "commands": commands, "frames": frames}))
        return 0
    show([*facts_lines(block), *findings(block)])
    show(f"process {pid}: {printable(command)}" for pid, command in commands.items())
    if frames:
        show([f"the last {many(len(frames), 'frame')}, the newest last:"])
    for frame in frames:
        owner = f" by process {frame['owner']}" if frame["owner"] else ""
        more = " ..." if frame["length"] > _HEX_BYTES else ""
        show(
            [
                f"  at {frame['position']}: {many(frame['length'], 'byte')}, {frame['codec']},"
                f" {frame['state']}{owner}",
                f"    {frame['hex']}{more}",
                f"    {frame['value'] or '(' + frame['why_not'] + ')'}",
            ]
        )
    return 0


def facts_lines(block: dict[str, Any]) -> list[str]:
    """Header and counters, one a line."""
    lines = [f"{printable(block['id'])}  {block['kind']}, {size(block['nbytes'])} of memory"]
    if block["name"] is None:
        lines[0] += ", anonymous"
    owner = block.get("owner")
    if owner is not None:
        since = "" if block.get("age_seconds") is None else f" {age(block['age_seconds'])} ago"
        lines.append(f"made by process {owner['pid']} ({owner['state']}){since}")
    if "messages" in block:
        bound = f" of {block['max_messages']:,}" if block["max_messages"] else ""
        lines += [
            f"messages: {block['messages']:,}{bound} in it,"
            f" {block['messages_put']:,} put, {block['messages_taken']:,} taken",
            f"bytes: {block['used_bytes']:,} in it, capacity {block['capacity']:,}, may grow to"
            f" {block['max_capacity']:,} ({100 * fill_of(block):.1f} % full),"
            f" {block['bytes_put']:,} put",
            f"grown or shrunk {many(block['growths'], 'time')}, lock owners found dead:"
            f" {block['recoveries']}",
        ]
    if block.get("blocks"):
        lines.append(
            f"{many(block['blocks'], 'block')} for large buffers: {block['block_bytes']:,} bytes,"
            f" {block['lent_bytes']:,} of them in messages or received arrays"
        )
    for pid, nbytes in block.get("deliveries", {}).items():
        lines.append(f"process {pid} took {nbytes:,} bytes that it has not acknowledged")
    return lines


def _frames(fd: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from shmring.errors import ShmringError
    from shmring.observer.frames import decoded, last_frames
    from shmring.observer.ring import header_in, read_bytes
    from shmring.shm.segment import pid_namespace

    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = 200
    shorten.maxdict = shorten.maxlist = shorten.maxtuple = shorten.maxset = 20
    try:
        header = header_in(read_bytes(fd), pid_namespace())
        found = last_frames(fd, header, options.frames, _MOST_DECODED)
    except ShmringError as error:
        raise Stop(f"its frames cannot be read: {error}", WRONG) from None
    shown = []
    for frame in found:
        value = why_not = None
        try:
            value = printable(shorten.repr(decoded(frame, unpickle=options.pickle)))
        except Exception as error:  # of a codec, or of what was unpickled
            why_not = printable(str(error) or type(error).__name__)
        shown.append(
            {
                **{name: getattr(frame, name) for name in _SHOWN},
                "hex": frame.payload[:_HEX_BYTES].hex(" ", 4),
                "value": value,
                "why_not": why_not,
            }
        )
    return shown


def _process(
    pid: int, observer: Any, found: list[dict[str, Any]], options: argparse.Namespace
) -> int:
    """What a process has open, and what it does there."""
    state = observer.processes.state(pid)
    blocks = [block for block in found if pid in block["pids"]]
    if not blocks:
        why = "is not there" if state == "dead" else "has nothing of shmring's open"
        raise Stop(f"process {pid} {why}", WRONG)
    command = observer.processes.command(pid)
    if options.json:
        print(dump({"pid": pid, "state": state, "command": command, "open": blocks}))
        return 0
    show([f"process {pid} ({state}): {printable(command)}"])
    show(table_lines(blocks, f"process {pid}"))
    return 0

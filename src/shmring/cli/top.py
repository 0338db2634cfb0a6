"""``shmring top``: what ``ls`` shows, live.

::

    keys --> Top: pages, order, histories --> lines of text with styles --> terminal
                      ^
    Observer ---------+  every interval

:class:`Top` knows no terminal.  :func:`top` draws what it says: curses, which every
Python on Linux has, knows keys and capabilities of the terminal.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from shmring.cli.common import IMPOSSIBLE, Stop, age, amount, cut, dump, many, need_ring, printable
from shmring.cli.inspect import facts_lines
from shmring.cli.listing import fill_of, findings, row_of
from shmring.observer.observer import Observer

__all__ = ["Line", "Top", "top"]

_HISTORY = 120  # looks
_TREND = 12  # characters of the list
_BARS = " ▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*%#"
_SCAN_S = 2.0
_PROCESSES_HEAD = "    PID STATE   ROLE  SINCE DELIVERY  BEAT  WAITS FOR             COMMAND"
_WORKERS_HEAD = "    PID STATE    SINCE   TASK    DONE  BEAT  NAME              WAITS FOR"


class Line(NamedTuple):
    """A line of the screen; the style is "", "head", "chosen", "bad" or "dim"."""

    text: str
    style: str = ""


# How the rows can be sorted: a title of the table, and what it means.
_ORDERS = {
    "MSG/S": lambda each: each.get("rate") or 0.0,
    "MSGS": lambda each: each.get("messages", each.get("tasks", {}).get("unanswered", 0)),
    "FILL": lambda each: fill_of(each) if "messages" in each else 0.0,
    "WAIT": lambda each: len(each.get("waiters", ())),
    "DIED": lambda each: each.get("recoveries", each.get("died", 0)),
    "OPEN": lambda each: len(each["pids"]),
    "AGE": lambda each: each.get("age_seconds") or 0.0,
    "NAME": lambda each: each["id"],
}


class Top:
    """What is shown, and what the keys do.

    Args:
        unicode: whether the terminal can show block characters.
    """

    def __init__(self, *, unicode: bool = True) -> None:
        self.order = "MSG/S"
        self.descending = True
        self.paused = False
        self.page: str | None = None  # the id of the block that has the screen
        self._chosen: str | None = None  # the id of the row with the cursor
        self._first = 0  # row on the screen
        self._found: list[dict[str, Any]] = []
        self._rates: dict[str, collections.deque[tuple[float, float]]] = {}
        self._bars = _BARS if unicode else _PLAIN_BARS
        self._observer: Observer | None = None

    def update(self, found: list[dict[str, Any]], observer: Observer | None = None) -> None:
        """Take in a look of an observer."""
        self._observer = observer
        for block in found:
            if "rate" in block:
                history = self._rates.setdefault(block["id"], collections.deque(maxlen=_HISTORY))
                history.append((block["put_rate"] or 0.0, block["rate"] or 0.0))
        for gone in self._rates.keys() - {each["id"] for each in found}:
            del self._rates[gone]
        self._found = sorted(found, key=_ORDERS[self.order], reverse=self.descending)
        if self._found and self._chosen not in {each["id"] for each in found}:
            self._chosen = self._found[0]["id"]

    def press(self, key: str) -> bool:
        """Do what a key says; False: end."""
        if key == "q":
            return False
        if key == "space":
            self.paused = not self.paused
        elif key in ("escape", "left"):
            self.page = None
        elif key in ("s", "r"):
            if key == "s":
                orders = [*_ORDERS]
                self.order = orders[(orders.index(self.order) + 1) % len(orders)]
                self.descending = self.order != "NAME"
            else:
                self.descending = not self.descending
            self._found.sort(key=_ORDERS[self.order], reverse=self.descending)
        elif self.page is None and key in ("enter", "right"):
            self.page = self._chosen
        elif self.page is None and key in ("up", "down", "page up", "page down"):
            ids = [each["id"] for each in self._found]
            step = {"up": -1, "down": 1, "page up": -10, "page down": 10}[key]
            if ids:
                at = ids.index(str(self._chosen)) + step
                self._chosen = ids[min(max(0, at), len(ids) - 1)]
        return True

    # -- lines ---------------------------------------------------------------------------------

    def lines(self, height: int, width: int) -> list[Line]:
        """The screen, from top to bottom; no line is longer than `width`."""
        body = self._list if self.page is None else self._page
        made = [self._title(), *body(height - 2, width)]
        keys = "q end  space pause  " + (
            "s sort  r reverse  enter open" if self.page is None else "esc back"
        )
        made = made[: height - 1]
        made += [Line("")] * (height - 1 - len(made))
        made.append(Line(keys, "dim"))
        return [Line(cut(text, width), style) for text, style in made]

    def _title(self) -> Line:
        rings = [each for each in self._found if "messages" in each]
        rate = sum(each["rate"] or 0.0 for each in rings if "rate" in each)
        waiting = sum(len(each["waiters"]) for each in rings)
        paused = "  PAUSED" if self.paused else ""
        return Line(
            f"shmring {time.strftime('%H:%M:%S')}{paused}  {many(len(rings), 'ring')}"
            f"  {amount(rate)} msg/s  {waiting} waiting"
            f"  by {self.order} {'down' if self.descending else 'up'}",
            "head",
        )

    def _list(self, height: int, width: int) -> Iterator[Line]:
        if not self._found:
            yield Line("nothing of ours in shared memory")
            return
        ids = [each["id"] for each in self._found]
        at, rows = ids.index(str(self._chosen)), max(1, height - 1)
        self._first = min(max(self._first, at - rows + 1), at)
        left = width - _TREND - 1 if width >= 80 else width  # no trend on a narrow terminal
        name_width = max(len(each) + 2 for each in ids)
        yield Line(row_of(None, name_width, left) + (" TREND" if left < width else ""), "head")
        for block in itertools.islice(self._found, self._first, self._first + rows):
            text = row_of(block, name_width, left)
            if left < width:
                text += f" {self._trend(block['id'], _TREND)}"
            style = "bad" if _is_bad(block) else ""
            yield Line(text, "chosen" if block["id"] == self._chosen else style)

    def _trend(self, identifier: str, wide: int, which: int = 1) -> str:
        """A line of bars, the newest on the right; the highest one is full."""
        rates = self._rates.get(identifier, collections.deque())
        history = [each[which] for each in itertools.islice(reversed(rates), wide)]
        most = max(history, default=0.0)
        if not most:
            return " " * wide
        top = len(self._bars) - 1
        bars = [self._bars[math.ceil(each * top / most)] for each in reversed(history)]
        return "".join(bars).rjust(wide)

    def _page(self, height: int, width: int) -> Iterator[Line]:
        block = next((each for each in self._found if each["id"] == self.page), None)
        if block is None:
            yield Line(f"{printable(str(self.page))} has gone", "bad")
            return
        for text in facts_lines(block):
            yield Line(text)
        if "rate" in block:
            for which, (title, name) in enumerate((("put/s  ", "put_rate"), ("taken/s", "rate"))):
                rate = block[name] or 0.0
                trend = self._trend(block["id"], min(_HISTORY, max(1, width - 16)), which)
                yield Line(f"{title} {amount(rate):>5}  {trend}")
        yield Line("")
        processes = "processes" in block
        yield from self._workers(block) if processes else self._processes(block)
        yield Line("")
        for text in findings(block):
            if not processes or "(process " not in text:
                yield Line(text)

    def _processes(self, block: dict[str, Any]) -> Iterator[Line]:
        """A line for each process that has a ring, or plain memory, open."""
        beats = {
            each["pid"]: each["silent_seconds"]
            for other in self._found
            for each in other.get("processes", ())
            if each["state"] != "exited"
        }
        waiting = {each["pid"]: each for each in reversed(block.get("waiters", ()))}
        holding = {each["pid"]: each for each in block.get("holders", ())}
        yield Line(_PROCESSES_HEAD, "head")
        for pid in block["pids"]:
            known = waiting.get(pid)
            roles = [
                role
                for role, seen in (("put", "producers"), ("get", "consumers"))
                if pid in block.get(seen, ())
            ]
            doing = known["waits_for"] if known else ""
            if pid in holding:
                doing = f"holds {holding[pid]['holds']}"
            taken = block.get("deliveries", {}).get(pid)
            command = self._observer.processes.command(pid) if self._observer else ""
            yield Line(
                f"{pid:>7} {'stopped' if pid in block['stopped'] else 'alive':<7}"
                f" {'+'.join(roles) or '-':<7}"
                f" {age(known['seconds']) if known else '-':>3}"
                f" {f'{amount(taken)}B' if taken else '-':>8}"
                f" {age(beats[pid]) if pid in beats else '-':>5}"
                f"  {doing:<21} {printable(command)}",
                "bad" if pid in block["stopped"] else "",
            )

    def _workers(self, block: dict[str, Any]) -> Iterator[Line]:
        """A line for each process of a registry or a pool."""
        yield Line(_WORKERS_HEAD, "head")
        for each in block["processes"]:
            since = "-" if each["seconds"] is None else age(each["seconds"])
            task = "-" if each["task"] is None else str(each["task"])
            yield Line(
                f"{each['pid']:>7} {each['state']:<8} {since:>5} {task:>6}"
                f" {amount(each['tasks']):>7} {age(each['silent_seconds']):>5}"
                f"  {printable(each['process_id']):<17}"
                f" {printable(each['waits_for'] or '')}",
                "bad" if each["state"] in ("dead", "stopped") else "",
            )


def _is_bad(block: dict[str, Any]) -> bool:
    """Whether a row asks for attention: damaged, left behind, or with a stopped process."""
    return bool("error" in block or block.get("poisoned") or not block["pids"] or block["stopped"])


# -- the terminal -----------------------------------------------------------------------------


def top(options: argparse.Namespace) -> int:
    """Show everything, live, until q; with --json, print it at each interval."""
    need_ring("top")
    if options.json:
        return _print_json(options)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Stop("top needs a terminal: use shmring ls, or shmring top --json", IMPOSSIBLE)
    import curses
    import locale
    import signal

    locale.setlocale(locale.LC_ALL, "")
    os.environ.setdefault("ESCDELAY", "50")  # milliseconds until Esc is a key of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # restores the terminal
    try:
        curses.setupterm()
        if not _capability("cup", 0, 0):
            raise curses.error("it cannot move its cursor")
        for name in ("LINES", "COLUMNS"):  # curses would believe them when the size has changed
            os.environ.pop(name, None)
        curses.wrapper(_show, options)
    except curses.error as error:
        raise Stop(f"the terminal TERM={os.environ.get('TERM')!r}: {error}", IMPOSSIBLE) from None
    return 0


def _print_json(options: argparse.Namespace) -> int:
    with Observer(scan_s=_SCAN_S) as observer:
        looks = itertools.count() if options.count is None else range(options.count)
        observer.look()
        for _ in looks:
            time.sleep(options.interval)
            print(dump(observer.look()), flush=True)
    return 0


def _show(screen: Any, options: argparse.Namespace) -> None:
    """Draw and read keys until q."""
    import curses
    import locale

    keys = {
        curses.KEY_UP: "up",
        curses.KEY_DOWN: "down",
        curses.KEY_PPAGE: "page up",
        curses.KEY_NPAGE: "page down",
        curses.KEY_ENTER: "enter",
        curses.KEY_LEFT: "left",
        curses.KEY_RIGHT: "right",
        curses.KEY_BACKSPACE: "left",
        10: "enter",
        13: "enter",
        27: "escape",
        32: "space",
        127: "left",
        ord("k"): "up",
        ord("j"): "down",
    }
    if curses.has_colors():
        curses.use_default_colors()
    with contextlib.suppress(curses.error):  # a terminal may be unable to hide it
        curses.curs_set(0)
    lines = _Lines(screen)
    shown = Top(unicode=locale.getpreferredencoding(False).upper() in ("UTF-8", "UTF8"))
    looks = 0
    with Observer(scan_s=_SCAN_S) as observer:
        due = time.monotonic()
        while options.count is None or looks < options.count:
            now = time.monotonic()
            if now >= due:
                due = now + options.interval
                if not shown.paused:
                    shown.update(observer.look(detail=shown.page is not None), observer)
                looks += 1
            lines.draw(shown)
            screen.timeout(max(1, math.ceil(1000 * (due - time.monotonic()))))
            key = screen.getch()
            if key == curses.KEY_RESIZE:
                lines.forget()
            if key in (-1, curses.KEY_RESIZE):
                continue
            if not shown.press(keys.get(key, chr(key) if 0 < key < 256 else "")):
                return
            if shown.page is not None and not shown.paused:
                due = time.monotonic()  # the page shows more than the list has looked at


class _Lines:
    """The lines on the screen; of new ones, those that differ are written, all at once.

    curses would write each piece that differs by a system call of its own, 140 at a look.
    """

    def __init__(self, screen: Any) -> None:
        import curses
        import locale

        self._screen = screen
        self._encoding = locale.getpreferredencoding(False)
        self._shown: list[Line] = []
        red = cyan = _capability("bold")
        if not os.environ.get("NO_COLOR") and curses.tigetnum("colors") >= 8:
            red += _capability("setaf", curses.COLOR_RED)
            cyan += _capability("setaf", curses.COLOR_CYAN)
        self._styles = {
            "": b"",
            "head": cyan,
            "chosen": _capability("rev"),
            "bad": red,
            "dim": _capability("dim"),
        }
        self._plain, self._rest = _capability("sgr0"), _capability("el")

    def forget(self) -> None:
        """Write all lines the next time."""
        self._shown = []

    def draw(self, shown: Top) -> None:
        """Show the lines of this moment."""
        height, width = self._screen.getmaxyx()
        lines = shown.lines(height, width - 1)
        if len(self._shown) != len(lines):
            self._screen.clear()
            self._screen.refresh()
            self._shown = [Line("")] * len(lines)
        data = b""
        for at, (line, old) in enumerate(zip(lines, self._shown, strict=True)):
            if line != old:
                text = line.text.ljust(width - 1) if line.style == "chosen" else line.text
                data += _capability("cup", at, 0) + self._styles[line.style]
                data += text.encode(self._encoding, "replace") + self._plain + self._rest
        # Wide characters may not fit: no line goes on in the next one.
        data = _capability("rmam") + data + _capability("smam")
        while data:
            data = data[os.write(1, data) :]
        self._shown = lines


@functools.lru_cache
def _capability(name: str, *numbers: int) -> bytes:
    """What to write to the terminal for an effect; nothing if it has none."""
    import curses

    text = curses.tigetstr(name)
    # Without the delays that a terminal of wire and paper needs.
    return re.sub(rb"\$<[^>]*>", b"", curses.tparm(text, *numbers)) if text else b""

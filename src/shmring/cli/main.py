"""The command ``shmring``: ``demo``, ``ls`` and ``rm --stale``.

Exit status: 0 success, 1 failure, 2 an impossible command line, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from shmring import _backend as backends
from shmring.cli.demo import (
    MOST_WORKERS,
    Outcome,
    Skipped,
    Tell,
    find_files,
    find_sources,
    run_demo,
)
from shmring.errors import ShmringError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["main"]

_WRONG, _IMPOSSIBLE, _INTERRUPTED = 1, 2, 130

# The bar is drawn by hand: a thread that draws would be alive while workers are forked.
_BAR_INTERVAL = 0.1
# On a terminal; into a file, stderr names them all.
_MOST_NAMES = 20


class _Stop(Exception):
    """The end of the command: a text for stderr, and the exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise _Stop(f"{message} (see {self.prog} --help)", _IMPOSSIBLE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the name of the program; None is ``sys.argv``'s.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the terminal may lack characters of words and names
            stream.reconfigure(errors="backslashreplace")
    try:
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
    except _Stop as stop:
        print(f"shmring: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("shmring: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # as in `shmring demo | head`; the flush at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _WRONG
    except (ShmringError, OSError, BrokenExecutor) as error:
        print(f"shmring: {type(error).__name__}: {error}", file=sys.stderr)
        return _WRONG
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="shmring", description="Message queues in shared memory.")
    version = sys.modules["shmring"].__version__  # imported already
    parser.add_argument("--version", action="version", version=f"shmring {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo",
        help="count the words of files in several processes",
        description="Count the words of every text file under PATH with workers of their own "
        "process, check the result, and compare the queues.",
    )
    demo.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a folder or a file; the standard library's sources otherwise",
    )
    demo.add_argument(
        "--workers",
        type=_number_to(MOST_WORKERS),
        default=_cores(),
        metavar="N",
        help="how many processes count (as many as there are cores: %(default)s)",
    )
    demo.add_argument(
        "--kill", action="store_true", help="kill a worker halfway; the result is still right"
    )
    demo.add_argument(
        "--messages",
        type=_number_to(10_000_000),
        default=100_000,
        metavar="N",
        help="how many messages compare the queues (%(default)s)",
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    demo.set_defaults(run=_demo)

    ls = commands.add_parser(
        "ls",
        help="show the blocks in shared memory, and the processes that wait, hold or died there",
        description="Show the rings, queues and registries of this user's processes, named and "
        "anonymous, with the processes that wait there, hold something, or died holding it.",
    )
    ls.add_argument("--json", action="store_true", help="print one JSON array, for scripts")
    ls.set_defaults(run=_ls)

    rm = commands.add_parser(
        "rm",
        help="remove what crashed programs left in shared memory",
        description="Remove from /dev/shm what crashed programs left there.",
    )
    rm.add_argument(
        "--stale",
        action="store_true",
        required=True,
        help="what no living process has open, and nothing else",
    )
    rm.set_defaults(run=_rm)
    return parser


def _number_to(most: int) -> Callable[[str], int]:
    def number_in(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = 0
        if not 1 <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {most}")
        return number

    return number_in


def _cores() -> int:
    """The number of cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


def _rm(options: argparse.Namespace) -> int:
    removed = backends.cleanup_stale()
    for name in removed:
        print(f"removed {_printable(name)}")
    if not removed:
        print(_no_place() or "nothing to remove")
    return 0


def _no_place() -> str | None:
    """The line to print where there is no /dev/shm; None where there is one."""
    if backends.backend != "ring":
        return None
    from shmring.shm.segment import DIRECTORY

    return None if os.path.isdir(DIRECTORY) else f"there is no {DIRECTORY}: nothing to look at"


# -- ls -----------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    if backends.backend != "ring":
        raise _Stop("ls needs the ring, this is the fallback: a pipe shows nothing", _IMPOSSIBLE)
    from shmring.cli.listing import listing

    found = listing()
    if options.json:
        print(json.dumps(found))
        return 0
    for block in found:
        print(_heading(block))
        for line in _findings(block):
            print(f"    {line}")
    if not found:
        print(_no_place() or "nothing of ours in shared memory")
    return 0


def _heading(block: dict[str, Any]) -> str:
    parts = [block["kind"], f"{block['nbytes'] // 1024:,} KiB"]
    if "messages" in block:
        parts.insert(1, _many(block["messages"], "message"))
    pids = ", ".join(
        f"{pid} (stopped)" if pid in block["stopped"] else str(pid) for pid in block["pids"]
    )
    parts.append(f"open in {pids}" if pids else "open nowhere: shmring rm --stale removes it")
    if block.get("poisoned") or block.get("shut_down"):
        parts.append("poisoned" if block["poisoned"] else "shut down")
    name = "(anonymous)" if block["name"] is None else _printable(block["name"])
    return f"{name}  {', '.join(parts)}"


def _findings(block: dict[str, Any]) -> Iterator[str]:
    """The lines on waiters, holders, deaths and processes."""
    if "error" in block:
        yield _printable(block["error"])
    for each in block.get("waiters", ()):
        waits = f"waits in {each['call']} for {each['waits_for']}"
        yield f"{_named(each)} {waits}, {each['seconds']:.1f} s"
    for each in block.get("holders", ()):
        yield f"{_named(each)} holds {each['holds']}"
    for each in block.get("deaths", ()):
        yield f"{_named(each)} died holding {each['held']}, {each['seconds']:.1f} s ago"
    now = time.monotonic_ns()
    for each in block.get("processes", ()):
        doing = each["state"]
        if each["waits_for"] is not None:
            doing += f", waits for {_printable(each['waits_for'])}"
        if each["task"] is not None:
            doing += f", at task {each['task']}"
        if each["since_ns"]:
            doing += f", {(now - each['since_ns']) / 1e9:.1f} s"
        yield f"{_printable(each['process_id'])} (process {each['pid']}) {doing}"


def _named(each: dict[str, Any]) -> str:
    name = "an unknown process" if each["pid"] is None else f"process {each['pid']}"
    state = each.get("state", "alive")
    return name if state == "alive" else f"{name} ({state})"


# -- demo ---------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    if options.kill and backends.backend != "ring":
        raise _Stop(
            "--kill needs the ring, this is the fallback: there a killed worker breaks the pool",
            _IMPOSSIBLE,
        )
    # The table shows the killed; log lines about them would stand between the bars.
    logging.getLogger("shmring").addHandler(logging.NullHandler())
    console = None if options.json else _console()
    try:
        files, skipped = find_sources() if options.path is None else find_files(options.path)
    except FileNotFoundError as error:
        raise _Stop(_printable(str(error)), _IMPOSSIBLE) from error
    run = functools.partial(run_demo, files, options.workers, options.messages, kill=options.kill)
    if console is None:
        outcome = run(tell=lambda stage, done, total: None)
    else:
        ring = backends.backend == "ring"
        pool = "shmring's pool" if ring else "concurrent.futures: the fallback has no pool"
        console.print(
            f"Counting the words of {_many(len(files), 'file')} with "
            f"{_many(options.workers, 'worker')} ({pool})"
        )
        with _bars(console) as tell:
            outcome = run(tell=tell)
    _name_skipped(skipped + outcome.skipped, outcome.unchecked)
    if console is None:
        print(json.dumps(_summary(outcome, options.workers)))
    else:
        _show(outcome, console)
    return 0 if outcome.correct else _WRONG


def _summary(outcome: Outcome, workers: int) -> dict[str, Any]:
    return {
        "correct": outcome.correct,
        "files": outcome.files,
        "words": outcome.words,
        "workers": workers,
        "killed": outcome.killed,
        "retried": outcome.retried,
        "seconds": outcome.seconds,
        "seconds_alone": outcome.seconds_alone,
        "rate_shmring": outcome.rates.shmring,
        "rate_multiprocessing": outcome.rates.multiprocessing,
        "ratio": outcome.rates.ratio,
    }


def _name_skipped(skipped: list[Skipped], unchecked: list[Skipped]) -> None:
    named = [f"skipped {_printable(each.path)}: {each.reason}" for each in skipped]
    named += [f"unchecked {_printable(each.path)}: {each.reason}" for each in unchecked]
    shown = named[:_MOST_NAMES] if sys.stderr.isatty() else named
    for line in shown:
        print(line, file=sys.stderr)
    if len(shown) < len(named):
        print(f"... and {len(named) - len(shown):,} more: 2>FILE names them all", file=sys.stderr)


def _printable(name: str) -> str:
    """The name of a file, without characters that would move the cursor."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


# -- on the terminal ----------------------------------------------------------------------


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError:
        raise _Stop(
            'the bar and the tables need rich: pip install "shmring[cli]", or use --json', _WRONG
        ) from None
    return Console(highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[Tell]:
    """Show one progress bar for each stage."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    titles = {"count": "count", "check": "check alone", "compare": "compare queues"}
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False, expand=True) as progress:
        bars: dict[str, TaskID] = {}
        due = 0.0

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal due
            if stage not in bars:
                bars[stage] = progress.add_task(titles[stage], total=total)
            progress.update(bars[stage], completed=done)
            now = time.monotonic()
            if now >= due or done == total:
                progress.refresh()
                due = now + _BAR_INTERVAL

        yield tell


def _show(outcome: Outcome, console: Console) -> None:
    from rich.table import Table

    console.print()
    tables = [_words_table(outcome)] if outcome.top else []
    tables += [_workers_table(outcome)] if outcome.workers else []
    if not outcome.top:
        console.print("There was no word to count.")
    side_by_side = Table.grid(padding=(0, 3, 0, 0))
    side_by_side.add_row(*tables)
    console.print(side_by_side)
    console.print()
    console.print(
        f"{_many(outcome.words, 'word')} in {_many(outcome.files, 'file')}: "
        f"{outcome.seconds:.2f} s, "
        f"one process alone {outcome.seconds_alone:.2f} s"
    )
    if outcome.killed:
        console.print(
            f"{_many(outcome.killed, 'worker')} killed with SIGKILL, "
            f"{_many(outcome.retried, 'task')} run again"
        )
    if outcome.rates.ratio is not None:
        console.print()
        console.print(_rates_table(outcome))
        console.print()
    if outcome.correct:
        console.print("The result is right: one process alone counts the same.", style="green")
    else:
        console.print("THE RESULT IS WRONG: one process alone counts otherwise.", style="bold red")


def _words_table(outcome: Outcome) -> Table:
    table = _table("word", "times")
    for word, times in outcome.top:
        table.add_row(word, f"{times:,}")
    return table


def _workers_table(outcome: Outcome) -> Table:
    table = _table("worker", "tasks", "heartbeats", "state")
    for row in sorted(outcome.workers, key=lambda each: (len(each.worker_id), each.worker_id)):
        table.add_row(
            row.worker_id,
            f"{row.tasks:,}",
            f"{row.heartbeats:,}",
            "killed" if row.exitcode == -9 else row.state,
        )
    return table


def _rates_table(outcome: Outcome) -> Table:
    rates = outcome.rates
    table = _table(f"{rates.messages:,} messages of the job", "messages/s", "")
    table.add_row("multiprocessing.Queue", f"{rates.multiprocessing:,.0f}", "1.0 x")
    table.add_row("shmring.Queue", f"{rates.shmring:,.0f}", f"{rates.ratio:.1f} x")
    return table


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=30)
    for title in others:
        table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    return table

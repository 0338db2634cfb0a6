"""``shmring demo``: bars, tables and the summary of a run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from shmring import _backend as backends
from shmring.cli.common import IMPOSSIBLE, WRONG, Stop, dump, many, printable
from shmring.cli.demo import Outcome, Rates, Skipped, Tell, find_files, find_sources, run_demo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

__all__ = ["demo"]

# The bar is drawn by hand: a thread that draws would be alive while workers are forked.
_BAR_INTERVAL = 0.1
# On a terminal; into a file, stderr names them all.
_MOST_NAMES = 20


def demo(options: argparse.Namespace) -> int:
    """Run the main job, show it, and say whether the result is right."""
    if options.kill and backends.backend != "ring":
        raise Stop(
            "--kill needs the ring, this is the fallback: there a killed worker breaks the pool",
            IMPOSSIBLE,
        )
    # The table shows the killed; log lines about them would stand between the bars.
    logging.getLogger("shmring").addHandler(logging.NullHandler())
    shown = None if options.json else _terminal()
    try:
        files, skipped = find_sources() if options.path is None else find_files(options.path)
    except FileNotFoundError as error:
        raise Stop(printable(str(error)), IMPOSSIBLE) from error
    run = functools.partial(run_demo, files, options.workers, options.messages, kill=options.kill)
    if shown is None:
        outcome = run(tell=lambda stage, done, total: None)
    else:
        ring = backends.backend == "ring"
        pool = "shmring's pool" if ring else "concurrent.futures: the fallback has no pool"
        shown.print(
            f"Counting the words of {many(len(files), 'file')} with "
            f"{many(options.workers, 'worker')} ({pool})"
        )
        with _bars(shown) as tell:
            outcome = run(tell=tell)
    _name_skipped(skipped + outcome.skipped, outcome.unchecked)
    if shown is None:
        print(dump(_summary(outcome, options.workers)))
    else:
        _show(outcome, shown)
    return 0 if outcome.correct else WRONG


def _terminal() -> Console:
    """The terminal, for bars and tables; Stop where rich is missing."""
    try:
        from rich.console import Console
    except ImportError:
        raise Stop(
            'the bar and the tables need rich: pip install "shmring[cli]", or use --json', WRONG
        ) from None

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end the process, with status 1

    return Terminal(highlight=False, markup=False, emoji=False)


def _summary(outcome: Outcome, workers: int) -> dict[str, Any]:
    names = ("correct", "files", "words", "killed", "retried", "seconds", "seconds_alone")
    return {
        **{name: getattr(outcome, name) for name in names},
        "workers": workers,
        "rate_shmring": outcome.rates.shmring,
        "rate_multiprocessing": outcome.rates.multiprocessing,
        "ratio": outcome.rates.ratio,
    }


def _name_skipped(skipped: list[Skipped], unchecked: list[Skipped]) -> None:
    named = [f"skipped {printable(each.path)}: {each.reason}" for each in skipped]
    named += [f"unchecked {printable(each.path)}: {each.reason}" for each in unchecked]
    shown = named[:_MOST_NAMES] if sys.stderr.isatty() else named
    for line in shown:
        print(line, file=sys.stderr)
    if len(shown) < len(named):
        print(f"... and {len(named) - len(shown):,} more: 2>FILE names them all", file=sys.stderr)


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[Tell]:
    """Show one progress bar for each stage."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
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
    tables = []
    if outcome.top:
        words = ((word, f"{times:,}") for word, times in outcome.top)
        tables.append(_table(("word", "times"), words))
    else:
        console.print("There was no word to count.")
    if outcome.workers:
        tables.append(_workers_table(outcome))
    side_by_side = Table.grid(padding=(0, 3, 0, 0))
    side_by_side.add_row(*tables)
    console.print(side_by_side)
    console.print()
    console.print(
        f"{many(outcome.words, 'word')} in {many(outcome.files, 'file')}: "
        f"{outcome.seconds:.2f} s, "
        f"one process alone {outcome.seconds_alone:.2f} s"
    )
    if outcome.killed:
        console.print(
            f"{many(outcome.killed, 'worker')} killed with SIGKILL, "
            f"{many(outcome.retried, 'task')} run again"
        )
    if outcome.rates.ratio is not None:
        console.print()
        console.print(_rates_table(outcome.rates))
        console.print()
    if outcome.correct:
        console.print("The result is right: one process alone counts the same.", style="green")
    else:
        console.print("THE RESULT IS WRONG: one process alone counts otherwise.", style="bold red")


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table without lines; every column but the first and "state" is of numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    made.add_column(titles[0], no_wrap=True, overflow="ellipsis", max_width=30)
    for title in titles[1:]:
        made.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def _workers_table(outcome: Outcome) -> Table:
    workers = sorted(outcome.workers, key=lambda each: (len(each.worker_id), each.worker_id))
    return _table(
        ("worker", "tasks", "heartbeats", "state"),
        (
            (
                each.worker_id,
                f"{each.tasks:,}",
                f"{each.heartbeats:,}",
                "killed" if each.exitcode == -9 else each.state,
            )
            for each in workers
        ),
    )


def _rates_table(rates: Rates) -> Table:
    return _table(
        (f"{rates.messages:,} messages of the job", "messages/s", ""),
        [
            ("multiprocessing.Queue", f"{rates.multiprocessing:,.0f}", "1.0 x"),
            ("shmring.Queue", f"{rates.shmring:,.0f}", f"{rates.ratio:.1f} x"),
        ],
    )

# PYTHON_ARGCOMPLETE_OK
"""Command line of shmring: options, exit statuses, errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from shmring.cli.common import CLOSED_PIPE, IMPOSSIBLE, INTERRUPTED, WRONG, Stop, cores, width
from shmring.errors import ShmringError

__all__ = ["main"]

_MOST_WORKERS = 61 if sys.platform == "win32" else 128

_STATUSES = """\
exit status:
  0    done
  1    it failed, or what was asked for is not there
  2    the command line is wrong, or this back end cannot do it
  130  interrupted by Ctrl-C
  141  the reader of the output went away
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal; argparse itself would import shutil for every command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(width=(width() or 80) - 2, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        import textwrap

        return "\n".join(
            line if line.startswith(" ") else textwrap.fill(line, width)  # examples stay whole
            for line in text.splitlines()
        )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise Stop(f"{message} (see {self.prog} --help)", IMPOSSIBLE)

    def flag(self, name: str, text: str) -> None:
        """An option without a value."""
        self.add_argument(name, action="store_true", help=text)

    def number(self, name: str, most: int, default: int | None, text: str) -> None:
        """An option that is a number from 1 to `most`."""

        def number_in(value: str) -> int:
            if value.isascii() and value.isdecimal() and 1 <= int(value) <= most:
                return int(value)
            raise argparse.ArgumentTypeError(f"{value!r} is no number from 1 to {most}")

        self.add_argument(name, type=number_in, default=default, metavar="N", help=text)

    def interval(self, default: float) -> None:
        """The option of a command that looks again and again, and how often it does."""
        text = "between two looks (%(default)s)"
        self.add_argument(
            "--interval", type=_seconds, default=default, metavar="SECONDS", help=text
        )
        self.number("--count", 1_000_000_000, None, "end after N")

    def ring(self, name: str, metavar: str, **options: Any) -> None:
        """An argument that is the name of a ring, completed by the shell."""
        argument: Any = self.add_argument(name, metavar=metavar, **options)
        argument.completer = _names


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.05 <= (seconds := float(text)) <= 86_400:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0.05 to 86400")


def _names(**_: Any) -> Iterable[str]:
    from shmring.observer.observer import Observer

    with Observer() as observer:
        return [each["id"] for each in observer.look(detail=False)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the name of the program; None is ``sys.argv``'s.

    Returns:
        The exit status.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    try:
        options = parser.parse_args(arguments)
    except Stop as stop:
        print(f"shmring: {stop}", file=sys.stderr)
        return stop.status
    module, _, function = options.run.partition(":")
    command = getattr(importlib.import_module(f"shmring.cli.{module}"), function)
    if options.run == "run:run":
        return int(command(options))  # a program's exceptions and output are its own
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the terminal may lack characters of words and names
            stream.reconfigure(errors="backslashreplace")
    try:
        status = int(command(options))
        sys.stdout.flush()
    except Stop as stop:
        print(f"shmring: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("shmring: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as in `shmring ls | head -1`; the flush at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (ShmringError, OSError, RuntimeError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"shmring: {type(error).__name__}: {text}", file=sys.stderr)
        return WRONG
    return status


def _parser() -> _Parser:
    parser = _Parser(
        prog="shmring",
        description="Message queues in shared memory: see them, debug them, use them.",
        epilog=_examples("ls", "top", "inspect jobs", "doctor") + "\n" + _STATUSES,
    )
    version = sys.modules["shmring"].__version__  # imported already
    parser.add_argument("--version", action="version", version=f"shmring {version}")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", title="commands", prog="shmring"
    )

    def command(run: str, summary: str, description: str, *examples: str) -> _Parser:
        name = run.partition(":")[2]
        made = commands.add_parser(
            name, help=summary, description=description, epilog=_examples(*examples)
        )
        made.set_defaults(run=run)
        if name != "run":
            made.flag("--json", "print JSON, for scripts")
        return made

    _add_looks(command)
    _add_others(command)
    return parser


def _examples(*lines: str) -> str:
    return "examples:\n" + "".join(f"  shmring {line}\n" for line in lines)


def _add_looks(command: Callable[..., _Parser]) -> None:
    command(
        "listing:ls",
        "show every ring, queue, registry and pool of this user",
        "Show the rings, queues, registries and pools of this user's processes, named and"
        " anonymous (*): messages, fill, messages taken a second, processes that wait, its owner,"
        " deaths, age, processes seen putting and getting, processes that have it open.\n"
        "Below each: which process waits for what since when, holds something, or died.",
        "ls",
        "ls --json | jq '.[] | select(.waiters != []) | .id'",
    )
    top = command(
        "top:top",
        "the same, live, in the terminal",
        "Show what ls shows, live. Keys: up and down choose, Enter opens a page about one, Esc"
        " goes back, s sorts by the next column, r reverses, space pauses, q ends. With --json,"
        " print an array at each look; this needs no terminal.",
        "top",
        "top --interval 1",
        "top --json --count 3",
    )
    top.interval(0.5)
    inspect = command(
        "inspect:inspect",
        "one ring with its last messages, or what a process has open",
        "Show the header, the counters and the last messages of one ring, which may be one that"
        " crashed processes left behind, or all that the process PID has open.",
        "inspect jobs",
        "inspect shmring-24da70ac18f81cd5 --frames 20",
        "inspect 4711",
    )
    inspect.ring("target", "NAME|PID")
    inspect.number("--frames", 10_000, 5, "how many (%(default)s)")
    inspect.flag("--pickle", "unpickle messages: this runs code of the sender's choosing")
    watch = command(
        "listing:watch",
        "one line about a ring each second",
        "Print one line about a ring each second: rates, messages, fill, waiting processes.",
        "watch jobs",
        "watch jobs --json --interval 0.2 --count 10",
    )
    watch.ring("name", "NAME")
    watch.interval(1.0)


def _add_others(command: Callable[..., _Parser]) -> None:
    rm = command(
        "listing:rm",
        "remove what crashed programs left in shared memory",
        "Remove names of shmring's from /dev/shm.",
        "rm --stale",
        "rm jobs results",
    )
    rm.ring("names", "NAME", nargs="*")
    rm.flag("--stale", "what no living process has open, and nothing else")
    rm.flag(
        "--force",
        "remove NAME although processes have it open: they go on, others no longer find it",
    )
    command(
        "doctor:doctor",
        "say what this machine can do, and what to do about the rest",
        "Check what the ring needs: kernel, futexes, /dev/shm, limits, compiler, back end. Exit"
        " status 1 if anything needs to be done.",
        "doctor",
        "doctor --json | jq '.checks[] | select(.state != \"ok\")'",
    )
    bench = command(
        "bench:bench",
        "compare with multiprocessing on this machine, in a minute",
        "Measure shmring beside the standard library on this machine, by turns, in about a minute.",
        "bench",
        "bench --seconds 10 --svg bench.svg",
    )
    bench.number("--seconds", 3600, 60, "how long (%(default)s)")
    bench.add_argument("--svg", metavar="FILE", help="also draw the result into FILE")
    demo = command(
        "demo_view:demo",
        "count the words of files in several processes",
        "Count the words of every text file under PATH with workers of their own process, check"
        " the result, and compare the queues.",
        "demo --kill",
        "demo ~/src --workers 4 --json",
    )
    text = "a folder or a file; the standard library's sources otherwise"
    demo.add_argument("path", nargs="?", metavar="PATH", help=text)
    demo.number(
        "--workers",
        _MOST_WORKERS,
        min(cores(), _MOST_WORKERS),
        "how many processes count (as many as there are cores: %(default)s)",
    )
    demo.flag("--kill", "kill a worker halfway; the result is still right")
    demo.number(
        "--messages", 10_000_000, 100_000, "how many messages compare the queues (%(default)s)"
    )
    run = command(
        "run:run",
        "run a program with shmring's queues in place of multiprocessing's",
        "Run a Python program as `python SCRIPT ARGS...` would, with shmring's Queue,"
        " JoinableQueue and SimpleQueue in place of multiprocessing's, in it and in the processes"
        " that multiprocessing starts. Programs started by subprocess keep the standard ones,"
        " unless they call shmring.install() or are started by `shmring run` themselves.\n"
        "The exit status is the program's.",
        "run program.py --its-own-option",
        "run -m package.module",
    )
    run.add_argument("-m", dest="module", metavar="MODULE", help="run a module instead of a script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS...")

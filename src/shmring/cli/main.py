# PYTHON_ARGCOMPLETE_OK
"""Command line of shmring: options, exit statuses, errors of one line."""

from __future__ import annotations

import argparse
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


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise Stop(f"{message} (see {self.prog} --help)", IMPOSSIBLE)


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shmring",
        description="Message queues in shared memory: see them, debug them, use them.",
        epilog=_examples("shmring ls", "shmring top", "shmring inspect jobs", "shmring doctor")
        + _STATUSES,
    )
    version = sys.modules["shmring"].__version__  # imported already
    parser.add_argument("--version", action="version", version=f"shmring {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: str, summary: str, description: str, *examples: str) -> Any:
        made = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=_examples(*examples),
        )
        made.set_defaults(run=run)
        return made

    for add in (_add_looks, _add_removal, _add_machine, _add_run):
        add(command)
    return parser


def _examples(*lines: str) -> str:
    return "examples:\n" + "".join(f"  {line}\n" for line in lines) + "\n"


def _add_looks(command: Callable[..., Any]) -> None:
    ls = command(
        "ls",
        "listing:ls",
        "show every ring, queue, registry and pool of this user",
        "Show the rings, queues, registries and pools of this user's processes, named and\n"
        "anonymous (*): messages, fill, messages taken a second, processes that wait, its\n"
        "owner, deaths, age, processes seen putting and getting, processes that have it open.\n"
        "Below each: which process waits for what since when, holds something, or died.",
        "shmring ls",
        "shmring ls --json | jq '.[] | select(.waiters != []) | .id'",
    )
    ls.add_argument("--json", action="store_true", help="print one JSON array")

    top = command(
        "top",
        "top:top",
        "the same, live, in the terminal",
        "Show what ls shows, live. Keys: up and down choose, Enter opens a page about one, Esc\n"
        "goes back, s sorts by the next column, r reverses, space pauses, q ends.",
        "shmring top",
        "shmring top --interval 1",
        "shmring top --json --count 3",
    )
    _interval(top, 0.5)
    top.add_argument(
        "--json", action="store_true", help="print a JSON array at each look; needs no terminal"
    )
    top.add_argument("--count", type=_number_to(1_000_000_000), metavar="N", help="end after N")

    inspect = command(
        "inspect",
        "inspect:inspect",
        "one ring with its last messages, or what a process has open",
        "Show the header, the counters and the last messages of one ring, which may be one that\n"
        "crashed processes left behind, or all that the process PID has open.",
        "shmring inspect jobs",
        "shmring inspect shmring-24da70ac18f81cd5 --frames 20",
        "shmring inspect 4711",
    )
    _named(inspect, "target", "NAME|PID")
    inspect.add_argument(
        "--frames", type=_number_to(10_000), default=5, metavar="N", help="how many (%(default)s)"
    )
    inspect.add_argument(
        "--pickle",
        action="store_true",
        help="unpickle messages: this runs code of the sender's choosing",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    watch = command(
        "watch",
        "listing:watch",
        "one line about a ring each second",
        "Print one line about a ring each second: rates, messages, fill, waiting processes.",
        "shmring watch jobs",
        "shmring watch jobs --json --interval 0.2 --count 10",
    )
    _named(watch, "name", "NAME")
    _interval(watch, 1.0)
    watch.add_argument("--count", type=_number_to(1_000_000_000), metavar="N", help="end after N")
    watch.add_argument("--json", action="store_true", help="print one JSON object a line")


def _add_removal(command: Callable[..., Any]) -> None:
    rm = command(
        "rm",
        "listing:rm",
        "remove what crashed programs left in shared memory",
        "Remove names of shmring's from /dev/shm.",
        "shmring rm --stale",
        "shmring rm jobs results",
    )
    _named(rm, "names", "NAME", nargs="*")
    rm.add_argument(
        "--stale", action="store_true", help="what no living process has open, and nothing else"
    )
    rm.add_argument(
        "--force",
        action="store_true",
        help="remove NAME although processes have it open: they go on, others no longer find it",
    )
    rm.add_argument("--json", action="store_true", help="print one JSON object")


def _add_machine(command: Callable[..., Any]) -> None:
    doctor = command(
        "doctor",
        "doctor:doctor",
        "say what this machine can do, and what to do about the rest",
        "Check what the ring needs: kernel, futexes, /dev/shm, limits, compiler, back end.\n"
        "Exit status 1 if anything needs to be done.",
        "shmring doctor",
        "shmring doctor --json | jq '.checks[] | select(.state != \"ok\")'",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    bench = command(
        "bench",
        "bench:bench",
        "compare with multiprocessing on this machine, in a minute",
        "Measure shmring beside the standard library on this machine, by turns, in about a minute.",
        "shmring bench",
        "shmring bench --seconds 10 --svg bench.svg",
    )
    bench.add_argument(
        "--seconds", type=_number_to(3600), default=60, metavar="N", help="how long (%(default)s)"
    )
    bench.add_argument("--svg", metavar="FILE", help="also draw the result into FILE")
    bench.add_argument("--json", action="store_true", help="print one JSON object")

    demo = command(
        "demo",
        "demo_view:demo",
        "count the words of files in several processes",
        "Count the words of every text file under PATH with workers of their own process, check\n"
        "the result, and compare the queues.",
        "shmring demo --kill",
        "shmring demo ~/src --workers 4 --json",
    )
    demo.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a folder or a file; the standard library's sources otherwise",
    )
    demo.add_argument(
        "--workers",
        type=_number_to(_MOST_WORKERS),
        default=min(cores(), _MOST_WORKERS),
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


def _add_run(command: Callable[..., Any]) -> None:
    run = command(
        "run",
        "run:run",
        "run a program with shmring's queues in place of multiprocessing's",
        "Run a Python program as `python SCRIPT ARGS...` would, with shmring's Queue,\n"
        "JoinableQueue and SimpleQueue in place of multiprocessing's, in it and in the processes\n"
        "that multiprocessing starts.  Programs started by subprocess keep the standard ones,\n"
        "unless they call shmring.install() or are started by `shmring run` themselves.\n"
        "The exit status is the program's.",
        "shmring run program.py --its-own-option",
        "shmring run -m package.module",
    )
    run.add_argument("-m", dest="module", metavar="MODULE", help="run a module instead of a script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS...")


def _named(parser: Any, name: str, metavar: str, **options: Any) -> None:
    """An argument that is the name of a ring, completed by the shell."""
    argument = parser.add_argument(name, metavar=metavar, **options)
    argument.completer = _names


def _names(**_: Any) -> Iterable[str]:
    from shmring.observer.observer import Observer

    with Observer() as observer:
        return [each["id"] for each in observer.look(detail=False)]


def _interval(parser: Any, default: float) -> None:
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=default,
        metavar="SECONDS",
        help="between two looks (%(default)s)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0.05 to 86400")
    return seconds


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

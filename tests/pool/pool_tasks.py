"""What workers do in the tests of pools.

A worker that is spawned loads this module: it imports what every worker has anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path


def square(number: int) -> int:
    return number * number


def note(folder: Path, number: int) -> int:
    """Leave a line for each time that this task begins."""
    with (folder / str(number)).open("a") as lines:
        lines.write("x")
    return number


def note_and_wait(folder: Path, number: int) -> int:
    note(folder, number)
    wait_to_go(folder)
    return number


def die_at(deadly: int, folder: Path, number: int) -> int:
    note(folder, number)
    if number == deadly:
        os._exit(3)
    return number


def die_once(folder: Path, number: int) -> int:
    with contextlib.suppress(FileExistsError):
        (folder / f"died-{number}").touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def wait_to_go(folder: Path) -> None:
    from support import wait_for

    wait_for((folder / "go").exists, 60)


def start_child_and_wait(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
    (folder / "child").write_text(str(child.pid))
    wait_to_go(folder)


def fork_and_die(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    (folder / "child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def log_something() -> None:
    logging.getLogger("some.library").warning("from the worker")

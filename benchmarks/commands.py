"""Rows of the report about the command line: what it takes to look at many queues."""

from __future__ import annotations

import contextlib
import os
import pty
import statistics
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import shmring
from benchmarks import Row, Settings, Target, progress
from benchmarks.sessions import DEADLINE_S, cpu_ns, deadline, forever, sleeps, wait_until

QUEUES = 50
PER_SECOND = 20  # messages through each of them
LOOKS = 10  # of top, a second


@contextlib.contextmanager
def _queues_in_use() -> Iterator[None]:
    """Queues with a consumer each, and one producer for all of them."""
    with contextlib.ExitStack() as stack:
        queues = [
            stack.enter_context(contextlib.closing(shmring.Queue[bytes]())) for _ in range(QUEUES)
        ]
        pids = [stack.enter_context(forever(queue.get)) for queue in queues]
        wait_until(lambda: all(map(sleeps, pids)))
        stack.enter_context(forever(_put_to_each, queues))
        yield


def _put_to_each(queues: list[Any]) -> None:
    for queue in queues:
        queue.put(bytes(64))
        time.sleep(1 / PER_SECOND / len(queues))


def listing(settings: Settings) -> Row:
    """Milliseconds from the start of `shmring ls` to its end."""
    question = f"shmring ls, {QUEUES} queues in use"
    progress(question)
    took = []
    # With compiled modules, as an installed package has them.
    command = [sys.executable, "-m", "shmring", "ls"]
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}
    with _queues_in_use(), deadline(DEADLINE_S, question):
        for _ in range(3 * settings.runs):
            start = time.perf_counter()
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            took.append(1000 * (time.perf_counter() - start))
    middle = statistics.median(took)
    targets = [Target("{} ms", 150, middle, at_most=True)]
    spread = f"{min(took):.0f} to {max(took):.0f} ms"
    return Row(question, f"{middle:.0f} ms", targets, spread, {"took": took})


def top(settings: Settings) -> Row:
    """CPU of `shmring top` in a terminal of 60 lines and 120 columns."""
    question = f"shmring top, {LOOKS} looks a second at {QUEUES} queues in use"
    progress(question)
    seconds = max(1.0, 20 * min(1.0, settings.scale))
    with _queues_in_use(), deadline(2 * seconds + DEADLINE_S, question):
        pid, terminal = pty.fork()
        if pid == 0:
            termios.tcsetwinsize(0, (60, 120))  # all queues can be seen
            os.environ["TERM"] = "xterm-256color"
            words = ["-m", "shmring", "top", "--interval", str(1 / LOOKS)]
            os.execv(sys.executable, [sys.executable, *words])
        reader = threading.Thread(target=_drain, args=(terminal,), daemon=True)
        reader.start()
        time.sleep(2)
        before, start = cpu_ns([pid]), time.monotonic()
        time.sleep(seconds)
        share = (cpu_ns([pid]) - before) / 1e7 / (time.monotonic() - start)
        os.write(terminal, b"q")
        reader.join(DEADLINE_S)
        os.waitpid(pid, 0)
        os.close(terminal)
    targets = [Target("{} % of a core", 2.0, share, at_most=True)]
    return Row(question, f"{share:.2f} %", targets)


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):  # the program at the other side has ended
        while os.read(terminal, 1 << 16):
            pass

"""``shmring top``: its pages and keys without a terminal, and driven in a real one by tmux."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("shmring._core.handle")
pytest.importorskip("curses", reason="this Python was built without curses")

from header import word
from shmring import ProcessPoolExecutor, Queue, Ring, SharedMemoryManager
from shmring.cli.top import Top
from shmring.observer.observer import Observer
from support import own_name, run_command, run_in_process, wait_for

NAME = own_name("top")


def block(name: str, **facts: Any) -> dict[str, Any]:
    """A ring as an observer shows it."""
    return {
        "name": name,
        "id": name,
        "kind": "queue",
        "nbytes": 73728,
        "pids": [1],
        "stopped": [],
        "owner": {"pid": 1, "state": "alive"},
        "age_seconds": 5.0,
        "capacity": 65536,
        "max_capacity": 65536,
        "max_messages": 0,
        "used_bytes": 0,
        "messages": 0,
        "messages_put": 0,
        "messages_taken": 0,
        "bytes_put": 0,
        "growths": 0,
        "recoveries": 0,
        "rate": 0.0,
        "put_rate": 0.0,
        "producers": [],
        "consumers": [],
        "waiters": [],
        "holders": [],
        "deaths": [],
        **facts,
    }


def rows(top: Top, height: int = 24, width: int = 100) -> list[str]:
    lines = top.lines(height, width)
    assert len(lines) == height
    assert max(len(each.text) for each in lines) <= width
    return [each.text.split()[0] for each in lines[2:-1] if each.text]


def chosen(top: Top) -> str:
    (line,) = (each.text for each in top.lines(24, 100) if each.style == "chosen")
    return line.split()[0]


def test_rows_are_sorted_by_the_chosen_column() -> None:
    top = Top()
    top.update([block("slow", rate=1.0, messages=9), block("fast", rate=9.0), block("a", rate=3.0)])
    assert rows(top) == ["fast", "a", "slow"]
    top.press("s")
    assert (top.order, rows(top)[0]) == ("MSGS", "slow")
    top.press("r")
    assert rows(top)[-1] == "slow"
    while top.order != "NAME":
        top.press("s")
    assert rows(top) == ["a", "fast", "slow"]


def test_the_cursor_stays_on_its_row_and_scrolls() -> None:
    top = Top()
    names = [f"ring-{number:02}" for number in range(40)]
    top.update([block(each, rate=float(-number)) for number, each in enumerate(names)])
    assert chosen(top) == names[0]
    for _ in range(3):
        top.press("page down")
    assert chosen(top) == names[30]
    top.press("up")
    assert chosen(top) == names[29]
    top.update([block(each, rate=float(number)) for number, each in enumerate(names)])
    assert chosen(top) == names[29]
    top.press("page down")
    top.press("page down")
    top.press("page down")
    assert chosen(top) == names[0]
    assert rows(top)[-1] == names[0]


def test_a_page_is_opened_and_left_and_survives_its_ring() -> None:
    top = Top()
    waiter = {"pid": 1, "waits_for": "a message", "call": "get", "seconds": 3.0, "state": "alive"}
    top.update([block("jobs", waiters=[waiter], consumers=[1], deliveries={1: 2048})])
    top.press("enter")
    assert top.page == "jobs"
    text = "\n".join(each.text for each in top.lines(30, 100))
    assert re.search(r"^ +1 alive +get +3s +2\.0kB +- +a message", text, re.M)
    assert "process 1 waits in get for a message, 3.0 s" in text
    facts = ("name", "id", "kind", "nbytes", "pids", "stopped")
    damaged = {each: block("jobs")[each] for each in facts} | {"error": "it is damaged"}
    top.update([damaged])
    assert ("it is damaged", "") in top.lines(24, 100)
    top.update([])
    assert ("jobs has gone", "bad") in top.lines(24, 100)
    top.press("escape")
    assert top.lines(24, 100)[1].text == "nothing of ours in shared memory"
    assert not top.press("q")


def test_the_trend_shows_the_last_rates() -> None:
    for unicode, expected in ((True, "▁▄█"), (False, ".=#")):
        top = Top(unicode=unicode)
        for rate in (1.0, 50.0, 100.0):
            top.update([block("jobs", rate=rate)])
        assert top.lines(24, 100)[2].text.endswith(f" {expected}")


def test_forty_columns_and_few_lines() -> None:
    top = Top()
    top.update([block("a-very-long-name-of-a-queue-that-does-not-fit", rate=5.0)])
    for height in (1, 2, 3, 10):
        top.lines(height, 39)
    assert rows(top, 10, 39)[0].startswith("a-very-long-name")
    top.press("enter")
    rows(top, 10, 39)


def test_what_observers_find_can_be_shown() -> None:
    """Pages about a queue, two rings, one damaged, a pool, its queues, and plain memory."""
    with (
        Queue[int](5, name=NAME) as queue,
        Ring.create() as ring,
        ring.reserve(8),
        Ring.create() as damaged,
        ProcessPoolExecutor(1) as pool,
        SharedMemoryManager(own_name("top-memory"), 4096) as memory,
        Observer() as observer,
    ):
        assert memory.create()
        word(damaged, 8, 77, size=4)  # its version
        pool.submit(abs, -1).result(60)
        queue.put(1)
        top = Top()
        top.update(observer.look(), observer)
        mine = [each for each in observer.look() if os.getpid() in each["pids"]]
        assert len(mine) == 7
        for each in mine:
            top.page = each["id"]
            text = "\n".join(line.text for line in top.lines(40, 120))
            assert each["id"] in text
            assert ("shmring-worker-0" in text) == (each["kind"] == "pool")


# ---- in a terminal --------------------------------------------------------------------------


class Terminal:
    """A tmux server of our own with one pane."""

    def __init__(self, socket: Path, command: str, columns: int, lines: int) -> None:
        self._socket = socket
        size = ["-x", str(columns), "-y", str(lines)]
        self.tmux("-f", "/dev/null", "new-session", "-d", *size, command)

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self._socket), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "TERM": "xterm-256color"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait_for(self, pattern: str) -> None:
        """Return as soon as a line of the screen matches."""
        try:
            wait_for(lambda: re.search(pattern, self.screen(), re.M), 60, dump=False, every=0.05)
        except TimeoutError:
            raise AssertionError(f"{pattern!r} is not on the screen:\n{self.screen()}") from None


@contextlib.contextmanager
def terminal(tmp_path: Path, columns: int = 120, environment: str = "") -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    command = (
        f"LC_ALL=C.UTF-8 {environment} {sys.executable} -m shmring top --interval 0.1"
        f" 2>{tmp_path}/stderr; echo ended with $?; sleep 60"
    )
    made = Terminal(tmp_path / "tmux", command, columns, 24)
    try:
        yield made
    finally:
        made.tmux("kill-server")


def test_top_in_a_terminal(tmp_path: Path) -> None:
    with (
        Queue[int](name=NAME) as queue,
        run_in_process(queue.get) as waiter,
        terminal(tmp_path) as shown,
    ):
        shown.wait_for(rf"^{NAME} +queue +0 +0% +0 +1 +{os.getpid()}")
        for _ in range(7):
            shown.keys("s")
        shown.wait_for("by NAME up")
        for _ in range(200):  # the list may hold the rings of others
            if re.search(rf"^\S*{NAME}\S* +queue", _selected(shown), re.M):
                break
            shown.keys("Down")
        shown.keys("Enter")
        shown.wait_for(rf"^ +{waiter.pid} alive +get .* a message")
        os.kill(waiter.pid or 0, signal.SIGSTOP)
        shown.wait_for(rf"^ +{waiter.pid} stopped")
        shown.keys("Space")
        shown.wait_for("PAUSED")
        shown.keys("Space", "Escape")
        shown.wait_for(r"^NAME +KIND")
        shown.tmux("resize-window", "-x", "40", "-y", "10")
        shown.wait_for(r"^NAME +KIND +MSGS( +FILL)? *$")  # as the longest name allows
        shown.keys("q")
        shown.wait_for("ended with 0")
        assert (tmp_path / "stderr").read_text() == ""
        assert queue.statistics().waiters[0]["pid"] == waiter.pid


def _selected(shown: Terminal) -> str:
    """The line with the cursor, which is drawn in reverse."""
    for line in shown.tmux("capture-pane", "-p", "-e").splitlines():
        if "\x1b[7m" in line:
            return re.sub(r"\x1b\[[0-9;]*m", "", line)
    return ""


def test_ctrl_c_restores_the_terminal(tmp_path: Path) -> None:
    with terminal(tmp_path, environment="NO_COLOR=1") as shown:
        shown.wait_for("^shmring ")
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown.tmux("capture-pane", "-p", "-e"))
        shown.keys("C-c")
        shown.wait_for("ended with 130")
        assert (tmp_path / "stderr").read_text() == "shmring: interrupted\n"


def test_without_a_terminal() -> None:
    done = run_command("top")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "shmring: top needs a terminal: use shmring ls, or shmring top --json\n"
    with Ring.create(name=NAME):
        done = run_command("top", "--json", "--count", 2, "--interval", 0.05)
        assert done.returncode == 0, done.stderr
        looks = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(looks) == 2
        assert all(NAME in [each["name"] for each in look] for look in looks)


def test_a_terminal_that_is_none(tmp_path: Path) -> None:
    with terminal(tmp_path, environment="TERM=nix") as shown:
        shown.wait_for("ended with 2")
        (line,) = (tmp_path / "stderr").read_text().splitlines()
        assert line.startswith("shmring: the terminal TERM='nix': ")

"""The commands that look and remove: ls, inspect, watch, rm; bad input, pipes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("shmring._core.handle")

from header import LAYOUT, word
from shmring import Queue, Ring, SharedMemoryManager
from support import SHARED_MEMORY, SHMRING, own_name, run_command, run_in_process, wait_for

pytestmark = pytest.mark.usefixtures("only_cleaner")

NAME = own_name("commands")


def text_of(*arguments: object) -> str:
    done = run_command(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def json_of(*arguments: object) -> Any:
    return json.loads(text_of(*arguments, "--json"))


def refused(status: int, text: str, *arguments: object) -> None:
    """One line on stderr, nothing on stdout."""
    done = run_command(*arguments)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(text, done.stderr), done.stderr


@pytest.fixture
def orphan() -> Iterator[str]:
    """A named queue with a message, of which every process is dead."""
    with run_in_process(_leave_a_queue_behind) as maker:
        wait_for(lambda: (SHARED_MEMORY / NAME).exists() and _has_message())
        maker.kill()
        maker.join()
    yield NAME
    (SHARED_MEMORY / NAME).unlink(missing_ok=True)


def _leave_a_queue_behind() -> None:
    queue = Queue[Any](name=NAME)
    queue.put({"last": "words"})
    signal.pause()


def _has_message() -> bool:
    fd = os.open(SHARED_MEMORY / NAME, os.O_RDONLY)
    try:
        return word(fd, LAYOUT["PRODUCERS_OFFSET"] + 8) > 0
    finally:
        os.close(fd)


# ---- ls ------------------------------------------------------------------------------------


def test_ls_shows_a_row_and_what_stands_out() -> None:
    with Queue[int](name=NAME) as queue, run_in_process(queue.get) as waiter:
        wait_for(lambda: queue.statistics().waiters)
        text = text_of("ls")
        assert re.search(r"^NAME +KIND +MSGS +FILL +MSG/S +WAIT +OWNER", text, re.M)
        assert re.search(
            rf"^{NAME} +queue +0 +0% +0 +1 +{os.getpid()} +0 +\d+s +0 +1 +2$", text, re.M
        )
        assert f"    process {waiter.pid} waits in get for a message, " in text
        (block,) = (each for each in json_of("ls") if each["name"] == NAME)
        assert [each["pid"] for each in block["waiters"]] == [waiter.pid]
        os.kill(waiter.pid or 0, signal.SIGSTOP)
        wait_for(lambda: f"open in stopped process {waiter.pid}" in text_of("ls"))


def test_ls_says_how_to_remove_what_is_left(orphan: str) -> None:
    assert re.search(r"open nowhere, \d+ KiB: shmring rm --stale removes it", text_of("ls"))
    assert (SHARED_MEMORY / orphan).exists()


def test_the_fallback_has_nothing_to_list() -> None:
    for command in (["ls"], ["inspect", "x"], ["watch", "x"], ["top"], ["rm", "x"]):
        done = run_command(*command, SHMRING_BACKEND="queue")
        assert (done.returncode, done.stdout) == (2, "")
        assert "a pipe shows nothing" in done.stderr


# ---- inspect -------------------------------------------------------------------------------


def test_inspect_shows_the_last_messages_of_the_dead(orphan: str) -> None:
    text = text_of("inspect", orphan)
    assert re.search(r"^made by process \d+ \(dead\) \d+s ago$", text, re.M)
    assert "messages: 1 in it, 1 put, 0 taken\n" in text
    assert "builtins, waiting\n" in text
    assert "    {'last': 'words'}\n" in text
    assert "\n    81046c61 73740577 6f726473\n" in text
    (frame,) = json_of("inspect", orphan)["frames"]
    assert (frame["value"], frame["why_not"]) == ("{'last': 'words'}", None)


class Dangerous:
    """Unpickling it ends the process."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_inspect_unpickles_only_if_told() -> None:
    with Queue[Any](name=NAME) as queue:
        queue.put(Dangerous())
        assert "--pickle unpickles it, which runs code" in text_of("inspect", NAME)
        assert run_command("inspect", NAME, "--pickle").returncode == 3


def test_inspect_an_anonymous_ring_by_its_id_and_a_process_by_its_pid() -> None:
    with Ring.create() as ring, run_in_process(_hold_for_ever, ring) as holder:
        wait_for(lambda: ring.statistics().holders)
        (block,) = json_of("inspect", holder.pid)["open"]
        assert block["id"].startswith("shmring-")
        text = text_of("inspect", block["id"])
        assert f"process {holder.pid} holds a reserve" in text
        assert f"reserved by process {holder.pid}\n" in text
        text = text_of("inspect", holder.pid)
        assert text.startswith(f"process {holder.pid} (alive): ")
        assert f"    process {holder.pid} holds a reserve" in text


def _hold_for_ever(ring: Ring) -> None:
    with ring.reserve(8):
        signal.pause()


def test_names_that_cannot_be_inspected() -> None:
    refused(1, "does not exist: shmring ls shows what does", "inspect", NAME)
    refused(1, "process 999999999 is not there", "inspect", "999999999")
    refused(1, "process 1 has nothing of shmring's open|is not there", "inspect", "1")
    refused(1, "name=.*/", "inspect", "../etc/passwd")
    (SHARED_MEMORY / NAME).write_bytes(b"of another program")
    try:
        refused(1, "is not shmring's", "inspect", NAME)
        refused(1, "is not shmring's", "watch", NAME)
        refused(1, "is not shmring's", "rm", NAME)
    finally:
        (SHARED_MEMORY / NAME).unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_segment_is_refused() -> None:
    with Ring.create(name=NAME):
        os.chown(SHARED_MEMORY / NAME, 12345, -1)
        try:
            for command in ("inspect", "watch", "rm"):
                refused(1, "belongs to user 12345", command, NAME)
            assert NAME not in text_of("ls")
        finally:
            os.chown(SHARED_MEMORY / NAME, os.geteuid(), -1)


# ---- watch ---------------------------------------------------------------------------------


def test_watch_prints_a_line_at_each_interval() -> None:
    with Queue[int](10, name=NAME) as queue:
        queue.put_many(range(5))
        lines = text_of("watch", NAME, "--count", 2, "--interval", 0.05).splitlines()
        assert len(lines) == 2
        line = r"\d\d:\d\d:\d\d  0 put/s  0 taken/s  5 messages  50.0 % full  0 waiting"
        assert all(re.fullmatch(line, each) for each in lines)
        shown = text_of("watch", NAME, "--count", 1, "--interval", 0.05, "--json")
        assert json.loads(shown)["messages"] == 5


def test_watch_says_what_is_wrong_with_a_ring() -> None:
    with SharedMemoryManager(NAME, 4096) as memory:
        assert memory.create()
        refused(2, f"{NAME} is a memory, not a ring", "watch", NAME)
    with Ring.create(name=NAME) as ring:
        word(ring, 8, 77, size=4)  # its version
        text = text_of("watch", NAME, "--count", 1, "--interval", 0.05)
        assert "version 77 of the layout" in text


def watching(target: str = NAME, line: str = "") -> subprocess.Popen[str]:
    """`shmring watch`, which has printed a line."""
    process = subprocess.Popen(
        [*SHMRING, "watch", target, "--interval", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert line in process.stdout.readline()
    return process


def test_watch_ends_when_the_ring_vanishes() -> None:
    for anonymous in (False, True):
        with Ring.create(name=None if anonymous else NAME) as ring:
            (target,) = (
                [each["id"] for each in json_of("ls") if os.getpid() in each["pids"]]
                if anonymous
                else [NAME]
            )
            process = watching(target, "0 messages")
            ring.close()
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (1, f"shmring: {target} has gone\n")


# ---- rm ------------------------------------------------------------------------------------


def test_rm_removes_what_no_process_has_open(orphan: str) -> None:
    assert text_of("rm", orphan) == f"removed {orphan}\n"
    assert not (SHARED_MEMORY / orphan).exists()
    refused(1, "does not exist", "rm", orphan)


def test_rm_leaves_what_is_in_use_unless_forced() -> None:
    with Ring.create(name=NAME) as ring:
        refused(1, f"it is open in {os.getpid()}: end them", "rm", NAME)
        assert (SHARED_MEMORY / NAME).exists()
        assert json_of("rm", NAME, "--force") == {"removed": [NAME], "refused": {}}
        assert not (SHARED_MEMORY / NAME).exists()
        ring.put(b"goes on")
        assert ring.get() == b"goes on"


def test_rm_stale(orphan: str) -> None:
    assert f"removed {orphan}\n" in text_of("rm", "--stale")
    refused(2, "give names, or --stale", "rm")
    refused(2, "give names, or --stale", "rm", "--stale", "x")


# ---- pipes, signals, terminals ----------------------------------------------------------------


def test_a_closed_pipe_ends_quietly() -> None:
    with Ring.create(name=NAME):
        process = watching()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
        process.stderr.close()


def test_ctrl_c_ends_with_one_line() -> None:
    with Ring.create(name=NAME):
        process = watching()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (130, "shmring: interrupted\n")


def test_lines_are_cut_to_forty_columns() -> None:
    from test_demo import on_terminal

    with Ring.create(name=NAME) as ring:
        ring.put(b"x" * 500)
        for arguments in (("ls",), ("inspect", NAME), ("watch", NAME, "--count", "1")):
            status, text = on_terminal(*arguments, columns=40)
            assert status == 0
            assert max(map(len, text.splitlines())) <= 40, text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nix"],
        ["watch", "x", "--interval", "0"],
        ["watch", "x", "--interval", "nan"],
        ["inspect", "x", "--frames", "0"],
        ["inspect"],
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str]) -> None:
    refused(2, r"^shmring: .* \(see shmring.* --help\)$", *arguments)


@pytest.mark.both_backends
@pytest.mark.parametrize(
    "command", ["ls", "top", "inspect", "watch", "rm", "doctor", "bench", "run"]
)
def test_help_has_examples(command: str) -> None:
    assert f"examples:\n  shmring {command}" in text_of(command, "--help")


def test_the_shell_completes_commands_and_names() -> None:
    pytest.importorskip("argcomplete")
    with Ring.create(name=NAME):
        for line, expected in (("shmring ins", "inspect "), (f"shmring watch {NAME[:-1]}", NAME)):
            done = subprocess.run(
                ["bash", "-c", f"{sys.executable} -m shmring 8>&1 9>/dev/null 1>/dev/null"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={
                    **os.environ,
                    "_ARGCOMPLETE": "1",
                    "_ARGCOMPLETE_IFS": "\n",
                    "_ARGCOMPLETE_SUPPRESS_SPACE": "0",
                    "COMP_LINE": line,
                    "COMP_POINT": str(len(line)),
                },
            )
            assert expected.strip() in done.stdout, (done.stdout, done.stderr)

"""The command as a newcomer types it: real processes, real files, really killed workers."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shmring
from shmring.cli import demo
from support import SHMRING, run_command, wait_for

KEYS = {
    "correct",
    "files",
    "words",
    "workers",
    "killed",
    "retried",
    "seconds",
    "seconds_alone",
    "rate_shmring",
    "rate_multiprocessing",
    "ratio",
}
DEADLINE = 60

ring_only = pytest.mark.skipif(shmring.backend != "ring", reason="the fallback survives no kill")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and groups of POSIX")


def few_messages(arguments: tuple[object, ...]) -> list[str]:
    """Options for a short comparison."""
    return ["--messages=500"] if arguments[:1] == ("demo",) else []


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, *few_messages(arguments), **environment)


def run_patched(patch: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command with something changed in its process, before it starts."""
    program = (
        "import sys, os, shmring.cli.main as cli, shmring.cli.demo as demo\n"
        "import shmring.cli.demo_view as view\n"
        f"{patch}\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(cli.main(sys.argv[1:]))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments), *few_messages(arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def alone(change: str) -> str:
    """A patch: what the process that checks the workers does before it counts a file."""
    return (
        "def count(path, counts, real=demo._count_file, checker=os.getpid()):\n"
        f"    if os.getpid() == checker: {change}\n"
        "    return real(path, counts)\n"
        "demo._count_file = count"
    )


def summary(done: subprocess.CompletedProcess[str], status: int = 0) -> dict[str, Any]:
    """The one object on stdout."""
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.keys() == KEYS
    assert done.stdout.count("\n") == 1
    return found


def one_line(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    """It ended with one line on stderr that says why."""
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def living_of(session: int) -> list[int]:
    """The processes of a session, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, found_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(found_session) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three text files with nine words, the most frequent of them "the"."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("The cat, the dog.\n", encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("the\n\nend", encoding="utf-8")
    (tmp_path / "deep" / "er" / "c").write_text("naïve Straße ...the\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The main job on real text in a session of its own, counting just now."""
    process = subprocess.Popen(
        [*SHMRING, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(living_of(process.pid)) > 1, 30, "workers")
        yield process
    finally:
        process.kill()
        process.communicate()
        wait_for(lambda: not living_of(process.pid), 30, "the end of the workers")


# -- the job ------------------------------------------------------------------------------


@pytest.mark.both_backends
def test_it_counts_and_checks(tree: Path) -> None:
    found = summary(run("demo", tree, "--json", "--workers", 2))
    assert found["correct"] is True
    assert (found["files"], found["words"], found["workers"]) == (3, 9, 2)
    assert (found["killed"], found["retried"]) == (0, 0)
    assert found["seconds"] > 0
    assert found["seconds_alone"] > 0
    assert found["ratio"] == pytest.approx(found["rate_shmring"] / found["rate_multiprocessing"])


@pytest.mark.both_backends
def test_a_path_may_be_one_file(tree: Path) -> None:
    found = summary(run("demo", tree / "a.txt", "--json"))
    assert (found["files"], found["words"]) == (1, 4)


@ring_only
def test_the_standard_library_is_counted_while_a_worker_is_killed() -> None:
    found = summary(run("demo", "--kill", "--json"))
    assert found["correct"] is True
    assert found["files"] > 500
    assert found["words"] > 500_000
    assert (found["killed"], found["retried"]) == (1, 1)
    assert found["workers"] == len(os.sched_getaffinity(0))


@ring_only
@pytest.mark.parametrize("workers", [1, 3])
def test_the_killed_worker_is_in_the_middle_of_a_task(tree: Path, workers: int) -> None:
    found = summary(run("demo", tree, "--kill", "--json", "--workers", workers))
    assert found["correct"] is True
    assert (found["files"], found["words"]) == (3, 9)
    assert (found["killed"], found["retried"]) == (1, 1)


@ring_only
def test_one_file_is_enough_to_kill_at(tree: Path) -> None:
    found = summary(run("demo", tree / "a.txt", "--kill", "--json"))
    assert (found["correct"], found["killed"], found["retried"]) == (True, 1, 1)


@ring_only
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_any_start_method_will_do(tree: Path, method: str) -> None:
    # A spawned child imports the main module again, which therefore is a file.
    script = tree / "run.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from shmring.cli.main import main\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    sys.exit(main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, script, "demo", tree / "deep", "--json", "--kill"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    found = summary(done)
    assert (found["correct"], found["files"], found["killed"]) == (True, 2, 1)


def test_a_wrong_result_is_told(tree: Path) -> None:
    patch = alone("counts['other'] += 1")
    found = summary(run_patched(patch, "demo", tree, "--json"), status=1)
    assert found["correct"] is False
    done = run_patched(patch, "demo", tree)
    assert done.returncode == 1
    assert "WRONG" in done.stdout


def test_the_fallback_counts_too(tree: Path) -> None:
    found = summary(run("demo", tree, "--json", SHMRING_BACKEND="queue"))
    assert (found["correct"], found["files"], found["words"]) == (True, 3, 9)
    assert found["ratio"] > 0


def test_the_fallback_kills_no_worker(tree: Path) -> None:
    done = run("demo", tree, "--kill", "--json", SHMRING_BACKEND="queue")
    one_line(done, 2, "--kill", "fallback")


# -- what is no text ----------------------------------------------------------------------


@posix_only
def test_what_is_no_text_is_named_and_skipped(tree: Path) -> None:
    (tree / "empty").touch()
    (tree / "binary").write_bytes(b"text, and then\0")
    (tree / "late-binary").write_bytes(b"x" * (1 << 20) + b"\0")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "loop").symlink_to("loop")
    (tree / "deep" / "up").symlink_to("..")
    os.mkfifo(tree / "pipe")
    done = run("demo", tree, "--json")
    assert summary(done)["words"] == 9
    reasons = dict(
        line.removeprefix(f"skipped {tree}/").split(": ", 1) for line in done.stderr.splitlines()
    )
    assert reasons == {
        "empty": "empty",
        "binary": "binary",
        "late-binary": "binary",
        "dangling": "missing",
        "loop": f"unreadable: {os.strerror(errno.ELOOP)}",
        "deep/up": "link to a folder",
        "pipe": "not a regular file",
    }


@linux_only  # /proc/self/mem is unreadable even for root
def test_an_unreadable_file_is_named(tree: Path) -> None:
    (tree / "memory").symlink_to("/proc/self/mem")
    done = run("demo", tree, "--json")
    assert summary(done)["files"] == 3
    assert f"skipped {tree}/memory: unreadable: " in done.stderr


@pytest.mark.both_backends
def test_a_file_may_vanish_between_listing_and_reading(tree: Path) -> None:
    patch = (
        "def find(path, real=view.find_files):\n"
        "    found = real(path)\n"
        "    os.unlink(next(iter(found[0])))\n"
        "    return found\n"
        "view.find_files = find"
    )
    done = run_patched(patch, "demo", tree, "--json")
    assert summary(done)["files"] == 2
    assert done.stderr == f"skipped {tree / 'a.txt'}: missing\n"


@pytest.mark.parametrize("change", ["os.unlink(path)", "open(path, 'a').write('more')"])
def test_a_file_that_changed_before_the_check_is_no_error(tree: Path, change: str) -> None:
    patch = alone(f"path.endswith('a.txt') and {change}")
    done = run_patched(patch, "demo", tree, "--json", "--workers", 1)
    assert summary(done)["correct"] is True
    assert done.stderr == f"unchecked {tree / 'a.txt'}: changed meanwhile\n"


def test_what_was_counted_with_a_changed_file_is_not_compared(tree: Path) -> None:
    (tree / "deep" / "f").write_text("the end")
    patch = alone("path.endswith('f') and open(path, 'a').write('more')")
    done = run_patched(patch, "demo", tree, "--json", "--workers", 1)
    assert summary(done)["correct"] is True
    assert done.stderr.splitlines() == [
        f"unchecked {tree / 'deep' / 'b.txt'}: counted with one that changed",
        f"unchecked {tree / 'deep' / 'f'}: changed meanwhile",
    ]


@pytest.mark.both_backends
def test_nothing_to_count_is_no_error(tmp_path: Path) -> None:
    found = summary(run("demo", tmp_path, "--json"))
    assert (found["correct"], found["files"], found["words"]) == (True, 0, 0)
    assert found["ratio"] is None
    (tmp_path / "empty").touch()
    done = run("demo", tmp_path)
    assert done.returncode == 0
    assert "no word to count" in done.stdout


@posix_only
def test_names_cannot_move_the_cursor(tmp_path: Path) -> None:
    (tmp_path / "\x1b[31m\n").touch()
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))).write_text("a word")
    done = run("demo", tmp_path, "--json")
    assert summary(done)["files"] == 1
    assert done.stderr == f"skipped {tmp_path}/\\x1b[31m\\n: empty\n"


@pytest.mark.both_backends
def test_undecodable_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("café café\n".encode("latin-1"))
    found = summary(run("demo", tmp_path, "--json"))
    assert (found["correct"], found["words"]) == (True, 2)


def test_blocks_cut_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_BLOCK_NBYTES", 7)
    pieces = [
        "ΟΔΟΣ",
        "\u03c3",
        "ß",
        "\u0307İ",
        "word",
        " ",
        "\n",
        "\r",
        "\r\n",
        "\u2028",
        "\ufeff",
        "_1",
    ]
    choose = random.Random(7)
    path = tmp_path / "text"
    for _ in range(300):
        text = "".join(choose.choices(pieces, k=30)).encode()
        broken = bytearray(b"x" + text)
        broken[choose.randrange(len(broken))] = 0xE2
        path.write_bytes(broken)
        words = re.findall(r"\w+", broken.decode("utf-8", "replace").lower())
        assert demo.count_files([str(path)]).counts == Counter(words), bytes(broken)


# -- the comparison -----------------------------------------------------------------------


class Deadly:
    """A process that takes it from a queue ends; one that gets it among its arguments does not."""

    def __reduce__(self) -> tuple[Any, ...]:
        return end_the_consumer, ()


def end_the_consumer() -> Deadly:
    if demo._inherited:
        os._exit(3)
    return Deadly()


def test_a_message_that_arrives_changed_is_seen() -> None:
    rates = demo.compare_queues([float("nan")], lambda *_: None)  # equal to nothing
    assert not rates.intact


@ring_only
def test_the_death_of_the_consumer_is_an_error() -> None:
    with pytest.raises(shmring.WorkerDied):
        demo.compare_queues([Deadly()], lambda *_: None)


# -- the command --------------------------------------------------------------------------


@pytest.mark.both_backends
@pytest.mark.parametrize("path", ["/nowhere/at/all", "", "nowhere"])
def test_a_path_that_does_not_exist(path: str) -> None:
    one_line(run("demo", path), 2, repr(path), "does not exist")
    one_line(run("demo", path, "--json"), 2, repr(path))


@posix_only
def test_a_path_through_a_file(tree: Path) -> None:
    one_line(run("demo", tree / "a.txt" / "b"), 2, "Not a directory")


@pytest.mark.both_backends
@pytest.mark.parametrize("workers", ["0", "-1", "1000000", "many", "1.5", ""])
def test_an_impossible_number_of_workers(workers: str) -> None:
    one_line(run("demo", f"--workers={workers}"), 2, "--workers", repr(workers), "128")


@pytest.mark.both_backends
@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--dance"], ["rm"]])
def test_an_impossible_command(arguments: list[str]) -> None:
    one_line(run(*arguments), 2, "--help")


@pytest.mark.both_backends
def test_version() -> None:
    assert run("--version").stdout == f"shmring {shmring.__version__}\n"


@pytest.mark.both_backends
def test_without_rich(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rich.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")])
    path = path.rstrip(os.pathsep)
    one_line(run("demo", tree, PYTHONPATH=path), 1, 'pip install "shmring[cli]"')
    assert summary(run("demo", tree / "a.txt", "--json", PYTHONPATH=path))["correct"] is True


@posix_only
def test_a_reader_may_go_away(tree: Path) -> None:
    with subprocess.Popen(
        [*SHMRING, "demo", tree], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(DEADLINE) == 141
        assert process.stderr.read() == ""


def on_terminal(*arguments: object, columns: int = 80) -> tuple[int, str]:
    """The exit status, and what stood on the terminal in the end, without colours."""
    import fcntl
    import pty
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*SHMRING, *map(str, arguments), *few_messages(arguments)],
        stdout=terminal,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    written = b""
    try:
        while block := os.read(controller, 1 << 16):
            written += block
    except OSError:  # Linux says EIO at the end
        pass
    finally:
        os.close(controller)
        process.kill() if process.poll() is None else None
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return process.wait(DEADLINE), text.replace("\r\n", "\n")


@ring_only
def test_it_reads_well_on_a_terminal(tree: Path) -> None:
    for number in range(30):
        (tree / f"empty-{number:02}").touch()
    status, text = on_terminal("demo", tree, "--workers", 2, "--kill")
    assert status == 0
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    print(*lines, sep="\n")
    assert max(map(len, lines)) <= max(80, len(f"skipped {tree}/empty-00: empty"))
    assert any("count " in line and "33/33" in line for line in lines)
    assert sum(line.startswith("skipped ") for line in lines) == 20
    assert "... and 10 more: 2>FILE names them all" in lines
    for needed in (
        r"^word +times +worker +tasks +heartbeats +state *$",
        r"^the +4 +shmring-worker-\d+ +\d+ +[\d,]+ +(exited|killed) *$",
        r" killed *$",
        r"^9 words in 3 files: [\d.]+ s, one process alone [\d.]+ s$",
        r"^1 worker killed with SIGKILL, 1 task run again$",
        r"^multiprocessing.Queue +[\d,]+ +1.0 x *$",
        r"^shmring.Queue +[\d,]+ +[\d.]+ x *$",
        r"^The result is right",
    ):
        assert re.search(needed, "\n".join(lines), re.MULTILINE), needed


# -- Ctrl-C, and what a crash leaves ------------------------------------------------------


@pytest.mark.both_backends
@linux_only
def test_ctrl_c_leaves_nothing(started: subprocess.Popen[str]) -> None:
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, stderr = started.communicate(timeout=DEADLINE)
    assert started.returncode == 130
    assert stderr == "shmring: interrupted\n"
    wait_for(lambda: not living_of(started.pid), 10, "the end of a fork server")


@ring_only
def test_a_killed_command_leaves_no_worker(started: subprocess.Popen[str]) -> None:
    started.kill()
    started.wait(DEADLINE)
    wait_for(lambda: not living_of(started.pid), 10, "the end of the workers")

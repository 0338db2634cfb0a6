"""What programs leave in /dev/shm, however they end, and what takes it away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from shmring import Queue, Ring, SharedMemoryManager, cleanup_stale
from support import own_name, run_command, run_in_process, shared_memory_names, wait_for

pytestmark = pytest.mark.usefixtures("only_cleaner")

NAME = own_name("leftovers")
SHM = Path("/dev/shm")
OTHER_USER = 65534


def ours() -> set[str]:
    return {name for name in shared_memory_names() if NAME in name}


def stale_command() -> list[str]:
    """`shmring rm --stale`, and what it says that it removed."""
    done = run_command("rm", "--stale")
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("removed ") for line in done.stdout.splitlines()]


# ---- a program ends ------------------------------------------------------------------------

PROGRAM = r"""
import os, select, signal, sys
from multiprocessing import get_context
from shmring import HighPerformanceIPC, Queue, Ring, SharedMemoryManager

name = sys.argv[1]
kept = [Queue(), Queue(name=name + "-queue"), Ring.create(name=name + "-ring")]
memory = SharedMemoryManager(name + "-memory", 1000)
memory.create()
ipc = HighPerformanceIPC("main", namespace=name)
ipc.create_message_queue("q")
ipc.create_shared_memory("m", 1000)
ipc.check_alive_processes()  # has a registry made
child = get_context("fork").Process(target=kept[1].get, daemon=True)
child.start()
if sys.argv[2] == "handled":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
print("ready", kept[0].name, flush=True)
sys.stdin.readline()
END
"""
# A signal that comes just before a wait ends it too, unlike that of signal.pause().
WAIT = """
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
while True:
    select.select([woken], [], [])
"""
CLOSE = "for each in kept: each.close()\nmemory.cleanup()\nipc.cleanup()"
ENDS = {  # what the program does, what it is sent, how it ends
    "return": ("", None, 0),
    "all closed": (CLOSE, None, 0),
    "sys.exit": ("sys.exit(4)", None, 4),
    "exception": ("1 / 0", None, 1),
    "Ctrl-C": (WAIT, signal.SIGINT, -signal.SIGINT),
    "Ctrl-C inside get": ("Ring.attach(name + '-ring').get()", signal.SIGINT, -signal.SIGINT),
    "SIGTERM, handled": (WAIT, signal.SIGTERM, 3),
}


@contextmanager
def running(end: str, how: str = "") -> Iterator[tuple[subprocess.Popen[str], set[str]]]:
    """The program when all is made; its process group is killed at the end."""
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.replace("END", end), NAME, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert program.stdin is not None
        assert program.stdout is not None
        ready, _, on_demand = program.stdout.readline().strip().partition(" ")
        assert ready == "ready", program.communicate()
        made = {each for each in shared_memory_names() if NAME in each or each == on_demand}
        assert len(made) == 7
        program.stdin.write("go on\n")
        program.stdin.flush()
        yield program, made
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate(timeout=30)


@pytest.mark.parametrize("how", ENDS)
def test_a_program_that_ends_by_itself_leaves_nothing(how):
    """Nor do its daemons, which inherited all it had, and are terminated on the way out."""
    end, number, status = ENDS[how]
    with running(end, "handled" if "handled" in how else "") as (program, made):
        if number is not None:
            os.kill(program.pid, number)
        program.communicate(timeout=30)
        assert program.returncode == status
        assert not shared_memory_names() & made


@pytest.mark.fault(37)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("clean", [cleanup_stale, stale_command])
def test_a_program_whose_processes_are_all_killed_leaves_what_cleaning_removes(clean, number):
    """SIGTERM without a handler ends a program as SIGKILL does."""
    with running(WAIT) as (program, made):
        assert not made & set(clean()), "they are in use"
        assert made <= shared_memory_names()
        os.killpg(program.pid, signal.Signals[number])
        program.communicate(timeout=30)
        # the daemon's end is not ours to wait for
        removed: set[str] = set()
        wait_for(lambda: made <= removed or removed.update(clean()))
    assert not shared_memory_names() & made


# ---- and nothing else is removed -------------------------------------------------------------


def make_and_be_killed(name: str) -> None:
    with Queue(name=name) as queue:
        queue.put("left behind")
        os.kill(os.getpid(), signal.SIGKILL)


def join_and_be_killed(name: str, ready: Queue[object]) -> None:
    with Queue.attach(name) as queue:
        ready.put("here")
        queue.get()
        queue.get()


@pytest.mark.fault(37)
@pytest.mark.parametrize("clean", [cleanup_stale, stale_command])
def test_cleaning_removes_the_stale_and_nothing_else(clean):
    with run_in_process(make_and_be_killed, NAME + "-stale") as child:
        child.join(30)
    foreign: dict[str, Callable[[Path], object]] = {
        "-foreign": lambda path: path.write_bytes(b"another program's" * 1000),
        "-empty": lambda path: path.touch(),
        "-folder": lambda path: path.mkdir(),
        "-fifo": lambda path: os.mkfifo(path),
        "-link": lambda path: path.symlink_to(NAME + "-stale"),
    }
    with (
        Queue(name=NAME + "-live") as live,
        Ring.create(name=NAME + "-ring"),
        SharedMemoryManager(NAME + "-memory", 10) as memory,
        ExitStack() as cleanup,
    ):
        assert memory.create()
        for name, make in foreign.items():
            path = SHM / (NAME + name)
            make(path)
            cleanup.callback(path.rmdir if path.is_dir() else path.unlink)
        if os.geteuid() == 0:  # a stale one of another user
            path = SHM / (NAME + "-other")
            with run_in_process(make_and_be_killed, NAME + "-other") as child:
                child.join(30)
            os.chown(path, OTHER_USER, -1)
            cleanup.callback(path.unlink)
        before = ours()
        assert NAME + "-stale" in clean()
        assert before - ours() == {NAME + "-stale"}
        live.put(1)
        with Queue.attach(NAME + "-live") as other:
            assert other.get() == 1


@pytest.mark.fault(37)
def test_a_name_whose_processes_were_all_killed_is_usable_at_once():
    """One made it, one waits in get, one in put."""
    with Queue() as ready, ExitStack() as victims:
        maker = victims.enter_context(run_in_process(make_and_be_killed, NAME))
        maker.join(30)
        assert (SHM / NAME).exists()
        for _ in range(2):
            victims.enter_context(run_in_process(join_and_be_killed, NAME, ready))
            assert ready.get(timeout=30) == "here"
        with pytest.raises(FileExistsError):
            Queue(name=NAME)
        victims.close()
        with Queue(name=NAME) as queue:
            assert queue.empty()
            queue.put(1)
            assert queue.get() == 1
    assert not (SHM / NAME).exists()

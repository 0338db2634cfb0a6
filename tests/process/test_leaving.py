"""Handles at the end of a program, of a process, and of the process that sent them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shmring
from shmring import HighPerformanceIPC, Queue, RingNotFound
from support import own_name, wait_for

if shmring.backend != "ring":
    pytest.skip("the fallback's files are not in /dev/shm", allow_module_level=True)

# How each is made under a name, and ended; {name} is the name, or the namespace.
KINDS = {
    "Queue": ("shmring.Queue(name={name!r})", "close"),
    "Ring": ("shmring.Ring.create(name={name!r})", "close"),
    "SharedMemoryManager": ("memory({name!r})", "cleanup"),
    "HighPerformanceIPC": ("ipc({name!r})", "cleanup"),
}
PRELUDE = """
import gc, os, sys
import shmring

def memory(name):
    made = shmring.SharedMemoryManager(name, 100)
    made.create()
    return made

def ipc(name):
    made = shmring.HighPerformanceIPC("a", namespace=name)
    made.create_message_queue("q")
    made.create_shared_memory("m", 10)
    return made

def left(name):
    return [each for each in os.listdir("/dev/shm") if name in each]
"""
WAIT_FOR = f"""
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from support import wait_for
"""


def run_program(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(46)
def test_a_handle_that_is_dropped_gives_its_name_back_where_warnings_are_errors(kind):
    name = own_name("leaving")
    made = KINDS[kind][0].format(name=name)
    done = run_program(
        f"made = {made}\nassert left({name!r})\ndel made; gc.collect()\nprint(left({name!r}))",
        "-Werror",
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(47)
def test_a_descriptor_that_another_file_got_is_left_alone(kind):
    name = own_name("leaving")
    make, end = KINDS[kind]
    done = run_program(
        f"made = {make.format(name=name)}\n"
        "os.closerange(3, 100)\n"
        "others = [os.open('/dev/null', os.O_RDONLY) for _ in range(60)]\n"
        "try:\n"
        f"    made.{end}()\n"
        "finally:\n"
        "    print(sum(os.path.sameopenfile(fd, others[0]) for fd in others))\n"
    )
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(45)
def test_the_last_of_processes_that_were_forked_without_multiprocessing_leaves(kind):
    name = own_name("leaving")
    made = KINDS[kind][0].format(name=name)
    done = run_program(
        f"made = {made}\n"
        "reader, writer = os.pipe()\n"
        "for _ in range(2):\n"
        "    if os.fork():\n"
        "        os._exit(0)\n"
        "os.close(writer)\n"
        "os.read(reader, 1)\n"  # until both parents have ended
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not [each for each in os.listdir("/dev/shm") if name in each]


@pytest.mark.fault(45)
def test_a_child_that_is_forked_while_a_thread_is_inside_uses_the_same_handle():
    name = own_name("leaving")
    done = run_program(
        f"import threading\n{WAIT_FOR}"
        f"made = ipc({name!r})\n"
        "queue = made.message_queues['q']\n"
        "threads = [threading.Thread(target=made.receive_message, args=('q',)) for _ in range(2)]\n"
        "for each in threads: each.start()\n"
        "wait_for(lambda: len(queue.statistics().waiters) == 2)\n"
        "made._guard.acquire()\n"  # as a thread that counts has it
        "pid = os.fork()\n"
        "made._guard.release() if pid else None\n"
        "if pid == 0:\n"
        "    for number in range(2):\n"
        "        made.send_message('q', shmring.MessageType.DATA, number)\n"
        "    made.write_shared_data('m', b'child')\n"
        "    made.cleanup()\n"
        "    os._exit(0)\n"
        "for each in threads: each.join(30)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), made.read_shared_data('m', 5))\n"
        "made.cleanup()\n",
        "-Wignore::DeprecationWarning",  # from 3.12 on: a fork beside threads
    )
    assert (done.stdout, done.stderr) == ("0 b'child'\n", "")


# ---- the end of a program ------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(43)
def test_a_program_that_imported_dill_ends_silently(kind, ended):
    pytest.importorskip("dill")
    make, end = KINDS[kind]
    made = make.format(name=own_name("leaving"))
    done = run_program(f"import dill\nmade = {made}\n" + (f"made.{end}()\n" if ended else ""))
    assert (done.returncode, done.stderr) == (0, "")


# What a daemon thread is in when its program ends.
DAEMONS = {
    "Queue.get": "q = shmring.Queue(); call = q.get",
    "Queue.put": "q = shmring.Queue(1); q.put(1); call = lambda: q.put(1)",
    "JoinableQueue.join": "q = shmring.JoinableQueue(); q.put(1); call = q.join",
    "Ring.get": "q = shmring.Ring.create(); call = q.get",
    "Ring.peek": "q = shmring.Ring.create(); call = q.peek().__enter__",
    "wait": "q = shmring.Queue(); call = lambda: shmring.wait([q])",
    "aget": "import asyncio; q = shmring.Queue(); call = lambda: asyncio.run(q.aget())",
    "QueueListener": "import logging.handlers; q = shmring.Queue();"
    " call = logging.handlers.QueueListener(q).start",
    "HighPerformanceIPC": "made = ipc({name!r}); q = made.message_queues['q'];"
    " call = lambda: made.receive_message('q')",
}
INSIDE_MEMORY = """
import threading
made = memory({name!r})
def call():
    while True:
        made.write_data(b"x" * 100)
threading.Thread(target=call, daemon=True).start()
wait_for(lambda: made.read_data(1) == b"x")
"""
BECOME_DAEMON = """
import threading
{setup}
def run():
    threading.Thread(target=call, daemon=True).start()
    wait_for(lambda: q.statistics().waiters)
"""


@pytest.mark.parametrize("where", ["the program", "a forked child", "a spawned child"])
@pytest.mark.parametrize("call", DAEMONS)
@pytest.mark.fault(43)
def test_a_daemon_thread_that_waits_ends_silently_with_its_process(call, where, tmp_path):
    program = tmp_path / "program.py"
    setup = DAEMONS[call].format(name=own_name("leaving"))
    text = BECOME_DAEMON
    if where == "the program":
        text = PRELUDE + WAIT_FOR + text.format(setup=setup) + "run()\n"
    else:
        method = "fork" if where == "a forked child" else "spawn"
        indented = "\n".join(f"    {line}" for line in text.format(setup=setup).splitlines())
        text = (
            f"{PRELUDE}{WAIT_FOR}import multiprocessing\n"
            f"def child():\n{indented}\n    run()\n"
            "if __name__ == '__main__':\n"
            f"    started = multiprocessing.get_context({method!r}).Process(target=child)\n"
            "    started.start()\n    started.join()\n    sys.exit(started.exitcode)\n"
        )
    program.write_text(text)
    ended = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.fault(43)
def test_a_daemon_thread_that_writes_memory_ends_silently():
    done = run_program(WAIT_FOR + INSIDE_MEMORY.format(name=own_name("leaving")))
    assert (done.returncode, done.stderr) == (0, "")


# ---- handles that arrive too late ----------------------------------------------------------------


def test_a_pool_gets_an_error_where_the_queue_it_was_sent_is_gone(tmp_path):
    queue = Queue()
    go = tmp_path / "go"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        busy = pool.apply_async(_wait_for_file, (go,))
        late = pool.apply_async(_take, (queue,))
        wait_for(lambda: queue._identity()[0])  # it was pickled, and is still to be unpickled
        queue.close()
        go.touch()
        busy.get(60)
        with pytest.raises(RingNotFound, match="keeps its handle open"):
            late.get(60)


def _wait_for_file(path: Path) -> None:
    wait_for(path.exists, timeout=60)


def _take(queue: Any) -> object:
    return queue.get(timeout=1)


def test_what_an_ipc_had_is_missed_when_it_is_used_and_not_when_it_arrives():
    with HighPerformanceIPC("a", namespace=own_name("leaving")) as ipc:
        ipc.create_message_queue("q")
        ipc.create_shared_memory("m", 10)
        sent = pickle.dumps(ipc)
    with pickle.loads(sent) as received:
        with pytest.raises(RingNotFound, match="keeps its handle open"):
            received.receive_message("q", timeout=0)
        with pytest.raises(RingNotFound, match="keeps its block"):
            received.read_shared_data("m", 1)

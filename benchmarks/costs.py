"""What a queue costs while nobody needs it, and what it leaves when everybody is killed.

Run as a program (``python -m benchmarks.costs unused`` or ``victim``), this is
the far end of :func:`unused` and :func:`killed`: a fresh interpreter, so that
nothing that was used before is counted, and a process group of its own, so
that all of it can be killed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shmring
from benchmarks.sessions import DEADLINE_S, deadline

__all__ = ["blocked", "killed", "unused"]

SHARED_MEMORY = Path("/dev/shm")
ROOT = Path(__file__).resolve().parent.parent

_MAKERS: dict[str, Callable[[], Any]] = {
    "shmring.Queue": shmring.Queue,
    "multiprocessing.Queue": multiprocessing.get_context("fork").Queue,
}
_FIRST_ROUNDS = 200  # of the program that is killed: by then everything is in full swing


# ---- blocked --------------------------------------------------------------------------------


def blocked(seconds: float, consumers: int) -> dict[str, list[dict[str, float]]]:
    """Have consumers, each of a queue of its own, wait in `get` for so long.

    All of them wait at the same time: the machine is idle, and so should they be.

    Returns:
        by kind of queue, for each consumer the CPU time it used (`cpu_ms`) and
        how often it was awake (`wakes`).
    """
    context = multiprocessing.get_context("fork")
    waiting: dict[str, list[tuple[Any, Connection, Any]]] = {name: [] for name in _MAKERS}
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in _MAKERS}
    with contextlib.ExitStack() as stack, deadline(seconds + DEADLINE_S, "blocked consumers"):
        for _ in range(consumers):
            for name, make in _MAKERS.items():
                queue = make()
                stack.callback(queue.close)
                near_end, far_end = context.Pipe()
                process = context.Process(target=_block, args=(queue, far_end, seconds))
                process.start()
                stack.callback(process.join)
                stack.callback(process.kill)
                if near_end.recv() != "ready":
                    raise AssertionError("the consumer did not get ready")
                waiting[name].append((queue, near_end, process))
        time.sleep(seconds)
        for name, entries in waiting.items():
            for queue, near_end, process in entries:
                queue.put("at last")
                message, used = near_end.recv()
                if message != "at last":
                    raise AssertionError(f"{name} delivered {message!r}")
                spent[name].append(used)
                process.join(1)
    return spent


def _block(queue: Any, control: Connection, seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + DEADLINE_S)
    control.send("ready")
    before = resource.getrusage(resource.RUSAGE_SELF)
    message = queue.get()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    used = {"cpu_ms": cpu * 1000, "wakes": after.ru_nvcsw - before.ru_nvcsw}
    control.send((message, used))


# ---- unused ---------------------------------------------------------------------------------


def unused() -> dict[str, dict[str, Any]]:
    """What making a queue adds to a process that has made none before.

    Returns:
        by kind of queue: `descriptors`, `threads`, `processes`, `names` in
        /dev/shm; and where the queue has a descriptor of its own, the shared
        memory behind it: `allocated_bytes` and `size_bytes`.
    """
    found = {}
    for name in _MAKERS:
        program = [sys.executable, "-m", "benchmarks.costs", "unused", name]
        done = subprocess.run(
            program, check=True, capture_output=True, env=_environment(), timeout=DEADLINE_S
        )
        found[name] = json.loads(done.stdout)
    return found


def _count() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": sum(parent == os.getpid() for parent in _parents().values()),
    }


def _unused(name: str) -> dict[str, Any]:
    names, before = _names(), _count()
    queue = _MAKERS[name]()
    after = _count()
    found: dict[str, Any] = {key: after[key] - before[key] for key in after}
    found["names"] = _left_since(names)
    if hasattr(queue, "fileno"):
        status = os.fstat(queue.fileno())
        found["allocated_bytes"] = status.st_blocks * 512
        found["size_bytes"] = status.st_size
    queue.close()
    return found


# ---- killed ---------------------------------------------------------------------------------


def killed() -> dict[str, Any]:
    """Kill every process of a program that is passing messages over anonymous queues.

    Returns:
        how many `processes` were killed, how many `queues` they had, and the
        `names` that are in /dev/shm since, and which no living process uses.
    """
    before = _names()
    program = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.costs", "victim"],
        env=_environment(),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert program.stdout is not None
        with deadline(DEADLINE_S, "a program to be killed"):
            said = json.loads(program.stdout.readline())
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        program.stdout.close()
    with deadline(DEADLINE_S, "killed processes"):
        while any(map(_alive, said["pids"])):
            time.sleep(0.01)
    return {
        "processes": len(said["pids"]),
        "queues": said["queues"],
        "names": _left_since(before),
    }


def _victim() -> None:
    """One process gives out work, three do it; until they are killed."""
    signal.alarm(int(2 * DEADLINE_S))  # should nobody come to kill it; the children inherit nothing
    context = multiprocessing.get_context("fork")
    tasks, results, nobody = shmring.Queue(), shmring.Queue(), shmring.Queue()
    nobody.put(bytes(8 << 20))  # one that has grown, and is full, when the end comes
    children = [context.Process(target=_work, args=(tasks, results)) for _ in range(3)]
    for child in children:
        child.start()
    done = 0
    while True:
        tasks.put({"task": done, "payload": bytes(1000)})
        results.get()
        done += 1
        if done == _FIRST_ROUNDS:
            pids = [os.getpid(), *(child.pid for child in children)]
            print(json.dumps({"pids": pids, "queues": 3}), flush=True)


def _work(tasks: Any, results: Any) -> None:
    signal.alarm(int(2 * DEADLINE_S))
    while True:
        results.put(tasks.get())


# ---- what stands in /dev/shm and /proc --------------------------------------------------------


def _names() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def _left_since(before: set[str]) -> list[str]:
    """New names that stay, and that no other process uses.

    Looked at more than once: another program's block has a name for a moment
    before it is mapped, and after.
    """
    left = _names() - before
    for _ in range(5):
        if not left:
            break
        time.sleep(0.1)
        left &= _names() - _in_use_by_others()
    return sorted(left)


def _in_use_by_others() -> set[str]:
    """Names that some other living process has mapped: another program's, not ours."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone, or not ours to read
            for line in (process / "maps").read_text().splitlines():
                _, _, path = line.partition(f" {SHARED_MEMORY}/")
                found.add(path)
    return found


def _parents() -> dict[int, int]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (process / "stat").read_text().rpartition(")")[2].split()
            found[int(process.name)] = int(after_name[1])
    return found


def _alive(pid: int) -> bool:
    """A zombie that nobody has waited for holds no memory any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _environment() -> dict[str, str]:
    """The modules this process sees, in the same order; never those of its working directory."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


if __name__ == "__main__":
    if sys.argv[1] == "unused":
        print(json.dumps(_unused(sys.argv[2])))
    else:
        _victim()

"""Rows of the report about the drop-in and about resources, beside multiprocessing."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shmring
from benchmarks import ROOT, Row, Settings, Target, per_second, progress
from benchmarks.adapters import FORK
from benchmarks.sessions import (
    DEADLINE_S,
    cpu_ns,
    deadline,
    end_with_alarm,
    forever,
    sleeps,
    wait_until,
)
from shmring._core import bytes_ring

IDLE = 64  # consumers
PER_SECOND = 100  # messages
BOTH: dict[str, Callable[[], Any]] = {
    "shmring.Queue": shmring.Queue,
    "multiprocessing.Queue": FORK.Queue,
}


def _in_turns(
    what: str, runs: int, measure: Callable[[Any], float], ours: Any, theirs: Any
) -> tuple[float, float, dict[str, list[float]]]:
    """Return the medians of both, and the values."""
    progress(what)
    raw: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(runs):
        raw["ours"].append(measure(ours))
        raw["theirs"].append(measure(theirs))
    return statistics.median(raw["ours"]), statistics.median(raw["theirs"]), raw


# ---- the drop-in ----------------------------------------------------------------------------


def joinable(settings: Settings) -> Row:
    """Messages a second, from the first put until join() returns."""

    def rate(make: Callable[[], Any]) -> float:
        count = int(max(0.01, settings.scale) * (10_000 if make == FORK.JoinableQueue else 100_000))
        message = bytes(64)
        with (
            contextlib.closing(make()) as queue,
            forever(_work_off, queue),
            deadline(DEADLINE_S, question),
        ):
            queue.put(message)
            queue.join()  # the child has started
            start = time.perf_counter()
            for _ in range(count):
                queue.put(message)
            queue.join()
            return count / (time.perf_counter() - start)

    question = "64 B through a JoinableQueue, with task_done"
    both = (shmring.JoinableQueue, FORK.JoinableQueue)
    ours, theirs, raw = _in_turns(question, settings.runs, rate, *both)
    text = f"{{}} times multiprocessing.JoinableQueue ({per_second(theirs)})"
    spread = f"{per_second(min(raw['ours']))} to {per_second(max(raw['ours']))}"
    return Row(question, per_second(ours), [Target(text, 20, ours / theirs)], spread, raw)


def _work_off(queue: Any) -> None:
    for _ in range(1000):
        queue.get()
        queue.task_done()


# A typical program: the spawned child runs its top again and imports the library too.
_HELLO = """
import multiprocessing, time
from LIBRARY import Queue

def say_hello(queue):
    queue.put("hello")

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    queue = Queue()
    child = multiprocessing.Process(target=say_hello, args=(queue,))
    start = time.perf_counter()
    child.start()
    try:
        assert queue.get(timeout=100) == "hello"
        print(time.perf_counter() - start)
    finally:
        child.join(10)
        child.kill()
        queue.close()
"""


def first_message(settings: Settings) -> Row:
    """Milliseconds from start() of a spawned child until its first message has arrived."""

    def milliseconds(library: str, folder: str) -> float:
        program = Path(folder) / f"hello_{library}.py"
        program.write_text(_HELLO.replace("LIBRARY", library))
        # With compiled modules, as an installed package has them.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, str(program)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, check=True, timeout=DEADLINE_S
        )
        return 1000 * float(done.stdout)

    question = "first message of a spawned child"
    with tempfile.TemporaryDirectory() as folder:
        measure = functools.partial(milliseconds, folder=folder)
        both = ("shmring", "multiprocessing")
        _in_turns("compiling", 1, measure, *both)
        # Three times the runs: the start of a process varies by more than the target.
        ours, theirs, raw = _in_turns(question, 3 * settings.runs, measure, *both)
    text = f"{{}} ms later than multiprocessing ({theirs:.0f} ms)"
    targets = [Target(text, 20, ours - theirs, at_most=True)]
    return Row(question, f"{ours:.0f} ms", targets, raw=raw)


def kept(settings: Settings) -> Row:
    """Seconds until a consumer that keeps all of many arrays has them."""
    import numpy as np

    count = int(max(0.01, settings.scale) * 2000)
    array = np.ones(1 << 18, np.float32)

    def seconds(least: int) -> float:
        before = bytes_ring._set_lend_bytes(least)
        try:
            with (
                contextlib.closing(shmring.Queue(max_capacity=1 << 28)) as queue,
                forever(_put_for_ever, queue, array),
                deadline(DEADLINE_S, question),
            ):
                queue.get()  # the child has started
                start = time.perf_counter()
                arrays = [queue.get() for _ in range(count)]
                took = time.perf_counter() - start
                assert all(one[-1] == 1 for one in arrays)
                return took
        finally:
            bytes_ring._set_lend_bytes(before)

    question = f"{count:,} arrays of 1 MiB, all kept"
    ours, theirs, raw = _in_turns(question, settings.runs, seconds, 1 << 20, 1 << 62)
    text = f"{{}} times what copying takes ({theirs:.2f} s)"
    targets = [Target(text, 1 / 0.9, ours / theirs, at_most=True)]
    return Row(question, f"{ours:.2f} s", targets, raw=raw)


def _put_for_ever(queue: Any, array: Any) -> None:
    for _ in range(100):
        queue.put(array)


def unread(settings: Settings) -> Row:
    """Seconds until the last put of many dicts returns; they are read afterwards."""
    dicts = [
        {"id": number, "name": "a name", "value": 1.5, "ok": True}
        for number in range(int(max(0.01, settings.scale) * 200_000))
    ]

    def seconds(make: Callable[[], Any]) -> float:
        queue = make()
        start = time.perf_counter()
        for each in dicts:
            queue.put(each)
        took = time.perf_counter() - start
        for number in range(len(dicts)):
            assert queue.get(timeout=DEADLINE_S)["id"] == number
        queue.close()
        return took

    question = f"{len(dicts):,} dicts put before any is read"
    ours, theirs, raw = _in_turns(question, settings.runs, seconds, *BOTH.values())
    targets = [Target(f"{{}} times multiprocessing.Queue ({theirs:.2f} s)", 6, theirs / ours)]
    spread = f"{min(raw['ours']):.2f} to {max(raw['ours']):.2f} s"
    return Row(question, f"{ours:.2f} s", targets, spread, raw)


# ---- resources ------------------------------------------------------------------------------


def idle_consumers(settings: Settings) -> Row:
    """CPU of consumers that wait on one queue, to which a message comes now and then."""

    def share() -> float:
        with contextlib.ExitStack() as stack, deadline(DEADLINE_S, question):
            queue = stack.enter_context(contextlib.closing(shmring.Queue()))
            pids = [stack.enter_context(forever(queue.get)) for _ in range(IDLE)]
            wait_until(lambda: all(map(sleeps, pids)))
            before, start = cpu_ns(pids), time.monotonic()
            for number in range(max(10, int(1000 * settings.scale))):
                time.sleep(max(0.0, start + number / PER_SECOND - time.monotonic()))
                queue.put(bytes(64))
            return (cpu_ns(pids) - before) / 1e7 / (time.monotonic() - start)

    question = f"{IDLE} idle consumers, {PER_SECOND} messages a second"
    progress(question)
    shares = [share() for _ in range(settings.runs)]
    middle = statistics.median(shares)
    targets = [Target("{} % of a core", 0.5, middle, at_most=True)]
    spread = f"{min(shares):.2f} to {max(shares):.2f} %"
    return Row(question, f"{middle:.2f} %", targets, spread, {"shares": shares})


def blocked(settings: Settings) -> Row:
    """CPU of consumers, each with its own queue, that wait in `get` at the same time."""
    seconds = 10 * min(1.0, settings.scale)
    question = f"a consumer blocked in get for {seconds:g} s"
    progress(question)
    pids: dict[str, list[int]] = {name: [] for name in BOTH}
    with contextlib.ExitStack() as stack, deadline(seconds + DEADLINE_S, question):
        for name, make in [*BOTH.items()] * settings.runs:
            queue = stack.enter_context(contextlib.closing(make()))
            pids[name].append(stack.enter_context(forever(queue.get)))
        wait_until(lambda: all(map(sleeps, itertools.chain(*pids.values()))))
        before = {name: [cpu_ns([pid]) for pid in of_one] for name, of_one in pids.items()}
        time.sleep(seconds)
        spent = {
            name: [(cpu_ns([pid]) - cpu) / 1e6 for pid, cpu in zip(pids[name], cpus, strict=True)]
            for name, cpus in before.items()
        }
    ours, theirs = (statistics.median(one) for one in spent.values())
    text = f"{{}} ms of CPU (multiprocessing.Queue {theirs:.2f})"
    targets = [Target(text, 10, ours, at_most=True)]
    return Row(question, f"{ours:.2f} ms", targets, raw=dict(spent))


def _program(call: str) -> dict[str, Any]:
    """Return the arguments that start a new interpreter and call a function of this module."""
    program = f"from benchmarks import costs; costs.{call}"
    return {"args": [sys.executable, "-c", program], "cwd": ROOT, "stdout": subprocess.PIPE}


def unused(settings: Settings) -> Row:
    """Resources of the first queue in a process."""
    question = "an unused Queue()"
    progress(question)
    found = {}
    for name in BOTH:
        done = subprocess.run(check=True, timeout=DEADLINE_S, **_program(f"_make({name!r})"))
        found[name] = json.loads(done.stdout)
    ours, theirs = found.values()
    kib = ours["allocated_bytes"] / 1024
    others = ours["threads"] + ours["processes"] + ours["names"]
    descriptors = f"{{}} descriptors ({theirs['descriptors']})"
    targets = [
        Target("{} KiB of shared memory", 128, kib, at_most=True),
        Target(descriptors, 1, ours["descriptors"], at_most=True),
        Target("{} threads, processes and names in /dev/shm", 0, others, at_most=True),
    ]
    return Row(question, f"{kib:.0f} KiB", targets, raw=found)


def _count() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "names": len(_names_of(os.getpid())),
    }


def _make(name: str) -> None:
    before = _count()
    queue = BOTH[name]()
    found = {key: value - before[key] for key, value in _count().items()}
    if hasattr(queue, "fileno"):
        found["allocated_bytes"] = os.fstat(queue._fileno()).st_blocks * 512
    print(json.dumps(found))


def killed(settings: Settings) -> Row:
    """Names in /dev/shm after every process of a program with anonymous queues is killed."""
    question = "all processes of a program killed with SIGKILL"
    progress(question)
    left: list[str] = []
    for _ in range(settings.runs):
        program = subprocess.Popen(start_new_session=True, **_program("_pass_messages()"))
        assert program.stdout is not None
        try:
            with deadline(DEADLINE_S, "start of the program"):
                pids = json.loads(program.stdout.readline())
            names = set().union(*map(_names_of, pids))
        finally:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
            program.stdout.close()
        left += [name for name in sorted(names) if Path("/dev/shm", name).exists()]
    targets = [Target("{} names left in /dev/shm", 0, len(left), at_most=True)]
    return Row(question, ", ".join(left) or "nothing left", targets, raw={"names": left})


def _pass_messages() -> None:
    """Give work to three processes until all are killed."""
    end_with_alarm(2 * DEADLINE_S)
    tasks, results, full = shmring.Queue(), shmring.Queue(), shmring.Queue()
    full.put(bytes(8 << 20))  # this queue has grown and is not empty when the kill comes
    with contextlib.ExitStack() as stack:
        workers = [forever(lambda: results.put(tasks.get())) for _ in range(3)]
        pids = [*map(stack.enter_context, workers)]
        for task in itertools.count():
            tasks.put({"task": task, "payload": bytes(1000)})
            results.get()
            if task == 200:
                print(json.dumps([os.getpid(), *pids]), flush=True)


def _names_of(pid: int) -> set[str]:
    """Return the names in /dev/shm that a process has mapped, and that are not unlinked."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.partition(" /dev/shm/")[2] for line in lines if not line.endswith("(deleted)")}
    return names - {""}

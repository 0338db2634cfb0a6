"""Lines of the report about costs and the drop-in, and the parts that every line has."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shmring
from benchmarks import ROOT, limits, per_second, progress
from benchmarks.adapters import FORK, ShmringQueue, Transport
from benchmarks.sessions import (
    DEADLINE_S,
    TRICKLE_PER_SECOND,
    Runs,
    Session,
    Trickle,
    deadline,
    end_with_alarm,
    take_turns,
)
from benchmarks.work import Work, bytes_of

__all__ = [
    "Aim",
    "Line",
    "Measuring",
    "blocked",
    "first",
    "idle_consumers",
    "joinable",
    "killed",
    "unread",
    "unused",
]

IDLE = 64  # consumers that wait
PATIENCE_S = 120.0
BOTH: dict[str, Callable[[], Any]] = {
    "shmring.Queue": shmring.Queue,
    "multiprocessing.Queue": FORK.Queue,
}


@dataclass(frozen=True)
class Aim:
    """One thing that a line asks for.

    Attributes:
        what: what was measured, "{}" in the place of the figure.
        asked: the target.
        measured: in the same unit; None where what it is compared to is not installed.
        most: `asked` is an upper bound.
    """

    what: str
    asked: float
    measured: float | None
    most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.most else self.measured >= self.asked

    def __str__(self) -> str:
        shown = "-" if self.measured is None else f"{self.measured:.3g}"
        verdict = {True: "", False: ", **not reached**", None: ", not measured"}[self.reached]
        word = "at most" if self.most else "at least"
        return f"{self.what.format(shown)} ({word} {self.asked:g}{verdict})"


@dataclass(frozen=True)
class Line:
    """A line of the report.

    Attributes:
        question: what is measured.
        measured: our median, with its unit.
        aims: what was asked of it.
        spread: our slowest and fastest run.
        raw: the figures behind it.
    """

    question: str
    measured: str
    aims: Sequence[Aim]
    spread: str = "-"
    raw: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        aims = "; ".join(map(str, self.aims))
        return f"| {self.question} | {self.measured} | {self.spread} | {aims} |"


@dataclass(frozen=True)
class Measuring:
    """How the lines are measured.

    Attributes:
        runs: of each side of a comparison.
        scale: share of the work.
        peers: compare with the packages that are installed, too.
        limits: the program that measures the limits of the machine.
    """

    runs: int
    scale: float
    peers: bool
    limits: Path

    def bound(self, name: str, work: Work) -> float:
        """Measure what the machine allows; to be asked before and after the line."""
        progress(name)
        if name == limits.PICKLE:
            return limits.pickle_alone(work, self.scale)
        start = name.removesuffix("_median_ns")
        return limits.measured(self.limits, min(1.0, self.scale), start)[name]

    def turns(
        self,
        session: Callable[..., Session],
        work: Work,
        ours: Sequence[type[Transport]],
        peers: Sequence[type[Transport]] = (),
        **options: Any,
    ) -> dict[str, Runs]:
        """Return the runs by transport; a peer that failed is left out."""
        make = functools.partial(session, work=work, scale=self.scale, **options)
        chosen = {one.label: functools.partial(make, one) for one in (*ours, *peers)}
        found = take_turns(self.runs, chosen, progress)
        for one in ours:
            if (error := found[one.label].error) is not None:
                raise error
        return {label: one for label, one in found.items() if one.error is None and one.rates}


# ---- what the drop-in promises --------------------------------------------------------------


def _in_turns(
    runs: int, measure: Callable[[Any], float], ours: Any, theirs: Any
) -> tuple[list[float], list[float]]:
    pairs = [(measure(ours), measure(theirs)) for _ in range(runs)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def joinable(run: Measuring) -> Line:
    """Messages a second, from the first put until join() returns."""

    def rate(make: Callable[[], Any]) -> float:
        count = int(max(0.01, run.scale) * (10_000 if make == FORK.JoinableQueue else 100_000))
        queue, ready = make(), FORK.SimpleQueue()
        child = FORK.Process(target=_work_off, args=(queue, ready, count))
        child.start()
        try:
            ready.get()
            message = bytes(64)
            began = time.perf_counter()
            for _ in range(count):
                queue.put(message)
            queue.join()
            return count / (time.perf_counter() - began)
        finally:
            child.join(PATIENCE_S)
            child.kill()
            queue.close()

    progress("JoinableQueue")
    ours, theirs = _in_turns(run.runs, rate, shmring.JoinableQueue, FORK.JoinableQueue)
    middle, other = statistics.median(ours), statistics.median(theirs)
    what = f"{{}} times multiprocessing.JoinableQueue ({per_second(other)})"
    spread = f"{per_second(min(ours))} to {per_second(max(ours))}"
    question, aims = "64 B through a JoinableQueue, with task_done", [Aim(what, 20, middle / other)]
    return Line(question, per_second(middle), aims, spread, {"ours": ours, "theirs": theirs})


def _work_off(queue: Any, ready: Any, count: int) -> None:
    end_with_alarm(PATIENCE_S)
    ready.put(None)
    for _ in range(count):
        queue.get()
        queue.task_done()


# As people write it: a spawned child runs the top of its parent's program again, and imports
# the library too.
_HELLO = """
import multiprocessing, time
from LIBRARY import Queue

def say_hello(queue):
    queue.put("hello")

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    queue = Queue()
    child = multiprocessing.Process(target=say_hello, args=(queue,))
    began = time.perf_counter()
    child.start()
    try:
        assert queue.get(timeout=100) == "hello"
        print(time.perf_counter() - began)
    finally:
        child.join(10)
        child.kill()
        queue.close()
"""


def first_message(library: str, folder: str) -> float:
    """Return seconds from start() of a spawned child until its first message is here.

    Args:
        library: the module whose Queue it is.
        folder: for the program and compiled modules, as an installed package has them; a
            tree under work may have none, and each child would compile them.
    """
    program = Path(folder) / f"hello_{library}.py"
    program.write_text(_HELLO.replace("LIBRARY", library))
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, str(program)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, timeout=PATIENCE_S
    )
    return float(done.stdout)


def first(run: Measuring) -> Line:
    progress("first message of a spawned child")
    with tempfile.TemporaryDirectory() as folder:
        measure = functools.partial(first_message, folder=folder)
        _in_turns(1, measure, "shmring", "multiprocessing")  # compiles what is imported
        # Starting a process varies by more than what is asked for.
        ours, theirs = _in_turns(3 * run.runs, measure, "shmring", "multiprocessing")
    middle, other = (1000 * statistics.median(one) for one in (ours, theirs))
    aims = [Aim(f"{{}} ms later than multiprocessing ({other:.0f} ms)", 20, middle - other, True)]
    raw = {"ours": ours, "theirs": theirs}
    return Line("first message of a spawned child", f"{middle:.0f} ms", aims, raw=raw)


def unread(run: Measuring) -> Line:
    """Seconds until the last put of many dicts returned, with no reader; all are read after."""
    dicts = [
        {"id": number, "name": "a name", "value": 1.5, "ok": True}
        for number in range(int(max(0.01, run.scale) * 200_000))
    ]

    def seconds(make: Callable[[], Any]) -> float:
        queue = make()
        began = time.perf_counter()
        for each in dicts:
            queue.put(each)
        took = time.perf_counter() - began
        for number in range(len(dicts)):
            assert queue.get(timeout=PATIENCE_S)["id"] == number
        queue.close()
        return took

    progress("puts without a reader")
    ours, theirs = _in_turns(run.runs, seconds, shmring.Queue, FORK.Queue)
    middle, other = statistics.median(ours), statistics.median(theirs)
    aims = [Aim(f"{{}} times multiprocessing.Queue ({other:.2f} s)", 6, other / middle)]
    spread = f"{min(ours):.2f} to {max(ours):.2f} s"
    raw = {"ours": ours, "theirs": theirs}
    return Line("200,000 dicts put before any is read", f"{middle:.2f} s", aims, spread, raw)


# ---- costs ----------------------------------------------------------------------------------


def idle_consumers(run: Measuring) -> Line:
    session = functools.partial(
        Trickle,
        ShmringQueue,
        bytes_of(64),
        producers=1,
        consumers=IDLE,
        count=max(10, int(1000 * run.scale)),
    )
    found = take_turns(run.runs, {"idle": session}, progress)["idle"]
    if found.error is not None:
        raise found.error
    share = 100 * found.cost["consumers_share_of_a_core"]
    question = f"64 idle consumers, {TRICKLE_PER_SECOND} messages a second"
    return Line(question, f"{share:.2f} %", [Aim("{} % of a core", 2.0, share, most=True)])


def blocked(run: Measuring) -> Line:
    """CPU of consumers, each of a queue of its own, that wait in `get` at the same time."""
    seconds = 10 * min(1.0, run.scale)
    progress(f"{run.runs} consumers of each kind blocked in get for {seconds:g} s")
    spent: dict[str, list[float]] = {name: [] for name in BOTH}
    waiting = []
    with contextlib.ExitStack() as stack, deadline(seconds + DEADLINE_S, "blocked consumers"):
        for _ in range(run.runs):
            for name, make in BOTH.items():
                queue = make()
                stack.callback(queue.close)
                near_end, far_end = FORK.Pipe()
                process = FORK.Process(target=_block, args=(queue, far_end, seconds + DEADLINE_S))
                process.start()
                stack.callback(process.join)
                stack.callback(process.kill)
                assert near_end.recv() == "ready"
                waiting.append((name, queue, near_end))
        time.sleep(seconds)
        for name, queue, near_end in waiting:
            queue.put("at last")
            spent[name].append(near_end.recv())
    ours, theirs = (statistics.median(one) for one in spent.values())
    aims = [Aim(f"{{}} ms of CPU (multiprocessing.Queue {theirs:.2f})", 10, ours, most=True)]
    question = f"a consumer blocked in get for {seconds:g} s"
    return Line(question, f"{ours:.2f} ms", aims, raw=dict(spent))


def _block(queue: Any, control: Connection, seconds: float) -> None:
    end_with_alarm(seconds)
    control.send("ready")
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert queue.get() == "at last"
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    control.send(cpu * 1000)


def _program(call: str) -> dict[str, Any]:
    """How to start a fresh interpreter that calls a function of this module."""
    program = f"from benchmarks import costs; costs.{call}"
    return {"args": [sys.executable, "-c", program], "cwd": ROOT, "stdout": subprocess.PIPE}


def unused(run: Measuring) -> Line:
    """What making a queue adds to a process that has made none before."""
    progress("an unused queue")
    found = {
        name: json.loads(
            subprocess.run(check=True, timeout=DEADLINE_S, **_program(f"_make({name!r})")).stdout
        )
        for name in BOTH
    }
    ours, theirs = found.values()
    kib = ours["allocated_bytes"] / 1024
    others = ours["threads"] + ours["processes"] + len(ours["names"])
    aims = [
        Aim("{} KiB of shared memory", 128, kib, most=True),
        Aim(f"{{}} descriptors ({theirs['descriptors']})", 1, ours["descriptors"], most=True),
        Aim("{} threads, processes and files in /dev/shm", 0, others, most=True),
    ]
    return Line("an unused Queue()", f"{kib:.0f} KiB", aims, raw=found)


def _count() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
    }


def _make(name: str) -> None:
    names, before = _names(), _count()
    queue = BOTH[name]()
    after = _count()
    found: dict[str, Any] = {key: after[key] - before[key] for key in after}
    found["names"] = _left_since(names)
    if hasattr(queue, "fileno"):
        found["allocated_bytes"] = os.fstat(queue._fileno()).st_blocks * 512
    print(json.dumps(found))


def killed(run: Measuring) -> Line:
    """What is left when every process of a program with anonymous queues is killed."""
    progress("all processes of a program killed")
    left: list[str] = []
    for _ in range(run.runs):
        before = _names()
        program = subprocess.Popen(start_new_session=True, **_program("_pass_messages()"))
        assert program.stdout is not None
        try:
            with deadline(DEADLINE_S, "a program to be killed"):
                pids = json.loads(program.stdout.readline())
        finally:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
            program.stdout.close()
        with deadline(DEADLINE_S, "killed processes"):
            while any(map(_alive, pids)):
                time.sleep(0.01)
        left += _left_since(before)
    aims = [Aim("{} names left in /dev/shm", 0, len(left), most=True)]
    question = "all processes of a program killed with SIGKILL"
    return Line(question, ", ".join(left) or "nothing left", aims, raw={"names": left})


def _pass_messages() -> None:
    """One process gives out work, three do it; until they are killed."""
    end_with_alarm(2 * DEADLINE_S)
    tasks, results, full = shmring.Queue(), shmring.Queue(), shmring.Queue()
    full.put(bytes(8 << 20))  # a queue that has grown, and has a message, when the end comes
    children = [FORK.Process(target=_answer, args=(tasks, results)) for _ in range(3)]
    for child in children:
        child.start()
    done = 0
    while True:
        tasks.put({"task": done, "payload": bytes(1000)})
        results.get()
        done += 1
        if done == 200:
            print(json.dumps([os.getpid(), *(child.pid for child in children)]), flush=True)


def _answer(tasks: Any, results: Any) -> None:
    end_with_alarm(2 * DEADLINE_S)
    while True:
        results.put(tasks.get())


def _names() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _left_since(before: set[str]) -> list[str]:
    """Return new names that stay and that no process has mapped: those are another program's.

    A block of another program has a name for a moment before it is mapped, and after.
    """
    left = _names() - before
    for _ in range(5):
        if not left:
            break
        time.sleep(0.1)
        mapped = set()
        for maps in Path("/proc").glob("[0-9]*/maps"):
            if maps.parent.name != str(os.getpid()):
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    lines = maps.read_text().splitlines()
                    mapped |= {line.partition(" /dev/shm/")[2] for line in lines}
        left &= _names() - mapped
    return sorted(left)


def _alive(pid: int) -> bool:
    """A zombie holds no memory any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

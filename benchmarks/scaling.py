"""What a message costs when many send and receive: ``python -m benchmarks.scaling``.

For each number of processes: messages a second, how often a process slept and
how often it was made to wait, and CPU, all from ``/proc``; where strace is
there, the system calls and the futex wakes in runs of their own, because
tracing slows them down and so changes how often somebody sleeps.  Two loads: as
fast as it goes, and a trickle of 100 messages a second to 64 consumers, of whom
all but one are idle at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import machine
from benchmarks.adapters import MultiprocessingQueue, ShmringQueue, Transport
from benchmarks.curves import RESULTS
from benchmarks.sessions import ManyToMany
from benchmarks.turns import per_second, progress
from benchmarks.work import bytes_of

__all__ = ["SHAPES", "Spent", "Trickle", "main", "measure", "spent", "system_calls", "traced"]

QUEUES: tuple[type[Transport], ...] = (ShmringQueue, MultiprocessingQueue)
SHAPES = ((1, 1), (1, 4), (4, 1), (4, 4), (16, 16))  # producers, consumers
IDLE = 64  # consumers of the trickle
TRICKLE_PER_SECOND = 100

_COUNT = 200_000  # messages at full load, of the fastest
_TRACED_FEW, _TRACED_MORE = 1000, 10_000  # messages at full load; a tenth at a trickle
_PATIENCE_S = 300.0


class Trickle(ManyToMany):
    """One producer that puts a message now and then; the consumers wait.

    Attributes:
        waited: what the consumers had used when all was sent: to stop and to end is not waiting.
        waited_until: that moment, as `time.perf_counter` says it.
    """

    def _all_sent(self) -> None:
        self.waited = spent(self.pids[: self.consumers])
        self.waited_until = time.perf_counter()

    def _produce(self, control: Connection, line: Transport) -> None:
        line.as_producer(self.consumers)
        control.send("ready")
        control.recv()
        start, pool = time.monotonic(), self.work.pool
        for number in range(self.count):
            time.sleep(max(0.0, start + number / TRICKLE_PER_SECOND - time.monotonic()))
            line.put(pool[number % len(pool)])
        line.flush()
        control.send("ready")


@dataclass(frozen=True)
class Spent:
    """What processes have used since they were forked.

    Attributes:
        sleeps: voluntary context switches.
        preemptions: those that were not.
        cpu_s: seconds on a CPU.
    """

    sleeps: int
    preemptions: int
    cpu_s: float

    def __sub__(self, before: Spent) -> Spent:
        return Spent(
            self.sleeps - before.sleeps,
            self.preemptions - before.preemptions,
            self.cpu_s - before.cpu_s,
        )


def spent(pids: Iterable[int]) -> Spent:
    """Read it from ``/proc``; a process that has ended counts until somebody waits for it."""
    sleeps = preemptions = 0
    cpu_ns = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        counts = dict(re.findall(r"^(\w*voluntary_ctxt_switches):\s+(\d+)$", status, re.MULTILINE))
        sleeps += int(counts["voluntary_ctxt_switches"])
        preemptions += int(counts["nonvoluntary_ctxt_switches"])
        cpu_ns += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    return Spent(sleeps, preemptions, cpu_ns / 1e9)


def _session(
    transport: type[Transport], producers: int, consumers: int, count: int, *, trickle: bool
) -> ManyToMany:
    kind = Trickle if trickle else ManyToMany
    return kind(transport, bytes_of(64), producers=producers, consumers=consumers, count=count)


def measure(session: ManyToMany) -> dict[str, float]:
    """Run it: the rate, and what a message cost."""
    with session:
        before = spent(session.pids)
        ready = spent(session.pids[: session.consumers])
        began = time.perf_counter()
        seconds = waiting_s = session.run()
        used = spent(session.pids) - before
        waited = spent(session.pids[: session.consumers])
        if isinstance(session, Trickle):
            waited, waiting_s = session.waited, session.waited_until - began
    return {
        "messages_per_second": session.count / seconds,
        "sleeps_a_message": used.sleeps / session.count,
        "preemptions_a_message": used.preemptions / session.count,
        "cpu_us_a_message": used.cpu_s * 1e6 / session.count,
        "consumers_share_of_a_core": (waited - ready).cpu_s / waiting_s,
    }


# ---- system calls ---------------------------------------------------------------------------


def system_calls(trace: str) -> Counter[str]:
    """Count calls in what strace wrote, futex by its operation."""
    found: Counter[str] = Counter()
    for line in trace.splitlines():
        call = re.match(r"(?:\d+ +)?(\w+)\((?:[^,]*, (FUTEX_[A-Z_]+))?", line)
        if call is not None:  # else the second half of one, a signal or an end
            found[" ".join(filter(None, call.groups()))] += 1
    return found


def _trace(arguments: Sequence[object]) -> Counter[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        program = [sys.executable, "-m", "benchmarks.scaling", "--run", *map(str, arguments)]
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", str(path), *program],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the traced program ended with {done.returncode}:\n{done.stderr}")
        return system_calls(path.read_text(errors="replace"))


def traced(
    producers: int, consumers: int, few: int, more: int, *, trickle: bool = False
) -> dict[str, float]:
    """System calls a message, by name: the difference of two runs of `shmring.Queue`.

    Args:
        producers: how many processes send.
        consumers: how many receive.
        few: messages of the run to compare with.
        more: how many more the other has.
        trickle: send them at `TRICKLE_PER_SECOND`.
    """
    load = "trickle" if trickle else "load"
    less = _trace([load, producers, consumers, few])
    most = _trace([load, producers, consumers, few + more])
    most.subtract(less)
    calls = {name: count / more for name, count in most.most_common() if count / more >= 0.001}
    every = sum(most.values()) / more
    return {"every": every, "wakes": calls.get("futex FUTEX_WAKE", 0.0), **calls}


def _run(load: str, producers: int, consumers: int, count: int) -> None:
    """What strace runs."""
    with _session(ShmringQueue, producers, consumers, count, trickle=load == "trickle") as session:
        session.run()


# ---- to the reader --------------------------------------------------------------------------


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def _row(load: str, label: str, figures: dict[str, float], calls: dict[str, float] | None) -> str:
    cells = [
        load,
        label,
        per_second(figures["messages_per_second"]),
        f"{figures['sleeps_a_message']:.3f}",
        f"{figures['preemptions_a_message']:.3f}",
        f"{figures['cpu_us_a_message']:.2f} us",
        f"{figures['consumers_share_of_a_core']:.1%}",
        f"{calls['every']:.3f}" if calls else "-",
        f"{calls['wakes']:.3f}" if calls else "-",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write what was found."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=5, help="of each line (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the messages to send")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the trickle (default: 10)")
    parser.add_argument("--no-strace", action="store_true", help="leave out the system calls")
    parser.add_argument("--run", nargs=4, metavar=("LOAD", "P", "C", "COUNT"), help="for strace")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}"
    )
    options = parser.parse_args(arguments)
    if options.run is not None:
        _run(options.run[0], *map(int, options.run[1:]))
        return 0
    tracing = not options.no_strace and shutil.which("strace") is not None
    described = machine.describe()
    print("Machine: " + "; ".join(f"{key} {value}" for key, value in described.items()) + ".")
    if not tracing:
        print("System calls and wakes are left out: no strace, or not asked for.")
    print("\n| processes | queue | rate | sleeps a message | preemptions | CPU a message |", end="")
    print(" consumers' share of a core | system calls | wakes |\n|" + "---|" * 9)

    rows: list[dict[str, Any]] = []

    def line(load: str, producers: int, consumers: int, count: int, *, trickle: bool) -> None:
        runs: dict[type[Transport], list[dict[str, float]]] = {}
        for number in range(options.runs):
            for transport in QUEUES:
                progress(f"run {number + 1} of {options.runs}: {load}, {transport.label}")
                share = 1.0 if trickle else transport.share
                messages = max(1, int(count * share))
                session = _session(transport, producers, consumers, messages, trickle=trickle)
                runs.setdefault(transport, []).append(measure(session))
        calls = None
        if tracing:
            progress(f"strace: {load}")
            part = min(1.0, options.scale) * (0.1 * options.seconds / 10 if trickle else 1.0)
            few, more = (max(10, int(part * many)) for many in (_TRACED_FEW, _TRACED_MORE))
            calls = traced(producers, consumers, few, more, trickle=trickle)
        for transport, found in runs.items():
            ours = calls if transport is ShmringQueue else None
            figures = _medians(found)
            print(_row(load, transport.label, figures, ours), flush=True)
            rows.append(
                {
                    "load": load,
                    "queue": transport.label,
                    "median": figures,
                    "runs": found,
                    "system_calls_a_message": ours,
                }
            )

    for producers, consumers in SHAPES:
        shape = f"{producers}:{consumers}"
        line(shape, producers, consumers, int(_COUNT * options.scale), trickle=False)
    trickle = f"1:{IDLE}, {TRICKLE_PER_SECOND} a second"
    line(trickle, 1, IDLE, max(1, int(TRICKLE_PER_SECOND * options.seconds)), trickle=True)

    options.results.mkdir(parents=True, exist_ok=True)
    written = {"machine": described, "runs": options.runs, "scale": options.scale, "rows": rows}
    (options.results / "scaling.json").write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

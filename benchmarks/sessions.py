"""Sessions: the processes that pass messages, and the clock; and turns of sessions.

A session is made, entered (its children are forked and warm, nothing runs), run
(which returns seconds) and left (its children have ended and are joined)::

    parent                              child
      fork ------------------------------>
           <------------- a few messages    warms both up
           <--------------------- "ready"
    clock
        "go" ----------------------------->
           <------------------ the messages
    clock
      kill, join

Everything has a deadline: an alarm raises TimeoutError in the parent wherever it
waits, and another ends the child even when the parent was killed.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
import signal
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from benchmarks import per_second
from benchmarks.adapters import FORK, Transport
from benchmarks.work import (
    BATCH,
    STOP,
    Work,
    WrongContent,
    receive_any,
    receive_batches,
    receive_each,
    receive_sums,
    send_batches,
    send_each,
)

__all__ = [
    "DEADLINE_S",
    "ManyToMany",
    "OneProcess",
    "OneWay",
    "RoundTrips",
    "Runs",
    "Session",
    "Trickle",
    "deadline",
    "end_with_alarm",
    "take_turns",
    "two_cpus",
]

DEADLINE_S = 60.0  # under pytest's faulthandler_timeout, so that the session says what hung
TRICKLE_PER_SECOND = 100

_WARM_UP = 2  # messages; more large ones would not fit into a pipe that is not read yet
_WARM_UP_TRIPS = 50

Key = TypeVar("Key", bound=Hashable)


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the main thread, wherever it waits, after so many seconds.

    A signal, because half of the transports know no timeout, and passing one
    would be part of what is measured.
    """

    def expire(signum: int, frame: object) -> None:
        raise TimeoutError(f"{what}: not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_with_alarm(seconds: float) -> None:
    """End this process after so many seconds; for a child that its parent may not end."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def two_cpus() -> tuple[int, int] | None:
    """Return two CPUs this process may run on; None if it has only one."""
    cpus = sorted(os.sched_getaffinity(0))
    return (cpus[0], cpus[1]) if len(cpus) > 1 else None


class Session(ABC):
    """The producer and consumer of some work over some transport, for one run.

    Attributes:
        count: messages of a run.
        pids: the children, in the order in which they were forked.
        trips_ns: each round trip of the run, where those are measured.
        costs: what a message cost, by name, where that is measured.
    """

    directions: ClassVar[int] = 1

    def __init__(
        self,
        transport: type[Transport],
        work: Work,
        *,
        scale: float = 1.0,
        count: int | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.label = f"{work.name} over {transport.label}"
        self.work = work
        self.count = count or max(BATCH // 10, int(work.count * transport.share * scale))
        self.pids: list[int] = []
        self.trips_ns: list[int] = []
        self.costs: dict[str, float] = {}
        self._transport = transport
        self._deadline_s = deadline_s

    def __enter__(self) -> Self:
        self._exit = contextlib.ExitStack()
        with self._exit:
            self._lines = [self._transport(self.work) for _ in range(self.directions)]
            for line in self._lines:
                self._exit.callback(line.close)
            with deadline(self._deadline_s, f"{self.label}, starting"):
                self._prepare()
            self._exit = self._exit.pop_all()  # nothing went wrong: keep it all until the end
        gc.collect()  # not while the clock runs
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with deadline(self._deadline_s, f"{self.label}, ending"):
            self._exit.close()

    def run(self) -> float:
        """Return seconds from the go to the last message received; once a session."""
        with deadline(self._deadline_s, self.label):
            return self._run()

    @abstractmethod
    def _prepare(self) -> None:
        """What happens before the go."""

    @abstractmethod
    def _run(self) -> float:
        """What `run` returns."""

    def _fork(self, body: Callable[..., None], *args: Any) -> Connection:
        """Run ``body(control, ...)`` in a child that does not outlive this session."""
        control, far_end = FORK.Pipe()
        child = FORK.Process(target=_child, args=(self._deadline_s, body, far_end, *args))
        child.start()
        assert child.pid is not None  # it was started
        self.pids.append(child.pid)
        self._exit.callback(_end, child)
        far_end.close()
        self._exit.callback(control.close)
        return control


def _child(deadline_s: float, body: Callable[..., None], *args: Any) -> None:
    end_with_alarm(2 * deadline_s + 1)  # for starting and running
    body(*args)


def _end(child: Any) -> None:
    child.join(0.5)  # it has nothing left to do, unless something went wrong
    child.kill()
    child.join()
    child.close()


def _expect_ready(*controls: Connection) -> None:
    for control in controls:
        if control.recv() != "ready":
            raise WrongContent("the child said something else than that it is ready")


class OneWay(Session):
    """One process sends, another receives.

    With `batches`, a transport that has put_many and get_many uses them; others
    send one by one.
    """

    def __init__(
        self, transport: type[Transport], work: Work, *, batches: bool = False, **options: Any
    ) -> None:
        super().__init__(transport, work, **options)
        self._batches = batches and transport.batches
        if self._batches:
            self.count = math.ceil(self.count / BATCH) * BATCH

    def _prepare(self) -> None:
        (line,) = self._lines
        line.as_consumer()
        self._control = self._fork(self._produce, line)
        for _ in range(_WARM_UP):
            if self.work.kind == "array":
                line.take_sum()
            else:
                line.get()
        _expect_ready(self._control)

    def _run(self) -> float:
        (line,) = self._lines
        start = time.perf_counter()
        self._control.send("go")
        if self.work.kind == "array":
            receive_sums(line.take_sum, self.work.sums, self.count)
        elif self._batches:
            receive_batches(line.get_many, self.work.pool, self.count)
        else:
            receive_each(line.get, self.work.pool, self.count)
        return time.perf_counter() - start

    def _produce(self, control: Connection, line: Transport) -> None:
        pool = self.work.pool
        line.as_producer()
        for message in pool[:_WARM_UP]:
            line.put(message)
        control.send("ready")
        control.recv()
        if self._batches:
            send_batches(line.put_many, pool, self.count)
        else:
            send_each(line.put, pool, self.count)
        line.flush()


class RoundTrips(Session):
    """A message there and the same one back, one at a time, each of them timed.

    With `apart`, the two processes are bound to one CPU each; `idle_s` is slept
    before each trip, so that the other side is asleep.
    """

    directions = 2

    def __init__(
        self,
        transport: type[Transport],
        work: Work,
        *,
        apart: bool = False,
        idle_s: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(transport, work, **options)
        self._cpus = two_cpus() if apart else None
        self._idle_s = idle_s

    def _prepare(self) -> None:
        there, back = self._lines
        if self._cpus is not None:
            self._exit.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, {self._cpus[0]})
        back.as_consumer()
        _expect_ready(self._fork(self._echo, there, back))
        there.as_producer()
        self._trips(_WARM_UP_TRIPS)

    def _run(self) -> float:
        start = time.perf_counter()
        self.trips_ns = self._trips(self.count)
        return time.perf_counter() - start

    def _trips(self, count: int) -> list[int]:
        there, back = self._lines
        put, get, clock = there.put, back.get, time.perf_counter_ns
        message = self.work.pool[0]
        samples = []
        for _ in range(count):
            if self._idle_s:
                time.sleep(self._idle_s)
            start = clock()
            put(message)
            answer = get()
            samples.append(clock() - start)
            if answer != message:
                raise WrongContent(f"{message!r:.80} went there and {answer!r:.80} came back")
        return samples

    def _echo(self, control: Connection, there: Transport, back: Transport) -> None:
        if self._cpus is not None:
            os.sched_setaffinity(0, {self._cpus[1]})
        there.as_consumer()
        back.as_producer()
        put, get = back.put, there.get
        control.send("ready")
        for _ in range(_WARM_UP_TRIPS + self.count):
            put(get())
        back.flush()


class OneProcess(Session):
    """put, then get, in the same thread: what the calls themselves cost."""

    def _prepare(self) -> None:
        (line,) = self._lines
        line.as_consumer()
        line.as_producer()
        for message in self.work.pool:
            self._pass(message, 1)

    def _run(self) -> float:
        return self._pass(self.work.pool[1], self.count)

    def _pass(self, message: Any, count: int) -> float:
        put, get = self._lines[0].put, self._lines[0].get
        start = time.perf_counter()
        for _ in range(count):
            put(message)
            answer = get()
        seconds = time.perf_counter() - start
        if answer != message:
            raise WrongContent(f"{message!r:.80} was put, {answer!r:.80} came out")
        return seconds


class ManyToMany(Session):
    """Several processes send, several receive, over one transport that all share.

    The clock stops when every consumer has come to the end of what was sent.  The
    consumers are forked first.  `shares` is how many messages each received.
    """

    idle: ClassVar[bool] = False

    def __init__(
        self,
        transport: type[Transport],
        work: Work,
        *,
        producers: int = 2,
        consumers: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(transport, work, **options)
        self.producers, self.consumers = producers, consumers
        self.label += f", {producers}:{consumers}"
        each = math.ceil(self.count / (producers * consumers)) * consumers
        self.count = producers * each
        self.shares: list[int] = []

    def _prepare(self) -> None:
        (line,) = self._lines
        self._receiving = [
            self._fork(self._consume, line, number) for number in range(self.consumers)
        ]
        _expect_ready(*self._receiving)
        self._sending = [self._fork(self._produce, line) for _ in range(self.producers)]
        _expect_ready(*self._sending)
        if not line.lines:
            line.as_producer()

    def _run(self) -> float:
        (line,) = self._lines
        receivers = self.pids[: self.consumers]
        before, waiting = _spent(self.pids), _spent(receivers)
        start = time.perf_counter()
        for control in self._sending:
            control.send("go")
        _expect_ready(*self._sending)
        if self.idle:  # to stop and to end is not waiting
            waited, waited_s = _spent(receivers), time.perf_counter() - start
        if not line.lines:
            for _ in range(self.consumers):
                line.put(STOP)
        self.shares = [control.recv() for control in self._receiving]
        seconds = time.perf_counter() - start
        if not self.idle:
            waited, waited_s = _spent(receivers), seconds
        if sum(self.shares) != self.count:
            raise WrongContent(f"{sum(self.shares)} messages came, {self.count} were sent")
        sleeps, preemptions, cpu_ns = (_spent(self.pids) - before) / self.count
        self.costs = {
            "sleeps_a_message": float(sleeps),
            "preemptions_a_message": float(preemptions),
            "cpu_us_a_message": float(cpu_ns) / 1e3,
            "consumers_share_of_a_core": float((waited - waiting)[2]) / 1e9 / waited_s,
        }
        return seconds

    def _send(self, line: Transport) -> None:
        send_each(line.put, self.work.pool, self.count // self.producers)

    def _produce(self, control: Connection, line: Transport) -> None:
        line.as_producer(self.consumers)
        control.send("ready")
        control.recv()
        self._send(line)
        if line.lines:
            for _ in range(self.consumers):
                line.put(STOP)
        line.flush()
        control.send("ready")

    def _consume(self, control: Connection, line: Transport, number: int) -> None:
        line.as_consumer(number)
        control.send("ready")
        stops = self.producers if line.lines else 1
        control.send(sum(receive_any(line.get, self.work.pool) for _ in range(stops)))


class Trickle(ManyToMany):
    """A message from each producer now and then; the consumers wait."""

    idle = True

    def _send(self, line: Transport) -> None:
        start, pool = time.monotonic(), self.work.pool
        for number in range(self.count // self.producers):
            time.sleep(max(0.0, start + number / TRICKLE_PER_SECOND - time.monotonic()))
            line.put(pool[number % len(pool)])


def _spent(pids: Iterable[int]) -> Any:
    """Read from /proc how often processes slept and were preempted, and their CPU time in ns.

    A process that has ended counts until it is joined.
    """
    spent = np.zeros(3, np.int64)
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        switches = re.findall(r"^(?:non)?voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)
        cpu_ns = Path(f"/proc/{pid}/schedstat").read_text().split()[0]
        spent += np.array([*switches, cpu_ns], np.int64)
    return spent


# ---- turns ----------------------------------------------------------------------------------


@dataclass
class Runs:
    """The runs of one transport.

    Attributes:
        rates: messages a second, run by run.
        trips_ns: each round trip of all runs, where those are measured.
        costs: what a message cost, run by run, where that is measured.
        error: what ended its last run; it has had no more turns since.
    """

    rates: list[float] = field(default_factory=list)
    trips_ns: list[int] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)
    error: Exception | None = None

    @property
    def median(self) -> float:
        """Messages a second."""
        return statistics.median(self.rates)

    @property
    def cost(self) -> dict[str, float]:
        """The median of each cost."""
        names = self.costs[0] if self.costs else ()
        return {name: statistics.median(one[name] for one in self.costs) for name in names}


def take_turns(
    runs: int,
    sessions: Mapping[Key, Callable[[], Session]],
    tell: Callable[[str], None] = lambda text: None,
) -> dict[Key, Runs]:
    """Run a session of each in turn, so often, and tell of each run."""
    found = {key: Runs() for key in sessions}
    for run in range(runs):
        for key, make in sessions.items():
            one = found[key]
            if one.error is not None:
                continue
            try:
                with make() as session:
                    one.rates.append(session.count / session.run())
                    one.trips_ns += session.trips_ns
                    one.costs += [session.costs] if session.costs else []
                    told = per_second(one.rates[-1])
                    tell(f"run {run + 1} of {runs}: {session.label}: {told}")
            except Exception as error:  # the caller decides what a failure means
                one.error = error
                tell(f"run {run + 1} of {runs}: {key}: {error!r}")
    return found

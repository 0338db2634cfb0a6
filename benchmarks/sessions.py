"""Sessions: processes that exchange messages, timed; and sessions that take turns.

A session is made, entered (its children are forked and warm, nothing runs), run (which
returns seconds) and left (its children have ended and are joined)::

    parent                              child
      fork ------------------------------>
           <------------- a few messages    both are warm
           <--------------------- "ready"
    clock
        "go" ----------------------------->
           <------------------ the messages
    clock
      join, or kill

Everything has a deadline: an alarm raises TimeoutError in the parent wherever it waits, and
another ends the child even when the parent was killed.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks import per_second, progress
from benchmarks.adapters import FORK, Transport
from benchmarks.work import (
    BATCH,
    Work,
    WrongContent,
    receive_any,
    receive_any_batches,
    receive_batches,
    receive_each,
    receive_sums,
    send_batches,
    send_each,
    send_each_timed,
)

DEADLINE_S = 60.0  # below pytest's faulthandler_timeout, so that the session names what hung

_WARM_UP = 2  # messages; more large ones would not fit into a pipe
_WARM_UP_TRIPS = 50


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds, wherever it waits.

    By a signal: half of the transports have no timeout, and one would cost time.
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
    """End this process after so many seconds, also when its parent is gone."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def two_cpus() -> tuple[int, int] | None:
    """Return two CPUs this process may run on; None if there is only one."""
    cpus = sorted(os.sched_getaffinity(0))
    return (cpus[0], cpus[1]) if len(cpus) > 1 else None


def cpu_ns(pids: Iterable[int]) -> int:
    """Return the CPU time of processes that are not joined yet."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids)


def sleeps(pid: int) -> bool:
    """Return whether a process waits in a futex or a pipe."""
    return any(name in Path(f"/proc/{pid}/wchan").read_text() for name in ("futex", "pipe"))


def wait_until(condition: Callable[[], object]) -> None:
    """Wait; the caller has a deadline."""
    while not condition():
        time.sleep(0.0002)


@contextlib.contextmanager
def forever(call: Callable[..., object], *arguments: Any) -> Iterator[int]:
    """Run a child that makes a call again and again; yield its pid, and kill it at the end."""
    process = FORK.Process(target=_call_forever, args=(call, *arguments), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def _call_forever(call: Callable[..., object], *arguments: Any) -> None:
    end_with_alarm(2 * DEADLINE_S)
    while True:
        call(*arguments)


class Session(ABC):
    """One run of some work over some transport."""

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
        self.pids: list[int] = []  # of the children, in the order of their start
        self.trips_ns: list[int] = []  # of each round trip, where those are measured
        self.puts_ns: list[int] = []  # of each put of one producer, likewise
        self.cpu_us: float | None = None  # a message, of all children, where that is measured
        self._transport = transport
        self._deadline_s = deadline_s

    def __enter__(self) -> Self:
        self._exit = contextlib.ExitStack()
        with self._exit:
            self._ways = [self._transport(self.work) for _ in range(self.directions)]
            for way in self._ways:
                self._exit.callback(way.close)
            with deadline(self._deadline_s, f"{self.label}, starting"):
                self._prepare()
            self._exit = self._exit.pop_all()  # no error: close at the end only
        gc.collect()  # now, not while the clock runs
        return self

    def __exit__(self, *error: object) -> None:
        with deadline(self._deadline_s, f"{self.label}, ending"):
            self._exit.close()

    def run(self) -> float:
        """Return the seconds from "go" to the last message received; once a session."""
        with deadline(self._deadline_s, self.label):
            return self._run()

    @abstractmethod
    def _prepare(self) -> None:
        """Fork and warm up."""

    @abstractmethod
    def _run(self) -> float:
        """Do the work; return seconds."""

    def _fork(self, body: Callable[..., None], *args: Any) -> Connection:
        """Run ``body(control, ...)`` in a child that does not outlive this session."""
        control, far_end = FORK.Pipe()
        child = FORK.Process(target=_child, args=(self._deadline_s, body, far_end, *args))
        child.start()
        assert child.pid is not None
        self.pids.append(child.pid)
        self._exit.callback(_end, child)
        far_end.close()
        self._exit.callback(control.close)
        return control


def _child(deadline_s: float, body: Callable[..., None], *args: Any) -> None:
    end_with_alarm(2 * deadline_s + 1)  # for starting and running
    body(*args)


def _end(child: Any) -> None:
    child.join(0.5)  # it has nothing left to do, unless there was an error
    child.kill()
    child.join()
    child.close()


def _expect_ready(*controls: Connection) -> None:
    for control in controls:
        if (message := control.recv()) != "ready":
            raise WrongContent(f'a child sent {message!r} instead of "ready"')


class OneWay(Session):
    """One process sends, another receives.

    With `batches`, a transport that has put_many and get_many uses them.
    """

    def __init__(
        self, transport: type[Transport], work: Work, *, batches: bool = False, **options: Any
    ) -> None:
        super().__init__(transport, work, **options)
        self._batches = batches and transport.batches
        if self._batches:
            self.count = math.ceil(self.count / BATCH) * BATCH

    def _prepare(self) -> None:
        (way,) = self._ways
        way.as_consumer()
        self._control = self._fork(self._produce, way)
        for _ in range(_WARM_UP):
            if self.work.kind == "array":
                way.take_sum()
            else:
                way.get()
        _expect_ready(self._control)

    def _run(self) -> float:
        (way,) = self._ways
        start = time.perf_counter()
        self._control.send("go")
        if self.work.kind == "array":
            receive_sums(way.take_sum, self.work.sums, self.count)
        elif self._batches:
            receive_batches(way.get_many, self.work.pool, self.count)
        else:
            receive_each(way.get, self.work.pool, self.count)
        return time.perf_counter() - start

    def _produce(self, control: Connection, way: Transport) -> None:
        pool = self.work.pool
        way.as_producer()
        for message in pool[:_WARM_UP]:
            way.put(message)
        control.send("ready")
        control.recv()
        if self._batches:
            send_batches(way.put_many, pool, self.count)
        else:
            send_each(way.put, pool, self.count)
        way.flush()


class RoundTrips(Session):
    """A message goes there and comes back, one at a time; each trip is timed.

    With `apart`, each process is bound to a CPU of its own.  Before each trip the parent
    sleeps `idle_s`, so that the child is asleep.
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
        there, back = self._ways
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
        there, back = self._ways
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
    """put, then get, in one thread: the cost of the calls themselves."""

    def _prepare(self) -> None:
        (way,) = self._ways
        way.as_consumer()
        way.as_producer()
        for message in self.work.pool:
            self._pass(message, 1)

    def _run(self) -> float:
        return self._pass(self.work.pool[1], self.count)

    def _pass(self, message: Any, count: int) -> float:
        put, get = self._ways[0].put, self._ways[0].get
        start = time.perf_counter()
        for _ in range(count):
            put(message)
            answer = get()
        seconds = time.perf_counter() - start
        if answer != message:
            raise WrongContent(f"{message!r:.80} was put, {answer!r:.80} came out")
        return seconds


class ManyToMany(Session):
    """Several processes send, several receive, over one shared transport.

    The clock stops when every consumer has received `STOP`.  With `batches`, a transport that has
    put_many and get_many uses them.  With `timed`, the first producer times each of its puts.
    """

    def __init__(
        self,
        transport: type[Transport],
        work: Work,
        *,
        producers: int = 2,
        consumers: int = 2,
        batches: bool = False,
        timed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(transport, work, **options)
        self.producers, self.consumers = producers, consumers
        self.label += f", {producers}:{consumers}"
        self._batches = batches and transport.batches
        self._timed = timed
        unit = producers * (BATCH if self._batches else 1)
        self.count = unit * math.ceil(self.count / unit)

    def _prepare(self) -> None:
        (way,) = self._ways
        self._receiving = [self._fork(self._consume, way) for _ in range(self.consumers)]
        _expect_ready(*self._receiving)
        self._sending = [
            self._fork(self._produce, way, self._timed and number == 0)
            for number in range(self.producers)
        ]
        _expect_ready(*self._sending)
        way.as_producer()

    def _run(self) -> float:
        (way,) = self._ways
        before = cpu_ns(self.pids)
        start = time.perf_counter()
        for control in self._sending:
            control.send("go")
        if self._timed:
            self.puts_ns = self._sending[0].recv()
        _expect_ready(*self._sending)
        way.stop(self.consumers)
        received = sum(control.recv() for control in self._receiving)
        seconds = time.perf_counter() - start
        if received != self.count:
            raise WrongContent(f"{received} messages came, {self.count} were sent")
        self.cpu_us = (cpu_ns(self.pids) - before) / self.count / 1e3
        return seconds

    def _produce(self, control: Connection, way: Transport, timed: bool) -> None:
        pool, count = self.work.pool, self.count // self.producers
        way.as_producer()
        control.send("ready")
        control.recv()
        if timed:
            control.send(send_each_timed(way.put, pool, count))
        elif self._batches:
            send_batches(way.put_many, pool, count)
        else:
            send_each(way.put, pool, count)
        way.flush()
        control.send("ready")

    def _consume(self, control: Connection, way: Transport) -> None:
        way.as_consumer()
        control.send("ready")
        if self._batches:
            control.send(receive_any_batches(way.get_many, way.put, self.work.pool))
        else:
            control.send(receive_any(way.get, self.work.pool))


# ---- turns ----------------------------------------------------------------------------------


def quantiles_us(nanoseconds: Iterable[int], *shares: float) -> list[float]:
    """Return quantiles in microseconds."""
    ordered = sorted(nanoseconds)
    last = len(ordered) - 1
    return [ordered[min(int(share * len(ordered)), last)] / 1000 for share in shares]


@dataclass
class Runs:
    """The runs of one transport."""

    rates: list[float] = field(default_factory=list)  # messages a second
    trips_ns: list[int] = field(default_factory=list)  # the round trips of all runs
    puts_ns: list[int] = field(default_factory=list)  # the puts of one producer, of all runs
    cpu_us: list[float] = field(default_factory=list)  # a message
    error: Exception | None = None  # what ended the last run; there are no more

    @property
    def median(self) -> float:
        """Messages a second."""
        return statistics.median(self.rates)

    def trips_us(self, *shares: float) -> list[float]:
        """Return quantiles of the round trips."""
        return quantiles_us(self.trips_ns, *shares)

    def figures(self) -> dict[str, Any]:
        """Return the rates and what a message costs, or the error."""
        if self.error is not None:
            return {"error": repr(self.error)}
        rates = {"median": self.median, "slowest": min(self.rates), "fastest": max(self.rates)}
        return rates | ({"cpu_us_a_message": statistics.median(self.cpu_us)} if self.cpu_us else {})


def take_turns(
    runs: int,
    transports: Iterable[type[Transport]],
    session: Callable[..., Session],
    *args: Any,
    **options: Any,
) -> dict[type[Transport], Runs]:
    """Run a session of each transport in turn, so many times; errors are kept in `Runs`."""
    found = {transport: Runs() for transport in transports}
    for run in range(1, runs + 1):
        for transport, one in found.items():
            if one.error is not None:
                continue
            try:
                with session(transport, *args, **options) as running:
                    one.rates.append(running.count / running.run())
                    one.trips_ns += running.trips_ns
                    one.puts_ns += running.puts_ns
                    one.cpu_us += [running.cpu_us] if running.cpu_us is not None else []
                    text = f"{running.label}: {per_second(one.rates[-1])}"
            except Exception as error:  # the caller decides what an error means
                one.error = error
                text = f"{transport.label}: {error!r}"
            progress(f"run {run} of {runs}: {text}")
    return found

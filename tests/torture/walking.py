"""Taking a process through one operation, to any of its instructions, by `stepper.c`.

A victim is forked from this process with its rings open and warm.  One victim
is traced from end to end, which gives the `Way`; others are taken to the n-th
stop of it, and killed there, or held and released.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shmring import Queue, Ring

__all__ = [
    "Arrival",
    "OperationFailed",
    "Walker",
    "Way",
    "build_stepper",
    "die_some_day",
    "end",
    "on_one_cpu",
    "place",
]

LIFETIME = 600  # seconds, longer than a kill is watched
# What touches the shared file.
EXTENSION = ("ring", "handle", "bytes_ring", "object_ring", "wait")


def build_stepper(folder: Path) -> Path:
    """Compile `stepper.c` into `folder`; returns the extension."""
    built = folder / "stepper.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    include = f"-I{sysconfig.get_paths()['include']}"
    source = Path(__file__).with_name("stepper.c")
    subprocess.run(["gcc", *flags, include, str(source), "-o", str(built)], check=True)
    return built


class OperationFailed(Exception):
    """A victim that was not killed did not succeed."""


@dataclass(frozen=True)
class Arrival:
    """Where a victim was taken, or how it ended before it came there."""

    there: bool
    status: int
    address: int


class Way:
    """The stops of one operation, in the order in which a victim came by.

    Args:
        stops: as `stepper.trace` wrote them down: address, how often it had come
            by (0: not counted), and whether the instruction sleeps.
    """

    def __init__(self, stops: list[tuple[int, int, bool]]) -> None:
        self.addresses = [address for address, _, _ in stops]
        self.sleeps = [n for n, (_, _, sleeps) in enumerate(stops) if sleeps]
        self._anchors: list[tuple[int, int, int]] = []
        for address, hits, _ in stops:
            if hits:
                self._anchors.append((address, hits, 0))
            else:
                before, often, steps = self._anchors[-1]
                self._anchors.append((before, often, steps + 1))

    def __len__(self) -> int:
        return len(self.addresses)

    def to(self, n: int) -> tuple[int, int, int]:
        """How to come to the n-th stop: what `stepper.go` wants to know."""
        return self._anchors[n]


class Walker:
    """Makes victims, and takes them along.

    Args:
        built: the compiled stepper.
    """

    def __init__(self, built: Path) -> None:
        self._stepper = _load(built)
        self._stepper.set_text(*_text())
        self._spare = Ring.create(4096)
        self._spare_queue: Queue[bytes] = Queue()

    def close(self) -> None:
        self._spare.close()
        self._spare_queue.close()

    def victim(
        self, act: Callable[[], object], warm: Callable[[], object] | None = None, status: int = 0
    ) -> int:
        """Fork a process that stops, and does `act` when it is taken along; returns its pid.

        Args:
            act: the operation.
            warm: done before the stop, for what happens once a process.
            status: the victim's exit status after the operation; 3 if it raised.
        """
        pid = os.fork()
        if pid != 0:
            return pid
        code = 3
        try:
            die_some_day()
            for spare in (self._spare, self._spare_queue):
                for timeout in (None, 10):  # the direct way, and the general one
                    spare.put(b"", timeout=timeout)  # each module finds out whose thread it is
                    spare.get(timeout=timeout)
            if warm is not None:
                warm()
            self._stepper.traceme()
            act()
            code = status
        finally:
            os._exit(code)

    def trace(self, pid: int) -> Way:
        """Step a victim through its whole operation.

        Raises:
            OperationFailed: it raised, in the victim.
        """
        status, stops = self._stepper.trace(pid)
        assert os.WIFEXITED(status), f"the operation itself was killed: {status:#x}"
        if os.WEXITSTATUS(status) != 0:
            raise OperationFailed(f"exit status {os.WEXITSTATUS(status)} of the operation itself")
        return Way(stops)

    def hold(self, pid: int, way: Way, n: int) -> Arrival:
        """Take a victim to its n-th stop, and leave it there."""
        return Arrival(*self._stepper.go(pid, *way.to(n)))

    def kill(self, pid: int, way: Way, n: int) -> Arrival:
        """Take a victim to its n-th stop, and kill it there."""
        arrival = self.hold(pid, way, n)
        if arrival.there:
            end(pid)
        return arrival

    def hold_at_once(self, pid: int) -> None:
        """Wait until a victim stands before its operation."""
        self._stepper.go(pid, 0, 0, 0)

    def release(self, pid: int) -> None:
        """Let a victim that is held run on by itself."""
        self._stepper.release(pid)


def die_some_day() -> None:
    """In a child: should no process be left to end it, the kernel does."""
    signal.alarm(LIFETIME)


def end(pid: int) -> None:
    """Kill a child and wait for it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _load(built: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("stepper", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _mappings() -> Iterator[tuple[int, int, int, str, str]]:
    """(low, high, offset, mode, path) of each mapping of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, mode, offset, _, _, *path = line.split(maxsplit=5)
        low, _, high = addresses.partition("-")
        yield int(low, 16), int(high, 16), int(offset, 16), mode, path[0] if path else ""


def _text() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The text of the extension, and that of libc.

    Not that of the kernel's clock: it reads only, and begins again when a tick comes
    in between, so that no two ways through it are the same while it is stepped.
    """
    suffix: Any = sysconfig.get_config_var("EXT_SUFFIX")
    extension = {f"{name}{suffix}" for name in EXTENSION}
    own, called = [], []
    for low, high, _, mode, path in _mappings():
        name = path.rpartition("/")[2]
        if "x" in mode and name in extension:
            own.append((low, high))
            extension.remove(name)
        elif "x" in mode and name.startswith(("libc.so", "libc-")):
            called.append((low, high))
    assert not extension, f"not loaded, or in pieces: {sorted(extension)}"
    return own, called


def place(address: int) -> str:
    """An address as file and offset, for addr2line."""
    for low, high, offset, _, path in _mappings():
        if low <= address < high:
            return f"{path or '?'}+{address - low + offset:#x}"
    return hex(address)


@contextlib.contextmanager
def on_one_cpu(number: int = 0) -> Iterator[None]:
    """One CPU for all: handing over to a victim is quickest then, and nothing spins.

    The collector stands still, so that forked processes do not copy what it touches.
    """
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cpus)[number % len(cpus)]})
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
        os.sched_setaffinity(0, cpus)

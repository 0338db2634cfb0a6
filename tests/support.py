"""What the tests share: waiting without hanging, children that always end, /dev/shm."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import types
import unittest
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SHARED_MEMORY = Path("/dev/shm")
LEFT_S = 20.0  # what stands in SHARED_MEMORY for longer than the longest of the tests is left


def own_name(what: str) -> str:
    """A name in /dev/shm that no other worker, nor another run of the suite, takes."""
    return f"test-{what}-{os.getpid()}"


def _looks(
    condition: Callable[[], object], timeout: float, what: str, dump: bool
) -> Iterator[None]:
    """Until the condition is true: one turn for each look at it, in which to pause."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            if dump:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            raise TimeoutError(f"waited {timeout} s in vain for {what or condition}")
        yield


def wait_for(
    condition: Callable[[], object],
    timeout: float = 10,
    what: str = "",
    *,
    dump: bool = True,
    every: float = 0.005,
) -> None:
    """Return as soon as ``condition()`` is true; it is asked ``every`` so many seconds.

    After ``timeout`` seconds, print the traceback of every thread and raise
    TimeoutError: a test that waits in vain shows where, instead of hanging.
    """
    pause = threading.Event()
    for _ in _looks(condition, timeout, what, dump):
        pause.wait(every)


async def until(condition: Callable[[], object], timeout: float = 10) -> None:
    """As ``wait_for``, in an asyncio program, whose other tasks go on."""
    pause = asyncio.Event()
    for _ in _looks(condition, timeout, what="", dump=True):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await pause.wait()


def asleep(waiter: threading.Thread | int) -> Callable[[], bool]:
    """For `wait_for`: whether a thread of this process, or a child, waits inside a call.

    It sleeps at two looks and has not run between them; a thread that waits for the GIL has.
    Where there is no /proc, it lives.
    """
    before = ""

    def look() -> bool:
        nonlocal before
        if isinstance(waiter, int):
            status = Path(f"/proc/{waiter}/status")
        else:
            status = Path(f"/proc/self/task/{waiter.native_id}/status")
        if not status.exists():
            return isinstance(waiter, threading.Thread) and waiter.is_alive()
        shown, last = status.read_text(), before
        before = "".join(re.findall(r"State:.*|voluntary_ctxt_switches:.*", shown))
        return before == last and "(sleeping)" in before

    return look


def taken_from(queue: Any, count: int) -> list[Any]:
    """So many messages, by ``get_many``, which takes what has come and no more."""
    taken: list[Any] = []
    while len(taken) < count:
        taken += queue.get_many(count - len(taken), timeout=30)
    return taken


def within(seconds: float, call: Callable[..., object], *args: Any, **named: Any) -> Any:
    """What a call gives, or raises, that ends by itself: in a thread, and with a deadline."""
    outcome: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call(*args, **named))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait_for(outcome.done, seconds, f"the end of {call}")
    return outcome.result()


@contextlib.contextmanager
def at_least(seconds: float) -> Iterator[None]:
    """What waits inside the block does so for that long, which no busy machine can spoil."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun >= seconds, "it came back early"


@types.coroutine
def turns(count: int) -> Generator[None, None, None]:
    """``await turns(n)``: after n turns of the event loop.  A place among the steps of the
    other tasks, whatever time they take; the deadline is that of the whole program.
    """
    for _ in range(count):
        yield


@contextlib.contextmanager
def run_in_process(
    target: Callable[..., object], *args: object, method: str = "fork"
) -> Iterator[BaseProcess]:
    """Run ``target(*args)`` in a child, which is killed and joined on leaving the block.

    ``exitcode`` can be read afterwards; it is -9 unless the child had ended.
    """
    process = multiprocessing.get_context(method).Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


SHMRING = (sys.executable, "-m", "shmring")


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``shmring`` with these arguments, and these variables beside the ones that are set."""
    return subprocess.run(
        [*SHMRING, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, **environment},
    )


def run_with_mounts(mounts: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with mounts of its own, which a shell command makes."""
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{mounts} && exec "$0" -c "$1"',
            sys.executable,
            program,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        import pytest  # not at the top: programs that tests start import this module too

        pytest.skip(f"no mount namespace to be had here: {done.stderr.strip()}")
    return done


def shared_memory_names() -> set[str]:
    """What stands in /dev/shm, whatever it is called: a ring bears the name its user gave it.

    Not what the C library leaves of a semaphore when a process is killed in sem_open(), nor
    the semaphores of loky, which joblib's own tests make in another worker.
    """
    names = os.listdir(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else []
    return {name for name in names if not re.fullmatch(r"sem\.\w{6}|(sem\.)?loky-.*", name)}


def holders(name: str) -> set[int]:
    """The living processes that have ``name`` mapped or open, as far as /proc shows.

    The file is recognised by device and inode: one that was linked later has no path in the maps.
    """
    try:
        found = (SHARED_MEMORY / name).lstat()
    except FileNotFoundError:
        return set()
    mapped = [f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}", str(found.st_ino)]
    holding = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is none of this user's
            lines = (process / "maps").read_text().splitlines()
            if any(line.split()[3:5] == mapped for line in lines):
                holding.add(int(process.name))
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(descriptor.stat(), found):
                        holding.add(int(process.name))
    return holding


def is_of_this_run(pid: int) -> bool:
    """Whether ``pid`` is this process or descends from it: surely no stranger."""
    while pid not in (0, os.getpid()):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return pid != 0


def leftovers(names: set[str]) -> list[str]:
    """Those that are there and no other run's.

    Another's is what a process holds that neither descends from this one nor is in its group,
    where orphans stay.
    """

    def is_a_strangers(pid: int) -> bool:
        try:
            return os.getpgid(pid) != os.getpgrp() and not is_of_this_run(pid)
        except ProcessLookupError:
            return False

    return sorted(
        name
        for name in names
        if (SHARED_MEMORY / name).exists() and not any(map(is_a_strangers, holders(name)))
    )


def left_since(before: set[str]) -> list[str]:
    """Those of `leftovers` that came since and do not go.

    No process holds a name that another run is about to map, or has left for a cleaner to find.
    """
    left = leftovers(shared_memory_names() - before)

    def gone() -> bool:
        nonlocal left
        left = leftovers(set(left))
        return not left

    with contextlib.suppress(TimeoutError):
        wait_for(gone, LEFT_S, "names to go", dump=False, every=0.02)
    return left


def remove_if_ours(name: str) -> bool:
    """Remove a name that this run surely made, and say whether it was one.

    Such a name carries this process's pid, or is held by processes of this run alone.
    A name without holder may be what another program left, or has just made.
    """
    holding = holders(name)
    if not all(map(is_of_this_run, holding)):
        return False
    if not holding and str(os.getpid()) not in re.findall(r"\d+", name):
        return False
    (SHARED_MEMORY / name).unlink(missing_ok=True)
    return True


def interpreters_tests(name: str) -> types.ModuleType:
    """A module of CPython's own tests; skips the file where the interpreter comes without."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, unittest.SkipTest) as reason:
        import pytest  # not at the top: programs that tests start import this module too

        pytest.skip(f"this interpreter's {name} cannot be run: {reason}", allow_module_level=True)

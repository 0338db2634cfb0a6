"""What the tests share: waiting without hanging, children that always end, /dev/shm."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def wait_for(
    condition: Callable[[], object], timeout: float = 10, what: str = "", *, dump: bool = True
) -> None:
    """Return as soon as ``condition()`` is true.

    After ``timeout`` seconds, print the traceback of every thread and raise
    TimeoutError: a test that waits in vain shows where, instead of hanging.
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            if dump:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            raise TimeoutError(f"waited {timeout} s in vain for {what or condition}")
        pause.wait(0.005)


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


def shared_memory_names() -> set[str]:
    """What stands in /dev/shm, whatever it is called: a ring bears the name its user gave it."""
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def used_by_others(name: str) -> bool:
    """Whether a process outside this test run (its process group) has mapped ``name``.

    Another run of the suite on the same machine is no leak of this one.  The file is
    recognised by device and inode: one that was linked later has no path in the maps.
    """
    try:
        found = (SHARED_MEMORY / name).stat()
    except FileNotFoundError:
        return True  # gone in the meantime, so it was somebody's who cleans up
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == os.getpgrp():
                continue
            for line in (process / "maps").read_text().splitlines():
                if line.split()[3:5] == [device, str(found.st_ino)]:
                    return True
    return False

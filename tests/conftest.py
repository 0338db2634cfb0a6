"""Fixtures of the whole suite."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import shmring
from shmring import HighPerformanceIPC
from support import (
    SHARED_MEMORY,
    left_since,
    own_name,
    remove_if_ours,
    shared_memory_names,
    wait_for,
)

USER = os.getuid() if hasattr(os, "getuid") else "user"
CLEANERS_LOCK = Path(tempfile.gettempdir()) / f"shmring-tests-{USER}.lock"

# A debug build shows what others ignore, and tests look at all that a program prints.
if hasattr(sys, "gettotalrefcount"):
    os.environ["PYTHONWARNINGS"] = "ignore::DeprecationWarning,ignore::ResourceWarning"

# A run that a script started in the background ignores Ctrl-C, and so would all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Make each worker of pytest-xdist a run of its own, as one of a stranger would be.

    A group of its own tells its names in /dev/shm from the other workers', and
    pytest-benchmark in a child must not take itself for a worker.
    """
    if hasattr(config, "workerinput"):
        os.setpgid(0, 0)
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For each worker: the fallback sweeps all of its folder once in each process."""
    if hasattr(request.config, "workerinput"):
        os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("t"))
        tempfile.tempdir = None  # it remembers the one before


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test takes its names out of /dev/shm again; one that does not fails, here.

    What is left is removed only if this run surely made it.
    """
    before = shared_memory_names()
    yield
    if not shared_memory_names() - before:
        return
    # A lock of multiprocessing keeps its name until it is dropped, unless it is for forks only.
    request.node.funcargs.clear()
    gc.collect()
    left = left_since(before)
    if left:
        removed = [name for name in left if remove_if_ours(name)]
        pytest.fail(
            f"left in {SHARED_MEMORY}: {', '.join(left)}; removed, being surely of this run:"
            f" {', '.join(removed) or 'none'}"
        )


@pytest.fixture
def only_cleaner() -> Iterator[None]:
    """For what cleans all of /dev/shm, or leaves there what cleaners take: one test at a time.

    The lock is shared by all workers and all runs of this user.
    """
    import fcntl

    def locked() -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    with CLEANERS_LOCK.open("a") as file:
        wait_for(locked, 100, "the end of another run's test of cleaning")
        yield


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Every way of starting a process that this platform has."""
    method: str = request.param
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not start processes by {method}")
    return method


@pytest.fixture(
    params=[
        *(["ring"] if shmring.backend == "ring" else []),
        pytest.param("fallback", marks=pytest.mark.both_backends),
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The queues of each back end in turn; programs that are started take the same one."""
    chosen, module = {"ring": ("ring", "queues.queue"), "fallback": ("queue", "fallback.queues")}[
        request.param
    ]
    monkeypatch.setenv("SHMRING_BACKEND", chosen)
    return importlib.import_module(f"shmring.{module}")


@pytest.fixture
def namespace() -> str:
    """One that no other run has."""
    return own_name(secrets.token_hex(4))


@pytest.fixture
def ipc(namespace: str) -> Iterator[HighPerformanceIPC]:
    """This process in that namespace."""
    with HighPerformanceIPC("main", namespace=namespace) as opened:
        yield opened


@pytest.fixture
def other(namespace: str) -> Iterator[HighPerformanceIPC]:
    """A second instance in this process: as another process would see it."""
    with HighPerformanceIPC("other", namespace=namespace) as opened:
        yield opened

"""Fixtures of the whole suite."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
from collections.abc import Iterator

import pytest

from support import SHARED_MEMORY, shared_memory_names, used_by_others, wait_for


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """Each test takes its names out of /dev/shm again; one that does not fails, here."""
    before = shared_memory_names()
    yield
    if not shared_memory_names() - before:
        return
    gc.collect()

    def leftovers() -> list[str]:
        return sorted(name for name in shared_memory_names() - before if not used_by_others(name))

    # another run on this machine may be between making a name and mapping it
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not leftovers(), timeout=2, what="names to go", dump=False)
    left = leftovers()
    for name in left:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    if left:
        pytest.fail(f"left in {SHARED_MEMORY} (and now removed): {', '.join(left)}")


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Every way of starting a process that this platform has."""
    method: str = request.param
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not start processes by {method}")
    return method

"""ProcessPoolExecutor: what callbacks, forks, other threads and odd objects must not break."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
from test_executor import note_and_wait, pool, square, times_begun

import shmring
from shmring import ProcessPoolExecutor
from support import wait_for

__all__ = ["pool"]

pytestmark = pytest.mark.skipif(shmring.backend != "ring", reason="a pipe cannot carry a pool")


# ---- futures -----------------------------------------------------------------------------------


def test_a_cancelled_future_can_be_cancelled_again(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    running = [pool.submit(note_and_wait, tmp_path, number) for number in (0, 1)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    waiting = pool.submit(square, 2)
    again: list[bool] = []
    waiting.add_done_callback(lambda done: again.append(done.cancel()))
    assert waiting.cancel()
    assert waiting.cancel()
    assert waiting.cancel_running()  # type: ignore[attr-defined]
    assert again == [True]
    assert futures.wait([waiting], 30).done
    (tmp_path / "go").touch()
    assert [each.result(30) for each in running] == [0, 1]


def test_a_callback_that_exits_costs_no_other_task_its_result(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    called = threading.Event()
    work = [pool.submit(note_and_wait, tmp_path, number) for number in range(10)]
    for each in work:
        each.add_done_callback(lambda done: sys.exit(3))
        each.add_done_callback(lambda done: called.set())
    (tmp_path / "go").touch()
    assert [each.result(30) for each in work] == list(range(10))
    assert called.wait(30)


# ---- what cannot be unpickled ------------------------------------------------------------------


class LoadsElsewhere:
    """Can be unpickled in any process but one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __reduce__(self) -> Any:
        return load_elsewhere, (self.pid,)


def load_elsewhere(pid: int) -> int:
    if os.getpid() == pid:
        raise ValueError("not in this process")
    return pid


def log_with(parent: int) -> None:
    for level in range(10, 60, 10):
        logging.getLogger().log(level, "odd", extra={"odd": LoadsElsewhere(parent)})


def test_a_cancel_loses_no_task_whose_arguments_load_in_workers_only(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    running = [pool.submit(note_and_wait, tmp_path, number) for number in (0, 1)]
    wait_for(lambda: len(times_begun(tmp_path)) == 2, 30)
    odd = [pool.submit(abs, LoadsElsewhere(os.getpid())) for _ in range(3)]
    waiting = pool.submit(square, 2)
    assert waiting.cancel()
    (tmp_path / "go").touch()
    assert [each.result(30) for each in running] == [0, 1]
    assert [each.result(30) for each in odd] == [os.getpid()] * 3


def test_a_log_record_that_does_not_arrive_costs_no_task_its_result() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        work = [pool.submit(log_with, os.getpid()), *(pool.submit(square, n) for n in range(60))]
        assert [each.exception(30) for each in work] == [None] * 61

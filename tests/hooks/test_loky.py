"""joblib's loky in the program that has our queues: neither disturbs the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shmring
from support import taken_from

joblib = pytest.importorskip("joblib")
if shmring.backend != "ring":
    pytest.skip("a fallback's queue reaches a worker only as an argument", allow_module_level=True)


def report(queue: Any, number: int) -> int:
    """Run in a worker of loky, which gets the queue by name."""
    queue.put({"number": number})
    return number * number


def test_workers_of_loky_put_into_a_queue_and_return_their_results(tmp_path: Path) -> None:
    with shmring.Queue() as queue:
        with joblib.parallel_config("loky", n_jobs=2, temp_folder=tmp_path):
            calls = (joblib.delayed(report)(queue, number) for number in range(20))
            squares = joblib.Parallel()(calls)
        assert squares == [number * number for number in range(20)]
        assert sorted(each["number"] for each in taken_from(queue, 20)) == list(range(20))
    loky = joblib.externals.loky.get_reusable_executor()
    with shmring.ProcessPoolExecutor(2) as pool:
        ours = pool.map(abs, range(-20, 0))
        assert sorted(loky.map(abs, range(-20, 0))) == sorted(ours)
    loky.shutdown(wait=True, kill_workers=True)

"""joblib backend: joblib's own tests, and what a killed worker does to a loop."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmring
from shmring import EncodeError, WorkerDied
from support import within

if shmring.backend != "ring":
    pytest.skip("a pipe cannot carry a pool", allow_module_level=True)
joblib = pytest.importorskip("joblib")
shmring.register_joblib()

# What runs with `-m torture` only: the same again, or many programs and pools.
SLOW = [
    *("background", "batch_statistics", "byteorder", "hinting", "in_child", "initializer_parallel"),
    *("interactively", "loop", "nested_backend", "nested_parallel_warnings", "no_blas"),
    *("not_reused", "parallel_backend", "pretty_print", "race", "separated", "threading"),
    *("unpicklable", "verbose"),
]
PATIENCE = 300  # seconds
QUICK = f"not ({' or '.join(SLOW)})"


@pytest.mark.parametrize("chosen", [QUICK, pytest.param("test", marks=pytest.mark.torture)])
def test_joblibs_own_tests_pass_in_the_place_of_loky(chosen: str, tmp_path: Path) -> None:
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\nfaulthandler_timeout = 60\n")
    # A fork server makes workers that import joblib anew: two minutes for all are too few.
    faulthandler.dump_traceback_later(PATIENCE + 60, exit=True, file=sys.__stderr__)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"),
            *("-c", str(settings), "-p", "joblib_on_ours", "-k", chosen),
            *("--pyargs", "joblib.test.test_parallel"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a second of CPU
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    assert " passed" in done.stdout


def in_parallel(calls: Any, **options: Any) -> Any:
    """The results of a loop with two workers, within a minute."""
    with joblib.parallel_config("shmring", n_jobs=2, **options):
        return within(60, joblib.Parallel(batch_size=1), calls)


def die_once(folder: Path, number: int) -> int:
    with contextlib.suppress(FileExistsError):
        (folder / str(number)).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_lambdas_and_closures_are_sent_and_come_back() -> None:
    base = 5
    functions = in_parallel(joblib.delayed(lambda n: lambda: n + base)(n) for n in range(3))
    assert [each() for each in functions] == [5, 6, 7]


def test_a_shared_array_arrives_read_only_in_each_task() -> None:
    shared = shmring.share(np.arange(1000))
    calls = (joblib.delayed(lambda a: (a.flags.writeable, int(a.sum())))(shared) for _ in range(8))
    assert in_parallel(calls) == [(False, 499_500)] * 8


def test_what_a_killed_worker_was_at_runs_again(tmp_path: Path) -> None:
    calls = (joblib.delayed(die_once)(tmp_path, n if n % 7 == 0 else -1) for n in range(40))
    expected = [n if n % 7 == 0 else -1 for n in range(40)]
    (tmp_path / "-1").touch()
    assert in_parallel(calls) == expected
    assert len(list(tmp_path.iterdir())) == 7


def test_options_of_the_pool_are_those_of_the_backend(tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match=r"after 1 attempt\(s\)"):
        in_parallel([joblib.delayed(die_once)(tmp_path, 1)] * 4, max_retries=0)


def test_a_task_that_cannot_be_pickled_is_an_error_wherever_it_stands() -> None:
    calls = (joblib.delayed(id)(sys._getframe() if n == 30 else n) for n in range(50))
    with pytest.raises(EncodeError, match="the task to send to the workers cannot be pickled"):
        in_parallel(calls)


def test_without_joblib_the_error_names_the_extra() -> None:
    program = (
        "import shmring, sys\n"
        "sys.modules['joblib'] = None\n"
        "try:\n"
        "    shmring.register_joblib()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'pip install "shmring[joblib]"' in done.stdout

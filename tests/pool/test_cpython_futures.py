"""CPython's own tests of concurrent.futures' process pool, run against ours.

They are taken from the interpreter that runs this; where it comes without them
there is nothing to run.
"""

from __future__ import annotations

import multiprocessing
import unittest
import warnings
from concurrent import futures
from concurrent.futures import process as theirs
from typing import Any
from unittest import mock

import pytest

import shmring
from support import interpreters_tests

if shmring.backend != "ring":
    pytest.skip("a pipe cannot carry a pool", allow_module_level=True)

# name: why it is not run
LEFT_OUT = {
    "test_killed_child": "deliberate: a killed worker is replaced, the pool takes more tasks",
    "test_python_finalization_error": "private: counts the threads that their pool starts",
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "private: their wake-up pipe",
    "test_shutdown_deadlock_pickle": "private: _executor_manager_thread",
    "test_del_shutdown": "private: _executor_manager_thread, _call_queue",
    "test_shutdown_no_wait": "private: _executor_manager_thread, _call_queue",
    "test_interpreter_shutdown": "a program that imports theirs; ours: test_executor.py",
    "test_submit_after_interpreter_shutdown": "a program that imports theirs; ours likewise",
    "test_hang_gh83386": "a program that imports theirs; ours likewise",
    "test_saturation": "deliberate: no worker is started for tasks that cannot be pickled",
    "test_processes_terminate": "deliberate: likewise",
    "test_cancel_futures": "deliberate: all are cancelled if no worker has taken one yet",
    "test_exit_at_task_unpickle": "deliberate: DecodeError fails the task, not the pool",
    "test_error_at_task_unpickle": "deliberate: DecodeError fails the task, not the pool",
    "test_error_during_result_unpickle_in_result_handler": "deliberate: likewise",
    "test_exit_during_result_unpickle_in_result_handler": "deliberate: likewise",
}


whole: Any = interpreters_tests("test.test_concurrent_futures")
split = hasattr(whole, "__path__")  # a package from 3.12 on


def part(name: str) -> Any:
    return interpreters_tests(f"test.test_concurrent_futures.{name}") if split else whole


class OnOurs(unittest.TestCase):
    """Puts our class where the tests look for theirs."""

    ctx = ""
    executor_type = shmring.ProcessPoolExecutor

    @classmethod
    def setUpClass(cls) -> None:
        if cls.ctx not in multiprocessing.get_all_start_methods():
            raise unittest.SkipTest(f"this platform does not start processes by {cls.ctx}")
        cls.enterClassContext(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        ours = shmring.ProcessPoolExecutor
        cls.enterClassContext(mock.patch.object(futures, "ProcessPoolExecutor", ours))
        refusal = AssertionError("a test made a pool of the standard library")
        cls.enterClassContext(
            mock.patch.object(theirs.ProcessPoolExecutor, "__init__", side_effect=refusal)
        )
        super().setUpClass()

    def setUp(self) -> None:
        for each in ("log_queue", "executor_kwargs"):  # semaphores last as long as these
            self.addCleanup(vars(self).pop, each, None)
        super().setUp()

    def get_context(self) -> Any:
        return multiprocessing.get_context(self.ctx)


def adopt(module: str, *names: str) -> None:
    """A class of tests for each start method, found by name in a spawned child."""
    util = part("util")
    for name in names:
        mixin = getattr(part(module), name)
        tests = {each for each in dir(mixin) if each.startswith("test")}
        kept = dict.fromkeys(tests & LEFT_OUT.keys())
        for method in ("fork", "spawn", "forkserver"):
            full = f"{name}_{method}"
            globals()[full] = type(
                full,
                (OnOurs, mixin, util.ExecutorMixin, util.BaseTestCase),
                {"ctx": method, "__module__": __name__, **kept},
            )


adopt("test_process_pool", "ProcessPoolExecutorTest")
adopt("test_shutdown", "ProcessPoolShutdownTest")
adopt("test_deadlock", "ExecutorDeadlockTest")
adopt("test_init", "InitializerMixin", "FailingInitializerMixin")
adopt("test_wait", "WaitTests")
adopt("test_as_completed", "AsCompletedTests")

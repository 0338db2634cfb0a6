"""CPython's own tests of multiprocessing's queues, run against ours.

They come from the interpreter that runs the suite, so they differ from version
to version.  What is left out stands in ``LEFT_OUT`` with the reason.
"""

from __future__ import annotations

import ast
import gc
import multiprocessing
import multiprocessing.queues
import queue as standard_queue
import sys
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import shmring
from support import interpreters_tests

# name: (why, the test of ours that covers the difference)
LEFT_OUT = {
    "test_queue_feeder_donot_stop_onexc": (
        "deliberate: an object that cannot be pickled raises in put; there is no feeder thread",
        "queues/test_queue.py::test_what_cannot_be_pickled_raises_in_put_and_names_the_part",
    ),
    "test_queue_feeder_on_queue_feeder_error": (
        "private: the hook _on_queue_feeder_error of the feeder thread, on the stock class itself",
        "queues/test_queue.py::test_what_cannot_be_pickled_raises_in_put_and_names_the_part",
    ),
    "test_closed": (
        "private: SimpleQueue's attributes _reader and _writer",
        "queues/test_surface.py::test_a_closed_simple_queue_raises_os_error",
    ),
}
TESTS = Path(__file__).resolve().parents[1]


theirs: Any = interpreters_tests("test._test_multiprocessing")


class Quiet(unittest.TestCase):
    """Many of their tests drop their queues open."""

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)
        self.addCleanup(gc.collect)  # while it is ignored: some stand in a cycle


class OnOurs(Quiet):
    """Sets the start method, and puts our classes where the tests look for them."""

    method = ""
    Queue = staticmethod(shmring.Queue)
    JoinableQueue = staticmethod(shmring.JoinableQueue)

    @classmethod
    def setUpClass(cls) -> None:
        if cls.method not in multiprocessing.get_all_start_methods():
            raise unittest.SkipTest(f"this platform does not start processes by {cls.method}")
        before = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method(cls.method, force=True)
        cls.addClassCleanup(multiprocessing.set_start_method, before, force=True)
        for name in ("Queue", "JoinableQueue", "SimpleQueue"):
            cls.enterClassContext(mock.patch.object(multiprocessing, name, getattr(shmring, name)))
            stock = getattr(multiprocessing.queues, name)
            refusal = AssertionError("a test made a queue of the standard library")
            cls.enterClassContext(mock.patch.object(stock, "__init__", side_effect=refusal))
        super().setUpClass()


def adopt(name: str, *bases: type) -> None:
    """A class for each start method, found by name in a spawned child."""
    tests = {each for base in bases for each in dir(base) if each.startswith("test")}
    kept = dict.fromkeys(tests & LEFT_OUT.keys())
    for method in ("fork", "spawn", "forkserver"):
        full = f"{name}_{method}"
        globals()[full] = type(
            full, (OnOurs, *bases), {"method": method, "__module__": __name__, **kept}
        )


adopt("TestQueue", theirs._TestQueue, theirs.ProcessesMixin)
adopt("TestSimpleQueue", theirs.TestSimpleQueue)


if sys.version_info >= (3, 13):  # the semantics of shutdown, which multiprocessing has not
    shutdown: Any = interpreters_tests("test.test_queue")

    class AsTheirs(shmring.JoinableQueue[Any]):
        """With what queue.Queue shows as attributes."""

        @property
        def is_shutdown(self) -> bool:
            return self.statistics().shut_down

        @property
        def unfinished_tasks(self) -> int:
            return self._unfinished()

    class OnShutdown(shutdown.BaseQueueTestMixin):
        queue = standard_queue
        type2test = AsTheirs

    # Of the tests of queue.Queue only these; the others look inside, and at its own rules.
    others = {
        each: None
        for each in dir(shutdown.BaseQueueTestMixin)
        if each.startswith("test") and "shutdown" not in each
    }
    vars().update(TestShutdown=type("TestShutdown", (Quiet, OnShutdown), others))


def test_what_is_left_out_is_covered_by_ours() -> None:
    for _reason, place in LEFT_OUT.values():
        file, _, name = place.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


def test_nothing_is_left_out_that_they_do_not_have() -> None:
    have = {*dir(theirs._TestQueue), *dir(theirs.TestSimpleQueue)}
    assert LEFT_OUT.keys() <= have

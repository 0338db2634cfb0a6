"""``shmring run`` and ``shmring.install()``: unmodified programs, and their children."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import multiprocessing.spawn
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest

import shmring

ring_only = pytest.mark.skipif(shmring.backend != "ring", reason="the fallback changes nothing")

PROGRAM = """
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import JoinableQueue, Queue

at_import = [type(Queue()).__module__] if __name__ == "__mp_main__" else []


def modules():
    made = [Queue(), JoinableQueue(3), multiprocessing.SimpleQueue()]
    made += [multiprocessing.get_context(each).Queue() for each in ("fork", "spawn")]
    return [type(each).__module__ for each in made]


def grandchild(told):
    told.put(modules())


def child(told):
    told.put([type(told).__module__, *at_import, *modules()])
    process = multiprocessing.Process(target=grandchild, args=(told,))
    process.start()
    process.join()


def square(number):
    return number * number


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    told = Queue()
    process = multiprocessing.Process(target=child, args=(told,))
    process.start()
    result = {"here": modules(), "child": told.get(), "grandchild": told.get(), "argv": sys.argv}
    process.join()
    with multiprocessing.Pool(1) as pool:
        result["pool"] = pool.map(square, [1, 2])
    with ProcessPoolExecutor(1) as executor:
        result["executor"] = list(executor.map(square, [1, 2]))
    with multiprocessing.Manager() as manager:
        queue = manager.Queue()
        queue.put(1)
        result["manager"] = [queue.get()]
    print(json.dumps(result))
    sys.exit(7)
"""
OURS = "shmring.queues.queue"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shmring", "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def check(done: subprocess.CompletedProcess[str], argv: list[str]) -> None:
    assert (done.returncode, done.stderr) == (7, ""), done.stderr
    result = json.loads(done.stdout)
    assert {*result["here"], *result["child"], *result["grandchild"]} == {OURS}
    assert result["argv"] == argv
    assert result["pool"] == result["executor"] == [1, 4]
    assert result["manager"] == [1]


@ring_only
def test_a_program_and_its_children_get_our_queues(program: Path, start_method: str) -> None:
    check(run(program, start_method, "--json"), [str(program), start_method, "--json"])


@ring_only
def test_a_module(program: Path) -> None:
    done = run("-m", "program", "spawn", cwd=program.parent)
    check(done, [os.path.realpath(program), "spawn"])


def test_the_exit_status_and_the_traceback_are_the_programs(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint(sys.path[0])\n{}['missing']\n")
    done = run(program)
    assert done.returncode == 1
    assert done.stdout == f"{tmp_path}\n"
    assert done.stderr.endswith("KeyError: 'missing'\n")


@pytest.mark.parametrize(
    ("arguments", "text"), [([], "SCRIPT is missing"), (["nix.py"], "'nix.py' does not exist")]
)
def test_a_script_that_is_not_there(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_fallback_runs_the_program_as_it_is(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import multiprocessing\nprint(type(multiprocessing.Queue()).__module__)\n")
    done = run(program, env={**os.environ, "SHMRING_BACKEND": "queue"})
    assert (done.returncode, done.stdout) == (0, "multiprocessing.queues\n")
    assert done.stderr == "shmring: the fallback changes no queues\n"


@pytest.fixture
def installed() -> Iterator[None]:
    assert shmring.install()
    assert shmring.install()
    yield
    shmring.uninstall()


@ring_only
def test_install_reaches_references_that_were_taken_before(installed: None) -> None:
    context = multiprocessing.get_context("spawn")
    with early(3) as queue, context.JoinableQueue() as joinable:
        assert isinstance(queue, shmring.Queue)
        assert isinstance(joinable, shmring.JoinableQueue)
        queue.put_many(range(3))
        assert queue.full()
    with context.SimpleQueue() as simple:
        assert isinstance(simple, shmring.SimpleQueue)


early = multiprocessing.Queue


@ring_only
def test_stock_pools_keep_stock_queues_inside(installed: None) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert isinstance(pool, multiprocessing.pool.Pool)
        assert not isinstance(pool._inqueue, shmring.SimpleQueue)
        assert pool.apply(abs, (-1,)) == 1
        pool.close()
        pool.join()
    with futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as executor:
        assert executor.submit(abs, -2).result(60) == 2


@ring_only
def test_uninstall_restores_everything() -> None:
    shmring.install()
    shmring.uninstall()
    shmring.uninstall()
    for make in (early, multiprocessing.JoinableQueue, multiprocessing.SimpleQueue):
        queue = make()
        assert type(queue).__module__ == "multiprocessing.queues"
        queue.close()
    assert "shmring" not in multiprocessing.spawn.get_preparation_data("x")

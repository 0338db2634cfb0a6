"""Imports: what is imported when, invisibly to users.

A child that is started by spawn imports before it can say anything: its first
message is to come no later than 20 ms after the one it would have sent through
multiprocessing.Queue.  ``make report`` measures that; here
stands what would spoil it.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import shmring
from support import own_name

ring_only = pytest.mark.skipif(
    shmring.backend != "ring", reason="the fallback imports all that multiprocessing's queues need"
)

# Each costs a child one to fifty milliseconds, and a queue has no use for it.  Some that one
# would look for here (subprocess, tempfile, typing) multiprocessing imports itself.
NEEDLESS = {
    "asyncio",
    "ast",
    "concurrent.futures",
    "dataclasses",
    "hashlib",
    "inspect",
    "logging",
    "mmap",
    "msgspec",
    "multiprocessing.managers",
    "numpy",
    "pathlib",
    "pickletools",
    "rich",
    "secrets",
    "ssl",
    "traceback",
    "urllib",
}
# What a queue stands on, beside the compiled floor, whose modules cost little.
FLOORS = {
    *("_lazy", "_warnings", "errors", "arguments", "process", "process.leaving", "process.threads"),
    *(
        "shm",
        "shm.descriptors",
        "shm.segment",
        "queues",
        "queues.handle",
        "queues.aio",
        "queues.arrays",
    ),
    *("queues.codec", "queues.queue"),
}


def run(*command: str) -> set[str]:
    """The words that a Python prints."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imported_by(statement: str) -> set[str]:
    """The modules that `statement` imports where multiprocessing's queues are there already."""
    return run(
        "-c",
        "import multiprocessing.queues, multiprocessing.synchronize, sys; before = {*sys.modules}\n"
        f"{statement}\n"
        "print(*{*sys.modules} - before)",
    )


def floors(modules: set[str]) -> set[str]:
    """The modules of the package, without those that are compiled."""
    names = {name.partition(".")[2] for name in modules if name.startswith("shmring.")}
    return {name for name in names if not name.startswith("_core")}


@pytest.mark.both_backends
def test_the_package_alone_imports_nothing() -> None:
    found = imported_by("import shmring; dir(shmring); shmring.__version__")
    assert floors(found) == {"_lazy"}
    assert not found & NEEDLESS


@ring_only
@pytest.mark.parametrize("name", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_a_queue_imports_what_it_stands_on(name: str) -> None:
    found = imported_by(f"import shmring; shmring.{name}")
    assert floors(found) == FLOORS | {"_backend"}
    assert not found & NEEDLESS


@ring_only
def test_to_use_a_queue_imports_no_more() -> None:
    found = imported_by(
        "import shmring, pickle\n"
        f"a = shmring.Queue(name={own_name('imports')!r})\n"
        "with a, pickle.loads(pickle.dumps(a)) as it:\n"
        "    it.put({'a': [1]}); a.get(timeout=1); it.put_many([bytes(5000)] * 2)\n"
        "    a.get_many(); a.qsize(); a.shutdown()"
    )
    assert not found & NEEDLESS


CHILD = """
import multiprocessing, sys

def tell(queue):
    queue.put([*sys.modules])

if __name__ == "__main__":
    import shmring

    with shmring.Queue() as queue:
        child = multiprocessing.get_context("spawn").Process(target=tell, args=(queue,))
        child.start()
        print(*queue.get(timeout=60))
        child.join()
"""


@ring_only
def test_a_spawned_child_imports_what_the_queue_stands_on(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(CHILD)
    before = run("-c", "import sys; print(*sys.modules)")  # a .pth file may import anything
    found = run(str(script))
    assert floors(found) == FLOORS
    assert not (found - before) & NEEDLESS


def static_names() -> dict[str, str]:
    """Each name that type checkers see in the package, and where they find it."""
    tree = ast.parse(Path(shmring.__file__).read_text(encoding="utf-8"))
    (static,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(each.module)
        for each in static.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }


@pytest.mark.both_backends
def test_what_type_checkers_see_is_what_there_is() -> None:
    static = static_names()
    assert static.keys() == {*shmring.__all__, "SharedMemoryManager"}
    assert static.keys() <= {*dir(shmring)}
    for name, home in static.items():
        assert getattr(shmring, name) is getattr(importlib.import_module(home), name)


@pytest.mark.both_backends
def test_an_unknown_name_is_an_error_and_a_module_is_found() -> None:
    with pytest.raises(AttributeError, match=r"'shmring' has no attribute 'Qeue'"):
        shmring.Qeue  # type: ignore[attr-defined]  # noqa: B018
    run(
        "-c",
        "import shmring; shmring.errors.ShmringError, shmring.ipc",
    )


@pytest.mark.both_backends
def test_a_wrong_backend_is_an_error_when_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMRING_BACKEND", "rign")
    program = (
        "import shmring\n"
        "try:\n"
        "    from shmring import Queue\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "SHMRING_BACKEND='rign':" in run("-c", program)

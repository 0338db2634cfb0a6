"""What a test leaves in /dev/shm is noticed, and a stranger's name is not touched."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import (
    SHARED_MEMORY,
    holders,
    leftovers,
    remove_if_ours,
    shared_memory_names,
    wait_for,
)

pytestmark = [
    pytest.mark.both_backends,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

HOLD = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] == "mapped":
    kept = mmap.mmap(fd, 1)
    os.close(fd)
print(os.getpid(), flush=True)
sys.stdin.read()
"""
ORPHAN = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"


@pytest.fixture
def name() -> Iterator[str]:
    """A name that does not tell which process made it."""
    chosen = "leak-" + re.sub(r"\d", "x", secrets.token_hex(8))
    (SHARED_MEMORY / chosen).write_bytes(b"x")
    yield chosen
    (SHARED_MEMORY / chosen).unlink(missing_ok=True)


@contextlib.contextmanager
def held(name: str, how: str, *prefix: str) -> Iterator[int]:
    """A process that holds the name, until the block is left; its pid."""
    command = [*prefix, sys.executable, "-c", HOLD, str(SHARED_MEMORY / name), how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        if prefix:
            process.wait(timeout=30)  # till then the holder is no orphan
        yield pid
        assert process.stdin is not None
        process.stdin.close()
    wait_for(lambda: pid not in holders(name), what="the holder's end")


@pytest.mark.parametrize("how", ["mapped", "open"])
def test_what_a_stranger_holds_is_no_leak_and_not_removed(name: str, how: str) -> None:
    with held(name, how, sys.executable, "-c", ORPHAN) as pid:
        assert holders(name) == {pid}
        assert leftovers({name}) == []
        assert not remove_if_ours(name)
    assert (SHARED_MEMORY / name).exists()


@pytest.mark.parametrize("how", ["mapped", "open"])
def test_what_only_our_own_processes_hold_is_a_leak_and_removed(name: str, how: str) -> None:
    with held(name, how) as pid:
        assert holders(name) == {pid}
        assert leftovers({name}) == [name]
        assert remove_if_ours(name)
    assert not (SHARED_MEMORY / name).exists()


def test_a_name_without_holder_is_a_leak_and_removed_only_if_it_carries_our_pid(name: str) -> None:
    assert holders(name) == set()
    assert leftovers({name}) == [name]
    assert not remove_if_ours(name)
    ours = f"{name}-{os.getpid()}-x"
    (SHARED_MEMORY / name).rename(SHARED_MEMORY / ours)
    assert remove_if_ours(ours)
    assert not (SHARED_MEMORY / ours).exists()


def test_what_an_orphan_of_ours_holds_is_a_leak(name: str) -> None:
    same_group = ORPHAN.replace("start_new_session=True", "start_new_session=False")
    with held(name, "mapped", sys.executable, "-c", same_group):
        assert leftovers({name}) == [name]
        assert not remove_if_ours(name), "a stranger may be in our group as well"


def test_a_test_that_leaves_a_name_fails(name: str, tmp_path: Path) -> None:
    """A run of pytest with the fixture of this suite."""
    (SHARED_MEMORY / name).unlink()
    (tmp_path / "test_inner.py").write_text(
        "import mmap, os, pathlib, support\n"
        "support.LEFT_S = 1\n"
        "kept = []\n"
        "def test_unknown():\n"
        f"    pathlib.Path('/dev/shm/{name}').write_bytes(b'x')\n"
        "def test_ours():\n"
        f"    kept.append(open(f'/dev/shm/{name}-{{os.getpid()}}', 'wb'))\n"
        "def test_clean():\n"
        "    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", os.devnull, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if "Failed: left in" in line]
    assert "3 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert re.search(rf"left in /dev/shm: {name}; .*: none$", found[0])
    assert re.search(rf"left in /dev/shm: ({name}-\d+); .*: \1$", found[1])
    assert (SHARED_MEMORY / name).exists()
    assert [each for each in shared_memory_names() if name in each] == [name]

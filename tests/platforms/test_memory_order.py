"""What sync.h and count.h promise of the order of memory holds between two threads here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FLOOR = TESTS.parent / "cython" / "shmring" / "_core"
# Instead of Python's own.
PYTHON_H = "#define PyExc_ImportError 0\n#define PyErr_Format(...) ((void)0)\n"
ENOUGH = "100000"


@pytest.mark.skipif(sys.platform != "linux" or not FLOOR.is_dir(), reason="builds the ring's floor")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_two_threads_see_what_the_fences_promise(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("with one processor nothing is out of order")
    (tmp_path / "Python.h").write_text(PYTHON_H)
    program = tmp_path / "litmus"
    subprocess.run(
        [
            *("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"),
            *(f"-I{tmp_path}", f"-I{FLOOR}", str(TESTS / "aarch64" / "litmus.c")),
            *("-o", str(program)),
        ],
        check=True,
    )
    for _ in range(10):  # on a busy machine one processor may run both threads
        done = subprocess.run(
            [program, ENOUGH], capture_output=True, text=True, timeout=100, check=False
        )
        *promised, unfenced = done.stdout.splitlines()
        assert all(": 0 wrong " in line for line in promised), done.stdout
        if done.returncode == 0:
            return
    pytest.fail(unfenced)

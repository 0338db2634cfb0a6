"""Types of the public names, as a user's program meets them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shmring

PROGRAM = Path(__file__).with_name("typed_program.py")

if shmring.backend != "ring":
    pytest.skip(
        "the program makes rings and named queues, which the fallback has not",
        allow_module_level=True,
    )


def run(*command: str | Path, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout, check=False
    )


def test_the_program_touches_every_public_name() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    touched = {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    assert set(shmring.__all__) - touched == set()


def test_the_program_runs() -> None:
    pytest.importorskip("numpy")
    done = run("-W", "error", PROGRAM, timeout=90)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("checker", "options"),
    [
        ("mypy", ["--strict", "--config-file="]),
        ("pyright", ["--pythonpath", sys.executable]),
    ],
)
def test_the_program_is_clean(checker: str, options: list[str]) -> None:
    pytest.importorskip(checker, reason=f"{checker} is not installed: make lint installs it")
    done = run("-m", checker, *options, PROGRAM, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

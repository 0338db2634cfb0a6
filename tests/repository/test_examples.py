"""Programs of examples/: each runs, and prints what its users would look for."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmring
from support import wait_for

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

if shmring.backend != "ring":
    pytest.skip(
        "the examples name queues and run pools, which the fallback has not",
        allow_module_level=True,
    )
if not EXAMPLES.is_dir():
    pytest.skip("tests without the examples", allow_module_level=True)


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_words_are_counted(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("one two two")
    output = run("word_count.py", str(tmp_path), "--pattern", "*.txt", "--workers", "2")
    assert "9 words in 3 files" in output
    assert "6  two" in output


def test_a_killed_stage_of_the_pipeline_costs_no_frame() -> None:
    pytest.importorskip("numpy")
    assert "60 of 60 frames, 1 process killed" in run("image_pipeline.py")


def test_the_server_answers_and_its_workers_report() -> None:
    output = run("asyncio_server.py")
    assert "{'1000003': '1000003', '999999': '3', 'many': 'a number is needed'}" in output
    assert output.count("factors") == 2


def test_what_a_killed_process_logged_is_there() -> None:
    lines = run("logging_listener.py").splitlines()
    assert "worker-1 WARNING: is about to be killed" in lines
    assert len(lines) == 6


def test_a_model_is_trained_on_batches_in_place() -> None:
    pytest.importorskip("torch")
    assert "40 batches on c" in run("training_loop.py")


def test_one_program_runs_here_and_on_dask() -> None:
    pytest.importorskip("distributed")
    assert "pi is about 3.1" in run("dask_scale_out.py")
    with cluster() as address:
        assert f"by {address}" in run("dask_scale_out.py", address)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A scheduler and a worker, started as the documentation says."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    commands = [
        ["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
        ["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"],
    ]
    with contextlib.ExitStack() as stack:
        for command in commands:
            started = subprocess.Popen(
                [sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]],
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(started.wait, 10)
            stack.callback(started.kill)
        wait_for(lambda: answers(port), 60)
        yield address


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False

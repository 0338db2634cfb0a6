"""Switches, CPU and system calls of many processes are counted.  No speed is judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benched  # noqa: F401  # isort: skip  (it adds the path)
from benchmarks import scaling
from benchmarks.adapters import ShmringQueue
from benchmarks.work import bytes_of

TRACE = """\
10 futex(0x7f0, FUTEX_WAKE, 1) = 1
11 futex(0x7f0, FUTEX_WAIT, 3, NULL <unfinished ...>
10 getpid()                          = 10
11 <... futex resumed>)              = 0
10 write(1, "futex(0, FUTEX_WAKE", 19) = 19
10 --- SIGCHLD {si_signo=SIGCHLD} ---
11 +++ exited with 0 +++
futex(0x7f8, FUTEX_WAIT_BITSET|FUTEX_CLOCK_REALTIME, 1, NULL) = 0
"""


def test_system_calls_are_counted_once_and_futexes_by_operation() -> None:
    assert scaling.system_calls(TRACE) == {
        "futex FUTEX_WAKE": 1,
        "futex FUTEX_WAIT": 1,
        "futex FUTEX_WAIT_BITSET": 1,
        "getpid": 1,
        "write": 1,
    }


def test_what_was_spent_counts_after_the_end_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "sum(range(10**6))"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
    try:
        used = scaling.spent([child.pid])
    finally:
        child.wait()
    assert used.cpu_s > 0
    assert (used - used) == scaling.Spent(0, 0, 0.0)


def test_many_processes_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "SHAPES", ((2, 3),))
    monkeypatch.setattr(scaling, "IDLE", 4)
    options = ["--runs", "1", "--scale", "0.01", "--seconds", "0.1", "--no-strace"]
    assert scaling.main([*options, "--results", str(tmp_path / "new")]) == 0
    assert "| 2:3 | shmring.Queue | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "new" / "scaling.json").read_text())["rows"]
    assert [row["load"] for row in rows] == ["2:3", "2:3", *["1:4, 100 a second"] * 2]
    assert all(row["median"]["cpu_us_a_message"] > 0 for row in rows)


def test_a_trickle_is_no_faster_than_it_should_be() -> None:
    began = time.perf_counter()
    session = scaling.Trickle(ShmringQueue, bytes_of(64), producers=1, consumers=2, count=6)
    with session:
        session.run()
    assert sum(session.shares) == 6
    assert session.waited_until - began >= 5 / scaling.TRICKLE_PER_SECOND


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_system_calls_a_message() -> None:
    if subprocess.run(["strace", "-f", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    found = scaling.traced(1, 1, few=10, more=30, trickle=True)
    assert found["every"] > 0.5, "the producer sleeps before each message"
    assert any("sleep" in name for name in found)

"""Benchmarks: each program runs, and wrong content is noticed.  No speed is judged."""

from __future__ import annotations

import functools
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shmring

ROOT = Path(__file__).resolve().parents[2]

if sys.platform != "linux" or shmring.backend != "ring":
    pytest.skip("the benchmarks fork, read /proc and compare the ring", allow_module_level=True)
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("tests without their benchmarks", allow_module_level=True)
pytest.importorskip("numpy")
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402  (the path first)
from benchmarks import costs, curves, instructions, limits, recovery, report
from benchmarks.adapters import MultiprocessingPipe, ShmringQueue, able
from benchmarks.sessions import OneWay, Runs, take_turns
from benchmarks.work import Work, WrongContent, arrays, bytes_of

BYTES = bytes_of(64)


@pytest.fixture(autouse=True)
def no_child_left() -> Any:
    yield
    assert not multiprocessing.active_children()


class Faulty(MultiprocessingPipe):
    """Loses its 100th message, and alters arrays."""

    label = "faulty"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._deliver, self._delivered = self.get, 0
        self.get = self._get

    def _get(self) -> Any:
        self._delivered += 1
        return self._deliver() if self._delivered != 100 else (self._deliver(), self._deliver())[1]

    def take_sum(self) -> float:
        return super().take_sum() + 1


class Broken(MultiprocessingPipe):
    label = "broken"
    shared = True

    def __init__(self, work: Work) -> None:
        raise OSError("no such thing here")


class Silent(MultiprocessingPipe):
    """Sends nothing."""

    label = "silent"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.put = lambda message: None


@pytest.mark.parametrize(
    ("work", "told"), [(BYTES, "a turn began"), (arrays(1 << 20, 4), "adds up to")]
)
def test_wrong_content_is_noticed(work: Work, told: str) -> None:
    with pytest.raises(WrongContent, match=told), OneWay(Faulty, work, count=600) as session:
        session.run()


def test_a_session_that_hangs_ends() -> None:
    with (
        pytest.raises(TimeoutError, match=r"starting: not done after 0\.3 s"),
        OneWay(Silent, BYTES, deadline_s=0.3),
    ):
        pass


def test_a_transport_that_fails_has_no_more_turns() -> None:
    found = take_turns(
        2, {one: functools.partial(OneWay, one, BYTES, count=600) for one in (Faulty, ShmringQueue)}
    )
    assert isinstance(found[Faulty].error, WrongContent)
    assert len(found[ShmringQueue].rates) == 2


def test_bench_prints_a_table_and_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    results = tmp_path / "new" / "rates.json"
    options = ["--benchmark-only", "--benchmark-quiet", "--rounds", "1", "--scale", "0.001"]
    options += ["--results", str(results), "-k", "2:2 or one and process", "benchmarks"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert table
    assert max(map(len, table)) <= 100
    found = json.loads(results.read_text())
    assert found["machine"]["cpu"] in done.stdout
    assert found["questions"]["64 B bytes, 2:2"]["shmring.Queue"]["messages_per_second"] > 0
    labels = {label for group in found["questions"].values() for label in group}
    assert labels == {one.label for one in able("bytes", between_processes=False, peers=False)}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_report_measures_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "BUILD", tmp_path / "build")
    monkeypatch.setattr(costs, "IDLE", 4)
    options = ["--runs", "1", "--scale", "0.001", "--results", str(tmp_path)]
    only = [name for name in report.LINES if "eight" not in name and "trips-busy" not in name]
    assert report.main([*options, "--only", *only]) == 0
    lines = json.loads((tmp_path / "report.json").read_text())["lines"]
    assert len(lines) == len(only)
    told = capsys.readouterr().out
    assert all(f"| {line['question']} |" in told for line in lines)
    (nothing,) = (line for line in lines if line["question"].startswith("all processes"))
    assert nothing["aims"][0]["measured"] == 0


@pytest.mark.parametrize(
    ("measured", "most", "told"),
    [
        (2.0, False, "2 M/s (at least 1.5)"),
        (2.0, True, "2 M/s (at most 1.5, **not reached**)"),
        (None, False, "- M/s (at least 1.5, not measured)"),
    ],
)
def test_an_aim_says_whether_it_is_reached(measured: float | None, most: bool, told: str) -> None:
    assert str(costs.Aim("{} M/s", 1.5, measured, most)) == told


def test_only_packages_from_pypi_are_the_best_peer() -> None:
    rates = {"shmring.Queue": 9.0, "multiprocessing.Pipe": 8.0, "faster-fifo": 2.0, "pyzmq ipc": 3}
    assert report.best_peer({label: Runs([rate]) for label, rate in rates.items()}) == (
        "pyzmq ipc",
        3,
    )
    assert report.best_peer({"shmring.Queue": Runs([1.0])}) is None


def test_curves_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves, "SHAPES", ("1:1", "2:3"))
    monkeypatch.setattr(curves, "IDLE", "1:4")
    monkeypatch.setattr(curves, "able", lambda kind, peers: [ShmringQueue, Broken])
    options = ["--runs", "1", "--scale", "0.002", "--short", "--no-strace"]
    assert curves.main([*options, "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "curves.json").read_text())
    assert "no such thing here" in found["by_size"]["rates"]["broken"][0]["error"]
    assert found["by_processes"]["rates"]["shmring.Queue"][1]["cpu_us_a_message"] > 0
    assert "shmring.Queue" in (tmp_path / "rate_by_size.svg").read_text()


def test_system_calls_are_counted_once_and_futexes_by_operation() -> None:
    trace = (
        "10 futex(0x7f0, FUTEX_WAKE, 1) = 1\n"
        "11 futex(0x7f0, FUTEX_WAIT, 3, NULL <unfinished ...>\n"
        "11 <... futex resumed>)              = 0\n"
        '10 write(1, "futex(0, FUTEX_WAKE", 19) = 19\n'
        "10 --- SIGCHLD {si_signo=SIGCHLD} ---\n"
    )
    assert curves.system_calls(trace) == {"futex FUTEX_WAKE": 1, "futex FUTEX_WAIT": 1, "write": 1}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_limits_and_shares_of_them_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BUILD", tmp_path / "build")
    rates = {"64 B bytes, one call a message": {"shmring.Queue": {"messages_per_second": 1e6}}}
    (tmp_path / "peers.json").write_text(
        json.dumps({"machine": {"load average": "0"}, "questions": rates})
    )
    assert limits.main(["--scale", "0.0001", "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "limits.json").read_text())
    assert all(found["limits"][name] > 0 for name in limits.LIMITS)
    (share,) = found["shares"]
    assert share["share"] == 1e6 / found["limits"]["ring_64_b_messages_per_second"]


def test_a_call_over_its_budget_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = dict.fromkeys(instructions.CALLS, 1000.0)
    monkeypatch.setattr(instructions, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setattr(instructions, "count", lambda: dict(counted))
    monkeypatch.setattr(instructions, "missing", lambda: None)
    assert instructions.main([]) == 2, "no budget for this environment"
    assert instructions.main(["--where-known"]) == 0
    assert instructions.main(["--write"]) == 0
    counted["get"] = 1051.0
    assert instructions.main([]) == 1
    assert "1,051  of      1,000  +5.1%  over by more than 5%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="peek"):
        instructions.judge({"put": 1.0}, {"put": 1.0, "peek": 1.0})


def test_the_others_go_on_after_a_kill_and_a_ctrl_c() -> None:
    (found,) = recovery.measure("consumer", kills=1, window=0.1)
    assert min(found.seconds, found.before, found.after) > 0
    assert recovery.interrupt("get", times=1)[0] > 0

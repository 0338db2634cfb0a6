"""Benchmarks: each program runs, and wrong content is noticed.  No speed is judged."""

from __future__ import annotations

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
for needed in ("numpy", "matplotlib", "pytest_benchmark"):
    pytest.importorskip(needed)
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402  (the path first)
import benchmarks
from benchmarks import Target, costs, curves, instructions, limits, report, scaling
from benchmarks.adapters import FasterFifo, Membridge, MultiprocessingPipe, ShmringQueue, able
from benchmarks.sessions import ManyToMany, OneWay, Runs, Session, take_turns
from benchmarks.work import Work, WrongContent, arrays, bytes_of

BYTES = bytes_of(64)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def no_child_left() -> Any:
    yield
    assert not multiprocessing.active_children()


class Faulty(ShmringQueue):
    """Loses every 100th message of a producer, and alters arrays."""

    label = "faulty"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._send, self._sent = self.put, 0
        self.put = self._put

    def _put(self, message: Any) -> None:
        self._sent += 1
        if self._sent % 100 != 0:
            self._send(message)

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
    ("session", "work", "error"),
    [
        (OneWay, BYTES, "a pass began"),
        (OneWay, arrays(1 << 20, 4), "adds up to"),
        (ManyToMany, BYTES, "messages came"),
    ],
)
def test_wrong_content_is_noticed(session: type[Session], work: Work, error: str) -> None:
    with pytest.raises(WrongContent, match=error), session(Faulty, work, count=600) as running:
        running.run()


def test_a_session_that_hangs_ends() -> None:
    with (
        pytest.raises(TimeoutError, match=r"starting: not done after 0\.3 s"),
        OneWay(Silent, BYTES, deadline_s=0.3),
    ):
        pass


def test_a_transport_that_fails_has_no_more_turns() -> None:
    found = take_turns(2, [Faulty, ShmringQueue], OneWay, BYTES, count=600)
    assert isinstance(found[Faulty].error, WrongContent)
    assert not found[Faulty].rates
    assert len(found[ShmringQueue].rates) == 2


def test_bench_prints_tables_and_writes_their_figures(tmp_path: Path) -> None:
    results = tmp_path / "new" / "rates.json"
    options = ["--benchmark-only", "--benchmark-quiet", "--rounds", "1", "--scale", "0.001"]
    options += ["--results", str(results), "-k", "2:2 or put", "benchmarks"]
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
    assert table[0].startswith("  shmring.")
    found = json.loads(results.read_text())
    assert found["machine"]["cpu"] in done.stdout
    assert found["questions"]["64 B bytes, 2:2"]["shmring.Queue"]["messages_per_second"] > 0
    labels = {label for group in found["questions"].values() for label in group}
    assert labels == {one.label for one in able("bytes", threads=True) if one.package is None}


@needs_compiler
def test_report_measures_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "BUILD", tmp_path / "build")
    monkeypatch.setattr(costs, "IDLE", 4)
    options = ["--runs", "1", "--scale", "0.001", "--results", str(tmp_path)]
    slow = {"batches", "eight-mib", "a-million", "first-message", "kill-producer", "kill-sleeper"}
    only = [name for name in report.ROWS if name not in slow]
    assert report.main([*options, "--only", *only]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["rows"]
    rows = dict(zip(only, found, strict=True))
    output = capsys.readouterr().out
    assert all(f"| {row['question']} |" in output for row in found)
    targets = [target for row in found for target in row["targets"]]
    assert all((one["measured"] is None) == ("peer" in one["text"]) for one in targets)
    assert rows["killed"]["targets"][0]["measured"] == 0
    assert [one["measured"] for one in rows["unused"]["targets"]][1:] == [1, 0]


@pytest.mark.parametrize(
    ("measured", "at_most", "text"),
    [
        (2.0, False, "2 M/s (at least 1.5)"),
        (2.0, True, "2 M/s (at most 1.5, **not reached**)"),
        (None, False, "- M/s (at least 1.5, not measured)"),
    ],
)
def test_a_target_says_whether_it_is_reached(
    measured: float | None, at_most: bool, text: str
) -> None:
    assert str(Target("{} M/s", 1.5, measured, at_most)) == text


def test_the_best_peer_is_a_package_from_pypi() -> None:
    rates = {ShmringQueue: 9.0, MultiprocessingPipe: 8.0, FasterFifo: 2.0, Membridge: 3.0}
    found = {transport: Runs([rate]) for transport, rate in rates.items()}
    assert str(report.beside_best_peer(found, 2, 9.0)).startswith("3 times membridge")
    assert report.beside_best_peer({ShmringQueue: Runs([9.0])}, 2, 9.0).measured is None


def test_curves_are_measured_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "SIZES", (8, 4096))
    monkeypatch.setattr(curves, "present", lambda kind, peers: [ShmringQueue, Broken])
    options = ["--runs", "1", "--scale", "0.002", "--short", "--results", str(tmp_path)]
    assert curves.main(options) == 0
    found = json.loads((tmp_path / "curves.json").read_text())
    assert "no such thing here" in found["by_size"]["rates"]["broken"][0]["error"]
    for name in ("rate_by_size", "round_trip_free"):
        assert "shmring.Queue" in (tmp_path / f"{name}.svg").read_text()


def test_scaling_is_measured_and_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "WAITING", "2:1")
    monkeypatch.setattr(scaling, "present", lambda kind, **options: [ShmringQueue, Broken])
    options = ["--runs", "1", "--scale", "0.002", "--results", str(tmp_path)]
    assert scaling.main([*options, "--shapes", "1:1", "2:3"]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert "no such thing here" in found["rates"]["broken"][0]["error"]
    for label in ("shmring.Queue", scaling.BATCHES):
        assert found["rates"][label][1]["cpu_us_a_message"] > 0
    assert list(found["puts_us"]["2:1"]) == ["shmring.Queue"]
    output = capsys.readouterr().out
    assert "NUMA node" in output
    assert "| 2:3 |" in output
    assert "shmring.Queue" in (tmp_path / "scaling.svg").read_text()


def test_the_places_of_cpus_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(4):
        topology = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
        (tmp_path / "node" / f"node{cpu % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "node" / f"node{cpu % 2}" / "cpulist").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(benchmarks, "SYSTEM", tmp_path)
    assert benchmarks.machine()["places"] == "2 NUMA nodes (0,2; 1,3), hyper-threads (0,2; 1,3)"


@needs_compiler
def test_limits_and_shares_of_them_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert f"| shmring.Queue | {limits.LIMITS[share['limit']]} |" in capsys.readouterr().out


def test_a_call_over_its_budget_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = dict.fromkeys(instructions.CALLS, 1000.0)
    monkeypatch.setattr(instructions, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setattr(instructions, "count", lambda: dict(counted))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert instructions.main([]) == 2, "no budget for this environment"
    assert instructions.main(["--where-known"]) == 0
    assert instructions.main(["--write"]) == 0
    counted["get"] = 1051.0
    assert instructions.main([]) == 1
    assert "1,051  of      1,000  +5.1%  over by more than 5%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="peek"):
        instructions.judge({"put": 1.0}, {"put": 1.0, "peek": 1.0})

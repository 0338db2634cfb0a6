"""The table of what is to be reached is measured line by line.  No speed is judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import benched  # noqa: F401  # isort: skip  (it adds the path)
from benchmarks import limits, targets
from benchmarks.turns import Runs


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_every_line_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "BUILD", tmp_path / "build")
    monkeypatch.setattr(targets.scaling, "IDLE", 4)
    found = tmp_path / "found.json"
    assert targets.main(["--runs", "1", "--scale", "0.001", "--json", str(found)]) == 0
    lines = json.loads(found.read_text())["lines"]
    assert len(lines) == len(targets.LINES)
    measured = [aim["measured"] for line in lines for aim in line["aims"]]
    assert all(value is None or value > 0 for value in measured)
    assert sum(value is None for value in measured) == 7, "what is compared with peers alone"
    told = capsys.readouterr().out
    assert all(f"| {line['work']} |" in told for line in lines)


def test_lines_can_be_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        targets.main(["--only", "no-such-line"])
    assert "no-such-line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "most", "told"),
    [
        (2.0, False, "2 M/s (at least 1.5)"),
        (1.0, False, "1 M/s (at least 1.5, **not reached**)"),
        (1.0, True, "1 M/s (at most 1.5)"),
        (2.0, True, "2 M/s (at most 1.5, **not reached**)"),
        (None, False, "- M/s (at least 1.5, not measured)"),
    ],
)
def test_an_aim_says_whether_it_is_reached(measured: float | None, most: bool, told: str) -> None:
    assert str(targets.Aim("{} M/s", 1.5, measured, most)) == told


def test_only_peers_are_the_best_peer() -> None:
    rates = {
        "shmring.Queue": 9.0,
        "multiprocessing.Pipe": 8.0,
        "faster-fifo": 2.0,
        "pyzmq ipc": 3.0,
    }
    found = {label: Runs([rate]) for label, rate in rates.items()}
    assert targets.best_peer(found) == ("pyzmq ipc", 3.0)
    assert targets.beside(found, 2).measured == 3.0
    assert targets.best_peer({"shmring.Queue": Runs([1.0])}) is None

"""The limits of the machine are measured, and shares of them told.  No speed is judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benched import ROOT  # isort: skip  (it adds the path)
from benchmarks import limits


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_every_limit_is_measured(
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
    assert "| 64 B bytes, one call a message | shmring.Queue |" in capsys.readouterr().out


def test_shares_of_rates_and_of_times() -> None:
    bounds = dict.fromkeys(limits.LIMITS, 1000.0)
    questions = {
        "1 MiB float32, writable, summed": {
            "shmring.Queue": {"megabytes_per_second": 0.0005},
            "faster-fifo": {"megabytes_per_second": 0.0001},
        },
        "round trip of 64 B": {"shmring.Ring": {"median_us": 4.0}},
    }
    found = {one["transport"]: one["share"] for one in limits.shares(bounds, questions)}
    assert found == {"shmring.Queue": pytest.approx(0.5), "shmring.Ring": pytest.approx(0.25)}


def test_every_share_is_of_a_question_that_is_asked() -> None:
    asked = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("bench_*.py"))
    asked = asked.replace("{BATCH}", "100")
    missing = [one.question for one in limits.SHARES if f'"{one.question}"' not in asked]
    assert not missing
    assert {one.limit for one in limits.SHARES} <= limits.LIMITS.keys()


def test_without_a_compiler_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -x")
    with pytest.raises(SystemExit, match="no-such-compiler"):
        limits.compiled(tmp_path)

"""A call that grew is reported with both figures; what cannot be compared is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("tests without their benchmarks", allow_module_level=True)
pytest.importorskip("shmring._core", reason="the extension is not built")
pytest.importorskip("numpy")
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402  (the path first)
from benchmarks import budgets, counting


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """What counting finds; the file of the budgets is an empty one."""
    found = dict.fromkeys(budgets.CALLS, 1000.0)
    monkeypatch.setattr(budgets, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setattr(budgets, "count", lambda package: dict(found))
    monkeypatch.setattr(counting, "missing", lambda: None)
    return found


def test_within_the_budget(counted: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    assert budgets.main(["--write"]) == 0
    assert json.loads(budgets.BUDGETS.read_text()) == {budgets.environment(): counted}
    counted["put"] = 1049.0
    assert budgets.main([]) == 0
    assert "1,049  of      1,000  +4.9%" in capsys.readouterr().out


def test_over_the_budget(counted: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    budgets.main(["--write"])
    counted["get"] = 1051.0
    assert budgets.main(["--where-known"]) == 1
    out = capsys.readouterr().out
    assert "1,051  of      1,000  +5.1%  over by more than 5%" in out
    assert "--write" in out
    budgets.main(["--write"])
    assert budgets.main([]) == 0, "the file was changed"


def test_an_unknown_environment_is_named(
    counted: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert budgets.main([]) == 2
    assert budgets.main(["--where-known"]) == 0
    assert f"skipped: budgets.json has no budget for {budgets.environment()}" in (
        capsys.readouterr().out
    )


def test_without_valgrind_that_is_said(
    counted: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counting, "missing", lambda: "there is no valgrind")
    assert budgets.main(["--where-known"]) == 0
    assert "skipped: there is no valgrind" in capsys.readouterr().out


def test_a_call_without_a_budget_is_an_error() -> None:
    with pytest.raises(SystemExit, match="peek"):
        budgets.judged({"put": 1.0}, {"put": 1.0, "peek": 1.0})


def test_the_budgets_are_of_the_calls_that_are_counted() -> None:
    for known in json.loads(budgets.BUDGETS.read_text()).values():
        assert known.keys() == budgets.CALLS.keys()


@pytest.mark.skipif(counting.missing() is not None, reason=str(counting.missing()))
def test_instructions_grow_with_the_work(tmp_path: Path) -> None:
    program = "import sys\nfor _ in range(int(sys.argv[1])): pass"
    few, many = (counting.instructions(program, turns, package=tmp_path) for turns in (1, 100_000))
    assert many - few > 100_000

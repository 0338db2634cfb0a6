"""The curves are measured and drawn; what is missing is said by name.  No speed is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import benched  # noqa: F401  # isort: skip  (it adds the path)
from benchmarks import curves, plots
from benchmarks.adapters import MultiprocessingPipe, ShmringQueue, Transport


class Short(ShmringQueue):
    """Takes nothing large."""

    label = "short"
    largest = 8


class Broken(ShmringQueue):
    label = "broken"

    def __init__(self, work: Any) -> None:
        raise OSError("no such thing here")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    chosen: list[type[Transport]] = [ShmringQueue, MultiprocessingPipe, Short, Broken]
    measured = {
        "machine": curves.machine.describe(),
        "runs": 1,
        "by_size": curves.by_size(chosen, 1, 0.001, [8, 1 << 20]),
        "round_trips": curves.round_trips(chosen, 1, 0.001),
        "by_processes": curves.by_processes(chosen, 1, 0.001, [(1, 1), (2, 3)]),
    }
    return json.loads(json.dumps(measured))


def test_each_point_is_a_rate_an_error_or_nothing(found: dict[str, Any]) -> None:
    rates = found["by_size"]["rates"]
    assert [point["median"] > 0 for point in rates["shmring.Queue"]] == [True, True]
    assert rates["short"][0]["median"] > 0
    assert rates["short"][1] is None, "it takes no message of that size"
    assert "no such thing here" in rates["broken"][1]["error"]
    assert found["by_processes"]["shapes"] == ["1:1", "2:3"]
    assert "multiprocessing.Pipe" not in found["by_processes"]["rates"], "for one and one only"


def test_round_trips_are_told_by_quantile(found: dict[str, Any]) -> None:
    spread = found["round_trips"]
    microseconds = spread["free"]["shmring.Queue"]
    assert len(microseconds) == len(spread["quantiles"])
    assert microseconds == sorted(microseconds)
    assert "broken" not in spread["free"]


def test_the_curves_are_drawn(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "curves.json").write_text(json.dumps(found))
    paths = plots.draw(tmp_path)
    assert {"rate_by_size.svg", "round_trip_free.svg", "rate_by_processes.svg"} <= {
        path.name for path in paths
    }
    first = paths[0].read_text()
    assert "shmring.Queue" in first
    assert found["machine"]["kernel"] in first


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"extra `bench`"):
        plots.draw(tmp_path)


def test_without_curves_the_program_that_makes_them_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=r"benchmarks\.curves"):
        plots.draw(tmp_path)


def test_the_program_writes_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(curves, "able", lambda kind: [ShmringQueue])
    monkeypatch.setattr(curves, "SHAPES", ((1, 1),))
    options = ["--runs", "1", "--scale", "0.001", "--short", "--results", str(tmp_path / "new")]
    assert curves.main(options) == 0
    written = tmp_path / "new" / "curves.json"
    assert capsys.readouterr().out == f"{written}\n"
    assert json.loads(written.read_text())["by_size"]["sizes"] == [8, 64, 512, 4096]

"""``shmring doctor`` and ``shmring bench``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest

import shmring
from shmring.cli import doctor
from shmring.cli.bench import Row, svg_of
from shmring.cli.common import age, amount, cut, size
from support import run_command

ring_only = pytest.mark.skipif(
    shmring.backend != "ring", reason="the fallback has no ring to examine"
)


@ring_only
def test_doctor_finds_this_machine_fit() -> None:
    done = run_command("doctor")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "back end         ring: the compiled extension" in done.stdout
    for name in ("kernel", "robust futexes", "futex_waitv", "/dev/shm", "seccomp", "compiler"):
        assert f" {name} " in done.stdout
    shown = json.loads(run_command("doctor", "--json").stdout)
    assert shown["ok"] is True
    assert {each["state"] for each in shown["checks"]} <= {"ok", "note"}


def test_doctor_says_why_the_fallback_serves() -> None:
    done = run_command("doctor", SHMRING_BACKEND="queue")
    assert "SHMRING_BACKEND=queue asks for the fallback" in done.stdout
    blocked = (
        "import sys; sys.modules['shmring._core.object_ring'] = None\n"
        "from shmring.cli.main import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "SHMRING_BACKEND": ""},
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "bad   back end         queue, the fallback: " in done.stdout


@ring_only
@pytest.mark.parametrize(("free", "state"), [(100, "bad"), (20 << 20, "note"), (1 << 30, "ok")])
def test_doctor_knows_a_small_shm(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(f_blocks=1 << 30, f_frsize=1, f_bavail=free)
    monkeypatch.setattr(os, "statvfs", lambda path: room)
    check = doctor._shared_memory()
    assert check.state == state
    assert ("--shm-size" in check.remedy) == (state != "ok")


def test_a_check_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Check:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_kernel", broken)
    assert ("broken", "note", "cannot be told: OSError: no such thing", "") in doctor.checks()


@pytest.mark.both_backends
def test_bench_prints_a_table_and_draws_it(tmp_path: Path) -> None:
    drawing = tmp_path / "bench.svg"
    done = run_command("bench", "--seconds", 1, "--svg", drawing)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["a", "second", "multiprocessing", "shmring", "times"]
    assert [line[:10].strip() for line in lines[1:5]] == [
        "64 bytes",
        "small dict",
        "64 KiB",
        "1 MiB",
    ]
    assert "docs/cli.md" in lines[-1]
    assert xml.etree.ElementTree.parse(drawing).getroot().tag.endswith("svg")


@ring_only
def test_bench_as_json() -> None:
    shown = json.loads(run_command("bench", "--seconds", 1, "--json").stdout)
    assert [each["name"] for each in shown["rows"]][-1] == "pool, empty tasks"
    assert all(each["ratio"] > 0 and each["runs"] >= 3 for each in shown["rows"])


def test_bench_refuses_a_drawing_that_cannot_be_written() -> None:
    done = run_command("bench", "--svg", "/nix/bench.svg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "shmring: --svg /nix/bench.svg: No such file or directory\n"


def test_a_drawing_names_every_row() -> None:
    drawing = svg_of([Row("<a>", 100.0, 250.0, 3), Row("b", 5.0, 1.0, 3)])
    texts = [each.text for each in xml.etree.ElementTree.fromstring(drawing).iter()]
    assert {"<a>", "b", "100/s", "250/s  (2.5 x)", "1/s  (0.2 x)"} <= {*texts}


def test_numbers_for_people() -> None:
    shown = [amount(each) for each in (0, 999, 999.6, 1000, 9949, 9951, 999_499, 999_600, 3e6)]
    assert shown == ["0", "999", "1.0k", "1.0k", "9.9k", "10k", "999k", "1.0M", "3.0M"]
    assert [amount(each) for each in (1 << 64, 1 << 94)] == ["18E", "20R"]
    assert [size(each) for each in (1024, 3 << 20, 5 << 30)] == ["1 KiB", "3.0 MiB", "5.0 GiB"]
    assert [age(each) for each in (5, 119, 120, 7300, 200_000)] == ["5s", "119s", "2m", "2h", "2d"]
    assert [cut("abcdef", each) for each in (None, 6, 3, 0)] == ["abcdef", "abcdef", "ab…", "…"]

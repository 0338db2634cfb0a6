"""The models of the protocol: a few small searches, and what the plan of all of them must cover."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

MODELS = Path(__file__).resolve().parents[2] / "docs" / "model"
CHECK = MODELS / "check.py"

if not CHECK.exists():
    pytest.skip("the models stand in the tree, not here", allow_module_level=True)

with_spin = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="needs spin and gcc (apt-get install spin gcc)",
)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_models", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def named(text: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, text, re.MULTILINE))


@with_spin
def test_the_quick_searches() -> None:
    done = subprocess.run(
        [sys.executable, str(CHECK), "--quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@with_spin
@pytest.mark.parametrize(
    ("mistake", "said"),
    [("NO_SUCH_MISTAKE", "NOT FOUND"), ("NO_SECOND_LOOK", "found: assertion violated")],
)
def test_a_mistake_that_is_not_found_is_said(
    check: ModuleType, tmp_path: Path, mistake: str, said: str
) -> None:
    search = check.Search("count", 0, "COMMITS=1", mistake)
    outcome = check.run(search, tmp_path)
    assert outcome.text(search).startswith(said)
    assert outcome.is_right(search) == (said != "NOT FOUND")


@with_spin
def test_an_error_in_a_model_is_said(check: ModuleType, tmp_path: Path) -> None:
    search = check.Search("count", 0, "COMMITS=1 NO_SECOND_LOOK")
    outcome = check.run(search, tmp_path)
    assert outcome.text(search).startswith("ERROR: assertion violated")
    assert not outcome.is_right(search)


@with_spin
def test_a_model_that_cannot_be_built_is_no_success(check: ModuleType, tmp_path: Path) -> None:
    search = check.Search("lock", 0, mistake="PROCESSES=-")
    outcome = check.run(search, tmp_path)
    assert outcome.text(search).startswith("FAILED: ")
    assert not outcome.is_right(search)


def test_the_plan_knows_every_model_and_every_switch(check: ModuleType) -> None:
    """A switch that no search throws shows nothing."""
    planned = {search.model for search in check.PLAN}
    assert planned == {path.stem for path in MODELS.glob("*.pml")}
    thrown = {
        define.removeprefix("-D").partition("=")[0] for s in check.PLAN for define in s.defines()
    }
    for path in MODELS.glob("*.*"):
        if path.suffix in (".pml", ".inc"):
            text = path.read_text()
            given = named(text, r"^ *#define +(\w+)")
            switches = named(text, r"^#ifn?def (\w+)") | named(text, r"defined\((\w+)\)")
            assert switches - given <= thrown, path.name


def test_each_model_is_searched_with_a_crash_and_without_a_mistake(check: ModuleType) -> None:
    whole = {search.model for search in check.PLAN if search.crashes and not search.mistake}
    assert whole == {path.stem for path in MODELS.glob("*.pml")}
    found = {search.model for search in check.PLAN if search.mistake}
    assert found == whole

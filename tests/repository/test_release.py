"""What is released: the changelog's section of a tag, and a build without a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import shmring

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = "# Changelog\n\n## [1.1.0] - unreleased\n\n- b\n\n## [1.0.0] - 2026-01-31\n\n- a\n"


@pytest.fixture
def release_notes() -> ModuleType:
    path = ROOT / ".github" / "release_notes.py"
    if not path.exists():
        pytest.skip("an sdist has no .github")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notes_of_a_tag_are_its_section(release_notes: ModuleType) -> None:
    assert release_notes.notes("v1.0.0", "1.0.0", SECTIONS) == "- a"


@pytest.mark.parametrize(
    ("tag", "version", "reason"),
    [
        ("v1.0.0", "1.1.0", "is not v1.1.0"),
        ("v1.1.0", "1.1.0", "write the date"),
        ("v1.0", "1.0", "there is no section"),
    ],
)
def test_a_tag_without_a_dated_section_is_not_released(
    release_notes: ModuleType, tag: str, version: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        release_notes.notes(tag, version, SECTIONS)


def test_the_changelog_has_a_section_for_the_version(release_notes: ModuleType) -> None:
    assert release_notes.version() == shmring.__version__
    assert f"\n## [{shmring.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is Linux only")
def test_without_a_compiler_one_line_says_that_the_fallback_is_installed(tmp_path: Path) -> None:
    tree, built = tmp_path / "tree", tmp_path / "built"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "cython", tree / "cython")
    for source in tree.glob("cython/shmring/_core/*.pyx"):
        if source.stem != "locked_memory":  # the shortest; they all fail alike
            source.unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", built],
        cwd=tree,
        env={**os.environ, "CC": "/bin/false", "SHMRING_REQUIRE_EXTENSION": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("shmring: ")]
    assert "could not be built" in said
    assert "multiprocessing.Queue" in said

    program = "import shmring; q = shmring.Queue(); q.put(1); print(shmring.backend, q.get())"
    used = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(built), "SHMRING_BACKEND": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert used.stdout == "queue 1\n", used.stderr
    assert "RuntimeWarning: shmring runs on its fallback" in used.stderr

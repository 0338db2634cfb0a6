"""Code blocks of the documents: each runs, and prints what stands under it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Not run: sh (what installs, needs another terminal or another machine) is read by a shell.
LANGUAGES = {"", "console", "pycon", "python", "sh", "text", "yaml", "{eval-rst}", "{toctree}"}


def blocks() -> list[tuple[str, str, str, str | None]]:
    """(document and line, language, source, expected output) of each fenced block."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.finditer(
            r"^```(\S*)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text, re.M | re.S
        ):
            line = text.count("\n", 0, block.start()) + 1
            found.append((f"{path.relative_to(ROOT).as_posix()}:{line}", *block.groups()))
    return found


BLOCKS = blocks()
PROGRAMS = [
    pytest.param(code, output, id=where)
    for where, language, code, output in BLOCKS
    if language in ("python", "pycon")
]
COMMANDS = [
    pytest.param(code, output, id=where)
    for where, language, code, output in BLOCKS
    if language == "console"
]
SHELL = [pytest.param(code, id=where) for where, language, code, _ in BLOCKS if language == "sh"]


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_readme_has_an_example_of_ten_lines() -> None:
    (source,) = (
        code
        for where, language, code, _ in BLOCKS
        if where.startswith("README.md") and language == "python"
    )
    assert len([line for line in source.splitlines() if line]) == 10


def test_each_block_has_a_language_that_is_tested() -> None:
    assert {language for _, language, _, _ in BLOCKS} - LANGUAGES == set()


@pytest.mark.parametrize(("source", "output"), PROGRAMS)
def test_an_example_runs(source: str, output: str | None, tmp_path: Path) -> None:
    """A block with prompts is a doctest, and its answers are compared."""
    for package in re.findall(r"^import (pandas|pyarrow|torch)\b", source, re.M):
        pytest.importorskip(package)
    if "metrics.serve" in source:
        pytest.importorskip("ssl")
    program = tmp_path / "example.py"
    arguments = [str(program)]
    if ">>> " in source:
        program = tmp_path / "example.txt"
        arguments = ["-m", "doctest", str(program)]
    program.write_text(source, encoding="utf-8")
    done = run([sys.executable, *arguments], tmp_path)
    assert output is None or done.stdout == output
    # The pool logs which worker died.
    assert [
        line for line in done.stderr.splitlines() if not line.startswith("shmring-worker-")
    ] == []


@pytest.mark.parametrize(("source", "output"), COMMANDS)
def test_a_command_runs(source: str, output: str | None, tmp_path: Path) -> None:
    commands = re.findall(r"^\$ (.*)$", source, re.M)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run(["bash", "-e", "-o", "pipefail", "-c", "\n".join(commands)], tmp_path, PATH=path)
    assert commands
    assert output is None or done.stdout == output
    assert done.stderr == ""


@pytest.mark.parametrize("source", SHELL)
def test_a_shell_block_can_be_read(source: str, tmp_path: Path) -> None:
    run(["bash", "-n", "-c", source], tmp_path)


def test_links_between_documents_lead_somewhere() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert not missing


def slug(heading: str) -> str:
    """The anchor of a heading, as on the site and where the file is shown as it is."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_errors_name_pages_that_exist() -> None:
    """`(docs: PAGE#ANCHOR)` in the text of an error or a warning."""
    anchors = {
        f"{path.stem}#{slug(heading)}"
        for path in (ROOT / "docs").rglob("*.md")
        for heading in ["", *re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)]
    }
    named = {
        reference if "#" in reference else f"{reference}#"
        for folder in ("src", "cython")
        for path in (ROOT / folder).rglob("*.py*")
        if path.suffix in (".py", ".pyx")
        for reference in re.findall(r"\(docs: ([\w#-]+)\)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 3
    assert named - anchors == set()

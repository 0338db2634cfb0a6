"""Examples of the documents: each Python block runs as a program of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def examples() -> list[tuple[str, str]]:
    """(document and line, source) of each ```python block."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.finditer(r"^```(?:python|pycon)\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, block.start()) + 1
            found.append((f"{path.relative_to(ROOT).as_posix()}:{line}", block[1]))
    return found


EXAMPLES = examples()


def test_the_readme_has_an_example_of_ten_lines() -> None:
    (source,) = (source for where, source in EXAMPLES if where.startswith("README.md"))
    assert len([line for line in source.splitlines() if line]) == 10


@pytest.mark.parametrize("source", [pytest.param(code, id=where) for where, code in EXAMPLES])
def test_an_example_runs(source: str, tmp_path: Path) -> None:
    """A block with prompts is a doctest, and its answers are compared."""
    program = tmp_path / "example.py"
    arguments = [str(program)]
    if ">>> " in source:
        program = tmp_path / "example.txt"
        arguments = ["-m", "doctest", str(program)]
    program.write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_links_between_documents_lead_somewhere() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert not missing

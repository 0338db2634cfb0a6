"""Print the changelog's section of a tag, or say why the tag cannot be released.

``release_notes.py v1.2.3``; run by release.yml.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """The version, where it stands: pyproject.toml reads the same line."""
    text = (ROOT / "src" / "shmring" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def notes(tag: str, version: str, changelog: str) -> str:
    """The section of the version; ValueError unless it is there, dated, and the tag's."""
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} is not v{version}, the version in src/shmring/__init__.py")
    _, *sections = re.split(r"^## ", changelog, flags=re.MULTILINE)
    for section in sections:
        title, _, body = section.partition("\n")
        if not title.startswith(f"[{version}]"):
            continue
        if not re.fullmatch(r"\[.+\] - \d{4}-\d\d-\d\d", title):
            raise ValueError(f"CHANGELOG.md: write the date of release into: ## {title}")
        if not body.strip():
            raise ValueError(f"CHANGELOG.md: the section {version} is empty")
        return body.strip()
    raise ValueError(f"CHANGELOG.md: there is no section ## [{version}] - YYYY-MM-DD")


def main(tag: str) -> None:
    try:
        print(notes(tag, version(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    except ValueError as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main(*sys.argv[1:])

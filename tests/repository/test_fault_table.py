"""docs/faults.md and docs/guarantees.md promise what tests show, and nothing else."""

from __future__ import annotations

import re

import pytest

from faults import FAULTS, PAGE, TESTS, files_with_tests, marked_tests, page

GUARANTEES = TESTS.parent / "docs" / "guarantees.md"


def test_the_page_is_what_the_marks_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(marked_tests()), "run `make faults`"


def test_every_row_has_a_test() -> None:
    shown = {number for each in marked_tests() for number in each.faults}
    assert shown - FAULTS.keys() == set(), "no such row in tests/faults.py"
    assert set(FAULTS) == set(range(1, len(FAULTS) + 1))
    assert FAULTS.keys() - shown == set()


def test_no_mark_is_overlooked() -> None:
    """One that stands on a class or on a whole module would not be collected."""
    marks = {
        path.relative_to(TESTS).as_posix(): len(
            re.findall(r"\bmark\.fault\(", re.sub(r'""".*?"""', "", path.read_text(), flags=re.S))
        )
        for path in files_with_tests()
        if path.name != "test_fault_table.py"
    }
    collected = marked_tests()
    for path, count in marks.items():
        assert count == sum(each.path == path for each in collected), path


def promises() -> list[tuple[str, str]]:
    """The table of guarantees: (what dies, a test that is named as showing it)."""
    (table,) = re.findall(r"^## What survives$(.*?)^#", GUARANTEES.read_text(), re.M | re.S)
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    return [
        (" ".join(cell.strip() for cell in row[:-1]), name)
        for row in rows
        for name in re.findall(r"`([^`]+)`", row[-1])
    ]


@pytest.mark.parametrize(("promise", "named"), promises(), ids=lambda text: text[:40])
def test_a_guarantee_names_a_marked_test(promise: str, named: str) -> None:
    """`file.py::test_the_begin…`, with the file left out where it is that of the one before."""
    path, _, name = named.rpartition("::")
    begin = name.removesuffix("…")
    matching = [
        each
        for each in marked_tests()
        if (not path or each.path == path)
        and (each.name.startswith(begin) or each.path == named)
        and not each.torture
    ]
    assert matching, f"{promise}: no test of `make test` that bears a fault's mark is {named}"

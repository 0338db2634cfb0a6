"""The interpreters of `make matrix`: found, or missing with a reason."""

from __future__ import annotations

import sys

import pytest

import matrix
from matrix import CannotTryError, Row


def test_an_interpreter_is_found_by_its_path():
    found = matrix.find(sys.executable)
    assert found.version == sys.version.split()[0]
    assert found.answers_to(f"3.{sys.version_info.minor}{found.kind}")
    assert not found.answers_to("3.99")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [("3.99", "give its path"), ("four", "neither a version"), ("/bin/false", "is no Python")],
)
def test_a_missing_interpreter_is_named_with_the_reason(wanted, reason):
    with pytest.raises(CannotTryError, match=reason):
        matrix.find(wanted)


def test_the_table_has_a_line_for_each_row_and_says_what_was_not_tried():
    rows = [
        Row("3.12", "3.12.1", "glibc 2.36", passed=10, skipped=2, build_s=60, tests_s=200),
        Row("3.14t", problem="not tried: give its path"),
    ]
    head, tested, missing = matrix.table(rows).splitlines()
    assert head.split()[:3] == ["interpreter", "version", "libc"]
    assert tested.split()[:2] == ["3.12", "3.12.1"]
    assert missing.split(maxsplit=1) == ["3.14t", "not tried: give its path"]
    assert [row.is_green for row in rows] == [True, False]

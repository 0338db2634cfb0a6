"""How many small messages a second, when two processes send and two receive?"""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import ManyToMany
from benchmarks.transports import able
from benchmarks.work import bytes_of

WORK = bytes_of(64, count=300_000)


@pytest.mark.benchmark(group="64 B bytes, 2:2")
@pytest.mark.parametrize(
    "transport", able("bytes", shared=True), ids=lambda transport: transport.label
)
def test_two_to_two(compare: Compare, transport: type[Transport]) -> None:
    compare(ManyToMany, transport, WORK)

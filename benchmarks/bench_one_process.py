"""What do the calls themselves cost, with nobody else about?"""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import OneProcess
from benchmarks.transports import able
from benchmarks.work import bytes_of

WORK = bytes_of(64, count=300_000)


@pytest.mark.benchmark(group="put + get of 64 B in one process")
@pytest.mark.parametrize(
    "transport", able("bytes", between_processes=False), ids=lambda transport: transport.label
)
def test_one_process(compare: Compare, transport: type[Transport]) -> None:
    compare(OneProcess, transport, WORK)

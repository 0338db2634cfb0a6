"""How many small messages a second go from one process to another, one call each?"""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import OneWay
from benchmarks.transports import able
from benchmarks.work import bytes_of

WORK = bytes_of(64)


@pytest.mark.benchmark(group="64 B bytes, one call a message")
@pytest.mark.parametrize("transport", able("bytes"), ids=lambda transport: transport.label)
def test_small(compare: Compare, transport: type[Transport]) -> None:
    compare(OneWay, transport, WORK)

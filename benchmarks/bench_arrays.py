"""How fast do large arrays arrive that may be written to, and are added up once?"""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import OneWay
from benchmarks.transports import able
from benchmarks.work import arrays

ONE_MIB = arrays(1 << 20, count=1000)
EIGHT_MIB = arrays(8 << 20, count=120)


@pytest.mark.benchmark(group="1 MiB float32, writable, summed")
@pytest.mark.parametrize("transport", able("array"), ids=lambda transport: transport.label)
def test_one_mib(compare: Compare, transport: type[Transport]) -> None:
    compare(OneWay, transport, ONE_MIB)


@pytest.mark.benchmark(group="8 MiB float32, writable, summed")
@pytest.mark.parametrize("transport", able("array"), ids=lambda transport: transport.label)
def test_eight_mib(compare: Compare, transport: type[Transport]) -> None:
    compare(OneWay, transport, EIGHT_MIB)

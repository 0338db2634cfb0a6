"""What is won by put_many and get_many?  Transports that have none send one by one."""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import OneWay
from benchmarks.transports import able
from benchmarks.work import BATCH, bytes_of, small_dicts

BYTES = bytes_of(64, count=1_000_000)
DICTS = small_dicts(count=150_000)


@pytest.mark.benchmark(group=f"64 B bytes, batches of {BATCH}")
@pytest.mark.parametrize("transport", able("bytes"), ids=lambda transport: transport.label)
def test_batches_of_bytes(compare: Compare, transport: type[Transport]) -> None:
    compare(OneWay, transport, BYTES, batches=True)


@pytest.mark.benchmark(group=f"small dict, batches of {BATCH}")
@pytest.mark.parametrize("transport", able("object"), ids=lambda transport: transport.label)
def test_batches_of_dicts(compare: Compare, transport: type[Transport]) -> None:
    compare(OneWay, transport, DICTS, batches=True)

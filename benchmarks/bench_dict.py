"""How many small objects a second, when they have to be encoded and decoded?"""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import OneWay
from benchmarks.transports import able
from benchmarks.work import small_dicts

WORK = small_dicts()


@pytest.mark.benchmark(group="small dict, one call a message")
@pytest.mark.parametrize("transport", able("object"), ids=lambda transport: transport.label)
def test_dict(compare: Compare, transport: type[Transport]) -> None:
    compare(OneWay, transport, WORK)

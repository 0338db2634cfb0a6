"""How long until the answer is there?

Left alone, the scheduler may put both processes on one CPU or on two, and that
decides more than the transport does; hence both: free, and bound to two CPUs.
"""

from __future__ import annotations

import pytest

from benchmarks.adapters import Transport
from benchmarks.conftest import Compare
from benchmarks.sessions import RoundTrips, two_cpus
from benchmarks.transports import able
from benchmarks.work import bytes_of

WORK = bytes_of(64, count=20_000)


@pytest.mark.benchmark(group="round trip of 64 B")
@pytest.mark.parametrize("transport", able("bytes"), ids=lambda transport: transport.label)
def test_round_trip(compare: Compare, transport: type[Transport]) -> None:
    compare(RoundTrips, transport, WORK)


@pytest.mark.skipif(two_cpus() is None, reason="one CPU, or a platform that does not bind to one")
@pytest.mark.benchmark(group="round trip of 64 B, a CPU each")
@pytest.mark.parametrize("transport", able("bytes"), ids=lambda transport: transport.label)
def test_round_trip_apart(compare: Compare, transport: type[Transport]) -> None:
    compare(RoundTrips, transport, WORK, apart=True)

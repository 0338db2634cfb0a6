"""All of them: ours, the standard library's and the peers; a new one is added to its list."""

from __future__ import annotations

from benchmarks.adapters import TRANSPORTS, Transport
from benchmarks.peers import PEERS

__all__ = ["EVERY", "able"]

EVERY: tuple[type[Transport], ...] = (*TRANSPORTS, *PEERS)


def able(
    kind: str, *, between_processes: bool = True, shared: bool = False
) -> list[type[Transport]]:
    """The transports that can do work of this kind.

    Args:
        kind: what they must carry.
        between_processes: leave out what threads use.
        shared: leave out what has only one producer and one consumer.
    """
    return [
        transport
        for transport in EVERY
        if kind in transport.carries
        and (transport.between_processes or not between_processes)
        and (transport.shared or not shared)
    ]

"""Taking: one message or many, as bytes."""

from collections.abc import Iterable
from typing import Any

from shmring._core.handle import RingHandle

class TakingRing(RingHandle):
    def get_many(
        self,
        max_items: int | None = None,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> list[Any]: ...

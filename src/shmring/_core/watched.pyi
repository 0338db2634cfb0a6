"""Whether what others register has changed since it was copied."""

from collections.abc import Iterable
from typing import Any

class Watched:
    def __init__(self, dicts: Iterable[dict[Any, Any]], awaited: str | None = None) -> None: ...
    def changed(self) -> bool: ...

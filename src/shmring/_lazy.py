"""Names of a module that are imported when first asked for (PEP 562).

A spawned child imports this package before its first message; what it does not
use must not delay it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(
    namespace: dict[str, Any], names: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` for a module that exports names of others.

    For type checkers the same names must be imported under ``TYPE_CHECKING``.

    Args:
        namespace: the module's ``globals()``, where a name is kept once it is known.
        names: what each module of this package defines.  These modules and their
            packages can be asked for too, as if they had been imported.
    """
    own_name: str = namespace["__name__"]
    homes = {name: home for home, defined in names.items() for name in defined}

    def __getattr__(name: str) -> Any:
        home = homes.get(name)
        if home is not None:
            value = getattr(importlib.import_module(f"shmring.{home}"), name)
        elif any(f"{each}.".startswith(f"{name}.") for each in names):
            value = importlib.import_module(f"shmring.{name}")
        else:
            raise AttributeError(f"module {own_name!r} has no attribute {name!r}")
        namespace[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*namespace, *homes})

    return __getattr__, __dir__

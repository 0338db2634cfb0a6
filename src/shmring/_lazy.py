"""Names of a module that are imported when somebody first asks for them (PEP 562).

A child that is handed a queue imports this package before it can say anything;
what it does not use is not to keep it waiting.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(
    namespace: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a module that has its names from elsewhere.

    For type checkers the same names have to be imported under ``TYPE_CHECKING``.

    Args:
        namespace: the module's ``globals()``, where each name is kept once it is known.
        homes: the module of this package in which each name is defined.  These modules,
            and the packages they are in, can be asked for as well, as if they had been imported.

    Returns:
        The two functions, for the module to bind.
    """
    own_name: str = namespace["__name__"]

    def __getattr__(name: str) -> Any:
        home = homes.get(name)
        if home is not None:
            value = getattr(importlib.import_module(f"shmring.{home}"), name)
        elif any(f"{each}.".startswith(f"{name}.") for each in homes.values()):
            value = importlib.import_module(f"shmring.{name}")
        else:
            raise AttributeError(f"module {own_name!r} has no attribute {name!r}")
        namespace[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*namespace, *homes})

    return __getattr__, __dir__

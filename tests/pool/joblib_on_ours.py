"""pytest plugin: joblib's own tests, with our backend in the place of loky."""

from __future__ import annotations

from typing import Any

import joblib._parallel_backends
import joblib.parallel

from shmring.pool.joblib_backend import ShmringBackend

# name: why it is not run
LEFT_OUT = {
    "test_auto_memmap_on_arrays_from_generator": "deliberate: arrays are no np.memmap",
    "test_memmapping_leaks": "deliberate: likewise",
    "test_multiple_generator_call_separated_gc": "deliberate: no call breaks another's pool",
    "test_initializer_reused": "deliberate: each call has a pool of its own",
    "test_loky_reuse_workers": "deliberate: likewise",
    "test_nested_parallel_warnings[loky-multiprocessing-True]": "private: loky's depth; it works",
    "test_parallel_with_interactively_defined_bound_method_loky": "private: LokyProcess in a log",
}

# The parameter that says what runs the outer calls.
OUTER = ("backend", "parent_backend", "outer_backend")


class LokyBackend(ShmringBackend):
    """Ours, under the name for which the tests look."""


joblib._parallel_backends.LokyBackend = LokyBackend
joblib.parallel.BACKENDS["loky"] = LokyBackend


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what other backends do; programs that are started take ours too."""
    kept = [
        item
        for item in items
        if not {item.name, item.originalname} & LEFT_OUT.keys() and _concerns_us(item)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for name, text in vars(kept[0].module).items():
        if isinstance(text, str) and "from joblib import Parallel" in text:
            setattr(kept[0].module, name, f"import {__name__}\n{text}")


def _concerns_us(item: Any) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("child_backend") == "loky" and "expected" in parameters:
        return True
    outer = [parameters[name] for name in OUTER if name in parameters]
    return not outer or outer[0] in (None, "loky") or isinstance(outer[0], LokyBackend)

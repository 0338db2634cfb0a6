"""A test for greenlets, which gevent may have put in the place of threads."""

from __future__ import annotations

import sys

__all__ = ["are_greenlets"]


def are_greenlets() -> bool:
    """Whether threading.Thread starts greenlets.

    One runs only while its starter waits in gevent's way: a call that sleeps in
    the kernel would keep it from running for ever.
    """
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))

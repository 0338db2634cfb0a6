"""Whether threading starts threads: gevent may have put greenlets in their place."""

from __future__ import annotations

import sys

__all__ = ["are_greenlets"]


def are_greenlets() -> bool:
    """Whether what threading.Thread starts runs only while its starter waits in gevent's way.

    A call that sleeps in the kernel would then keep it from running, for ever.
    """
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))

"""How soon a child can speak: ``python -m benchmarks.hello shmring`` (or ``multiprocessing``).

A program as people write it: it imports the library's Queue at its top, so a
spawned child, which runs the top of its parent's program again, imports it too.
Nothing else is imported here, or both libraries would have it for nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from typing import Any

__all__ = ["main"]

PATIENCE = 120  # seconds
LIBRARY = importlib.import_module(sys.argv[1])  # a child is given the arguments as well
Queue: Any = LIBRARY.Queue


def _say_hello(queue: Any) -> None:
    queue.put("hello")


def main() -> int:
    """Print the seconds from start() of a spawned child until its message is here."""
    multiprocessing.set_start_method("spawn")
    queue = Queue()
    child = multiprocessing.Process(target=_say_hello, args=(queue,))
    began = time.perf_counter()
    child.start()
    try:
        assert queue.get(timeout=PATIENCE) == "hello"
        print(time.perf_counter() - began)
    finally:
        child.join(PATIENCE)
        child.kill()
        queue.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What each guard costs, in instructions: ``python -m benchmarks.guards``.

`put` and `get` of 64 bytes in one process, counted by callgrind (Debian's valgrind),
in builds from which one guard after another was taken out, and then all of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: this folder's parent is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "torture"))

from benchmarks.counting import instructions
from builds import DIRECT, SYNC, Build, Patch  # type: ignore[import-not-found, unused-ignore]

__all__ = ["GUARDS", "main", "messages_cost"]

MESSAGES = 10_000
MODULES = ("_core", "_handle", "_queue")
LOOP = """
import sys, shmring
queue = shmring.Queue()
put, get, message = queue.put, queue.get, bytes(64)
for _ in range(int(sys.argv[1])):
    put(message)
    get()
queue.close()
"""
WITNESS, COUNT = "cython/shmring/_witness.h", "cython/shmring/_count.h"

GUARDS: dict[str, list[Patch]] = {
    "the kernel is told of a lock that is being taken or released": [
        Patch(
            SYNC,
            "    *pending = word == NULL ? NULL"
            " : (struct robust_list *)((char *)word - self->head->futex_offset);\n",
            "    (void)pending, (void)word;\n",
        )
    ],
    "the pid beside the lock word": [
        Patch(WITNESS, "{ store_relaxed32(word + 1, sync_pid()); }", "{ (void)word; }"),
        Patch(WITNESS, "{ store_relaxed32(word + 1, 0); }", "{ (void)word; }"),
    ],
    "counts that are right after a kill between any two stores": [
        Patch(
            COUNT,
            "    store_release64(&count->previous, value);\n"
            "    store_release64(&count->position, following);\n"
            "    store_release64(&count->current, value + by);\n",
            "    (void)following;\n    count->current = value + by;\n",
        ),
        Patch(
            COUNT,
            "return count->position == position ? count->current : count->previous;",
            "(void)position;\n    return count->current;",
        ),
    ],
    "a frame is checked before it is believed": [
        Patch(
            DIRECT,
            " and frame_is_possible(frame, length, pos, m.capacity, limit):\n",
            ":\n",
        )
    ],
    "positions are checked before they are believed": [
        Patch(DIRECT, "h.write_generation and pos & 7 == 0\n", "h.write_generation\n"),
        Patch(DIRECT, "h.read_generation and pos & 7 == 0):\n", "h.read_generation):\n"),
        Patch(DIRECT, " or limit - pos > m.capacity:\n", ":\n"),
    ],
    "a poisoned ring is left alone": [
        Patch(
            DIRECT,
            "    if (load_relaxed32(&h.poisoned) == 0 and load_relaxed32(&h.shutdown) == 0\n"
            "            and m.generation",
            "    if (load_relaxed32(&h.shutdown) == 0\n            and m.generation",
        ),
        Patch(
            DIRECT,
            "    if (load_relaxed32(&h.poisoned) == 0 and load_relaxed32(&h.shutdown) == 0\n"
            "            and load",
            "    if (load_relaxed32(&h.shutdown) == 0\n            and load",
        ),
    ],
    "a peek is in nobody's way": [Patch(DIRECT, "load_relaxed64(&h.lease_owner) == 0 and ", "")],
}


def messages_cost(patches: list[Patch], folder: Path) -> float:
    """Instructions of one `put` and one `get`.

    Args:
        patches: what is different from the code as it is.
        folder: where to build, an empty one.
    """
    package = Build(patches, MODULES, quick=False).make(folder / "tree")
    instructions(LOOP, 1, package=package)  # what is imported is compiled once
    few, many = (instructions(LOOP, n, package=package) for n in (1000, 1000 + MESSAGES))
    return (many - few) / MESSAGES


def main() -> int:
    """Count with every guard, without each, and without all."""
    everything = [patch for patches in GUARDS.values() for patch in patches]
    builds = {"": [], **GUARDS, "all of these": everything}
    whole = 0.0
    print("| without | instructions of put + get | the guard's share |\n|---|---|---|")
    for name, patches in builds.items():
        with tempfile.TemporaryDirectory() as folder:
            cost = messages_cost(patches, Path(folder))
        whole = whole or cost
        print(f"| {name or 'nothing'} | {cost:,.0f} | {(whole - cost) / cost:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

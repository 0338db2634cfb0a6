"""One program, on this machine or on a Dask cluster: the address decides.

python dask_scale_out.py                          on this machine
python dask_scale_out.py tcp://scheduler:8786     on the cluster of that scheduler

The second needs the extra dask, here and on the workers.
"""

from __future__ import annotations

import random
import sys

import shmring


def hits(seed: int, throws: int = 200_000) -> int:
    """Random points that fall into the quarter circle."""
    chance = random.Random(seed)
    return sum(chance.random() ** 2 + chance.random() ** 2 < 1 for _ in range(throws))


def main() -> None:
    address = sys.argv[1] if sys.argv[1:] else "local"
    rounds = 40
    with shmring.executor(address) as pool:
        total = sum(pool.map_unordered(hits, range(rounds)))
    print(f"pi is about {4 * total / (rounds * 200_000):.3f}, by {address}")


if __name__ == "__main__":
    main()

"""Count the words of every text file below a folder, with the workers of a pool.

    python word_count.py [FOLDER] [--workers N] [--pattern GLOB]

The default is Python's own sources.
"""

from __future__ import annotations

import argparse
import collections
import re
import sysconfig
import time
from pathlib import Path

import shmring

WORD = re.compile(r"\w+")


def count_words(path: Path) -> collections.Counter[str]:
    """The words of one file; runs in a worker."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return collections.Counter(WORD.findall(text.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=sysconfig.get_path("stdlib"))
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--pattern", default="*.py")
    options = parser.parse_args()

    paths = [
        path
        for path in Path(options.folder).rglob(options.pattern)
        if path.is_file() and "site-packages" not in path.parts
    ]
    total: collections.Counter[str] = collections.Counter()
    started = time.perf_counter()
    with shmring.ProcessPoolExecutor(options.workers) as pool:
        for words in pool.map_unordered(count_words, paths):
            total.update(words)
    seconds = time.perf_counter() - started
    print(f"{total.total():,} words in {len(paths):,} files, {seconds:.2f} s")
    for word, count in total.most_common(5):
        print(f"{count:10,}  {word}")


if __name__ == "__main__":
    main()

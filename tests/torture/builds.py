"""Other builds of the extension: with sleeps that have no end, and broken on purpose.

A build is a copy of the tree with a few lines replaced.  What is replaced must
stand there exactly once, so a patch that the code has left behind fails loudly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import shmring

__all__ = ["BUILDS", "ROOT", "Build", "Patch"]

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Patch:
    """Text of one file that is replaced."""

    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.file} has {text.count(self.old)} times what a patch replaces; "
                f"write the patch anew for the code as it is now:\n{self.old}"
            )
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Build:
    """A build of the extension.

    Args:
        patches: what is different.
        modules: which modules are compiled; the others are those under test.
        quick: compiled in less time, and into more instructions.
    """

    patches: Sequence[Patch]
    modules: Sequence[str] = ("ring",)
    quick: bool = True

    def make(self, tree: Path) -> Path:
        """Build it in a new folder; returns what to put in front of PYTHONPATH."""
        tree.mkdir()
        for name in NEEDED:
            shutil.copy(ROOT / name, tree)
        shutil.copytree(ROOT / "cython", tree / "cython")
        package = tree / "src" / "shmring"
        shutil.copytree(Path(shmring.__file__).parent, package)
        for source in (tree / "cython" / "shmring" / "_core").glob("*.pyx"):
            if source.stem not in self.modules:
                source.unlink()
        for name in self.modules:
            for built in (package / "_core").glob(f"{name}.*.so"):
                built.unlink()
        for patch in (*[QUICK] * self.quick, *self.patches):
            patch.apply(tree)
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=tree,
            env={**os.environ, "SHMRING_REQUIRE_EXTENSION": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return package.parent


CORE, WAIT = "cython/shmring/_core/ring.pyx", "cython/shmring/_core/wait.pyx"
DIRECT = "cython/shmring/_core/fast_path.pxd"
# The general way, and what has the direct one compiled in.
WITH_DIRECT = ("ring", "bytes_ring", "object_ring")
BLOCK, LENDING = "cython/shmring/_core/block.h", "cython/shmring/_core/lending.pxd"
SEGMENTS = "            for segment in item.segments[:item.count]:\n                memcpy(out,"
SYNC, AREA = "cython/shmring/_core/sync.h", "cython/shmring/_core/area.h"

QUICK = Patch("setup.py", '"-O3"', '"-O1"')  # to compile, and with more instructions to die at
NO_END = Patch(SYNC, "#define SYNC_SLICE_NS 90000000LL", "#define SYNC_SLICE_NS 3600000000000LL")

BUILDS = {
    "endless sleeps": Build([NO_END], ["ring", "handle", "wait"]),
    "commit before the payload": Build(
        [
            Patch(
                CORE,
                SEGMENTS,
                "            count_on(&h.put_count, start, pos + span, at + 1 - done[0])\n"
                "            store_release64(&h.write_position, pos + span)\n" + SEGMENTS,
            ),
            Patch(
                DIRECT,
                "        memcpy(<char *>frame + SHMRING_FRAME_BYTES, data, length)\n",
                "        count_on(&h.put_count, pos, pos + span, 1)\n"
                "        store_release64(&h.write_position, pos + span)\n"
                "        memcpy(<char *>frame + SHMRING_FRAME_BYTES, data, length)\n",
            ),
        ],
        WITH_DIRECT,
    ),
    "commit before the count": Build(
        [
            Patch(
                DIRECT,
                "                count_on(&h.get_count, pos, following, 1)\n"
                "                store_release64(&h.read_position, following)  # the commit\n",
                "                store_release64(&h.read_position, following)\n"
                "                count_on(&h.get_count, pos, following, 1)\n",
            ),
        ],
        WITH_DIRECT,
    ),
    "lock not robust": Build(
        [
            Patch(
                SYNC,
                "    *pending = word == NULL ? NULL"
                " : (struct robust_list *)((char *)word - self->head->futex_offset);\n",
                "    (void)pending, (void)word;\n",
            )
        ],
        WITH_DIRECT,
    ),
    "claim after the commit": Build(
        [
            Patch(
                CORE,
                "            store_release64(&claim.low, h.read_position)\n"
                "            store_release64(&claim.high, following)\n"
                "        self.commit_read(following, count)\n",
                "            low = h.read_position\n"
                "        self.commit_read(following, count)\n"
                "        if claim != NULL:\n"
                "            store_release64(&claim.low, low)\n"
                "            store_release64(&claim.high, following)\n",
            ),
            Patch(
                CORE,
                '        """Claim and commit what was copied out."""\n',
                "        cdef uint64_t low = 0\n",
            ),
        ]
    ),
    "lent after the commit": Build(
        [
            Patch(
                CORE,
                "cimport block_recover, block_return",
                "cimport block_lend, block_recover, block_return",
            ),
            Patch(
                LENDING,
                "        block_lend(ring.space, take.lent[j].index, ring.myself())\n",
                "        pass\n",
            ),
            Patch(
                CORE,
                "            RingCore.wake_producers(self)\n            RingCore.wake_next(self)\n"
                "        return result\n\n    # ---- blocks",
                "            RingCore.wake_producers(self)\n            RingCore.wake_next(self)\n"
                "        for i in range(take.lent_count if result == LENT else 0):\n"
                "            block_lend(self.space, take.lent[i].index, self.myself())\n"
                "        return result\n\n    # ---- blocks",
            ),
        ],
    ),
    "taken out of a message": Build(
        [
            Patch(
                BLOCK,
                "        if (position != SHMRING_NO_POSITION && position >= read)\n",
                "        if (position == SHMRING_NO_POSITION && position < read)\n",
            ),
        ],
        ["bytes_ring", "wait"],  # what calls it
    ),
    "reaped before the punch": Build(
        [
            Patch(
                AREA,
                "        int error = area_punch(fd, area.offset, area.capacity);\n",
                "        store_release64(&header->reaped, header->reaped + 1);\n"
                "        int error = area_punch(fd, area.offset, area.capacity);\n",
            ),
            Patch(
                AREA,
                "            return error; /* the next one tries again */\n"
                "        store_release64(&header->reaped, header->reaped + 1);\n",
                "            return error;\n",
            ),
        ]
    ),
    "no second look before sleeping": Build(
        [
            NO_END,
            Patch(
                WAIT,
                "        result = self.attempt(MAY_WAIT)\n        if woken and result == EMPTY:\n",
                "        result = self.attempt(MAY_WAIT) if woken else EMPTY\n"
                "        if woken and result == EMPTY:\n",
            ),
        ],
        ["ring", "wait"],
    ),
    "no second look of a producer": Build(
        [
            NO_END,
            Patch(
                WAIT,
                "        return self.attempt(MAY_WAIT if woken else MAY_WAIT | IS_WAITING)\n",
                "        return self.attempt(MAY_WAIT) if woken else FULL\n",
            ),
        ],
        ["ring", "wait"],
    ),
    "shutdown after the position": Build(
        [
            Patch(
                CORE,
                "                if result == EMPTY and shutdown != 0:\n",
                "                if result == EMPTY and load_acquire32(&h.shutdown) != 0:\n",
            ),
        ]
    ),
    "no baton": Build(
        [
            NO_END,
            Patch(
                CORE,
                "        if wait_wants_wake(&h.data_wait) and load_acquire64(&h.write_position)",
                "        if h == NULL and load_acquire64(&h.write_position)",
            ),
        ],
        ["ring", "handle", "wait"],
    ),
}

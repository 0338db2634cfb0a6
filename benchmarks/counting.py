"""Instructions of a Python program, counted by callgrind (Debian's valgrind).

Unlike seconds they are the same on a busy machine.  What a call costs is the
difference of two runs that differ by how often it is made, so that starting the
interpreter and importing cost nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["instructions", "missing"]


def missing() -> str | None:
    """Why nothing can be counted here; None if it can."""
    return None if shutil.which("valgrind") else "there is no valgrind"


def instructions(program: str, *arguments: object, package: Path) -> int:
    """Count those of a whole process.

    Args:
        program: Python source.
        arguments: its ``sys.argv[1:]``.
        package: the folder in which `shmring` is found.

    Raises:
        RuntimeError: the program failed; with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
                *(sys.executable, "-c", program, *map(str, arguments)),
            ],
            env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the counted program ended with {done.returncode}:\n{done.stderr}")
        found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("callgrind wrote no total")
    return int(found.group(1))

"""What sync.h asks of the C library holds for each one that is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FLOOR = HERE.parents[1] / "cython" / "shmring" / "_core"
# Instead of Python's own, which belongs to one C library.
PYTHON_H = "#define PyExc_ImportError 0\n#define PyErr_Format(...) ((void)0)\n"


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
@pytest.mark.skipif(
    sys.platform != "linux" or not FLOOR.is_dir(), reason="no Linux, or no C sources"
)
def test_the_kernel_releases_the_lock_of_a_killed_thread(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    (tmp_path / "Python.h").write_text(PYTHON_H)
    links = tmp_path / "kernel"  # the kernel's headers, which musl-gcc does not look for
    links.mkdir()
    machine = subprocess.run(
        ["gcc", "-print-multiarch"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for name, place in {"linux": "", "asm-generic": "", "asm": machine}.items():
        found = Path("/usr/include", place, name)
        (links / name).symlink_to(found if found.is_dir() else Path("/usr/include", name))
    program = tmp_path / "killed_holder"
    subprocess.run(
        [
            *(compiler, "-O2", "-pthread", f"-I{tmp_path}", f"-I{FLOOR}", f"-idirafter{links}"),
            *(str(HERE / "killed_holder.c"), "-o", str(program)),
        ],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout

"""A short run of each fuzz driver over the build at hand; `make asan` is the long one.

In a child, because what is looked for is a crash or a hang.  The seed is fixed: what fails
here fails again, and the child says which batch it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("shmring._core.ring", reason="the extension is not built")

from fuzz.runner import DRIVERS

TESTS = Path(__file__).resolve().parents[1]
READS = 3000  # a driver rounds up to whole batches


@pytest.mark.fault(23, 24, 25, 26)
@pytest.mark.parametrize("driver", DRIVERS)
def test_mutated_memory_gives_data_or_an_error_in_time(driver):
    reads = READS if driver != "handles" else READS // 20
    search = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "fuzz", "--only", driver, "--reads", str(reads), "--workers", "1"]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": search.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = int(done.stdout.splitlines()[-1].split()[0].replace(",", ""))
    assert counted >= reads, done.stdout

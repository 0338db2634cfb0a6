"""Kernels and emulators that would not release the locks of the dead get the fallback."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PATIENCE = 3600  # seconds: an emulated interpreter takes four to begin with
CANNOT_TRY = 77  # what emulated.py ends with when the machine lacks something


@pytest.mark.fault(36)
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="gcc builds what answers as a kernel without robust lists does",
)
def test_the_fallback_serves_and_says_why(tmp_path):
    refused = tmp_path / "refused.so"
    source = HERE / "robust_lists.c"
    subprocess.run(
        ["gcc", "-DREFUSED", "-shared", "-fPIC", str(source), "-o", str(refused)], check=True
    )

    preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(refused)]))

    def python(program: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = {name: os.environ[name] for name in os.environ if name != "SHMRING_BACKEND"}
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**env, "LD_PRELOAD": preload, **more},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    served = python(
        "import shmring; queue = shmring.Queue(); queue.put(shmring.backend); print(queue.get())"
    )
    assert (served.returncode, served.stdout) == (0, "queue\n"), served.stderr
    assert "RuntimeWarning: shmring runs on its fallback" in served.stderr
    assert "has no robust futexes, without which a killed process would block" in served.stderr
    assert os.strerror(38) in served.stderr  # ENOSYS

    wanted = python("from shmring import Queue", SHMRING_BACKEND="queue")
    assert (wanted.returncode, wanted.stderr) == (0, "")
    insisted = python("from shmring import Queue", SHMRING_BACKEND="ring")
    assert insisted.returncode == 1
    assert "ImportError: this kernel (or emulator) has no robust futexes" in insisted.stderr


@pytest.mark.torture
@pytest.mark.fault(36)
def test_on_aarch64_under_an_emulator():
    faulthandler.dump_traceback_later(PATIENCE + 60, exit=True, file=sys.__stderr__)
    done = subprocess.run(
        [sys.executable, str(HERE / "emulated.py")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode == CANNOT_TRY:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)

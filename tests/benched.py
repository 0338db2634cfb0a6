"""Where the benchmarks are; imported first by the tests of what is in there.

They are skipped where there are none, and on platforms that do not fork or have no /proc.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if sys.platform != "linux":
    pytest.skip("the benchmarks fork, and read /proc", allow_module_level=True)
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("tests without their benchmarks", allow_module_level=True)
pytest.importorskip("numpy")
sys.path.insert(0, str(ROOT))

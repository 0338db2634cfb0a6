"""The other builds of the torture are of the code as it is now."""

from __future__ import annotations

import pytest

pytest.importorskip("shmring._core.handle", exc_type=ImportError)

from builds import BUILDS, QUICK, ROOT


@pytest.mark.skipif(not (ROOT / "cython").is_dir(), reason="tests without their sources")
@pytest.mark.parametrize("name", BUILDS)
def test_each_patch_fits_in_one_place(name: str) -> None:
    for patch in (QUICK, *BUILDS[name].patches):
        assert (ROOT / patch.file).read_text().count(patch.old) == 1, (
            f"{patch.file}: the code was changed where {name!r} breaks it; write that patch anew"
        )

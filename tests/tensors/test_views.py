"""Tensors over a ring's own memory."""

from __future__ import annotations

from typing import Any

import pytest

import shmring

torch = pytest.importorskip("torch")
if shmring.backend != "ring":
    pytest.skip("a pipe has no memory to look into", allow_module_level=True)

# ruff: noqa: E402  (needs torch)
from shmring import Ring
from shmring.torch import tensor_over
from support import run_in_process


def collate(ring: Any, count: int) -> None:
    """Stack samples straight into the ring."""
    for number in range(count):
        samples = [torch.full((3, 4), 10.0 * number + each) for each in range(5)]
        with ring.reserve(5 * 3 * 4 * 4) as view:
            torch.stack(samples, out=tensor_over(view, torch.float32, (5, 3, 4)))


def test_a_batch_is_written_and_read_in_place() -> None:
    with Ring.create(1 << 16) as ring, run_in_process(collate, ring, 10):
        for number in range(10):
            with ring.peek(timeout=30) as view:
                batch = tensor_over(view, torch.float32, (5, 3, 4))
                assert batch[:, 2, 3].tolist() == [10 * number + each for each in range(5)]
                del batch


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.complex64])
def test_every_data_type_is_shown_without_warnings(dtype: Any) -> None:
    with Ring.create(1 << 16) as ring:
        with ring.reserve(64) as view:
            tensor_over(view, dtype).fill_(1)
        with ring.peek() as view:
            assert (tensor_over(view, dtype, (2, -1)) == torch.ones(1, dtype=dtype)).all()


def look_and_leave(ring: Any) -> Any:
    with ring.peek() as view:
        return tensor_over(view)


def test_a_tensor_that_outlives_the_block_is_an_error_and_stays_valid() -> None:
    with Ring.create(4096) as ring:
        ring.put(bytes(range(200)))
        with pytest.raises(BufferError, match="alive"):
            look_and_leave(ring)
        with ring.peek() as view:
            kept = tensor_over(view)
            with pytest.raises(RuntimeError, match="shape"):
                tensor_over(view, torch.uint8, (3, 3))
            assert kept.tolist() == list(range(200))
            del kept
        assert ring.qsize() == 0

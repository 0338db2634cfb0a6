"""Tensors over the views of `Ring.reserve` and `Ring.peek`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy
import torch

__all__ = ["tensor_over"]


def tensor_over(view: memoryview, dtype: Any = torch.uint8, shape: Sequence[int] = (-1,)) -> Any:
    """A tensor over memory of a ring, without a copy.

    While it lives, the block of ``reserve`` or ``peek`` cannot be left: BufferError says so.
    (``torch.frombuffer`` does not hold the view, and would show memory that is used anew.)

    Args:
        view: of ``Ring.reserve()``; or of ``Ring.peek()``, and then for reading only.
        dtype: of the elements.
        shape: of the tensor; one of its numbers may be -1.

    Raises:
        RuntimeError: the bytes do not make a tensor of that shape.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about memory for reading only
        held = torch.from_numpy(numpy.frombuffer(view, numpy.uint8))
    return held.view(dtype).view(shape)

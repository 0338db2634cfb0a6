"""Reducer for numpy arrays: quick to pickle, writable on arrival.

numpy's own reducer spends most of its time on the dtype, and a read-only array
would arrive read-only; through multiprocessing.Queue every array arrives
writable.  This module never imports numpy: a program that has arrays has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any

__all__ = ["IN_BAND_BYTES", "array_reducers", "by_strides"]

IN_BAND_BYTES = 512  # a smaller buffer costs less inside the pickle

_BUILT_IN_TYPES = 24  # dtype.num of types that other packages added
_SIMPLE = frozenset("?bBhHiIlLqQefdgFDG")  # dtypes that one character describes


def array_reducers() -> dict[type, Callable[[Any], Any]]:
    """The reducer for exactly `numpy.ndarray`; none while numpy is not imported."""
    numpy = sys.modules.get("numpy")
    kind = getattr(numpy, "ndarray", None)  # None while it is being imported
    return {} if kind is None else {kind: reduce_array}


def reduce_array(array: Any) -> Any:
    """Reduce an array to `numpy.ndarray` over a buffer."""
    dtype = array.dtype
    size = array.nbytes
    if dtype.hasobject or dtype.num >= _BUILT_IN_TYPES or dtype.itemsize == 0:
        # By numpy; its reducer for old protocols copies, so that the array arrives writable.
        return array.__reduce_ex__(5) if array.flags.writeable else array.__reduce__()
    strides: tuple[int, ...] | None = None
    order = "C"
    laid = array  # its memory, without gaps
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        order = "F"
    elif not array.flags.c_contiguous:
        laid = by_strides(array)
        if not laid.flags.c_contiguous:  # reversed, or with gaps
            array = array.copy("K")
            laid = by_strides(array)
        strides = array.strides
    simple = dtype.char in _SIMPLE and dtype.isnative and dtype.metadata is None
    described = dtype.char if simple else dtype
    if size < IN_BAND_BYTES:
        data: Any = bytearray(laid.tobytes(order))
    else:
        try:
            data = PickleBuffer(laid.view("i8") if dtype.kind in "mM" else laid)
        except (BufferError, ValueError):  # a structure that no buffer can describe
            return array.__reduce__()
        if not array.flags.writeable:
            return _writable, (array.shape, described, data, strides, order)
    return type(array), (array.shape, described, data, 0, strides, order)


def by_strides(array: Any) -> Any:
    """A view with the axes in the order of memory: C-contiguous if they were only swapped."""
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return array.transpose(axes)


def _writable(
    shape: tuple[int, ...], dtype: Any, data: Any, strides: tuple[int, ...] | None, order: Any
) -> Any:
    """Rebuild an array whose source was read-only, over a writable buffer."""
    import numpy

    inner: Any = data.obj if type(data) is memoryview else data
    whole = memoryview(inner)
    if whole.readonly or whole.nbytes != memoryview(data).nbytes:
        inner = bytearray(data)
    return numpy.ndarray(shape, dtype, inner, 0, strides, order)

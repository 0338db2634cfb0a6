"""Codec for tensors: CPU tensors by value, their bytes out of band.

A tensor goes by way of numpy, which hands over its memory in one call and takes memory,
shape and strides in one call.  Data types that numpy lacks travel as integers of the same
size.  Only the elements that a view shows travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import methodcaller
from pickle import PickleBuffer
from typing import Any, ClassVar

import numpy
import torch
from torch.multiprocessing import reductions
from torch.utils.hooks import warn_if_has_hooks

from shmring.queues.arrays import by_strides
from shmring.queues.codec import PickleCodec, Reducer, ReusedPickler, reducers

__all__ = ["TensorCodec"]

# What carries data types that numpy lacks, by their size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class TensorCodec(PickleCodec):
    """The codec "pickle", with tensors by value: what was put outlives its sender.

    For the ``codec=`` of a queue; those of :func:`shmring.torch.get_context` have it.
    """

    _spare_picklers: ClassVar[list[ReusedPickler]] = []

    @staticmethod
    def reducers() -> Mapping[type, Reducer]:
        """The reducers that are registered now, with those for tensors in place of torch's."""
        ours: dict[type, Reducer] = {
            torch.Tensor: _reduce_tensor,
            torch.nn.Parameter: methodcaller("__reduce_ex__", 5),  # around its data, a tensor
            torch.UntypedStorage: _reduce_storage,
        }
        return _Reducers({**reducers(), **ours})


class _Reducers(dict[type, Reducer]):
    """Reducers by type; subclasses of Tensor have one too."""

    def __missing__(self, kind: type) -> Reducer:
        if issubclass(kind, torch.Tensor):
            return _reduce_subclass
        raise KeyError(kind)


def _reduce_tensor(tensor: Any) -> Any:
    try:
        array = tensor.numpy()
    except (RuntimeError, TypeError):
        return _reduce_other(tensor)
    return _rebuild, _parts(array)


def _parts(array: Any) -> tuple[Any, ...]:
    """What `_rebuild` makes a tensor of: bytes, character of the type, shape, strides."""
    if array.flags.c_contiguous:
        return PickleBuffer(array), array.dtype.char, array.shape
    # An axis that an expanded tensor repeats has stride 0: its first element travels.
    repeated = [stride == 0 for stride in array.strides]
    shown = array[tuple(slice(0, 1) if each else slice(None) for each in repeated)]
    laid = by_strides(shown)
    if not laid.flags.c_contiguous:  # it has gaps
        shown = shown.copy("K")
        laid = by_strides(shown)
    strides = [0 if each else stride for each, stride in zip(repeated, shown.strides, strict=True)]
    return PickleBuffer(laid), array.dtype.char, array.shape, tuple(strides)


def _rebuild(
    data: Any,
    char: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    dtype: str | None = None,
) -> Any:
    """Make a tensor over bytes that arrived; ValueError or TypeError if they do not fit."""
    array = numpy.ndarray(shape, char, data, 0, strides)
    size = array.nbytes
    if strides is not None and 0 in strides:
        size = array[tuple(slice(None) if stride else slice(0, 1) for stride in strides)].nbytes
    if size != (given := memoryview(data).nbytes):
        raise ValueError(f"{given} bytes for a tensor of shape {shape}, which has {size}")
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.view(getattr(torch, dtype))


def _reduce_other(tensor: Any) -> Any:
    """Reduce a tensor that cannot be seen as an array."""
    _check_leaf(tensor)
    if tensor.device.type != "cpu":
        return reductions.reduce_tensor(tensor)  # torch's way: by a handle of the device
    if tensor.requires_grad:
        return _with_gradient, (tensor.detach(),)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        try:
            return tensor.__reduce_ex__(5)  # by parts, which are tensors or storages
        except NotImplementedError as error:
            raise TypeError(
                f"a tensor of layout {tensor.layout} cannot travel by value ({error}):"
                " put tensor.to_dense()"
            ) from None
    if tensor.is_conj() or tensor.is_neg():
        return _reduce_tensor(tensor.resolve_conj().resolve_neg())
    data, char, shape, *strides = _parts(tensor.view(_INTEGERS[tensor.itemsize]).numpy())
    name = str(tensor.dtype).removeprefix("torch.")
    return _rebuild, (data, char, shape, strides[0] if strides else None, name)


def _check_leaf(tensor: Any) -> None:
    if tensor.requires_grad:
        if not tensor.is_leaf:
            raise ValueError(
                "this tensor is the result of operations that autograd recorded, and the record"
                " cannot travel: put tensor.detach()"
            )
        warn_if_has_hooks(tensor)


def _with_gradient(tensor: Any) -> Any:
    return tensor.requires_grad_()


# ---- subclasses and storages -----------------------------------------------------------


def _reduce_subclass(tensor: Any) -> Any:
    """Reduce as the subclass does; of torch's own reduction, what is seen of the storage."""
    _check_leaf(tensor)
    reduced = tensor.__reduce_ex__(5)
    match reduced:
        case (torch._tensor._rebuild_from_type_v2 as whole, (make, kind, parts, state)):
            if make is torch._utils._rebuild_tensor_v2:
                return whole, (_itself, kind, (make(*parts),), state)
    return reduced


def _itself(tensor: Any) -> Any:
    return tensor


def _reduce_storage(storage: Any) -> Any:
    if storage.device.type != "cpu":
        return reductions.reduce_storage(storage)  # which says what to do
    held = torch.empty(0, dtype=torch.uint8).set_(storage)
    return _rebuild_storage, (PickleBuffer(held.numpy()),)


def _rebuild_storage(data: Any) -> Any:
    return torch.from_numpy(numpy.ndarray((memoryview(data).nbytes,), "B", data)).untyped_storage()

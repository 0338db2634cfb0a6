"""The context whose queues carry tensors by value, and whose processes collate for them."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import torch
from torch.utils.data._utils import collate

from shmring._backend import Queue
from shmring.context import QueueMethods, context_with
from shmring.torch.tensors import TensorCodec

__all__ = ["get_context"]


class LoaderQueue(Queue[Any]):
    """The queues of a DataLoader, which closes none of them."""

    _may_be_dropped = True


class _TensorMethods(QueueMethods):
    def defaults(self) -> dict[str, Any]:
        return {"codec": TensorCodec()}

    def Queue(self, maxsize: int = 0, **options: Any) -> Queue[Any]:
        """A :class:`shmring.Queue` with the codec for tensors."""
        if sys._getframe(1).f_globals.get("__name__") == "torch.utils.data.dataloader":
            # Its workers seed this one: imported once, not in each fork. Not at the top: other
            # children would inherit the state of its generator, and draw the same numbers.
            import numpy.random  # noqa: F401

            return LoaderQueue(maxsize, ctx=self.stock, **{**self.defaults(), **options})
        return super().Queue(maxsize, **options)

    @property
    def Process(self) -> Any:
        """The class of this context's processes."""
        return _PROCESSES[self.stock.get_start_method()]


class _Collating:
    """A process in which torch's ``default_collate`` makes no shared memory for each batch.

    In a worker torch's own collates into a block that it opens for the batch; its descriptor
    would be sent. Here the bytes travel, and private memory is warm.
    """

    def run(self) -> None:
        known = collate.default_collate_fn_map
        if known.get(torch.Tensor) is collate.collate_tensor_fn:  # not a program's own
            known[torch.Tensor] = _stack
        super().run()  # type: ignore[misc]


def _stack(batch: Any, *, collate_fn_map: Any = None) -> Any:
    if batch[0].is_nested or batch[0].layout is not torch.strided:
        return collate.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)  # which refuses
    return torch.stack(batch)


def _collating(method: str) -> Any:
    context: Any = multiprocessing.get_context(method)
    kind = context.Process
    made = type(kind.__name__, (_Collating, kind), {"__module__": __name__})
    globals()[kind.__name__] = made  # where a spawned child finds it
    return made


_PROCESSES = {method: _collating(method) for method in multiprocessing.get_all_start_methods()}


def get_context(method: str | None = None) -> Any:
    """A multiprocessing context whose queues carry CPU tensors by value, out of band.

    Args:
        method: "fork", "spawn" or "forkserver"; None is the default, which is
            then fixed, as by :func:`multiprocessing.get_context`.

    Returns:
        A ``multiprocessing.context.BaseContext``, for a program's own processes and
        for ``DataLoader(multiprocessing_context=...)``; the same object for the
        same start method.

    Raises:
        ValueError: this platform has no such start method.
    """
    return context_with(_TensorMethods, method)

"""The context whose queues carry tensors by value."""

from __future__ import annotations

from typing import Any

from shmring.context import QueueMethods, context_with
from shmring.torch.tensors import TensorCodec

__all__ = ["get_context"]


class _TensorQueueMethods(QueueMethods):
    def defaults(self) -> dict[str, Any]:
        return {"codec": TensorCodec()}


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
    return context_with(_TensorQueueMethods, method)

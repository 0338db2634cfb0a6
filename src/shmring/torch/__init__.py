"""Tensors through shmring's queues: CPU tensors by value, without file descriptors.

>>> import shmring.torch
>>> ctx = shmring.torch.get_context("spawn")  # for a DataLoader's multiprocessing_context=

``torch.multiprocessing`` is left as it is: only queues of this context, and those with
``codec=shmring.torch.TensorCodec()``, carry tensors this way.
"""

try:
    import numpy  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(f'shmring.torch needs {error.name}: pip install "shmring[torch]"') from error

from shmring.torch.context import get_context
from shmring.torch.tensors import TensorCodec
from shmring.torch.views import tensor_over

__all__ = ["TensorCodec", "get_context", "tensor_over"]

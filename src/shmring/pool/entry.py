"""Entries to what needs an extra: it is imported when it is asked for."""

from __future__ import annotations

from typing import Any

from shmring.pool.executor import ProcessPoolExecutor
from shmring.pool.interface import TaskExecutor

__all__ = ["executor", "register_joblib"]


def executor(address: str = "local", **options: Any) -> TaskExecutor:
    """An executor on this machine or, by its scheduler's address, on a Dask cluster.

    Args:
        address: "local", or the address of a scheduler, as "tcp://host:8786"
            (extra ``dask``).
        options: of ProcessPoolExecutor, or of :class:`shmring.pool.dask.DaskExecutor`.

    Returns:
        an executor; the same calls make the same promises on both.

    Raises:
        InvalidArgument: the address is neither.
        SchedulerNotFound: no scheduler answers there.
        ImportError: Dask is not installed.
    """
    if address == "local":
        return ProcessPoolExecutor(**options)
    from shmring.pool.dask import DaskExecutor

    return DaskExecutor(address, **options)


def register_joblib() -> None:
    """Make ``joblib.parallel_config("shmring")`` known (extra ``joblib``).

    Importing ``shmring.pool.joblib_backend`` does the same.

    Raises:
        ImportError: joblib is not installed.
    """
    import shmring.pool.joblib_backend  # noqa: F401

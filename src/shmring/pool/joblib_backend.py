"""joblib backend: ``joblib.parallel_config("shmring")`` runs on a ProcessPoolExecutor.

Importing this module registers it. Each call of ``joblib.Parallel`` has a pool of its own,
as long as its ``with`` block if it has one. Tasks and results are pickled by cloudpickle, as
loky does, so that lambdas, closures and what ``__main__`` defines can be sent; their large
buffers travel out of band.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from shmring.errors import EncodeError
from shmring.pool.executor import MOST_WORKERS, ProcessPoolExecutor

try:
    import cloudpickle
    import threadpoolctl
    from joblib import cpu_count
    from joblib._parallel_backends import (
        AutoBatchingMixin,
        FallbackToBackend,
        ParallelBackendBase,
        SequentialBackend,
    )
    from joblib._utils import _retrieve_traceback_capturing_wrapped_call as result_or_raise
    from joblib._utils import _TracebackCapturingWrapper
    from joblib.parallel import register_parallel_backend
except ImportError as error:
    raise ImportError(
        f'the joblib backend needs joblib 1.5 or later ({error}): pip install "shmring[joblib]"'
    ) from error

__all__ = ["ShmringBackend"]


class ShmringBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Backend of joblib: a batch is a task, which runs again if its worker dies.

    Keyword arguments that are not joblib's are those of ProcessPoolExecutor, as in
    ``parallel_config("shmring", max_retries=0)``. joblib's ``max_nbytes``,
    ``temp_folder`` and ``mmap_mode`` have no meaning: arrays travel in shared memory.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    _workers: ProcessPoolExecutor | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers there will be: 1 where joblib's rules allow no processes."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or n_jobs == 1:
            return 1
        if multiprocessing.current_process().daemon:
            return _only_one("in a daemonic process")
        if not (self.in_main_thread() or self.nesting_level == 0):
            return _only_one("below threads")
        if n_jobs < 0:
            n_jobs = max(cpu_count() + 1 + n_jobs, 1)
        return min(n_jobs, MOST_WORKERS)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, *, context: Any = None, **options: Any
    ) -> int:
        """Make the pool; its workers start with the first task."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        for name in ("max_nbytes", "mmap_mode", "prefer", "require", "temp_folder", "verbose"):
            options.pop(name, None)
        pool = {"mp_context": context, **self.backend_kwargs, **options}
        initial = pool.pop("initializer", None), pool.pop("initargs", ())
        pool["initializer"] = _start_worker
        pool["initargs"] = self._prepare_worker_env(n_jobs), cloudpickle.dumps(initial)
        self._workers = ProcessPoolExecutor(n_jobs, **pool)
        self.parallel = parallel
        return n_jobs

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None
    ) -> Future[Any]:
        """Schedule a batch; one that cannot be pickled is the error of its future."""
        future: Future[Any]
        buffers: list[pickle.PickleBuffer] = []
        try:
            task = cloudpickle.dumps(
                _TracebackCapturingWrapper(func), buffer_callback=buffers.append
            )
        except Exception as error:
            # Not raised: joblib may be in a callback here, where nothing would hear of it.
            future = Future()
            refused = EncodeError(f"the task to send to the workers cannot be pickled: {error}")
            refused.__cause__ = error
            future.set_exception(refused)
        else:
            assert self._workers is not None
            future = self._workers.submit(_run, task, buffers)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """The results of a batch, or what one of its calls raised."""
        answer, buffers = future.result()
        return result_or_raise(pickle.loads(answer, buffers=buffers))

    def terminate(self) -> None:
        """End the pool, all of whose tasks are done."""
        if self._workers is not None:
            self._workers.shutdown()
            self._workers = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Kill the workers; with `ensure_ready`, make another pool."""
        if self._workers is not None:
            self._workers.kill_workers()
            self._workers = None
        if ensure_ready:
            self.configure(self.parallel.n_jobs, self.parallel, **self.parallel._backend_kwargs)


def _only_one(where: str) -> int:
    warnings.warn(
        f"shmring-backed parallel loops cannot be nested {where}, setting n_jobs=1", stacklevel=4
    )
    return 1


def _start_worker(environment: dict[str, str], initial: bytes) -> None:
    """Limit the threads of libraries, whether they are loaded yet or not."""
    os.environ.update(environment)
    limits = {"openmp": "OMP_NUM_THREADS", "blas": "OPENBLAS_NUM_THREADS"}
    threadpoolctl.threadpool_limits(
        {api: int(environment[name]) for api, name in limits.items() if environment[name].isdigit()}
    )
    initializer, initargs = pickle.loads(initial)
    if initializer is not None:
        initializer(*initargs)


def _run(task: bytes, buffers: list[Any]) -> tuple[bytes, list[pickle.PickleBuffer]]:
    result: list[pickle.PickleBuffer] = []
    value = pickle.loads(task, buffers=buffers)()
    return cloudpickle.dumps(value, buffer_callback=result.append), result


register_parallel_backend("shmring", ShmringBackend)

"""The whole of it in one call: workers, a coordinator, tasks out and results in."""

from __future__ import annotations

import multiprocessing
import os
import secrets
from typing import Any

from shmring._backend import backend
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.pool.coordinator import Report, coordinator_process
from shmring.pool.worker import worker_process

__all__ = ["multiprocessing_example", "square"]


def square(number: int) -> int:
    """What the workers of the example do.

    Args:
        number: a task.

    Returns:
        its square.
    """
    return number * number


def multiprocessing_example(
    num_workers: int = 2, num_tasks: int = 20, *, method: str | None = None
) -> list[int]:
    """Square numbers in other processes, and print who did what.

    It starts the workers itself, runs on both back ends, and leaves nothing
    behind; its namespace is its own, so that several can run at a time.

    Args:
        num_workers: how many processes.
        num_tasks: how many numbers.
        method: the start method; None is the default of the platform.

    Returns:
        the squares, in order.

    Raises:
        InvalidArgument: an impossible number of workers.
        ShmringError: as :func:`~shmring.pool.coordinator.coordinator_process`.
    """
    namespace = f"example-{os.getpid()}-{secrets.token_hex(4)}"
    context: Any = multiprocessing.get_context(method)
    workers = [
        context.Process(
            target=worker_process,
            args=(number, "task_queue"),
            kwargs={"handler": square, "namespace": namespace},
        )
        for number in range(num_workers)
    ]
    # The IPC outlives the workers: the last one out removes the registry.
    with HighPerformanceIPC("coordinator", namespace=namespace) as ipc:
        try:
            for worker in workers:
                worker.start()
            report = coordinator_process(ipc, num_workers, tasks=range(num_tasks))
        except BaseException:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
            raise
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.join()
    _print_summary(report)
    return report.results


def _print_summary(report: Report) -> None:
    print(f"{len(report.results)} tasks in {report.seconds:.3f} s on the {backend} back end")
    for row in sorted(report.workers, key=lambda each: each.worker_id):
        print(
            f"  {row.worker_id}: process {row.pid}, {row.tasks} tasks, {row.nbytes} bytes, "
            f"{row.heartbeats} heartbeats, {row.state}"
        )

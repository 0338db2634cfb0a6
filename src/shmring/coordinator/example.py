"""Example: a coordinator, workers that it did not start, tasks out and results in."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import secrets
from typing import Any

from shmring._backend import backend
from shmring.coordinator.coordinator import Report, coordinator_process
from shmring.coordinator.worker import worker_process
from shmring.ipc.high_performance_ipc import HighPerformanceIPC
from shmring.tasks.task_loop import current_worker

__all__ = ["multiprocessing_example", "process_task"]

_LOG = logging.getLogger("shmring")

_TASKS = 100


def process_task(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task of the example: what its workers run.

    Args:
        task: ``task_id`` and ``data``.

    Returns:
        ``task_id``, ``result`` and the ``worker_id`` that made it.
    """
    return {
        "task_id": task["task_id"],
        "result": f"processed_{task['data']}",
        "worker_id": current_worker().worker_id,
    }


def multiprocessing_example(
    num_workers: int = 4, *, method: str | None = None
) -> list[dict[str, Any]]:
    """Have 100 small tasks done by other processes, and log which did what.

    It starts the workers itself, with 1 MiB of shared memory beside the queues, runs
    on both back ends, and leaves nothing behind. Its namespace is its own, so that
    several can run at a time.

    Args:
        num_workers: how many processes.
        method: the start method; None for the platform's.

    Returns:
        One dict a task, in order: see :func:`process_task`.

    Raises:
        InvalidArgument: an impossible number of workers.
        ShmringError: as :func:`~shmring.coordinator_process`.
    """
    namespace = f"example-{os.getpid()}-{secrets.token_hex(4)}"
    context: Any = multiprocessing.get_context(method)
    workers = [
        context.Process(
            target=worker_process,
            args=(number, "task_queue"),
            kwargs={"handler": process_task, "namespace": namespace},
        )
        for number in range(num_workers)
    ]
    tasks = [{"task_id": number, "data": f"task_data_{number}"} for number in range(_TASKS)]
    # The IPC outlives the workers: the last one out removes the registry.
    with HighPerformanceIPC("coordinator", namespace=namespace) as ipc:
        try:
            for worker in workers:
                worker.start()
            report = coordinator_process(ipc, num_workers, tasks=tasks)
        except BaseException:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
            raise
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.join()
    _log_summary(report)
    return report.results


def _log_summary(report: Report) -> None:
    _LOG.info("%d tasks in %.3f s on the %s", len(report.results), report.seconds, backend)
    for row in sorted(report.workers, key=lambda each: each.worker_id):
        facts = dataclasses.astuple(row)[:-1]
        _LOG.info("%s: process %d, %d tasks, %d heartbeats, %s", *facts)
    _LOG.info("coordinator: %s", dict(report.stats))

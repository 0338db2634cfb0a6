# pyright: strict
# ruff: noqa: PT017, PT018  (a program, not a test)
"""A user's program that touches every public name; mypy and pyright read it, and it runs."""

from __future__ import annotations

import asyncio
import json
import os
import queue
from multiprocessing import Process
from multiprocessing.shared_memory import SharedMemory

import numpy as np

import shmring
from shmring import SharedMemoryManager

NAMESPACE = f"typed-{os.getpid()}"


class JsonCodec:
    def dumps(self, obj: object) -> bytes:
        return json.dumps(obj).encode()

    def loads(self, data: bytes) -> object:
        return json.loads(data)


def double(number: int) -> int:
    return 2 * number


def task_in_worker(number: int) -> str:
    worker: shmring.Worker = shmring.current_worker()
    return f"{worker.worker_id} got {number}"


def queues() -> None:
    codec: shmring.Codec = JsonCodec()
    with shmring.Queue[dict[str, int]](codec=codec, max_capacity=1 << 20) as numbers:
        numbers.put({"one": 1}, timeout=1.0, peers=[os.getpid()])
        numbers.put_many([{"two": 2}])
        assert shmring.wait([numbers], timeout=1.0) == [numbers]
        found: shmring.RingStatistics = numbers.statistics()
        assert found.messages == 2 and numbers.get_many() == [{"one": 1}, {"two": 2}]
        try:
            numbers.get_nowait()
        except shmring.Empty as empty:
            assert isinstance(empty, queue.Empty)
        numbers.shutdown()
        try:
            numbers.get()
        except (shmring.ShutDown, shmring.RingClosed, shmring.DecodeError) as error:
            assert isinstance(error, shmring.ShutDown)
    tasks: shmring.JoinableQueue[str] = shmring.JoinableQueue(1)
    tasks.put("task")
    try:
        tasks.put_nowait("another")
    except (shmring.Full, shmring.EncodeError):
        tasks.get()
    tasks.task_done()
    assert tasks.join(timeout=1.0)
    simple = shmring.SimpleQueue[int]()
    simple.put(1)
    for each in (tasks, simple):
        each.close()
    assert shmring.install()
    shmring.uninstall()
    with shmring.get_context("spawn").Queue() as spawned:
        assert isinstance(spawned, shmring.Queue)


async def coroutines() -> int:
    with shmring.Queue[int]() as numbers:
        await numbers.aput(1)
        numbers.shutdown()
        return sum([number async for number in numbers])


def rings() -> None:
    with shmring.Ring.create(1 << 16) as ring:
        with ring.reserve(8, timeout=1.0) as view:
            np.frombuffer(view, np.int64)[:] = 42
        with ring.peek() as view:
            assert int(np.frombuffer(view, np.int64)[0]) == 42
        try:
            ring.put(bytes(1 << 20))
        except (shmring.MessageTooLarge, shmring.SharedMemoryFull) as error:
            assert isinstance(error, shmring.InvalidArgument)
    try:
        shmring.Ring.attach("typed-program-nothing")
    except (shmring.RingNotFound, shmring.RingExists, shmring.AccessRefused) as refused:
        assert isinstance(refused, shmring.ShmringError)
    block = SharedMemory(create=True, size=1 << 17)
    try:
        shmring.Ring.attach(buffer=block)
    except (shmring.LayoutMismatch, shmring.RingCorrupted, shmring.RingNotFound):
        block.unlink()


def pools() -> None:
    events: list[shmring.Event] = []
    table: shmring.SharedArray = shmring.share(np.arange(4))
    with shmring.ProcessPoolExecutor(1, on_event=events.append) as pool:
        try:
            assert pool.submit(double, 21).result(timeout=30) + table.nbytes > 42
        except (shmring.WorkerDied, shmring.TaskTimeout, shmring.MemoryExceeded) as lost:
            print(lost.task)
        counts: shmring.PoolStatistics = pool.statistics()
        assert sorted(pool.map_unordered(double, [1, 2])) == [2, 4] and counts.died == 0
    try:
        shmring.executor("tcp://127.0.0.1:1", connect_timeout=0.1)
    except (shmring.SchedulerNotFound, ImportError):
        shmring.register_joblib()
    assert events


def by_name() -> None:
    with shmring.HighPerformanceIPC("main", namespace=NAMESPACE) as ipc:
        ipc.create_message_queue("jobs")
        ipc.send_message("jobs", shmring.MessageType.DATA, {"job": 1})
        message: shmring.Message | None = ipc.receive_message("jobs", timeout=1.0)
        assert message is not None and message.msg_type is shmring.MessageType.DATA
        slot: shmring.RegistrySlot = ipc.register(shmring.ProcessRole.PEER)
        entry: shmring.RegistryEntry | None = ipc.registry_entry(slot.index)
        assert entry is not None and entry.state is not shmring.ProcessState.EXITED
        stats: shmring.IPCStatistics = ipc.get_stats()
        assert stats["messages_sent"] == 1
        seen: list[shmring.Progress] = []
        options = {"handler": task_in_worker, "namespace": NAMESPACE}
        worker = Process(target=shmring.worker_process, args=(1, "task_queue"), kwargs=options)
        worker.start()
        try:
            report: shmring.Report = shmring.coordinator_process(
                ipc, 1, tasks=[1, 2], progress=seen.append
            )
        except (shmring.RemoteError, shmring.PeerDied, shmring.NotSupportedByFallback) as error:
            raise SystemExit(str(error)) from error
        worker.join()
        rows: list[shmring.WorkerReport] = report.workers
        assert report.results == ["worker-1 got 1", "worker-1 got 2"] and len(rows) == 1
    memory = SharedMemoryManager(f"{NAMESPACE}-memory", 64)
    assert memory.create()
    memory.write_data(b"abc")
    memory.cleanup()


if __name__ == "__main__":
    queues()
    rings()
    pools()
    by_name()
    assert asyncio.run(coroutines()) == 1
    assert len(shmring.multiprocessing_example(2)) == 100
    assert shmring.backend == "ring" and callable(shmring.cleanup_stale)

"""Segments that are removed, or truncated, while processes use them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from header import READ_POSITION, WRITE_POSITION, word
from shmring import LayoutMismatch, Queue, Ring, RingCorrupted, RingNotFound, wait
from support import own_name, run_in_process, wait_for

NAME = own_name("removed")
PATH = f"/dev/shm/{NAME}"


def _answer(name: str) -> None:
    with Queue.attach(name, timeout=30) as queue:
        queue.put("attached")
        wait_for(lambda: not os.path.exists(f"/dev/shm/{name}"))
        for i in range(1000):
            queue.put(bytes(i * 10))  # it grows, too


@pytest.mark.fault(41)
def test_attached_processes_go_on_and_no_other_can_attach():
    with Queue(name=NAME) as queue, run_in_process(_answer, NAME, method="spawn") as child:
        assert queue.get(timeout=60) == "attached"
        os.unlink(PATH)
        assert [len(queue.get(timeout=30)) for _ in range(1000)] == [i * 10 for i in range(1000)]
        with pytest.raises(RingNotFound, match=f"{NAME}.*does not exist"):
            Queue.attach(NAME)
        child.join(30)
        assert child.exitcode == 0


def _get(queue: Queue[str]) -> None:
    queue.get(timeout=60)


def _aget(queue: Queue[str]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await queue.aget()

    asyncio.run(main())


def _wait(queue: Queue[str]) -> None:
    assert wait([queue], timeout=60) == [queue]
    queue.get_nowait()


def _wait_beside_a_file(queue: Queue[str]) -> None:
    reader, writer = os.pipe()
    assert wait([reader, queue], timeout=60) == [queue]
    queue.get_nowait()
    os.close(reader)
    os.close(writer)


def _wait_on_more_than_the_kernel_takes(queue: Queue[str]) -> None:
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(Ring.create(4096)) for _ in range(150)]
        assert wait([queue, *others], timeout=60) == [queue]
    queue.get_nowait()


@pytest.mark.fault(41)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "take", [_get, _aget, _wait, _wait_beside_a_file, _wait_on_more_than_the_kernel_takes]
)
def test_a_waiter_logs_that_the_name_was_removed(caplog, take, given):
    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    with Queue(name=NAME if given else None) as queue:
        waiter = threading.Thread(target=lambda: [take(queue) for _ in range(2)])
        waiter.start()
        name = queue.name  # made now, if none was given, while the other waits
        wait_for(lambda: queue.statistics().consumers_waiting)
        assert not said()
        os.unlink(f"/dev/shm/{name}")
        wait_for(said)
        queue.put("goes on")
        queue.put("and ends")
        waiter.join(60)
        assert not waiter.is_alive()
        assert len(said()) == 1
        assert f"/dev/shm/{name} was removed" in said()[0]
        assert "make the queue anew" in said()[0]


def test_a_name_given_up_on_purpose_is_no_trouble(caplog):
    with Queue(name=NAME) as queue:
        queue.unlink()
        waiter = threading.Thread(target=lambda: queue.get(timeout=60))
        waiter.start()
        waiter.join(0.5)  # several slices
        queue.put("done")
        waiter.join(60)
        assert not caplog.records


@pytest.mark.fault(41)
def test_the_name_can_be_used_anew_and_both_go_on():
    with Queue(name=NAME) as old:
        os.unlink(PATH)
        with Queue(name=NAME) as new:
            old.put("old")
            with Queue.attach(NAME) as attached:
                attached.put("new")
            assert (old.get(), new.get()) == ("old", "new")
            old.close()  # and leaves the name to the other
            assert os.path.exists(PATH)
    assert not os.path.exists(PATH)


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("call", "size"), [("get()", 0), ("put(b'x' * 9000)", 0), ("put(b'x' * 9000)", 8192)]
)
def test_a_file_cut_short_ends_its_users_at_once(call, size):
    """As with any mapped file the kernel sends SIGBUS: no process waits for ever."""
    program = f"import shmring\nring = shmring.Ring.attach({NAME!r})\nwhile True:\n    ring.{call}"
    with Ring.create(name=NAME) as ring:
        child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        try:
            wait_for(
                lambda: ring.statistics().consumers_waiting or ring.statistics().producers_waiting,
                timeout=60,
            )
            if size:  # the producer sleeps, and touches the area when there is room
                os.truncate(PATH, size)
                word(ring, READ_POSITION, word(ring, WRITE_POSITION))
            ring.close()
            os.truncate(PATH, size)
            assert child.wait(30) == -signal.SIGBUS
            with pytest.raises((LayoutMismatch, RingCorrupted)):
                Ring.attach(NAME)
        finally:
            child.kill()
            child.wait()
            os.unlink(PATH)

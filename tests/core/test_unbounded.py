"""Without maxsize: growth, what is given back, and what happens when there is no more."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from header import LAYOUT
from shmring import Queue, Ring, SharedMemoryFull, ShutDown
from shmring.errors import Empty, Full
from support import run_in_process, run_with_mounts, wait_for

resource = pytest.importorskip("resource")

MIB = 1 << 20


def held(queue: Queue[object] | Ring) -> int:
    """Bytes of shared memory."""
    return os.fstat(queue._fileno()).st_blocks * 512


# ---- growth --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1 << 17, 1 << 20, 1 << 26])
def test_it_grows_to_max_capacity_and_no_further(limit, caplog):
    with Queue(max_capacity=limit) as queue:
        message = b"x" * 9_968  # a frame of 10,000 bytes
        count = 0
        with contextlib.suppress(Full):
            while True:
                queue.put_nowait(message)
                count += 1
        # the last area may not have fitted any more
        assert limit // 2 <= count * 10_000 <= limit
        assert held(queue) <= limit + 8192
        assert not caplog.messages
        for _ in range(2):
            with pytest.raises(Full):
                queue.put(message, timeout=0.2)
        said = [record for record in caplog.records if record.name == "shmring"]
        assert len(said) == 1
        assert f"max_capacity={limit}" in said[0].getMessage()
        taken = queue.get_many(count)
        while len(taken) < count:
            taken += queue.get_many(count - len(taken))
        assert taken == [message] * count
        queue.put(message, timeout=5)
        assert queue.get() == message


def test_what_is_larger_than_the_area_still_fits_up_to_max_capacity():
    with Queue(max_capacity=1 << 22) as queue:
        queue.put(b"small")
        queue.put(bytes((1 << 22) - 100), timeout=5)
        assert queue.get() == b"small"
        assert len(queue.get(timeout=5)) == (1 << 22) - 100


@pytest.mark.parametrize("size", [5_000, 60_000, 500_000])
def test_what_is_larger_than_the_area_fits_while_another_producer_waits(size):
    """Its room is left free where there is room for both; that does not make an area larger."""
    with Ring.create(4096, max_capacity=1 << 20) as ring:
        message = bytes(range(250)) * (size // 250)
        waits = struct.pack("<3Q", 7, 1000, time.monotonic_ns() + 2 * 10**8)  # owner, need, until
        os.pwrite(ring._fileno(), waits, LAYOUT["PRODUCERS_OFFSET"] + 48)
        ring.put(message, timeout=5)
        assert ring.get() == message
        ring.put(b"next")
        assert ring.get() == b"next"


# ---- given back ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 100_000, 1 << 20, 8 << 20])
@pytest.mark.parametrize("after", ["get", "get_many"])
def test_a_burst_is_given_back_by_the_next_put_and_get(size, after):
    total = 500 * MIB if size > 100 else 20 * MIB
    if held_at_most() < 2 * total:
        pytest.skip(f"{total} bytes do not fit here")
    with Queue(max_capacity=1 << 30) as queue:
        message = b"x" * size
        count = total // size
        for _ in range(count):
            queue.put(message)
        assert held(queue) > total
        if after == "get":
            for _ in range(count):
                queue.get()
        else:
            while count:
                count -= len(queue.get_many())
        queue.put("next")
        assert queue.get() == "next"
        wait_for(lambda: held(queue) < 2 * MIB, timeout=1)


def held_at_most() -> int:
    found = os.statvfs("/dev/shm")
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("peers", [None, [1]])
def test_an_idle_consumer_gives_back_what_others_left(peers):
    with Queue(max_capacity=1 << 28) as queue:
        for _ in range(64):
            queue.put(bytes(MIB))
        for _ in range(64):
            queue.get()
        assert held(queue) > 16 * MIB
        with pytest.raises(Empty):
            queue.get(timeout=0.25, peers=peers)
        assert held(queue) < 2 * MIB


def test_a_burst_through_another_process_is_given_back():
    with Queue(max_capacity=1 << 28) as queue, Queue() as done:
        with run_in_process(_take, queue, done, 100):
            for _ in range(100):
                queue.put(bytes(MIB))
            assert done.get(timeout=30) == "all"
        queue.put("next")
        queue.get()
        wait_for(lambda: held(queue) < 2 * MIB, timeout=1)


def _take(queue: Queue[object], done: Queue[object], count: int) -> None:
    for _ in range(count):
        queue.get()
    done.put("all")


def _take_until_shut_down(queue, orders, outcomes):
    outcomes.put(len(queue.get()))
    orders.get()
    for ask in (queue.get, queue.get_nowait, queue.get_many, lambda: queue.put(1)):
        try:
            ask()
        except ShutDown:
            outcomes.put("ShutDown")


@pytest.mark.parametrize("count", [1, 20, 300])
def test_what_an_immediate_shutdown_drops_gives_its_memory_back(count, start_method):
    with Queue() as queue, Queue() as orders, Queue() as outcomes:
        for number in range(count + 1):  # one area, or several
            queue.put(bytes([number % 256]) * (100_000 if number % 7 else MIB))
        given = queue, orders, outcomes
        with run_in_process(_take_until_shut_down, *given, method=start_method) as child:
            assert outcomes.get(timeout=60) == MIB
            assert held(queue) > count * 100_000
            queue.shutdown(immediate=True)
            queue.shutdown(immediate=True)
            assert held(queue) <= 8192, "the header alone"
            orders.put("go on")
            assert [outcomes.get(timeout=60) for _ in range(4)] == ["ShutDown"] * 4
            child.join(60)
            assert child.exitcode == 0
        statistics = queue.statistics()
        assert (statistics.messages, statistics.used_bytes) == (0, 0)
        assert statistics.messages_taken == 1
        with pickle.loads(pickle.dumps(queue)) as late, pytest.raises(ShutDown):
            late.get()
        assert held(queue) <= 8192


def test_shutting_down_without_haste_gives_nothing_away():
    with Queue() as queue:
        queue.put_many([b"x" * 100_000] * 20)
        queue.shutdown()
        assert held(queue) > 2_000_000
        assert queue.get_many() == [b"x" * 100_000] * 20
        with pytest.raises(ShutDown):
            queue.get()


def test_a_view_outlives_an_immediate_shutdown():
    """Which is why a Ring keeps its memory."""
    with Ring.create(max_capacity=MIB) as ring:
        ring.put_many([b"front", b"x" * 100_000])
        block = ring.reserve(5)
        with block as reserved, ring.peek() as front:
            ring.shutdown(immediate=True)
            assert bytes(front) == b"front"
            reserved[:] = b"later"
            assert bytes(reserved) == b"later"
        with pytest.raises(ShutDown):
            ring.get()


# ---- a flow --------------------------------------------------------------------------------


def test_a_steady_flow_does_not_oscillate():
    with Queue(max_capacity=1 << 28) as queue:
        for _ in range(500):
            queue.put(bytes(MIB))
            assert len(queue.get()) == MIB
        assert queue.statistics().growths <= 3


def test_large_messages_among_small_ones_do_not_oscillate():
    with Queue(max_capacity=1 << 28) as queue:
        for _ in range(500):
            for message in (bytes(MIB), "small", "small"):
                queue.put(message)
                queue.get()
        assert queue.statistics().growths <= 5  # the first shrinking was a mistake


@pytest.mark.parametrize("pause", [0.01, 0.15, 0.3])
def test_a_steady_flow_with_pauses_does_not_oscillate(pause):
    """The consumer sleeps for longer than the slice after which an idle one gives back."""
    with Queue(max_capacity=1 << 28) as queue, Queue() as done:
        count = 12
        with run_in_process(_take, queue, done, count):
            for _ in range(count):
                queue.put(bytes(MIB))
                threading.Event().wait(pause)
            assert done.get(timeout=30) == "all"
        assert queue.statistics().growths <= 6


@pytest.mark.parametrize("size", [12, 64, 100])
def test_a_flow_in_bursts_does_not_oscillate(size):
    if held_at_most() < 4 * size * MIB:
        pytest.skip(f"bursts of {size} MiB do not fit here")
    with Queue(max_capacity=1 << 30) as queue:
        for turn in range(20):
            for _ in range(size):
                queue.put(bytes(MIB))
            for _ in range(size):
                queue.get()
            if turn % 3 == 0:
                queue.put("control")
                queue.get()
            if turn == 10:
                before = queue.statistics().growths
        assert queue.statistics().growths - before <= 2


# ---- a full file system --------------------------------------------------------------------


def in_a_small_shared_memory(megabytes: int, program: str) -> str:
    """Run a program with a /dev/shm of its own; return what it wrote to stderr."""
    done = run_with_mounts(f"mount -t tmpfs -o size={megabytes}m none /dev/shm", program)
    assert done.returncode == 0, done.stderr
    return done.stderr


WAITS = """
import os, sys, threading
from shmring import Queue

limit = {limit}
queues = [Queue(max_capacity=limit) for _ in range({queues})]

def put(queue, *numbers):
    for i in numbers:
        queue.put(i.to_bytes(8, "little") * 12_500)

for queue in queues:  # one message fits each area, however soon another thread fills the memory
    put(queue, 0)
threads = [threading.Thread(target=put, args=(queue, *range(1, {count}))) for queue in queues]
for thread in threads:
    thread.start()
while not all(queue.statistics().producers_waiting for queue in queues):
    threading.Event().wait(0.01)
threading.Event().wait(0.3)
for queue in queues:
    for i in range({count}):
        message = queue.get(timeout=60)
        assert message == i.to_bytes(8, "little") * 12_500, i
    assert queue.empty()
for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
for queue in queues:
    queue.put(1); assert queue.get() == 1
    queue.close()
assert os.listdir("/dev/shm") == []
"""


@pytest.mark.fault(21)
@pytest.mark.parametrize(("queues", "limit"), [(1, "None"), (3, "1 << 30")])
def test_a_full_shared_memory_means_waiting_and_one_line_in_the_log(queues, limit):
    """The first ends at its max_capacity, half of what there is; the others fill it."""
    program = WAITS.format(queues=queues, limit=limit, count=1000)
    said = in_a_small_shared_memory(64, program).splitlines()
    assert 1 <= len(said) <= queues
    assert all("--shm-size" in line and "waits for a reader" in line for line in said)


def test_two_hundred_queues_fit_into_64_mib():
    program = (
        "from shmring import JoinableQueue, Queue, SimpleQueue\n"
        "queues = [(Queue, JoinableQueue, SimpleQueue)[i % 3]() for i in range(200)]\n"
        "for each in queues:\n    each.put_many([{'some': 'thing'}] * 100)\n"
        "for each in queues:\n    assert len(each.get_many(100)) == 100\n"
        "for each in queues:\n    each.close()\n"
    )
    assert in_a_small_shared_memory(64, program) == ""


TOO_LARGE = """
import shmring
with shmring.Queue() as queue:
    try:
        queue.put(bytes(40 << 20))
    except shmring.MessageTooLarge as error:
        print(error)
with shmring.Queue(max_capacity=1 << 30) as queue:
    try:
        queue.put(bytes(80 << 20))
    except shmring.SharedMemoryFull as error:
        print(error)
"""


def test_a_message_too_large_for_a_small_shared_memory_names_the_remedy():
    done = run_with_mounts("mount -t tmpfs -o size=64m none /dev/shm", TOO_LARGE)
    assert done.returncode == 0, done.stderr
    bound, room = done.stdout.splitlines()
    assert bound.startswith("a message of 41943040 bytes can never fit: max_capacity is 33554432")
    assert "max_capacity=" in bound
    assert all("enlarge /dev/shm" in line and "--shm-size" in line for line in (bound, room))


WAITS_UNREAD = """
import shmring
from queue import Full
queue = shmring.Queue(max_capacity=1 << 17)
for _ in range(3):
    try:
        while True:
            queue.put(bytes(30_000), timeout=0.3)
    except Full:
        pass
queue.close()
"""


def test_a_put_that_waits_unread_tells_the_user_once():
    """With logging as Python sets it up: a warning goes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", WAITS_UNREAD],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == (
        "max_capacity=131072 (unless given, half of shared memory) is reached: put waits for a"
        " reader; enlarge /dev/shm (for containers: --shm-size) or bound the queue with maxsize or"
        " max_capacity (docs: containers#no-room)\n"
    )


# ---- out of something else -----------------------------------------------------------------


def limited(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _report(report: Queue[object], action, *args) -> None:
    """What an action raised; then it must work without the limit."""
    try:
        action(*args)
    except OSError as error:
        report.put((type(error).__name__, error.errno, str(error)))
    else:
        report.put(None)


def outcome_of(report: Queue[object], action, *args) -> tuple[str, int, str]:
    with run_in_process(_report, report, action, *args) as child:
        outcome = report.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
    assert outcome is not None, "nothing was raised"
    return outcome


@pytest.fixture
def report():
    with Queue() as made:
        yield made


def _create_without_descriptors() -> None:
    with Queue() as before:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)
        limited(resource.RLIMIT_NOFILE, before._fileno() + 1)
        try:
            Queue()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, soft)
            before.put(bytes(MIB))
            assert len(before.get()) == MIB


def _grow_without_descriptors() -> None:
    with Queue(max_capacity=1 << 24) as queue:
        limited(resource.RLIMIT_NOFILE, queue._fileno() + 1)
        queue.put(bytes(MIB))  # growing needs none
        assert len(queue.get()) == MIB
    raise OSError(errno.EMFILE, "grew all the same")


def _create_without_address_space() -> None:
    limited(resource.RLIMIT_AS, address_space())
    try:
        Queue(max_capacity=1 << 24)
    finally:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def _create_without_file_size() -> None:
    limited(resource.RLIMIT_FSIZE, 16384)
    Queue()


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("action", "number", "said"),
    [
        (_create_without_descriptors, errno.EMFILE, os.strerror(errno.EMFILE)),
        (_grow_without_descriptors, errno.EMFILE, "all the same"),
        (_create_without_address_space, errno.ENOMEM, "mapped"),
        (_create_without_file_size, errno.EFBIG, "RLIMIT_FSIZE"),
    ],
)
def test_creating_without_a_resource_names_it_and_leaves_nothing(report, action, number, said):
    _, raised, text = outcome_of(report, action)
    assert raised == number
    assert said in text


def _attach(limit: int, value: Callable[[], int]) -> None:
    """By name, with a limit, and again without it."""
    with Ring.create() as ring:
        ring.put(b"still there")
        before = resource.getrlimit(limit)
        name = ring.name
        try:
            limited(limit, value())
            Ring.attach(name)
        finally:
            resource.setrlimit(limit, before)
            with Ring.attach(name) as other:
                assert other.get() == b"still there"


def lowest_free_descriptor() -> int:
    free = os.dup(0)
    os.close(free)
    return free


def _attach_without_descriptors() -> None:
    _attach(resource.RLIMIT_NOFILE, lowest_free_descriptor)


def _attach_without_address_space() -> None:
    _attach(resource.RLIMIT_AS, address_space)


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("action", "number", "said"),
    [
        (_attach_without_descriptors, errno.EMFILE, os.strerror(errno.EMFILE)),
        (_attach_without_address_space, errno.ENOMEM, "mapped"),
    ],
)
def test_attaching_without_a_resource_names_it_and_works_later(report, action, number, said):
    kind, raised, text = outcome_of(report, action)
    assert (kind, raised) == ("OSError", number)
    assert said in text


def _put_with_little_address_space(queue: Queue[object]) -> None:
    limited(resource.RLIMIT_AS, address_space() + 24 * MIB)
    queue.put(bytes(8 * MIB))


def _put_with_small_files(queue: Queue[object]) -> None:
    limited(resource.RLIMIT_FSIZE, 1 << 18)
    queue.put(bytes(8 * MIB))


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("action", "number", "said"),
    [
        (_put_with_little_address_space, errno.ENOMEM, "memory"),
        (_put_with_small_files, errno.EFBIG, "RLIMIT_FSIZE"),
    ],
)
def test_growing_without_a_resource_fails_by_name_and_others_grow(report, action, number, said):
    with Queue(max_capacity=1 << 28) as queue:
        queue.put("before")
        kind, raised, text = outcome_of(report, action, queue)
        assert raised == number
        assert said in text
        assert kind == ("SharedMemoryFull" if number == errno.EFBIG else "OSError")
        assert held(queue) < MIB  # what was begun is undone
        queue.put(bytes(8 * MIB))
        queue.put("after")
        assert queue.get() == "before"
        assert len(queue.get()) == 8 * MIB
        assert queue.get() == "after"
    assert issubclass(SharedMemoryFull, OSError)


def _get_with_little_address_space(queue: Queue[object], go: Queue[object]) -> None:
    go.get(timeout=60)  # by then the ring has grown, beyond what this process may map
    limited(resource.RLIMIT_AS, address_space() + 8 * MIB)
    queue.get(timeout=60)


def _put_with_none(queue: Queue[object], go: Queue[object]) -> None:
    go.get(timeout=60)
    limited(resource.RLIMIT_AS, address_space() + 8 * MIB)
    queue.put("small")


@pytest.mark.fault(40)
@pytest.mark.parametrize("action", [_get_with_little_address_space, _put_with_none])
def test_no_memory_to_map_a_grown_area_leaves_the_message_to_others(report, action):
    large = b"x" * (40 * MIB)
    with (
        Queue(max_capacity=1 << 28) as queue,
        Queue() as go,
        run_in_process(_report, report, action, queue, go) as child,
    ):
        queue.put(large)
        go.put("go")
        _, raised, text = report.get(timeout=60)
        assert raised == errno.ENOMEM
        assert "mapping a grown area; nothing is lost" in text
        child.join(60)
        assert child.exitcode == 0
        assert queue.qsize() == 1
        assert queue.get(timeout=10) == large
        queue.put("goes on")
        assert queue.get() == "goes on"

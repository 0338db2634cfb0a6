"""Pickles that must never be loaded: on queues whose codec is not pickle, nothing unpickles."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from header import first_frame, word
from shmring import DecodeError, Queue, RingCorrupted
from support import own_name

NAME = own_name("hostile")
LOADED = Path("/dev/shm", NAME + "-was-loaded")
MULTI = 1 << 31  # a frame that carries a table of segments
KINDS = [*range(8), 255, 1 << 16, MULTI - 1, *range(MULTI, MULTI + 8), 0xFFFFFFFF]


class Hostile:
    """Loading it leaves a trace."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(LOADED),)


# Takes what there is, in a process in which whatever unpickles is an error that cannot be caught.
RECEIVER = r"""
import _pickle, asyncio, os, pickle, sys
from multiprocessing import reduction

import shmring
from shmring.errors import DecodeError, Empty, RingCorrupted

def loaded(*args, **kwargs):
    os.write(2, b"something was unpickled\n")
    os._exit(66)

sys.addaudithook(lambda event, args: loaded() if event == "pickle.find_class" else None)
for module in (pickle, _pickle):
    module.loads = module.load = module.Unpickler = loaded
pickle._loads = pickle._load = pickle._Unpickler = loaded
reduction.ForkingPickler.loads = loaded
queue = shmring.Queue.attach(sys.argv[1], codec=sys.argv[2])
outcomes = []
take = {
    "get": lambda: [queue.get(block=False)],
    "get_many": lambda: queue.get_many(block=False),
    "aget": lambda: [asyncio.run(asyncio.wait_for(queue.aget(), 0.2))],
}[sys.argv[3]]
while True:
    try:
        outcomes += [type(each).__name__ for each in take()]
    except DecodeError as error:
        outcomes += ["DecodeError"] + [type(each).__name__ for each in error.items]
    except RingCorrupted:
        outcomes.append("RingCorrupted")
    except (Empty, TimeoutError):
        break
print(*outcomes)
"""


def receive(codec: str, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RECEIVER, NAME, codec, how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(autouse=True)
def nothing_was_loaded():
    yield
    loaded = LOADED.exists()
    if loaded:
        LOADED.rmdir()
    assert not loaded


@pytest.mark.fault(38)
@pytest.mark.parametrize("codec", ["bytes", "msgpack"])
@pytest.mark.parametrize("how", ["get", "get_many", "aget"])
def test_a_hostile_pickle_is_never_loaded(codec, how):
    """By a sender that pickles, or that sends a pickle as bytes; of every size and kind."""
    hostile = pickle.dumps(Hostile())
    large = [Hostile(), bytearray(100_000), b"x" * 5000]
    with Queue(codec="bytes", name=NAME) as raw, Queue.attach(NAME) as pickling:
        for obj in (Hostile(), [Hostile()], large, {"key": Hostile()}):
            pickling.put(obj)
        for payload in (hostile, hostile + bytes(5000), hostile + bytes(100_000)):
            raw.put(payload)
        done = receive(codec, how)
        assert done.returncode == 0, done.stderr
        assert raw.empty()
    outcomes = done.stdout.split()
    assert len(outcomes) == 7
    assert outcomes.count("bytes") == (3 if codec == "bytes" else 0)
    assert outcomes.count("DecodeError") == (4 if codec == "bytes" else 7)


@pytest.mark.fault(38)
@pytest.mark.parametrize("codec", ["bytes", "msgpack"])
def test_a_hostile_pickle_in_a_frame_of_any_kind_is_never_loaded(codec, monkeypatch):
    hostile = pickle.dumps(Hostile())
    with_table = struct.pack("<2Q", 1, len(hostile)) + hostile
    monkeypatch.setattr(pickle, "loads", pytest.fail)
    with Queue(codec="bytes", name=NAME) as raw, Queue.attach(NAME, codec=codec) as receiver:
        for kind in KINDS:
            for payload in (hostile, with_table):
                raw.put(payload)
                word(raw, first_frame(raw) + 20, kind, size=4)
                with contextlib.suppress(DecodeError, RingCorrupted):
                    assert type(receiver.get(timeout=5)) is bytes
                assert raw.empty()
                raw.put(b"next")
                with contextlib.suppress(DecodeError):  # of msgpack, which wants its own
                    assert receiver.get(timeout=5) == b"next"


@pytest.mark.fault(38)
def test_a_broken_table_of_segments_costs_a_batch_only_itself():
    with Queue(codec="bytes", name=NAME) as queue:
        queue.put_many([b"first", b"second", struct.pack("<2Q", 1, 1 << 40), b"third"])
        spans = 2 * 40  # of the two in front of it
        word(queue, first_frame(queue) + spans + 20, MULTI, size=4)
        with pytest.raises(RingCorrupted, match="segment 0") as caught:
            queue.get_many()
        assert caught.value.items == [b"first", b"second", b"third"]
        assert queue.empty()


@pytest.mark.fault(38)
def test_the_receiver_of_these_tests_would_tell():
    with Queue(name=NAME) as pickling:
        pickling.put(Hostile())
        done = receive("pickle", "get")
    assert done.returncode == 66
    assert "something was unpickled" in done.stderr

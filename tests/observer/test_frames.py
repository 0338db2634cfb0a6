"""The last frames of a ring: found by walking back, decoded without running code."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("shmring._core.handle")

from header import area, first_frame, word
from shmring import Message, MessageType, Queue, Ring
from shmring.errors import DecodeError, RingCorrupted
from shmring.ipc.message import MessageCodec
from shmring.observer.frames import LoggedFrame, decoded, last_frames
from shmring.observer.ring import header_in, read_bytes
from shmring.shm.segment import pid_namespace


def frames(ring: Any, count: int = 10) -> list[LoggedFrame]:
    fd = ring._fileno()
    return last_frames(fd, header_in(read_bytes(fd), pid_namespace()), count, 1 << 24)


def values(ring: Any, count: int = 10) -> list[Any]:
    return [decoded(each) for each in frames(ring, count)]


def test_messages_that_wait_and_messages_that_were_taken() -> None:
    with Queue[Any]() as queue:
        queue.put_many([{"a": 1}, "b", b"c", [None] * 50])
        queue.get()
        assert values(queue) == [{"a": 1}, "b", b"c", [None] * 50]
        assert [each.state for each in frames(queue)] == ["taken", *3 * ["waiting"]]
        assert values(queue, 2) == [b"c", [None] * 50]
        assert [each.codec for each in frames(queue, 2)] == ["bytes", "builtins"]


def test_frames_across_the_end_of_an_area() -> None:
    with Ring.create(4096) as ring:
        for number in range(1000):
            ring.put(number.to_bytes(2, "little") * 50)
            ring.get()
        assert [each.payload[:2] for each in frames(ring, 20)] == [
            number.to_bytes(2, "little") for number in range(980, 1000)
        ]


def test_frames_of_two_areas() -> None:
    with Queue[bytes]() as queue:
        sent = [bytes([number]) * 9000 for number in range(100)]
        queue.put_many(sent)
        assert queue.statistics().growths
        assert values(queue, 100) == sent


def test_a_large_message_in_several_segments() -> None:
    with Queue[Any]() as queue:
        queue.put(bytearray(3 << 20))
        (frame,) = frames(queue)
        assert frame.length > 3 << 20
        with pytest.raises(DecodeError, match="a pickle"):
            decoded(frame)
        assert decoded(frame, unpickle=True) == bytearray(3 << 20)


def test_a_large_buffer_that_lies_in_a_block() -> None:
    numpy = pytest.importorskip("numpy")
    with Queue[Any]() as queue:
        queue.put(numpy.arange(1 << 18))
        (frame,) = frames(queue)
        assert decoded(frame, unpickle=True).sum() == sum(range(1 << 18))
        fd = queue._fileno()
        (cut,) = last_frames(fd, header_in(read_bytes(fd), pid_namespace()), 1, 1000)
        with pytest.raises(DecodeError, match="too large to be read here"):
            decoded(cut, unpickle=True)


class Dangerous:
    """Unpickling it ends the process."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_pickle_is_named_and_not_run() -> None:
    with Queue[Any]() as queue:
        queue.put(Dangerous())
        (frame,) = frames(queue)
        with pytest.raises(DecodeError, match=r"a pickle of \w+\._exit.*--pickle unpickles it"):
            decoded(frame)


def test_a_pickle_inside_a_message_is_not_run() -> None:
    with Queue[Any](codec=MessageCodec()) as queue:
        queue.put(Message(MessageType.DATA, "me", data=Dangerous()))
        queue.put(Message(MessageType.DATA, "me", data={"x": 1}))
        dangerous, harmless = frames(queue)
        with pytest.raises(DecodeError, match="--pickle unpickles it"):
            decoded(dangerous)
        assert decoded(harmless).data == {"x": 1}


def test_a_users_codec_stays_bytes() -> None:
    import json

    class Json:
        def dumps(self, obj: Any) -> bytes:
            return json.dumps(obj).encode()

        def loads(self, data: bytes) -> Any:
            return json.loads(data)

    with Queue[Any](codec=Json()) as queue:
        queue.put([1])
        (frame,) = frames(queue)
        assert frame.payload == b"[1]"
        with pytest.raises(DecodeError, match="its codec is not known here"):
            decoded(frame)


def test_a_reservation_is_shown_and_not_decoded() -> None:
    with Ring.create() as ring, ring.reserve(8):
        (frame,) = frames(ring)
        assert (frame.state, frame.owner) == ("reserved", os.getpid())
        with pytest.raises(DecodeError, match="never completed"):
            decoded(frame)


def test_garbage_between_frames_ends_the_walk() -> None:
    with Ring.create() as ring:
        for _ in range(3):
            ring.put(b"x" * 100)
        second = first_frame(ring) + 136
        word(ring, second + 8, 1 << 60)
        assert len(frames(ring)) == 1


def test_an_area_between_two_words_is_none() -> None:
    with Ring.create() as ring:
        ring.put(b"x")
        base, *place = area(ring, 0)
        area(ring, 0, (base + 4, *place))
        with pytest.raises(RingCorrupted, match="from position 4 on, cannot be"):
            frames(ring)
        area(ring, 0, (base, *place))


def test_an_empty_ring_has_no_frames() -> None:
    with Ring.create() as ring:
        assert frames(ring) == []

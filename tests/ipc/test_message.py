"""Messages: what travels, what does not touch pickle, what is refused."""

from __future__ import annotations

import contextlib
import pickle
import struct
from typing import Any

import pytest

from shmring.errors import DecodeError, EncodeError, InvalidArgument
from shmring.ipc.message import Message, MessageCodec, MessageType

pytestmark = pytest.mark.both_backends


class NoPickle:
    """A data codec that must not be asked."""

    def encode(self, obj: object) -> Any:
        raise AssertionError(f"encode({obj!r})")

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> Any:
        raise AssertionError(f"decode(kind={kind})")


def through(codec: MessageCodec, message: Message) -> Message:
    kind, segments = codec.encode(message)
    return codec.decode(kind, bytes(segments[0]), [bytearray(each) for each in segments[1:]])


@pytest.mark.parametrize("msg_type", MessageType)
@pytest.mark.parametrize("data", [None, 0, "text", {"a": [1, 2.5]}, b"bytes"])
def test_every_field_arrives(msg_type: MessageType, data: object) -> None:
    sent = Message(msg_type, "sender-ä", 1234.5, data)
    received = through(MessageCodec(), sent)
    assert received == sent
    assert received.nbytes == sent.nbytes > 0


def test_the_values_of_the_types_are_the_contract() -> None:
    values = {each.name: each.value for each in MessageType}
    assert values == {
        "DATA": "data",
        "CONTROL": "control",
        "HEARTBEAT": "heartbeat",
        "SHUTDOWN": "shutdown",
    }


@pytest.mark.parametrize("msg_type", MessageType)
def test_a_message_without_data_never_touches_pickle(msg_type: MessageType) -> None:
    codec = MessageCodec(NoPickle())
    assert through(codec, Message(msg_type, "a", 1.0)) == Message(msg_type, "a", 1.0)


def test_large_buffers_travel_out_of_band_and_arrive_writable() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1 << 16, dtype="f4")
    kind, segments = MessageCodec().encode(Message(MessageType.DATA, "a", 1.0, array))
    assert len(segments) == 2
    assert len(segments[0]) < 4096
    buffers = [bytearray(each) for each in segments[1:]]
    received: Any = MessageCodec().decode(kind, bytes(segments[0]), buffers).data
    assert (received == array).all()
    received[0] = 7
    assert received[0] == 7


def test_only_messages_can_be_encoded() -> None:
    with pytest.raises(EncodeError, match="not dict"):
        MessageCodec().encode({})
    with pytest.raises(InvalidArgument, match="70000 bytes"):
        MessageCodec().encode(Message(MessageType.DATA, "x" * 70_000))


HEAD = MessageCodec().encode(Message(MessageType.DATA, "me", 1.0, [1, 2]))[1][0]


@pytest.mark.parametrize(
    ("kind", "head", "buffers", "match"),
    [
        (3, HEAD, [], "kind=3"),
        (16, b"", [], "length=0"),
        (16, HEAD[:11], [], "length=11"),
        (16, b"\x09" + bytes(HEAD[1:]), [], "type=9"),
        (16, struct.pack("<BBHd", 1, 0, 5, 1.0) + b"abc", [], "length=5"),
        (16, struct.pack("<BBHd", 1, 0, 65535, 1.0), [], "length=65535"),
        (16, struct.pack("<BBHd", 1, 0, 0, float("nan")), [], "nan"),
        (16, struct.pack("<BBHd", 1, 0, 2, 1.0) + b"\xff\xff", [], "UTF-8"),
        (16, struct.pack("<BBHd", 1, 0, 0, 1.0) + b"rest", [], "4 bytes"),
        (16, struct.pack("<BBHd", 1, 0, 0, 1.0), [bytearray(1)], "1 buffers"),
        (16, struct.pack("<BBHd", 1, 99, 0, 1.0), [], "."),
        (16, struct.pack("<BBHd", 1, 1, 0, 1.0) + b"no pickle", [], "."),
    ],
)
def test_what_is_no_message_is_refused(
    kind: int, head: bytes, buffers: list[bytearray], match: str
) -> None:
    with pytest.raises(DecodeError, match=match):
        MessageCodec().decode(kind, bytes(head), buffers)


def test_any_byte_may_be_wrong() -> None:
    codec = MessageCodec(NoneOrBytes())
    head = bytes(codec.encode(Message(MessageType.DATA, "me", 1.0, b"data"))[1][0])
    for at in range(len(head)):
        for value in (0, 1, 127, 255):
            forged = head[:at] + bytes([value]) + head[at + 1 :]
            with contextlib.suppress(DecodeError):
                assert isinstance(codec.decode(16, forged, []), Message)
    for length in range(len(head)):
        with contextlib.suppress(DecodeError):
            assert isinstance(codec.decode(16, head[:length], []), Message)


class NoneOrBytes:
    """A data codec without pickle: forged bytes must not be run."""

    def encode(self, obj: Any) -> tuple[int, list[bytes | bytearray | memoryview]]:
        return 7, [obj]

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> object:
        if kind != 7:
            raise DecodeError(f"kind={kind}")
        return head


def test_the_codec_goes_to_other_processes() -> None:
    codec = pickle.loads(pickle.dumps(MessageCodec()))
    assert through(codec, Message(MessageType.DATA, "a", 1.0, 5)).data == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("msg_type", "data"),
        ("msg_type", []),
        ("sender_id", None),
        ("sender_id", "\ud800"),
        ("timestamp", float("nan")),
        ("timestamp", float("-inf")),
        ("timestamp", "now"),
        ("timestamp", 10**400),
    ],
)
def test_what_the_receiver_would_refuse_is_not_encoded(field: str, value: object) -> None:
    message = Message(MessageType.DATA, "x", 1.0)
    setattr(message, field, value)
    with pytest.raises(EncodeError, match=f"{field}="):
        MessageCodec().encode(message)

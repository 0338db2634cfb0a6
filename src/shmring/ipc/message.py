"""Messages and their frames.

Type, sender and timestamp stand in front of the data in the frame, packed, and
never go through pickle; a message without data (the usual HEARTBEAT and
SHUTDOWN) does not use pickle at all.

Head of a frame, little-endian::

    +------+------------+------------+-----------+---------+------------------+
    | type | data kind  | sender len | timestamp | sender  | head of the data |
    | u8   | u8, 0=None | u16        | f64       | UTF-8   | data codec's own |
    +------+------------+------------+-----------+---------+------------------+

Large buffers follow out of band, as the codec of the data hands them over.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
import time
from typing import Protocol

from shmring.errors import DecodeError, EncodeError, InvalidArgument
from shmring.queues.codec import KIND_MESSAGE, PickleCodec

__all__ = ["Message", "MessageCodec", "MessageType"]

_FIELDS = struct.Struct("<BBHd")
_MAX_SENDER_BYTES = 0xFFFF
_NO_DATA = 0


class MessageType(enum.Enum):
    """What a message is for."""

    DATA = "data"
    CONTROL = "control"
    HEARTBEAT = "heartbeat"
    SHUTDOWN = "shutdown"


_CODE_OF = {
    MessageType.DATA: 1,
    MessageType.CONTROL: 2,
    MessageType.HEARTBEAT: 3,
    MessageType.SHUTDOWN: 4,
}
_TYPE_OF = {code: msg_type for msg_type, code in _CODE_OF.items()}


@dataclasses.dataclass(slots=True)
class Message:
    """One message between processes.

    Args:
        msg_type: what the message is for.
        sender_id: the process id (a name, not a PID) of the sender.
        timestamp: when it was made, in seconds since the epoch.
        data: any object that the codec of the data carries; None costs nothing.

    Attributes:
        nbytes: the size of its frame in bytes, 0 until it has been encoded or decoded;
            not compared.
    """

    msg_type: MessageType
    sender_id: str
    timestamp: float = dataclasses.field(default_factory=time.time)
    data: object = None
    nbytes: int = dataclasses.field(default=0, init=False, repr=False, compare=False)


class DataCodec(Protocol):
    """The codec of a message's data, such as :class:`shmring.queues.codec.PickleCodec`."""

    def encode(self, obj: object) -> tuple[int, list[bytes | bytearray | memoryview]]:
        """Turn ``obj`` into a kind (1 to 254) and segments: the head, then large buffers."""

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> object:
        """Turn the result of :meth:`encode` back into an object."""


class MessageCodec:
    """Messages to frames and back, for the ``codec=`` of a queue.

    Args:
        data_codec: the codec of each message's data; None is pickle.
    """

    KIND = KIND_MESSAGE

    def __init__(self, data_codec: DataCodec | None = None) -> None:
        self._data: DataCodec = PickleCodec() if data_codec is None else data_codec

    def encode(self, obj: object) -> tuple[int, list[bytes | bytearray | memoryview]]:
        """Turn a message into a kind and segments, the head first; set its ``nbytes``.

        Raises:
            EncodeError: it is not a message, or its data cannot be encoded.
            InvalidArgument: the sender's name is longer than 65,535 bytes.
        """
        if not isinstance(obj, Message):
            raise EncodeError(f"a message queue carries Message, not {type(obj).__name__}")
        if not isinstance(obj.msg_type, MessageType):
            raise EncodeError(f"msg_type={obj.msg_type!r}: a MessageType is needed")
        try:
            sender = obj.sender_id.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise EncodeError(f"sender_id={obj.sender_id!r} is no text: {error}") from error
        if len(sender) > _MAX_SENDER_BYTES:
            raise InvalidArgument(
                f"sender_id of {len(sender)} bytes: at most {_MAX_SENDER_BYTES} can travel"
            )
        try:
            finite = math.isfinite(obj.timestamp)
        except (TypeError, OverflowError):
            finite = False
        if not finite:  # else the receiver would refuse the frame
            raise EncodeError(f"timestamp={obj.timestamp!r}: a finite number is needed")
        code = _CODE_OF[obj.msg_type]
        if obj.data is None:
            head = _FIELDS.pack(code, _NO_DATA, len(sender), obj.timestamp) + sender
            obj.nbytes = len(head)
            return self.KIND, [head]
        kind, segments = self._data.encode(obj.data)
        if not 0 < kind < 256:
            raise EncodeError(f"the data codec returned kind={kind}: it must be 1 to 255")
        head = _FIELDS.pack(code, kind, len(sender), obj.timestamp) + sender + segments[0]
        buffers = segments[1:]
        obj.nbytes = len(head) + sum(memoryview(buffer).nbytes for buffer in buffers)
        return self.KIND, [head, *buffers]

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> Message:
        """Turn a frame back into a message; every length in it is checked first.

        Raises:
            DecodeError: the frame is not a message, or its data cannot be decoded.
        """
        if kind != self.KIND:
            raise DecodeError(f"frame of kind={kind}: a message has kind={self.KIND}")
        if len(head) < _FIELDS.size:
            raise DecodeError(
                f"message head of length={len(head)}: at least {_FIELDS.size} bytes expected"
            )
        code, data_kind, sender_length, timestamp = _FIELDS.unpack_from(head)
        msg_type = _TYPE_OF.get(code)
        if msg_type is None:
            raise DecodeError(f"message type={code}: one of {sorted(_TYPE_OF)} expected")
        if not math.isfinite(timestamp):
            raise DecodeError(f"message timestamp={timestamp}: a finite number expected")
        start = _FIELDS.size + sender_length
        if start > len(head):
            raise DecodeError(
                f"sender of length={sender_length} in a message head of length={len(head)}"
            )
        try:
            sender = str(head[_FIELDS.size : start], "utf-8")
        except UnicodeDecodeError as error:
            raise DecodeError(f"the sender's name is not UTF-8: {error}") from error
        data: object = None
        if data_kind != _NO_DATA:
            data = self._data.decode(data_kind, bytes(head[start:]), buffers)
        elif start != len(head) or buffers:
            raise DecodeError(
                f"message without data, yet {len(head) - start} bytes and "
                f"{len(buffers)} buffers follow"
            )
        message = Message(msg_type, sender, timestamp, data)
        message.nbytes = len(head) + sum(len(buffer) for buffer in buffers)
        return message

"""Codecs: objects to frames and back.

A codec turns an object into a *kind* and *segments*: the head, and perhaps
large buffers, which are copied once in and once out.  Kind 0 is plain bytes;
1 to 255 are the codecs' own.
"""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Protocol, runtime_checkable

from shmring.errors import DecodeError, EncodeError, InvalidArgument
from shmring.queues.arrays import IN_BAND_BYTES, array_reducers

core: ModuleType | None
try:
    from shmring._core import object_ring as core
except ImportError:
    core = None  # the fallback, where pickle carries everything


__all__ = [
    "BytesCodec",
    "Codec",
    "MsgpackCodec",
    "PickleCodec",
    "UserCodec",
    "find_codec",
    "portable",
]

Segment = bytes | bytearray | memoryview

# As in cython/shmring/_core/layout.h.
KIND_BYTES = 0
KIND_PICKLE = 1
KIND_MSGPACK = 2
KIND_USER = 3
KIND_BUILTINS = 4
KIND_MESSAGE = 16  # of shmring.ipc.message

Reducer = Callable[[Any], Any]


@runtime_checkable
class Codec(Protocol):
    """A user's codec, for ``codec=``; the names "pickle", "bytes" and "msgpack" are others."""

    def dumps(self, obj: Any) -> Segment:
        """Turn an object into bytes.

        Args:
            obj: what was put.

        Raises:
            Exception: it cannot be encoded; ``put`` raises EncodeError.
        """

    def loads(self, data: bytes) -> Any:
        """Turn the result of :meth:`dumps` back into an object.

        Args:
            data: the message.

        Raises:
            Exception: it cannot be decoded; ``get`` raises DecodeError.
        """


_registered: dict[type, Reducer] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]


def reducers() -> dict[type, Reducer]:
    """The reducers that multiprocessing and copyreg have now, and shmring's for arrays."""
    return {**array_reducers(), **copyreg.dispatch_table, **_registered}


class ReusedPickler:
    """A C pickler that is used again: a fresh one costs three times as much.

    It has the reducers that were registered (ForkingPickler, copyreg) when it was
    made.  Not for two users at a time.

    Args:
        table: makes its reducers, by type, from what is registered.

    Attributes:
        watched: tells whether reducers were registered since; None on the fallback.
        chunks: the pickle, usually one piece; the caller empties it.
        buffers: the out-of-band buffers; the caller empties it.
    """

    __slots__ = ("buffers", "chunks", "clear_memo", "dump", "watched")

    def __init__(self, table: Callable[[], Mapping[type, Reducer]] = reducers) -> None:
        chunks: list[bytes] = []
        buffers: list[memoryview] = []

        def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
            # A closure, not a method: a cycle would keep the pickled object alive.
            try:
                raw = buffer.raw()
            except BufferError:
                return True  # not contiguous
            if raw.nbytes < IN_BAND_BYTES:
                return True
            buffers.append(raw)
            return False

        pickler = pickle.Pickler(
            SimpleNamespace(write=chunks.append), protocol=5, buffer_callback=keep_in_band
        )
        self.watched = None
        if core is not None:  # before they are copied: what is registered meanwhile is noticed
            awaited = None if array_reducers() else "numpy"
            self.watched = core.Watched((copyreg.dispatch_table, _registered), awaited)
        pickler.dispatch_table = table()
        self.chunks = chunks
        self.buffers = buffers
        self.dump: Callable[[Any], None] = pickler.dump
        self.clear_memo: Callable[[], None] = pickler.clear_memo


class PickleCodec:
    """Pickle protocol 5 with large buffers out of band; the default.

    Trees of exact builtins have a faster encoding of their own.  A subclass with
    other reducers has a list of picklers of its own.
    """

    # One user takes one: a thread, or an object that encodes while it is being pickled.
    _spare_picklers: ClassVar[list[ReusedPickler]] = []

    @staticmethod
    def reducers() -> Mapping[type, Reducer]:
        """The reducers of this codec, by type."""
        return reducers()

    def new_pickler(self) -> ReusedPickler:
        """A pickler with these reducers."""
        return ReusedPickler(self.reducers)

    def explain_encode(self, obj: Any, error: BaseException) -> EncodeError:
        """The exception for an object that could not be pickled."""
        return encode_error(obj, error, self.reducers)

    def encode(self, obj: Any) -> tuple[int, list[Segment]]:
        """Encode builtins as such, other objects as a pickle and its out-of-band buffers.

        Raises:
            EncodeError: it cannot be pickled; the text names the part that failed.
        """
        if core is not None and (encoded := core.encode_builtins(obj)) is not None:
            return KIND_BUILTINS, [encoded]
        pickler = self._spare_picklers.pop() if self._spare_picklers else self.new_pickler()
        if pickler.watched is None or pickler.watched.changed():
            pickler = self.new_pickler()
        try:
            pickler.dump(obj)
        except Exception as error:  # the pickler is in an unknown state, and dropped
            raise self.explain_encode(obj, error) from error
        chunks, buffers = pickler.chunks, pickler.buffers
        segments: list[Segment] = [chunks[0] if len(chunks) == 1 else b"".join(chunks), *buffers]
        chunks.clear()
        buffers.clear()
        pickler.clear_memo()
        self._spare_picklers.append(pickler)
        return KIND_PICKLE, segments

    def decode(self, kind: int, head: bytes, buffers: Sequence[Any]) -> Any:
        """Unpickle, which runs code of the sender's choosing; DecodeError if it fails."""
        if kind == KIND_BYTES and not buffers:
            return head
        if kind == KIND_BUILTINS and not buffers and core is not None:
            return core.decode_builtins(bytes(head))
        if kind != KIND_PICKLE:
            raise DecodeError(
                f"a message of {len(head)} bytes has kind {kind}, not pickle's {KIND_PICKLE}"
            )
        try:
            return pickle.loads(head, buffers=buffers)
        except Exception as error:
            raise decode_error(head, buffers, error) from error


class BytesCodec:
    """Bytes-like objects only, which arrive as bytes; nothing is ever unpickled."""

    def encode(self, obj: Any) -> tuple[int, list[Segment]]:
        """Check that `obj` is bytes-like and C-contiguous; EncodeError otherwise."""
        try:
            view = memoryview(obj)
        except TypeError:
            raise EncodeError(
                f'codec="bytes" carries bytes-like objects, not {type(obj).__name__}'
            ) from None
        if not view.c_contiguous:
            raise EncodeError(
                f'codec="bytes" carries C-contiguous buffers, and this {type(obj).__name__} is'
                " not one: make a copy with bytes(...)"
            )
        if view.ndim == 1 and view.format == "B":
            return KIND_BYTES, [view]
        try:
            return KIND_BYTES, [view.cast("B")]
        except TypeError:  # a shape with a zero cannot be cast
            return KIND_BYTES, [view.tobytes()]

    def decode(self, kind: int, head: bytes, buffers: Sequence[Any]) -> bytes:
        """The bytes themselves; DecodeError for a frame of another codec."""
        if kind != KIND_BYTES or buffers:
            raise DecodeError(f"a message of {len(head)} bytes has kind {kind}, not plain bytes")
        return head


class _ByName:
    """A module, pickled by its name."""

    def __init__(self, module: ModuleType) -> None:
        self._name = module.__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self._name,)


def portable(codec: Any) -> Any:
    """A ``codec=`` argument in a form that can be pickled; it arrives as the argument."""
    return _ByName(codec) if isinstance(codec, ModuleType) else codec


class UserCodec:
    """A user's object with ``dumps`` and ``loads``, or a module that has them."""

    kind = KIND_USER

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def __getstate__(self) -> dict[str, Any]:
        return {"_codec": portable(self._codec)}

    def encode(self, obj: Any) -> tuple[int, list[Segment]]:
        """Call ``dumps``; its exceptions become an EncodeError."""
        try:
            encoded = self._codec.dumps(obj)
        except Exception as error:
            raise EncodeError(f"{_a(obj)} cannot be put ({_text(error)})") from error
        if not isinstance(encoded, bytes | bytearray | memoryview):
            raise EncodeError(
                f"dumps of {self._codec!r} returned {_a(encoded)}: bytes, a bytearray or a"
                " memoryview can travel"
            )
        if isinstance(encoded, memoryview) and not encoded.c_contiguous:
            raise EncodeError(
                f"dumps of {self._codec!r} returned a memoryview that is not C-contiguous:"
                " make a copy with bytes(...)"
            )
        return self.kind, [encoded]

    def decode(self, kind: int, head: bytes, buffers: Sequence[Any]) -> Any:
        """Call ``loads``; its exceptions become a DecodeError."""
        if kind != self.kind or buffers:
            raise DecodeError(f"a message of {len(head)} bytes has kind {kind}, not {self.kind}")
        try:
            return self._codec.loads(head)
        except Exception as error:
            raise _undecodable(head, buffers, error) from error


class MsgpackCodec(UserCodec):
    """MessagePack by msgspec: runs no code on arrival, readable by other languages."""

    kind = KIND_MSGPACK

    def __init__(self) -> None:
        try:
            from msgspec import msgpack
        except ImportError:
            raise ImportError(
                'codec="msgpack" needs msgspec: pip install "shmring[msgpack]"'
            ) from None
        super().__init__(SimpleNamespace(dumps=msgpack.encode, loads=msgpack.decode))


def find_codec(codec: Any) -> Any:
    """The codec for a ``codec=`` argument.

    Args:
        codec: "pickle", "bytes", "msgpack", or an object or module with ``dumps``
            and ``loads`` (or with ``encode`` and ``decode``, as the classes here).

    Raises:
        InvalidArgument: it is none of these.
        ImportError: "msgpack" without its extra.
    """
    if codec == "pickle":
        return PickleCodec()
    if codec == "bytes":
        return BytesCodec()
    if codec == "msgpack":
        return MsgpackCodec()
    ours = type(codec).__module__.split(".")[0] == "shmring"
    if isinstance(codec, Codec) and not ours:
        return UserCodec(codec)  # also with an encode, as json's encoders have
    if hasattr(codec, "encode") and hasattr(codec, "decode") and not isinstance(codec, str):
        return codec
    raise InvalidArgument(
        f'codec={codec!r}: "pickle", "bytes", "msgpack" or an object with dumps and loads'
    )


def encode_error(
    obj: Any, error: BaseException, table: Callable[[], Mapping[type, Reducer]] = reducers
) -> EncodeError:
    """The exception for an object that could not be pickled; names the part, if it is found."""
    part = None
    with contextlib.suppress(Exception):  # the import fails where descriptors have run out
        # Not at the top: seldom needed, and it imports much.
        from shmring.queues.pickle_errors import unpicklable_part

        part = unpicklable_part(obj, table())
    where = f": {part} is the part that cannot travel" if part else ""
    return EncodeError(f"{_a(obj)} cannot be put ({_text(error)}){where}")


def decode_error(head: bytes, buffers: Sequence[Any], error: BaseException) -> DecodeError:
    """The exception for a pickle that could not be decoded: its size, and its first type."""
    kind = None
    with contextlib.suppress(Exception):
        from shmring.queues.pickle_errors import first_type_in

        kind = first_type_in(head)
    return _undecodable(head, buffers, error, kind)


def _undecodable(
    head: bytes, buffers: Sequence[Any], error: BaseException, kind: str | None = None
) -> DecodeError:
    size = len(head) + sum(len(buffer) for buffer in buffers)
    what = f" (the first type in it is {kind})" if kind else ""
    return DecodeError(
        f"a message of {size} bytes was taken and cannot be decoded:"
        f" {type(error).__name__}: {_text(error)}{what}"
    )


def _text(error: BaseException) -> str:
    """The text of an error; its class where that raises."""
    try:
        return str(error)
    except Exception:
        return type(error).__qualname__


def _a(obj: Any) -> str:
    return f"a {type(obj).__qualname__}"

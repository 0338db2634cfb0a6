"""Messages of bytes: get and get_many of every ring, and the compiled half of Ring."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, TypeAlias

from typing_extensions import Buffer

from shmring._core.handle import RingHandle

def _set_lend_bytes(least: int) -> int: ...

_Peers: TypeAlias = Iterable[Any] | None

class Parcel: ...
class LentBuffer: ...

class MessageRing(RingHandle):
    def get_many(
        self,
        max_items: int | None = None,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: _Peers = None,
    ) -> list[Any]: ...

class BytesRing(MessageRing):
    def put(
        self,
        data: Buffer,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: _Peers = None,
    ) -> None: ...
    def put_nowait(self, data: Buffer) -> None: ...
    def put_many(
        self,
        messages: Iterable[Buffer],
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: _Peers = None,
    ) -> None: ...
    def get(
        self, block: bool = True, timeout: float | None = None, *, peers: _Peers = None
    ) -> bytes: ...
    def get_nowait(self) -> bytes: ...
    def get_many(
        self,
        max_items: int | None = None,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: _Peers = None,
    ) -> list[bytes]: ...
    def reserve(
        self, nbytes: int, block: bool = True, timeout: float | None = None, *, peers: _Peers = None
    ) -> FrameView: ...
    def peek(
        self, block: bool = True, timeout: float | None = None, *, peers: _Peers = None
    ) -> FrameView: ...

class FrameView:
    def __init__(
        self, ring: BytesRing, writable: bool, length: int, block: bool, timeout: float | None
    ) -> None: ...
    def __enter__(self) -> memoryview: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

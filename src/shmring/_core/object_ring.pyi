"""The compiled half of Queue: one call from the object to the frame."""

from collections.abc import Callable, Iterable
from typing import Any

from shmring._core.take import TakingRing

class Parcel: ...

class ObjectRing(TakingRing):
    def put(
        self,
        obj: Any,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> None: ...
    def put_nowait(self, obj: Any) -> None: ...
    def put_many(
        self,
        objects: Iterable[Any],
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> None: ...
    def get(
        self,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> Any: ...
    def get_nowait(self) -> Any: ...
    def _set_codec(
        self,
        encoder: Callable[[Any], tuple[int, list[Any]]],
        decoder: Callable[[int, bytes, Any], Any],
        raw: bool,
        trees: bool = False,
        pickler_type: Callable[[], Any] | None = None,
        loader: Callable[[bytes], Any] | None = None,
        explain_encode: Callable[[Any, BaseException], BaseException] | None = None,
        explain_decode: Callable[[bytes, Any, BaseException], BaseException] | None = None,
    ) -> None: ...
    def _put_position(self, obj: Any, block: bool = True, timeout: float | None = None) -> int: ...
    def _task_done(self) -> bool: ...
    def _unfinished(self) -> int: ...
    def _join_all(
        self, timeout: float | None = None, peers: Iterable[Any] | None = None
    ) -> bool: ...
    def _claim_open(self, key: int = 0) -> int: ...
    def _claim_release(self, slot: int) -> None: ...
    def _claim_close(self, slot: int) -> None: ...
    def _claim_free(self, slot: int) -> None: ...
    def _claims(self) -> list[tuple[int, int, int, int, int, int]]: ...

"""Named queues of the fallback: a BaseManager in the process that created them.

The queue itself is a ``queue.Queue`` in the creator; the others reach it
through a socket.  Where it listens, and the key, stand in a file of
:func:`~shmring.fallback.files.fallback_folder` that only this user can read::

    creator                                   another process
      queue.Queue  <-- one thread a client <-- socket <-- proxy
      NAME.queue (locked while it lives) ------------------^ address, key
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing import connection, managers, util
from typing import Any, Protocol

from shmring.arguments import checked_timeout
from shmring.errors import (
    Empty,
    Full,
    InvalidArgument,
    RingClosed,
    RingNotFound,
)
from shmring.fallback.files import SharedFile
from shmring.process.leaving import end_thread_at_exit
from shmring.process.peers import PeerPoll

__all__ = ["ServedQueue"]

_ENDPOINT_BYTES = 4096


class FrameCodec(Protocol):
    """What turns objects into a kind and segments, and back."""

    def encode(self, obj: Any) -> tuple[int, list[bytes | bytearray | memoryview]]: ...

    def decode(self, kind: int, head: bytes, buffers: list[bytearray]) -> Any: ...


_METHODS = ("empty", "full", "get", "put", "qsize")


class _Client(managers.BaseManager):
    """The client's end."""


_Client.register("queue", exposed=_METHODS)
# Chosen by the client, as is the type of the proxy: the server only looks at the methods.
_proxy_type = None


class _Server(managers.Server):
    """The manager's server with an end: the original accepts, and spins, for ever."""

    listener: Any

    def __init__(self, registry: Any, address: Any, key: bytes) -> None:
        super().__init__(registry, address, key, "pickle")
        self.stop_event = threading.Event()
        self._guard = threading.Lock()
        self._clients: set[connection.Connection] = set()
        util.register_after_fork(self, _Server._let_go)

    def accepter(self) -> None:
        """Give each client a thread, until :meth:`stop`."""
        while not self.stop_event.is_set():
            try:
                accepted = self.listener.accept()
            except OSError:
                continue
            if self.stop_event.is_set():
                accepted.close()
                return
            with self._guard:
                self._clients.add(accepted)
            threading.Thread(
                target=self._serve, args=(accepted,), name="shmring-client", daemon=True
            ).start()

    def _serve(self, client: connection.Connection) -> None:
        try:
            self.handle_request(client)
        finally:
            with self._guard:
                self._clients.discard(client)

    def _let_go(self) -> None:
        """In a forked child: an end held here would hide the server's death from its clients."""
        for client in list(self._clients):  # without the lock, which another thread may have had
            client.close()
        if sys.platform == "linux":  # elsewhere this would remove the parent's socket file
            self.listener.close()

    def stop(self) -> None:
        """End the accepter, and hang up on every client."""
        self.stop_event.set()
        # Nothing but a caller wakes accept().
        with contextlib.suppress(OSError):
            connection.Client(self.listener.address).close()
        with self._guard:
            for client in self._clients:
                _hang_up(client)


def _hang_up(client: connection.Connection) -> None:
    """Let the other end see the end of the file; close() would not wake our own thread."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(client.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)


class _Local(queue.Queue[tuple[int, list[bytes]]]):
    """A ``queue.Queue`` that Ctrl-C cannot leave locked.

    Python may raise KeyboardInterrupt after a lock was taken and before the block is
    entered that gives it back; all clients would then wait for ever.  A lock that knows
    its owner lets him give it back.
    """

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._owned = threading.RLock()
        self.mutex = self._owned  # type: ignore[assignment]
        self.not_empty = threading.Condition(self._owned)
        self.not_full = threading.Condition(self._owned)
        self.all_tasks_done = threading.Condition(self._owned)

    def call(self, method: str, *args: Any) -> Any:
        """One of the methods, by the thread that an interruption may hit."""
        try:
            return getattr(self, method)(*args)
        except BaseException:
            while self._owned._is_owned():  # type: ignore[attr-defined]
                self._owned.release()
            raise


class ServedQueue:
    """A queue that other processes find by name; made by :meth:`create` or :meth:`attach`.

    It can be pickled to wherever the same name can be reached, and a forked
    child that inherits it becomes a client by itself.
    """

    def __init__(self, name: str, codec: FrameCodec) -> None:
        self.name = name
        self._codec = codec
        self._pid = os.getpid()
        self._local: _Local | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._endpoint: SharedFile | None = None
        self._proxy: Any = None
        self._manager: Any = None
        self._closed = False

    @classmethod
    def create(cls, name: str, maxsize: int, codec: FrameCodec) -> ServedQueue:
        """Make the queue and serve it from a thread of this process.

        Args:
            name: what the others ask for.
            maxsize: how many messages it holds at most; 0 is without a bound.
            codec: what turns messages into bytes.

        Returns:
            the creator's handle; the queue lives as long as it.

        Raises:
            RingExists: a living process serves that name.
            InvalidArgument: an impossible maxsize.
        """
        bound = checked_maxsize(maxsize, (1 << 63) - 1, "more messages than memory can ever hold")
        self = cls(name, codec)
        endpoint = SharedFile.create(f"{name}.queue", _ENDPOINT_BYTES)
        try:
            local = _Local(bound)
            key = secrets.token_bytes(32)
            # A name in Linux's abstract space goes with the process, however it ends.
            address = f"\0shmring-{secrets.token_hex(16)}" if sys.platform == "linux" else None
            registry = {"queue": (lambda: local, _METHODS, None, _proxy_type)}
            server = _Server(registry, address, key)
            text = json.dumps([key.hex(), _as_text(server.address)]).encode()
            endpoint.buffer[1 : 1 + len(text)] = text
            endpoint.buffer[0] = 1  # ready: what follows is whole
            thread = threading.Thread(
                target=server.accepter, name=f"shmring-serve-{name}", daemon=True
            )
            thread.start()
        except BaseException:
            endpoint.close()
            raise
        self._local, self._server, self._thread, self._endpoint = local, server, thread, endpoint
        return self

    @classmethod
    def attach(cls, name: str, timeout: float, codec: FrameCodec) -> ServedQueue:
        """Reach a queue that another process serves.

        Args:
            name: its name.
            timeout: how long to wait for its creator, in seconds.
            codec: as its creator's.

        Returns:
            a client's handle.

        Raises:
            RingNotFound: nobody serves that name until the deadline.
        """
        self = cls(name, codec)
        self._connect(checked_timeout(timeout))
        return self

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """As :meth:`shmring.Queue.put`.

        Args:
            obj: what the codec takes.
            block: whether to wait while the queue is full.
            timeout: in seconds; None is without end.

        Raises:
            Full: no room until the deadline.
            EncodeError: it cannot be encoded; nothing was put.
            RingClosed: this handle was closed, or the process that serves it has ended.
        """
        kind, segments = self._codec.encode(obj)
        timeout = checked_timeout(timeout)
        self._call("put", (kind, [bytes(each) for each in segments]), block, timeout)

    def get(
        self,
        block: bool = True,
        timeout: float | None = None,
        *,
        peers: Iterable[Any] | None = None,
    ) -> Any:
        """As :meth:`shmring.Queue.get`.

        Args:
            block: whether to wait while the queue is empty.
            timeout: in seconds; None is without end.
            peers: processes without which waiting is in vain.

        Returns:
            the oldest message.

        Raises:
            Empty: none until the deadline.
            PeerDied: every one of ``peers`` is dead, and nothing is left to take.
            DecodeError: it was taken and cannot be decoded.
            RingClosed: this handle was closed, or the process that serves it has ended.
        """
        timeout = checked_timeout(timeout)
        taken: Any
        if peers is None:
            taken = self._call("get", block, timeout)
        else:
            taken = self._get_beside(PeerPoll(peers, timeout), block)
        kind, segments = taken
        return self._codec.decode(kind, segments[0], [bytearray(each) for each in segments[1:]])

    def put_nowait(self, obj: Any) -> None:
        """Put one message, or raise :class:`Full` at once."""
        self.put(obj, block=False)

    def get_nowait(self) -> Any:
        """Take one message, or raise :class:`Empty` at once."""
        return self.get(block=False)

    def qsize(self) -> int:
        """How many messages are there."""
        return int(self._call("qsize"))

    def empty(self) -> bool:
        """Whether no message is there."""
        return bool(self._call("empty"))

    def full(self) -> bool:
        """Whether ``maxsize`` is reached."""
        return bool(self._call("full"))

    def close(self) -> None:
        """Close this handle; the creator's ends the queue for all. Twice is allowed."""
        self._closed = True
        if self._is_server():
            assert self._server is not None
            assert self._thread is not None
            assert self._endpoint is not None
            self._endpoint.unlink()
            self._server.stop()
            self._thread.join(5)
            self._server.listener.close()
            self._endpoint.close()
        elif self._endpoint is not None:
            self._endpoint.close()
        self._local = self._server = self._thread = self._endpoint = None
        self._proxy = self._manager = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "codec": self._codec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ServedQueue.__init__(self, state["name"], state["codec"])

    def _is_server(self) -> bool:
        return self._local is not None and self._pid == os.getpid()

    def _call(self, method: str, *args: Any) -> Any:
        if self._closed:
            end_thread_at_exit()
            raise RingClosed(f"queue {self.name!r} has been closed by this handle")
        if self._pid != os.getpid():
            # Forked: the thread that serves is in the parent, the sockets are the parent's.
            self._pid = os.getpid()
            if self._endpoint is not None:
                self._endpoint.close()
            self._local = self._server = self._thread = self._endpoint = self._proxy = None
        if self._local is not None:
            return self._local.call(method, *args)
        try:
            if self._proxy is None:
                self._connect(0.0)
            return getattr(self._proxy, method)(*args)
        except (EOFError, OSError) as error:  # RingNotFound is one
            self._proxy = None
            raise RingClosed(
                f"queue {self.name!r}: the process that serves it has ended ({error!r})"
            ) from error
        except (Empty, Full):
            raise
        except BaseException:
            # Interrupted between question and answer: the next call must not read this answer.
            per_thread: Any = getattr(self._proxy, "_tls", None)
            if per_thread is not None and hasattr(per_thread, "connection"):
                per_thread.connection.close()
                del per_thread.connection
            raise

    def _get_beside(self, watch: PeerPoll, block: bool) -> Any:
        """A get in slices, between which the peers are looked after."""
        deadline = math.inf if watch.timeout is None else time.monotonic() + watch.timeout
        while True:
            died = watch.all_dead()
            left = max(0.0, min(watch.SLICE, deadline - time.monotonic()))
            try:
                return self._call("get", block and not died, left)
            except Empty:
                if died:
                    raise watch.error("nothing is left to take") from None
                if not block or time.monotonic() >= deadline:
                    raise

    def _connect(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            endpoint = SharedFile.attach(
                f"{self.name}.queue", max(0.0, deadline - time.monotonic())
            )
            try:
                if endpoint.buffer[0] == 1:
                    key, address = json.loads(bytes(endpoint.buffer[1:]).rstrip(b"\0"))
                    manager = _Client(address, bytes.fromhex(key))
                    with contextlib.suppress(OSError, EOFError):
                        manager.connect()
                        self._proxy = manager.queue()  # type: ignore[attr-defined]
                        self._manager = manager
                        return
            finally:
                # Not held: the file must go with its creator, not with its clients.
                endpoint.close()
            if time.monotonic() >= deadline:
                raise RingNotFound(f"queue {self.name!r}: nobody serves it")
            time.sleep(0.005)


def _as_text(address: object) -> str:
    if not isinstance(address, (str, bytes)):
        raise InvalidArgument(f"address={address!r}: a path or pipe expected on this platform")
    return address if isinstance(address, str) else os.fsdecode(address)


def checked_maxsize(maxsize: object, most: int, why: str) -> int:
    """A bound on messages, 0 for none; InvalidArgument, which says why, above `most`."""
    try:
        bound = max(0, operator.index(maxsize))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"maxsize must be an int, not {type(maxsize).__name__}") from None
    if bound > most:
        raise InvalidArgument(f"maxsize={maxsize}: {why}")
    return bound

"""Named queues of the fallback: a BaseManager in the process that created them.

Where it listens, and the key, stand in a file that only this user can read::

    creator                                   another process
      queue.Queue  <-- one thread a client <-- socket <-- proxy
      NAME.queue (held while it lives) --------------------^ address, key
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
import weakref
from functools import partialmethod
from multiprocessing import connection, managers, util
from typing import Any, Self

from shmring.arguments import checked_timeout
from shmring.errors import Empty, Full, RingClosed, RingNotFound
from shmring.fallback.files import SharedFile, fallback_folder, locked
from shmring.fallback.queues import Peers, SlicedWait, encoded
from shmring.process.leaving import end_thread_at_exit

__all__ = ["ServedQueue"]

_ENDPOINT_BYTES = 4096
_RETRY_S = 0.005


class _Client(managers.BaseManager):
    """The client's end."""


_Client.register("queue", proxytype=managers.BaseProxy)


class _LocalQueue(queue.Queue[Any]):
    """A ``queue.Queue`` whose lock knows its owner, and can be released by it."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.mutex: Any = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.not_full = threading.Condition(self.mutex)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method; Ctrl-C may hit between taking the lock and entering its block."""
        try:
            return getattr(self, method)(*args)
        except BaseException:
            while self.mutex._is_owned():
                self.mutex.release()
            raise


class _Server(managers.Server):
    """The manager's server of one queue, with an end: the original accepts for ever."""

    listener: connection.Listener

    def __init__(self, name: str, maxsize: int) -> None:
        self.queue = _LocalQueue(maxsize)
        self.stop_event = threading.Event()
        self._clients: weakref.WeakSet[connection.Connection] = weakref.WeakSet()
        key = secrets.token_bytes(32)
        # A name in Linux's abstract space goes with the process, however it ends.
        address = f"\0shmring-{secrets.token_hex(16)}" if sys.platform == "linux" else None
        methods = ("empty", "full", "get", "put", "qsize")
        served: dict[str, Any] = {"queue": (lambda: self.queue, methods, {}, None)}
        super().__init__(served, address, key, "pickle")
        text = json.dumps([key.hex(), os.fsdecode(self.listener.address)]).encode()
        try:
            with locked(fallback_folder()):  # no client sees it half written
                self._endpoint = SharedFile.create(f"{name}.queue", _ENDPOINT_BYTES)
                self._endpoint.buffer[: len(text)] = text
        except BaseException:
            self.listener.close()
            raise
        self._thread = threading.Thread(
            target=self.accepter, name=f"shmring-serve-{name}", daemon=True
        )
        self._thread.start()
        util.register_after_fork(self, _Server.let_go)

    def accepter(self) -> None:
        """Give each client a thread, until :meth:`stop`."""
        while True:
            try:
                client = self.listener.accept()
            except OSError:
                continue
            if self.stop_event.is_set():
                client.close()
                return
            self._clients.add(client)
            threading.Thread(target=self.handle_request, args=(client,), daemon=True).start()

    def accept_connection(self, client: connection.Connection, name: str) -> None:
        """Serve a client; once stopped, the original answers its next request with None."""
        super().accept_connection(client, name)
        client.close()

    def decref(self, client: connection.Connection, ident: str) -> None:
        """Keep the queue: it goes with its server, not with its last proxy."""

    def stop(self) -> None:
        """End the thread that accepts, and hang up on every client."""
        self._endpoint.close(remove=True)
        self.stop_event.set()
        with contextlib.suppress(OSError):  # nothing but a client wakes accept()
            connection.Client(self.listener.address).close()
        self._thread.join(5)
        self.listener.close()
        for client in list(self._clients) if sys.platform != "win32" else ():
            # close() would not wake a thread of ours that reads
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(client.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """In a forked child: an end held here would hide the server's death from its clients."""
        for client in list(self._clients):
            client.close()
        self.listener.close()  # removes a socket file only in the process that made it
        self._endpoint.close()


class ServedQueue:
    """A queue that other processes find by name; made by :meth:`create` or :meth:`attach`.

    The calls are those of :class:`shmring.Queue`; they raise RingClosed when the process
    that serves it has ended.  A copy, pickled or in a forked child, is a client.
    """

    def __init__(self, name: str, codec: Any) -> None:
        self.name = name
        self._codec = codec
        self._pid = os.getpid()
        self._server: _Server | None = None  # in the creator
        self._proxy: Any = None  # in the others
        self._closed = False

    @classmethod
    def create(cls, name: str, maxsize: int, codec: Any) -> Self:
        """Make the queue and serve it from a thread; RingExists if the name is in use."""
        self = cls(name, codec)
        self._server = _Server(name, maxsize)
        return self

    @classmethod
    def attach(cls, name: str, timeout: float, codec: Any) -> Self:
        """Reach a queue; RingNotFound if no process serves it until the deadline."""
        self = cls(name, codec)
        self._proxy = self._connect(checked_timeout(timeout))
        return self

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """As :meth:`shmring.Queue.put`."""
        self._call("put", encoded(self._codec, obj), block, checked_timeout(timeout))

    def get(self, block: bool = True, timeout: float | None = None, *, peers: Peers = None) -> Any:
        """As :meth:`shmring.Queue.get`."""
        waiting = SlicedWait(block, timeout, peers)
        message = waiting.until(
            lambda seconds: self._call("get", seconds > 0, seconds), "nothing is left to take"
        )
        return self._codec.decode(*message)

    def close(self) -> None:
        """Close this handle; the creator's ends the queue for all. Twice is allowed."""
        self._closed = True
        server, self._server, self._proxy = self._server, None, None
        if server is not None and self._pid == os.getpid():
            server.stop()

    def __reduce__(self) -> tuple[Any, ...]:
        return ServedQueue, (self.name, self._codec)

    def _call(self, method: str, *args: Any) -> Any:
        if self._closed:
            end_thread_at_exit()
            raise RingClosed(f"queue {self.name!r} has been closed by this handle")
        if self._pid != os.getpid():  # forked: thread and sockets are the parent's
            self._pid = os.getpid()
            if self._server is not None:
                self._server.let_go()
            self._server = self._proxy = None
        server, proxy = self._server, self._proxy  # another thread may close this handle
        if server is not None:
            return server.queue.call(method, *args)
        try:
            if proxy is None:
                proxy = self._proxy = self._connect(0.0)
            return proxy._callmethod(method, args)
        except (Empty, Full):
            raise
        except (EOFError, OSError) as error:  # RingNotFound is one
            self._proxy = None
            raise RingClosed(
                f"queue {self.name!r}: the process that serves it has ended ({error!r})"
            ) from error
        except BaseException:
            _drop_connection(proxy)
            raise

    put_nowait = partialmethod(put, block=False)
    get_nowait = partialmethod(get, block=False)
    qsize = partialmethod(_call, "qsize")
    empty = partialmethod(_call, "empty")
    full = partialmethod(_call, "full")

    def _connect(self, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            # Closed at once: the file must go with its creator, not with its clients.
            with contextlib.closing(SharedFile.attach(f"{self.name}.queue", left)) as endpoint:
                key, address = json.loads(bytes(endpoint.buffer).rstrip(b"\0"))
            manager = _Client(address, bytes.fromhex(key))
            with contextlib.suppress(OSError, EOFError):  # its server is ending
                manager.connect()
                return manager.queue()  # type: ignore[attr-defined]
            if time.monotonic() >= deadline:
                raise RingNotFound(f"queue {self.name!r}: no process serves it")
            time.sleep(_RETRY_S)


def _drop_connection(proxy: Any) -> None:
    """Interrupted before the answer: the next call of this thread must not read it."""
    of_this_thread: Any = getattr(proxy, "_tls", None)
    if hasattr(of_this_thread, "connection"):
        of_this_thread.connection.close()
        del of_this_thread.connection

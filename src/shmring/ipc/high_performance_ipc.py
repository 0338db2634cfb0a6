"""HighPerformanceIPC: message queues, shared memory and heartbeats by name.

One object a process.  Names belong to a namespace, which has one registry with
a slot for each of its processes::

    process "a"                         namespace                     process "b"
      send_message("jobs", …)  ------>  queue  jobs    ------>  receive_message("jobs")
      write_shared_data("buf", …) --->  memory buf     ------>  read_shared_data("buf", …)
      each call: a store   ---------->  registry       ------>  check_alive_processes()
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from shmring._backend import SharedMemoryManager
from shmring.arguments import checked_maxsize, checked_timeout
from shmring.errors import (
    Empty,
    InvalidArgument,
    PeerDied,
    RingExists,
    RingNotFound,
    ShmringError,
)
from shmring.ipc.message import Message, MessageCodec, MessageType
from shmring.ipc.names import (
    attach_queue,
    create_queue,
    full_name,
    is_current,
    open_registry,
    remove_queue,
)
from shmring.ipc.registry import (
    MAX_PROCESS_ID_BYTES,
    ProcessRole,
    Registry,
    RegistryEntry,
    RegistrySlot,
    SeenProcesses,
)
from shmring.process.leaving import Exit, adopted_by_forks, close_dropped, end_thread_at_exit
from shmring.queues.statistics import IPCStatistics

__all__ = ["HighPerformanceIPC", "IPCStatistics"]

# A blocked receive_message() stores a heartbeat this often, in seconds.
_SLICE = 0.25
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class _Registration(NamedTuple):
    """The slot of the calling process, and the registry that has it."""

    registry: Registry
    slot: RegistrySlot


class HighPerformanceIPC:
    """Queues, memory and heartbeats shared by the processes of a namespace.

    It can be passed to a child under every start method; the child then has a
    slot and statistics of its own, and its :meth:`cleanup` removes nothing that
    the parent created.

    Args:
        process_id: the name of this process for the others, 1 to 72 bytes.
        namespace: letters, digits, ``-`` and ``_``; None is the environment's
            ``SHMRING_NAMESPACE``, or "default".

    Attributes:
        process_id: as given.
        namespace: as given or found.
        message_queues: the queues created or connected, by name.
        shared_memories: the blocks created or connected, by name.
        stats: counts of this process: messages_sent, messages_received,
            bytes_transferred, errors.
        heartbeat_interval: how often the program's loop should call
            :meth:`send_heartbeat`, in seconds; this class does not use it.
        last_heartbeat: when :meth:`send_heartbeat` was last called, in seconds
            since the epoch; 0.0 is never.
        alive_processes: when each other process was last seen, in seconds of
            ``time.monotonic()``.

    Raises:
        InvalidArgument: an impossible process_id or namespace.
    """

    _registration: _Registration | None
    alive_processes: dict[str, float]

    def __init__(self, process_id: str, *, namespace: str | None = None) -> None:
        if not isinstance(process_id, str):
            raise TypeError(f"process_id={process_id!r}: a str is needed")
        if not 0 < len(process_id.encode()) <= MAX_PROCESS_ID_BYTES:
            raise InvalidArgument(
                f"process_id={process_id!r}: 1 to {MAX_PROCESS_ID_BYTES} bytes are possible"
            )
        if namespace is None:
            namespace = os.environ.get("SHMRING_NAMESPACE") or "default"
        if not _NAMESPACE.fullmatch(namespace):
            raise InvalidArgument(
                f"namespace={namespace!r}: 1 to 64 letters, digits, '-' and '_' are possible"
            )
        self.process_id = process_id
        self.namespace = namespace
        self.heartbeat_interval = 5.0
        self.message_queues: dict[str, Any] = {}
        self.shared_memories: dict[str, Any] = {}
        self._enrol()

    # -- queues ---------------------------------------------------------------------------

    def create_message_queue(self, queue_name: str, maxsize: int = 0) -> None:
        """Make a queue that others of the namespace can connect to.

        Args:
            queue_name: 1 to 100 bytes without a slash.
            maxsize: how many messages it holds at most; 0 is without a bound.

        Raises:
            RingExists: it exists; the queue of a crashed program is reclaimed.
            InvalidArgument: an impossible name or maxsize.
        """
        self._create_queue(queue_name, checked_maxsize(maxsize), MessageCodec())

    def _create_queue(self, queue_name: str, bound: int, codec: Any) -> None:
        full_name = self._full_name("q", queue_name)
        self._beat()
        try:
            queue = create_queue(full_name, bound, codec)
        except RingExists as error:
            raise RingExists(
                f"message queue {queue_name!r} exists in namespace {self.namespace!r}: "
                "connect_message_queue() it, or use another name or namespace"
            ) from error
        self._created.add(full_name)
        replaced = self.message_queues.get(queue_name)
        self.message_queues[queue_name] = queue
        if replaced is not None:  # its name was given back, or the create had failed
            replaced.close()

    def connect_message_queue(self, queue_name: str, timeout: float | None = 5.0) -> None:
        """Open a queue that another process creates, unless it is open here.

        A handle on a queue that was removed or created anew is replaced.

        Args:
            queue_name: its name.
            timeout: seconds to wait for its creator; None for ever.

        Raises:
            RingNotFound: no process created it until the deadline.
            InvalidArgument: an impossible name or timeout.
        """
        self._connect_queue(queue_name, checked_timeout(timeout), MessageCodec())

    def _connect_queue(self, queue_name: str, timeout: float | None, codec: Any) -> None:
        full_name = self._full_name("q", queue_name)
        self._beat()
        if queue_name in self.message_queues:
            if is_current(self.message_queues[queue_name], full_name):
                return
            self.close_message_queue(queue_name)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self.message_queues[queue_name] = attach_queue(full_name, min(_SLICE, left), codec)
                return
            except RingNotFound as error:
                if timeout is not None and left <= _SLICE:
                    raise RingNotFound(
                        f"message queue {queue_name!r} was not created in namespace "
                        f"{self.namespace!r} within timeout={timeout:g} s"
                    ) from error
            self._beat()

    def send_message(
        self, queue_name: str, msg_type: MessageType, data: Any, timeout: float | None = None
    ) -> None:
        """Send one message.

        Args:
            queue_name: a queue created or connected here.
            msg_type: what the message is for.
            data: any object that can be pickled; None costs nothing.
            timeout: seconds to wait while the queue is full; None for ever.

        Raises:
            InvalidArgument: an unknown queue, or an impossible timeout.
            TypeError: `msg_type` is no MessageType.
            Full: no space until the deadline.
            EncodeError: the data cannot be pickled; nothing was sent.
        """
        with self._counted_errors():
            if not isinstance(msg_type, MessageType):
                raise TypeError(f"msg_type={msg_type!r}: a MessageType is needed")
            slot = self._beat().slot
            message = Message(msg_type, self.process_id, time.time(), data)
            queue = self._known("queue_name", queue_name, self.message_queues)
            queue.put(message, True, timeout)
        self._count(slot, message.nbytes, "messages_sent")

    def _send_control(self, queue_name: str, msg_type: MessageType) -> None:
        """Send a message without data on a queue whose handle here has another codec."""
        full_name = self._full_name("q", queue_name)
        with contextlib.closing(attach_queue(full_name, 0.0, MessageCodec())) as queue:
            queue.put(Message(msg_type, self.process_id, time.time(), None), True, _SLICE)
        with self._guard:
            self.stats["messages_sent"] += 1

    def receive_message(
        self,
        queue_name: str,
        timeout: float | None = None,
        *,
        peers: Sequence[Any] | None = None,
    ) -> Message | None:
        """Take one message. A HEARTBEAT marks its sender alive, and is returned as well.

        Args:
            queue_name: a queue created or connected here.
            timeout: seconds to wait; None for ever.
            peers: processes without which waiting is in vain.

        Returns:
            The message; None if there was none until the deadline, and only then.

        Raises:
            InvalidArgument: an unknown queue, or an impossible timeout.
            PeerDied: every one of ``peers`` is dead, and nothing is left to take.
            DecodeError: a message was taken whose data cannot be unpickled.
            RingClosed: the queue was closed or removed.
        """
        with self._counted_errors():
            queue = self._known("queue_name", queue_name, self.message_queues)
            timeout = checked_timeout(timeout)
            slot = self._beat().slot
            message: Message | None
            try:
                message = queue.get(False)
            except Empty:
                message = self._wait_for_message(queue, queue_name, timeout, peers)
            if message is None:
                return None
            self._count(slot, message.nbytes, "messages_received")
            if message.msg_type is MessageType.HEARTBEAT and message.sender_id != self.process_id:
                now = time.monotonic()
                # The message may be older than the death of its sender.
                sent = now - max(0.0, time.time() - message.timestamp)
                with self._guard:
                    self._seen.saw(message.sender_id, now, sent)
            return message

    def send_heartbeat(self, queue_name: str) -> None:
        """Send a HEARTBEAT message, for receivers that do not read the registry.

        Args:
            queue_name: a queue created or connected here.

        Raises:
            InvalidArgument: an unknown queue.
        """
        self.send_message(queue_name, MessageType.HEARTBEAT, None)
        self.last_heartbeat = time.time()

    # -- memory ---------------------------------------------------------------------------

    def create_shared_memory(self, memory_name: str, size: int) -> None:
        """Make a block of memory that others of the namespace can connect to.

        Args:
            memory_name: 1 to 100 bytes without a slash.
            size: in bytes.

        Raises:
            RingExists: it exists.
            InvalidArgument: an impossible name or size.
        """
        memory = SharedMemoryManager(self._full_name("m", memory_name), size)
        self._beat()
        if not memory.create():
            raise RingExists(
                f"shared memory {memory_name!r} exists in namespace {self.namespace!r}"
            )
        self.close_shared_memory(memory_name)  # one whose name was given back
        self.shared_memories[memory_name] = memory

    def connect_shared_memory(self, memory_name: str, size: int) -> None:
        """Open a block of memory that another process created, unless it is open here.

        A handle on a block that was removed or created anew is replaced.

        Args:
            memory_name: its name.
            size: in bytes, as its creator's.

        Raises:
            RingNotFound: there is none.
            InvalidArgument: an impossible name or size.
        """
        memory = SharedMemoryManager(self._full_name("m", memory_name), size)
        self._beat()
        if memory_name in self.shared_memories:
            if self.shared_memories[memory_name].is_current():
                return
            self.close_shared_memory(memory_name)
        if not memory.connect():
            raise RingNotFound(
                f"shared memory {memory_name!r} does not exist in namespace {self.namespace!r}"
            )
        self.shared_memories[memory_name] = memory

    def write_shared_data(
        self, memory_name: str, data: bytes | bytearray | memoryview, offset: int = 0
    ) -> None:
        """Copy bytes into a block, under its lock.

        Args:
            memory_name: a block created or connected here.
            data: any contiguous buffer.
            offset: in bytes.

        Raises:
            InvalidArgument: an unknown block, a negative offset, or past the end.
        """
        with self._counted_errors():
            memory = self._known("memory_name", memory_name, self.shared_memories)
            slot = self._beat().slot
            memory.write_data(data, offset)
            self._count(slot, memoryview(data).nbytes)

    def read_shared_data(self, memory_name: str, length: int, offset: int = 0) -> bytes:
        """Copy bytes out of a block, under its lock.

        Args:
            memory_name: a block created or connected here.
            length: in bytes.
            offset: in bytes.

        Returns:
            A copy.

        Raises:
            InvalidArgument: an unknown block, a negative number, or past the end.
        """
        with self._counted_errors():
            memory = self._known("memory_name", memory_name, self.shared_memories)
            slot = self._beat().slot
            data: bytes = memory.read_data(length, offset)
            self._count(slot, len(data))
            return data

    # -- processes ------------------------------------------------------------------------

    def check_alive_processes(self, timeout: float = 10.0) -> list[str]:
        """Name the other processes that are alive, as far as can be seen.

        Args:
            timeout: how old the last sign of life may be, in seconds: a heartbeat in
                the registry, or a HEARTBEAT message received here.

        Returns:
            The ids, sorted, of those seen within it and not proven dead.

        Raises:
            InvalidArgument: an impossible timeout.
        """
        timeout = checked_timeout(timeout)
        self._look_at_registry()
        now = time.monotonic()
        with self._guard:
            return self._seen.alive(now - timeout)

    def get_stats(self) -> IPCStatistics:
        """Count what this process has done so far.

        Returns:
            The counts of ``stats``, and process_id, alive_processes (how many
            others were seen so far) and last_heartbeat.
        """
        if self._registration is not None:  # after cleanup() nothing is opened again
            self._look_at_registry()
        with self._guard:
            return IPCStatistics(
                messages_sent=self.stats["messages_sent"],
                messages_received=self.stats["messages_received"],
                bytes_transferred=self.stats["bytes_transferred"],
                errors=self.stats["errors"],
                process_id=self.process_id,
                alive_processes=len(self.alive_processes),
                last_heartbeat=self.last_heartbeat,
            )

    def registry_entries(self) -> list[RegistryEntry]:
        """The entries of all processes of the namespace, dead ones included."""
        return self._beat().registry.entries()

    def registry_entry(self, index: int) -> RegistryEntry | None:
        """The entry of one slot of the registry; None if the slot is free.

        Args:
            index: 0 to 254.
        """
        return self._beat().registry.entry(index)

    @property
    def is_registered(self) -> bool:
        """Whether this process has a slot in the registry; its first call takes one."""
        return self._registration is not None and self._pid == os.getpid()

    def register(self, role: ProcessRole) -> RegistrySlot:
        """Take part in the namespace in a role; return the slot in the registry.

        Args:
            role: what the others see.

        Raises:
            ShmringError: living processes hold all 255 slots.
        """
        slot = self._beat().slot
        slot.set_role(role)
        return slot

    def close_message_queue(self, queue_name: str) -> None:
        """Close one queue; its creator removes it.

        Args:
            queue_name: an unknown name is no error.
        """
        queue = self.message_queues.pop(queue_name, None)
        if queue is None:
            return
        full_name = self._full_name("q", queue_name)
        mine = full_name in self._created and self._pid == os.getpid()
        self._created.discard(full_name)
        if mine:
            remove_queue(queue)
        else:
            queue.close()

    def close_shared_memory(self, memory_name: str) -> None:
        """Close one block; its creator removes it.

        Args:
            memory_name: an unknown name is no error.
        """
        memory = self.shared_memories.pop(memory_name, None)
        if memory is not None:
            memory.cleanup()

    def unregister(self) -> None:
        """Give the slot in the registry back; the next call takes one again."""
        with self._joining:
            registration, self._registration = self._registration, None
        if registration is not None:
            registration.slot.release()  # does nothing in a forked child: the slot is its parent's
            registration.registry.close()

    def cleanup(self) -> None:
        """Close everything, and remove what this process created. Twice is allowed."""
        with contextlib.ExitStack() as stack:  # goes on after an error, raises it at the end
            stack.callback(self._forget_exit)
            stack.callback(self.unregister)
            for queue_name in list(self.message_queues):
                stack.callback(self.close_message_queue, queue_name)
            for memory_name in list(self.shared_memories):
                stack.callback(self.close_shared_memory, memory_name)

    _leave = cleanup  # when the process ends

    def __enter__(self) -> HighPerformanceIPC:
        return self

    def __exit__(self, *exc_info: object) -> Literal[False]:
        self.cleanup()
        return False

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # First, and bound above: at the very end the globals are gone.
        if is_finalizing() or not getattr(self, "_enrolled", False):
            return
        mine = self._pid == os.getpid()
        if self._registration is None and not (
            mine and (self.message_queues or self.shared_memories)
        ):
            return
        if mine:
            close_dropped(self, self.cleanup, "cleanup()")
        else:  # in a forked child
            with contextlib.suppress(BufferError, OSError, ShmringError):
                self.cleanup()

    def __repr__(self) -> str:
        return f"<shmring.HighPerformanceIPC {self.process_id!r} of {self.namespace!r}>"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "process_id": self.process_id,
            "namespace": self.namespace,
            "heartbeat_interval": self.heartbeat_interval,
            "message_queues": dict(self.message_queues),
            "shared_memories": dict(self.shared_memories),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._enrol()

    # -- inside ---------------------------------------------------------------------------

    def _renew_locks(self) -> None:
        """In a forked child: a thread that was not copied may hold the parent's."""
        self._joining = threading.RLock()
        self._guard = threading.Lock()

    def _enrol(self) -> None:
        self._renew_locks()
        self._exit: Any = None
        self._start_afresh()
        _instances.add(self)
        self._enrolled = True

    def _start_afresh(self) -> None:
        """Reset the state in a new process: nothing created, counted or registered."""
        self._pid = os.getpid()
        self._created: set[str] = set()
        self._registration = None
        self.stats = dict.fromkeys(
            ("messages_sent", "messages_received", "bytes_transferred", "errors"), 0
        )
        self._seen = SeenProcesses()
        self.alive_processes = self._seen.last_seen
        self.last_heartbeat = 0.0
        self._forget_exit()

    def _forget_exit(self) -> None:
        leaving, self._exit = self._exit, None
        if leaving is not None:
            leaving.cancel()

    def _beat(self) -> _Registration:
        """Store a heartbeat; before the first one, take a slot in the registry."""
        registration = self._registration
        if registration is None or self._pid != os.getpid():
            registration = self._join()
        registration.slot.beat()
        return registration

    def _join(self) -> _Registration:
        with self._joining:  # threads of one process share a slot
            registration = self._registration
            if self._pid != os.getpid():
                # Forked: the slot is the parent's, the mapping of the registry can be used.
                self._start_afresh()
                if registration is not None:
                    registration = _Registration(
                        registration.registry, registration.registry.register(self.process_id)
                    )
            if registration is None:
                registry = Registry(open_registry(f"shmring.{self.namespace}.registry"))
                try:
                    registration = _Registration(registry, registry.register(self.process_id))
                except BaseException:
                    registry.close()
                    raise
            if self._exit is None:
                # Unlike atexit, this also runs where multiprocessing ends a child.
                self._exit = Exit(self, priority=20)
            self._registration = registration
            return registration

    def _wait_for_message(
        self, queue: Any, queue_name: str, timeout: float | None, peers: Sequence[Any] | None
    ) -> Message | None:
        if timeout == 0:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        slot = self._beat().slot
        slot.waiting(queue_name)
        try:
            while True:
                left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
                if left <= 0:
                    return None
                with contextlib.suppress(Empty):
                    message: Message = queue.get(True, left, peers=peers)
                    return message
                slot.beat()
        finally:
            with contextlib.suppress(ValueError):  # cleanup() has released the registry meanwhile
                slot.idle()

    def _look_at_registry(self) -> None:
        """Note the other processes, and which of them are proven dead."""
        started = time.monotonic()
        registry, own = self._beat()
        others = [
            each
            for each in registry.entries()
            if each.process_id != self.process_id and each.index != own.index
        ]
        dead = {(each.index, each.incarnation) for each in others if each.is_dead()}
        with self._guard:
            self._seen.look(others, dead, started)

    def _count(self, slot: RegistrySlot, nbytes: int, messages: str | None = None) -> None:
        """Count bytes, and a message in the statistic of that name."""
        with self._guard:
            self.stats["bytes_transferred"] += nbytes
            if messages is not None:
                self.stats[messages] += 1
        slot.count(nbytes=nbytes, messages=messages is not None)

    @contextlib.contextmanager
    def _counted_errors(self) -> Iterator[None]:
        try:
            yield
        except PeerDied:  # the caller asked for it, as for a time-out
            raise
        except Exception:
            with self._guard:
                self.stats["errors"] += 1
            raise

    def _known(self, argument: str, name: str, known: dict[str, Any]) -> Any:
        """The queue or block of that name; `argument` is for the error."""
        try:
            return known[name]
        except KeyError:
            end_thread_at_exit()
            raise InvalidArgument(
                f"{argument}={name!r}: create or connect it first; known here: {sorted(known)}"
            ) from None

    def _full_name(self, kind: str, name: str) -> str:
        return full_name(self.namespace, kind, name)


_instances = adopted_by_forks(HighPerformanceIPC, "_renew_locks")

"""Task and answer queues of a pool, and what travels on them.

::

    task     (number, function, args, kwargs)     one call
             (number, function, (item, ...), flags) a chunk: one function, many calls
             (-1, None, (), None)                 stop: one worker ends
    answer   (number, value)                      the result of a call, or all of a chunk
             (number, index, [value, ...])        results of a chunk from ``index`` on
             (number, index, failure, text)       an exception: pickled, and its traceback
             (None, kind, worker id, content)     not about a task: "log", "left", "broken"

A function that is pickled by its name travels as those bytes, which are made
once in the sender and loaded once in each worker. Everything else is one pickle
that begins with the number: what cannot be unpickled costs that task alone.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Sequence
from typing import Any

from shmring._backend import backend
from shmring.errors import DecodeError, RemoteError
from shmring.queues.codec import (
    KIND_MESSAGE,
    KIND_PICKLE,
    PickleCodec,
    ReusedPickler,
    decode_error,
    encode_error,
)

__all__ = ["CAREFUL", "SPREAD", "STOP", "FunctionReferences", "Functions", "PoolCodec"]

# Flags of a chunk.
CAREFUL = 1  # each result is sent before the next call begins
SPREAD = 2  # each item is a tuple of arguments
STOP = (-1, None, (), None)
_MOST_REFERENCES = 1024


class FunctionReferences:
    """Functions as the bytes that name them, for the sender of tasks."""

    def __init__(self) -> None:
        self._known: dict[Any, bytes] = {}

    def get(self, function: Any) -> Any:
        """What stands for a function in a task: its reference, or itself where it has none."""
        try:
            return self._known[function]
        except (KeyError, TypeError):
            return self._make(function)

    def _make(self, function: Any) -> Any:
        by_name = isinstance(function, types.FunctionType) or (
            isinstance(function, types.BuiltinFunctionType)
            and isinstance(function.__self__, types.ModuleType)
        )
        if not by_name:
            return function
        try:
            reference = pickle.dumps(function, protocol=5)
        except Exception:
            return function  # the codec of the queue knows more reducers, and explains better
        if len(self._known) >= _MOST_REFERENCES:
            self._known.clear()
        self._known[function] = reference
        return reference


class Functions:
    """Functions by their references, for a worker."""

    def __init__(self) -> None:
        self._known: dict[bytes, Any] = {}

    def get(self, reference: Any) -> Any:
        """The function that a task names; DecodeError if this process has none of that name."""
        if not isinstance(reference, bytes):
            return reference
        function = self._known.get(reference)
        if function is None:
            try:
                function = pickle.loads(reference)
            except Exception as error:
                raise DecodeError(
                    f"the function of the task is not known in the worker: {error}; it must be"
                    " at the top level of a module, and defined before the pool starts its workers"
                ) from error
            self._known[reference] = function
        return function


class PoolCodec(PickleCodec):
    """Pickle, which notes the tasks of what it cannot decode, and control messages.

    SHUTDOWN and HEARTBEAT travel as messages of :mod:`shmring.ipc.message`, so that a
    worker that a program wrote by hand can understand and send them.

    Attributes:
        failures: (number of the task, error) of each message that could not be unpickled.
    """

    def __init__(self) -> None:
        self.failures: list[tuple[int, DecodeError]] = []

    def install(self, queue: Any) -> PoolCodec:
        """Use this codec in a handle of a queue, with its fast path for builtins."""
        if backend == "ring":
            queue._set_codec(
                self.encode,
                self.decode,
                True,
                True,
                ReusedPickler,
                load,
                encode_error,
                self._explained,
            )
        else:
            queue._codec = self
        return self

    def decode(self, kind: int, head: bytes, buffers: Sequence[Any]) -> Any:
        """The object; what cannot be unpickled is noted and raised."""
        if kind == KIND_MESSAGE:
            from shmring.ipc.message import MessageCodec, MessageType  # a pool has none

            message = MessageCodec().decode(kind, head, list(buffers))
            if message.msg_type is MessageType.SHUTDOWN:
                return STOP
            return None, "beat", message.sender_id, None
        if kind != KIND_PICKLE:
            return super().decode(kind, head, buffers)
        try:
            return load(head, buffers=buffers)
        except Exception as error:
            raise self._explained(head, buffers, error) from error

    def _explained(self, head: bytes, buffers: Sequence[Any], error: BaseException) -> DecodeError:
        explained = decode_error(head, buffers, error)
        self.failures.append((_number_in(head), explained))
        return explained


def load(head: bytes, *, buffers: Any = ()) -> Any:
    """Unpickle; SystemExit and its like, which would end the pool, become an error."""
    try:
        return pickle.loads(head, buffers=buffers)
    except Exception:
        raise
    except BaseException as error:
        raise RemoteError(f"unpickling raised {type(error).__name__}") from error


def _number_in(head: bytes) -> int:
    """The number of the task at the beginning of a pickle."""
    import pickletools  # not needed where nothing fails

    for opcode, argument, _ in pickletools.genops(head):
        if opcode.name not in ("PROTO", "FRAME", "MARK"):
            return argument if isinstance(argument, int) else -1
    return -1

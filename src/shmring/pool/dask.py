"""Executor on a Dask cluster: ProcessPoolExecutor's interface over ``dask.distributed``.

::

    submit(), map()                 scheduler                    worker of Dask
        |--- call or chunk: a task ---->|------------------------->|
        |                               |<-- note of the attempt --| before it begins
        |                               |        (metadata of the task)
        |                               |<-- note of the answer ---| if it is small
        |<-- answer, or "lost" ---------|<-------------------------|

Dask runs a task again when its worker dies, up to a limit of the scheduler's that also
counts tasks that had not begun. Here the note decides: a worker that finds as many attempts
as the call may have answers "lost" and does not run it.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import threading
import uuid
import weakref
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import _RemoteTraceback  # as programs know it
from typing import Any, TypeVar

from shmring.arguments import checked_int, checked_timeout
from shmring.errors import EncodeError, InvalidArgument, SchedulerNotFound
from shmring.pool.interface import PoolStatistics, TaskExecutor
from shmring.pool.manager import BrokenTask
from shmring.tasks.channel import SPREAD
from shmring.tasks.task_loop import described
from shmring.tasks.task_table import Failure, PartialResults

try:
    import cloudpickle
    from distributed import Client, KilledWorker, get_client, get_worker
    from distributed.comm.addressing import get_address_host_port
except ImportError as error:
    raise ImportError(
        f'an executor on Dask needs dask.distributed ({error}): pip install "shmring[dask]"'
    ) from error

__all__ = ["DaskExecutor"]

T = TypeVar("T")

# How often a task is sent again that Dask gave up although the call has attempts left.
_MOST_ROUNDS = 100
# An answer up to this size is kept by the scheduler too, until it is taken.
_KEPT_NBYTES = 4096


class _Call:
    """A call, or a chunk of calls, without an answer."""

    def __init__(self, number: int, function: Any, args: Any, kwargs: Any, retries: int) -> None:
        self.number = number
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.retries = retries
        self.future: _DaskFuture[Any] = _DaskFuture()
        self.parts: list[_Part] = []
        self.results: list[Any] = []  # of a chunk whose calls are tasks of their own
        self.missing = 0
        self.answered = False

    @property
    def is_chunk(self) -> bool:
        return isinstance(self.kwargs, int)


class _Part:
    """One task of Dask: a call, a chunk, or the call of a chunk at `index`.

    Attributes:
        begun: attempts before it was sent.
        most: how many attempts it may have.
        task: the future of Dask.
    """

    def __init__(self, call: _Call, index: int | None, begun: int) -> None:
        self.call = call
        self.index = index
        self.begun = begun
        # After one attempt a chunk is given up for its calls: each fails, or not, alone.
        self.most = 1 if call.is_chunk and index is None else call.retries + 1
        self.rounds = 0
        self.task: Any = None

    def work(self) -> tuple[Any, Any, Any]:
        call = self.call
        if self.index is None:
            return call.function, call.args, call.kwargs
        item = call.args[self.index]
        return call.function, item if call.kwargs & SPREAD else (item,), {}


class _DaskFuture(Future[T]):
    """What ``submit`` returns; ``cancel`` asks the scheduler whether the task is with a worker."""

    _withdraw: Any = None

    def cancel(self) -> bool:
        """Cancel the task if no worker has it; if one gets it meanwhile, its answer is dropped."""
        if not self.done() and self._withdraw is not None:
            self._withdraw()
        return self.cancelled()

    def _cancel(self) -> None:
        super().cancel()
        self.set_running_or_notify_cancel()


class DaskExecutor(TaskExecutor):
    """Runs calls on a Dask cluster, with the promises of ProcessPoolExecutor.

    A call whose worker dies runs again, at most `max_retries` times, then it fails alone
    with :class:`~shmring.WorkerDied`; each has one answer. The workers of the cluster
    need shmring. They are not this executor's: it starts, limits and kills none.

    Args:
        address: of the scheduler, as "tcp://host:8786".
        max_retries: as for ProcessPoolExecutor.
        connect_timeout: seconds until the scheduler must have answered.
        security: a ``distributed.Security``, for addresses with "tls:".

    Raises:
        SchedulerNotFound: no scheduler answers there.
        InvalidArgument: what is no address, or an impossible number.
    """

    _chunk_seconds = 0.2  # a task costs the scheduler milliseconds

    def __init__(
        self,
        address: str,
        *,
        max_retries: int = 2,
        connect_timeout: float = 10.0,
        security: Any = None,
    ) -> None:
        try:
            get_address_host_port(address)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                f'address={address!r}: "local", or the address of a Dask scheduler, as'
                f' "tcp://host:8786", is needed ({error})'
            ) from error
        connect_timeout = checked_timeout(connect_timeout, "connect_timeout")
        try:
            self._client = Client(
                address, timeout=connect_timeout, security=security, set_as_default=False
            )
        except OSError as error:
            raise SchedulerNotFound(address, str(error)) from error
        self._max_retries = checked_int(max_retries, "max_retries", 0)
        self._address = address
        self._prefix = f"shmring-{uuid.uuid4().hex}"
        self._numbers = itertools.count()
        self._keys = itertools.count()
        self._changed = threading.Condition()
        self._open: dict[int, _Call] = {}
        self._closing = False
        self._submitted = self._retried = self._died = 0
        self._close_client = weakref.finalize(self, self._client.close)

    @property
    def _max_workers(self) -> int:  # type: ignore[override]
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    # -- tasks -----------------------------------------------------------------------------

    def _submit(self, fn: Any, args: Any, kwargs: Any, retries: int) -> Any:
        call = _Call(next(self._numbers), fn, args, kwargs, retries)
        call.future._withdraw = functools.partial(self._withdraw, [call])
        with self._changed:
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._open[call.number] = call
            self._submitted += 1
        if call.is_chunk and retries == 0:
            self._split(call, 0)
        else:
            self._send(_Part(call, None, 0))
        return call.future

    def _split(self, call: _Call, begun: int) -> None:
        """Make a task of each call of a chunk."""
        call.missing = len(call.args)
        call.results = [None] * call.missing
        call.parts.clear()
        for index in range(len(call.args)):
            self._send(_Part(call, index, begun))

    def _send(self, part: _Part) -> None:
        buffers: list[pickle.PickleBuffer] = []
        try:
            head = cloudpickle.dumps(part.work(), buffer_callback=buffers.append)
        except Exception as error:
            refused = EncodeError(f"{part.call.function!r} and its arguments: {error}")
            refused.__cause__ = error
            self._settle(part, Failure(refused))
            return
        try:
            part.task = self._client.submit(
                _attempt,
                part.begun,
                part.most,
                head,
                buffers,
                key=f"{self._prefix}-{next(self._keys)}",
                pure=False,
            )
        except Exception as error:
            self._settle(part, Failure(SchedulerNotFound(self._address, str(error))))
            return
        part.call.parts.append(part)
        part.task.add_done_callback(functools.partial(self._arrived, part))

    # -- answers: in the one thread in which Dask calls back -----------------------------------

    def _arrived(self, part: _Part, task: Any) -> None:
        if part.call.answered:
            return
        try:
            self._take(part, task)
        except CancelledError as error:
            self._settle(part, Failure(SchedulerNotFound(self._address, str(error))))
        except Exception as error:
            self._settle(part, Failure(error))
        task.release()

    def _take(self, part: _Part, task: Any) -> None:
        call = part.call
        again = False
        try:
            kind, begun, pid, head, buffers = task.result()
        except KilledWorker:  # Dask gave it up, and has charged it with what had not begun too
            begun, pid, answer = self._client.get_metadata(task.key, default=[part.begun, 0, None])
            part.rounds += 1
            again = answer is None and begun < part.most and part.rounds < _MOST_ROUNDS
            kind, begun, pid, head, buffers = answer or _lost(begun, pid)
        content = pickle.loads(head, buffers=buffers)
        is_chunk = call.is_chunk and part.index is None
        given_up = kind == "lost" and not again and not is_chunk
        deaths = begun - part.begun - (kind != "lost")
        self._died += deaths
        self._retried += deaths - given_up
        if again:
            call.parts.remove(part)
            part.begun = begun
            self._send(part)
        elif given_up:
            self._settle(part, Failure(BrokenTask(call.number, pid, None, begun)))
        elif kind == "lost":
            self._split(call, begun)
        elif kind == "raised":
            self._settle(part, _raised(*content, chunk=is_chunk))
        else:
            self._settle(part, content)

    def _settle(self, part: _Part, outcome: Any) -> None:
        """Give a call its answer, when the last of its parts has one."""
        call = part.call
        if part.index is not None:
            call.results[part.index] = outcome
            call.missing -= 1
            if call.missing:
                return
            failed = any(isinstance(each, Failure) for each in call.results)
            outcome = PartialResults(call.results) if failed else call.results
        if not self._is_first_answer(call):
            return
        if isinstance(outcome, Failure):
            call.future.set_exception(outcome.error)
        else:
            call.future.set_result(outcome)
        self._forget(call)

    def _is_first_answer(self, call: _Call) -> bool:
        with self._changed:
            answered, call.answered = call.answered, True
        return not answered

    def _forget(self, call: _Call) -> None:
        call.future._withdraw = None
        with self._changed:
            del self._open[call.number]
            self._changed.notify_all()
        self._close_if_done()

    # -- the end ---------------------------------------------------------------------------

    def _withdraw(self, calls: list[_Call], *, also_running: bool = False) -> None:
        """Cancel those of the calls that no worker has."""
        with_workers: set[Any] = set()
        if calls and not also_running:
            with_workers = set(itertools.chain(*self._client.processing().values()))
        for call in calls:
            tasks = [part.task for part in call.parts]
            if not with_workers & {each.key for each in tasks} and self._is_first_answer(call):
                try:
                    self._client.cancel(tasks)
                finally:
                    call.future._cancel()
                    self._forget(call)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; what was submitted is done, unless it is cancelled.

        At the end of the program what is still running is given up: wait for it.

        Args:
            wait: return when all is done.
            cancel_futures: cancel what no worker has.
        """
        with self._changed:
            self._closing = True
            calls = list(self._open.values())
        if cancel_futures:
            self._withdraw(calls)
        if wait:
            with self._changed:
                self._changed.wait_for(lambda: not self._open)
        self._close_if_done()

    def _kill(self, signum: int) -> None:
        """Cancel all tasks, and shut down: the workers are the cluster's, and go on."""
        self._closing = True
        self._withdraw(list(self._open.values()), also_running=True)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._closing and not self._open:
            self._close_client()

    def statistics(self) -> PoolStatistics:
        """Counts of this executor's tasks; the workers are seen on Dask's dashboard."""
        waiting = 0
        if self._open:
            with_workers = set(itertools.chain(*self._client.processing().values()))
            parts = [part for call in list(self._open.values()) for part in call.parts]
            tasks = [part.task for part in parts if not part.task.done()]
            waiting = sum(task.key not in with_workers for task in tasks)
        return PoolStatistics(
            submitted=self._submitted,
            answered=self._submitted - len(self._open),
            waiting=waiting,
            retried=self._retried,
            died=self._died,
            workers=(),
        )


def _raised(pickled: bytes, text: str, values: list[Any], *, chunk: bool) -> Any:
    error = pickle.loads(pickled)
    error.__cause__ = _RemoteTraceback(f'\n"""\n{text}"""')  # type: ignore[arg-type]
    return PartialResults([*values, Failure(error)]) if chunk else Failure(error)


def _lost(begun: int, pid: int) -> tuple[Any, ...]:
    """The answer to a call that has had its attempts."""
    return "lost", begun, pid, pickle.dumps(None), []


# -- in a worker of Dask -------------------------------------------------------------------------


def _attempt(begun: int, most: int, head: bytes, buffers: list[Any]) -> Any:
    """Note the attempt, run the call, note and return the answer."""
    client, key = get_client(), get_worker().get_current_task()
    begun, pid, answer = client.get_metadata(key, default=[begun, 0, None])
    if answer is not None:  # its worker died with it
        return answer
    if begun >= most:
        return _lost(begun, pid)
    begun, pid = begun + 1, os.getpid()
    client.set_metadata(key, [begun, pid, None])
    kind, content, packed = _answer(head, buffers)
    answer = kind, begun, pid, content, packed
    if len(content) + sum(map(len, packed)) <= _KEPT_NBYTES:
        client.set_metadata(key, [begun, pid, answer])
    elif most > 1:  # this attempt did not die: it is not counted if its answer is lost
        client.set_metadata(key, [begun - 1, pid, None])
    return answer


def _answer(head: bytes, buffers: list[Any]) -> tuple[str, bytes, list[memoryview]]:
    """Run a call: "done" or "raised", and the pickle that goes with it."""
    results: list[Any] = []
    packed: list[pickle.PickleBuffer] = []
    try:
        function, args, kwargs = pickle.loads(head, buffers=buffers)
        kind, value = "done", _run(function, args, kwargs, results)
        try:
            content = cloudpickle.dumps(value, buffer_callback=packed.append)
        except Exception as error:
            results.clear()
            raise EncodeError(f"the result cannot be pickled: {error}") from error
    except BaseException as error:
        kind, packed = "raised", []
        content = cloudpickle.dumps((*described(error), results), buffer_callback=packed.append)
    # As memoryviews: some messages of Dask are pickled by a protocol without PickleBuffer.
    return kind, content, [each.raw() for each in packed]


def _run(function: Any, args: Any, kwargs: Any, results: list[Any]) -> Any:
    if not isinstance(kwargs, int):
        return function(*args, **kwargs)
    for item in args:
        results.append(function(*item) if kwargs & SPREAD else function(item))
    return results

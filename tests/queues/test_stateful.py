"""Any sequence of calls on several handles of one ring or queue, beside a plain deque.

Hypothesis makes the sequences up.  Handles are the first one, attached ones, pickled ones, and
those of forked children, which do what they are told over a pipe and can be killed.  The model
says what each call must return or raise.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import pytest

pytest.importorskip("shmring._core.ring", reason="the extension is not built")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shmring import JoinableQueue, Ring
from shmring.errors import Empty, Full, MessageTooLarge, RingClosed, ShutDown

FRAME_BYTES = 32
SHORT = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # Shortening what failed takes up to five minutes, and pytest ends a test after two: add
    # Phase.shrink by hand; the failure is kept in .hypothesis and comes first.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
LONG = settings(SHORT, max_examples=300, stateful_step_count=60)

HANDLE = st.integers(0, 11)
BLOCKING = st.sampled_from(
    [(False, None), (False, None), (False, None), (True, 0.0), (True, 0.003)]
)
MOST = st.sampled_from([None, 1, 2, 5])
CHILDREN_AT_MOST = 2


# ---- handles, here and in children -----------------------------------------------------------


class Here:
    """A handle of this process, and the blocks it is in."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.blocks: dict[str, Any] = {}

    def do(self, what: str, *args: Any) -> Any:
        """One call: of this class, or of the handle."""
        return getattr(self, what)(*args) if what in Here.__dict__ else self._call(what, *args)

    def _call(self, what: str, *args: Any) -> Any:
        return getattr(self.handle, what)(*args)

    def begin_reserve(self, data: bytes, block: bool, timeout: float | None) -> None:
        """Enter a reservation and write it."""
        entered = self.handle.reserve(len(data), block, timeout)
        entered.__enter__()[:] = data
        self.blocks["reserve"] = entered

    def begin_peek(self, block: bool, timeout: float | None) -> bytes:
        """Enter a peek; what it shows."""
        entered = self.handle.peek(block, timeout)
        seen = bytes(entered.__enter__())
        self.blocks["peek"] = entered
        return seen

    def end(self, side: str, keep: bool) -> None:
        """Leave a block, cleanly or by an exception."""
        entered = self.blocks.pop(side)
        if keep:
            entered.__exit__(None, None, None)
        else:
            assert not entered.__exit__(KeyError, KeyError(), None)


class Child:
    """A handle in a forked child."""

    def __init__(self, other: Here) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(other.handle, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def do(self, what: str, *args: Any) -> Any:
        """Have the child make a call; what it raises is raised here."""
        self._pipe.send((what, args))
        assert self._pipe.poll(30), f"the child does not come back from {what}{args}"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        """SIGKILL, wherever it is."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def serve(handle: Any, pipe: Connection) -> None:
    """What a child does until it is killed."""
    here, parent = Here(handle), os.getppid()
    while True:
        while not pipe.poll(1):  # a sibling may hold the other end when the parent is gone
            if os.getppid() != parent:
                return
        what, args = pipe.recv()
        try:
            answer = here.do(what, *args)
        except Exception as error:
            answer = error
        pipe.send(answer)


Handle = Here | Child


class Machine(RuleBasedStateMachine):
    """What rings and queues have in common: handles that come and go, and the end."""

    first: Any

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []
        self.shut = 0  # 1 drains, 2 refuses gets as well

    def begin(self, first: Any) -> None:
        """The first handle."""
        self.first = type(first)
        self.handles = [Here(first)]

    def of(self, index: int) -> Handle:
        """One of the handles."""
        return self.handles[index % len(self.handles)]

    def here(self) -> list[Here]:
        """Those of this process: at least one is open all the time."""
        return [each for each in self.handles if isinstance(each, Here)]

    def children(self) -> list[Child]:
        """Those of children."""
        return [each for each in self.handles if isinstance(each, Child)]

    def may_be_closed(self, handle: Here) -> bool:
        """Whether nothing holds it open."""
        return not handle.blocks

    def forget(self, handle: Handle) -> None:
        """A handle has gone."""
        self.handles.remove(handle)

    @precondition(lambda self: len(self.here()) < 4)
    @rule()
    def attach(self) -> None:
        name = self.here()[0].handle.name
        self.handles.append(Here(self.first.attach(name, timeout=5)))

    @precondition(lambda self: len(self.here()) < 4)
    @rule(index=HANDLE)
    def travel_in_a_pickle(self, index: int) -> None:
        copied = self.here()[index % len(self.here())].handle
        self.handles.append(Here(pickle.loads(pickle.dumps(copied))))

    @precondition(lambda self: len(self.children()) < CHILDREN_AT_MOST)
    @rule(index=HANDLE)
    def fork(self, index: int) -> None:
        self.handles.append(Child(self.here()[index % len(self.here())]))

    @precondition(lambda self: len(self.here()) > 1)
    @rule(index=HANDLE)
    def close(self, index: int) -> None:
        closed = self.here()[index % len(self.here())]
        if not self.may_be_closed(closed):
            with pytest.raises(BufferError):
                closed.handle.close()
            return
        closed.handle.close()
        self.forget(closed)
        closed.handle.close()  # twice is allowed
        with pytest.raises(RingClosed):
            closed.handle.get_nowait()

    @precondition(lambda self: self.children())
    @rule(index=HANDLE)
    def kill(self, index: int) -> None:
        killed = self.children()[index % len(self.children())]
        if self.may_be_killed(killed):
            killed.kill()
            self.forget(killed)

    def may_be_killed(self, child: Child) -> bool:
        """Whether the model can say what comes of it."""
        return True

    @rule(index=HANDLE, immediate=st.sampled_from([False, False, False, True]))
    def shut_down(self, index: int, immediate: bool) -> None:
        self.of(index).do("shutdown", immediate)
        self.shut = max(self.shut, 2 if immediate else 1)

    def teardown(self) -> None:
        for child in self.children():
            child.kill()
        for each in self.here():
            for side in list(each.blocks):
                each.do("end", side, False)
            each.handle.close()


# ---- rings -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Message:
    """A frame, as the model has it."""

    data: bytes
    state: str = "whole"  # or reserved, or aborted
    owner: Handle | None = None  # of a reservation; None: it died

    @property
    def span(self) -> int:
        """Bytes of the ring that it takes."""
        return (FRAME_BYTES + len(self.data) + 7) // 8 * 8


SIZES = st.sampled_from([0, 1, 7, 8, 40, 100, 500, 1000, 1500, 3000, 4000, 4064])
LARGER = st.sampled_from([10_000, 20_000, 32_736])


class RingMachine(Machine):
    """A ring that never grows, of which the model knows each byte; or one that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: deque[Message] = deque()
        self.lease: Handle | None = None
        self.made = 0

    @initialize(grows=st.booleans())
    def make(self, grows: bool) -> None:
        self.grows = grows
        self.limit = 1 << 15 if grows else 4096
        self.begin(Ring.create(4096, max_capacity=self.limit))

    def new(self, size: int) -> bytes:
        """A message that differs from others, if it is long enough."""
        self.made += 1
        return (b"%d " % self.made * (size // 2 + 1))[:size]

    @property
    def used(self) -> int:
        """Bytes between the two positions."""
        return sum(each.span for each in self.messages)

    # ---- what is to be expected ----

    def pass_over_aborted(self) -> None:
        """What each look at the front does first."""
        while self.messages and self.messages[0].state == "aborted":
            self.messages.popleft()

    def look(self, handle: Handle) -> type[Exception] | None:
        """What a get by that handle raises now; None if the front can be taken."""
        if self.is_inside(handle, "peek"):
            return RuntimeError
        if self.shut == 2:
            return ShutDown
        if self.lease is not None:
            return Empty
        self.pass_over_aborted()
        if self.messages and self.messages[0].state == "reserved" and not self.messages[0].owner:
            self.messages[0].state = "aborted"
            self.pass_over_aborted()
        if not self.messages:
            return ShutDown if self.shut else Empty
        return Empty if self.messages[0].state == "reserved" else None

    def went_in(self, message: Message) -> None:
        """A put succeeded."""
        self.messages.append(message)
        assert self.grows or self.used <= self.limit

    def did_not(self, message: Message) -> None:
        """A put found no room: of a ring that grows, too much may be drained, but not left."""
        assert self.grows or self.used + message.span > self.limit
        assert self.made > 1

    # ---- calls ----

    @rule(index=HANDLE, size=SIZES | LARGER, how=BLOCKING)
    def put(self, index: int, size: int, how: tuple[bool, float | None]) -> None:
        handle, message = self.of(index), Message(self.new(size))
        if size > self.limit - FRAME_BYTES:
            with pytest.raises(MessageTooLarge):
                handle.do("put", message.data, *how)
        elif self.shut:
            with pytest.raises(ShutDown):
                handle.do("put", message.data, *how)
        else:
            try:
                handle.do("put", message.data, *how)
            except Full:
                self.did_not(message)
            else:
                self.went_in(message)

    @rule(index=HANDLE, sizes=st.lists(SIZES, max_size=6), how=BLOCKING)
    def put_many(self, index: int, sizes: Sequence[int], how: tuple[bool, float | None]) -> None:
        handle, messages = self.of(index), [Message(self.new(size)) for size in sizes]
        count = len(messages)
        if self.shut and messages:
            with pytest.raises(ShutDown):
                handle.do("put_many", [each.data for each in messages], *how)
            return
        try:
            handle.do("put_many", [each.data for each in messages], *how)
        except Full as full:
            count = full.count
            assert count < len(messages)
        for each in messages[:count]:
            self.went_in(each)
        if count < len(messages):
            self.did_not(messages[count])

    @rule(index=HANDLE, how=BLOCKING)
    def get(self, index: int, how: tuple[bool, float | None]) -> None:
        handle = self.of(index)
        expected = self.look(handle)
        if expected is not None:
            with pytest.raises(expected):
                handle.do("get", *how)
        else:
            assert handle.do("get", *how) == self.messages.popleft().data

    @rule(index=HANDLE, most=MOST, how=BLOCKING)
    def get_many(self, index: int, most: int | None, how: tuple[bool, float | None]) -> None:
        handle = self.of(index)
        expected = self.look(handle)
        if expected is not None:
            with pytest.raises(expected):
                handle.do("get_many", most, *how)
            return
        taken = []
        while self.messages and len(taken) != most and self.messages[0].state != "reserved":
            message = self.messages.popleft()
            if message.state == "whole":
                taken.append(message.data)
        assert handle.do("get_many", most, *how) == taken

    def is_inside(self, handle: Handle, side: str) -> bool:
        """Whether the thread behind that handle is in such a block, by whatever handle."""
        if isinstance(handle, Here):
            return any(side in each.blocks for each in self.here())
        if side == "peek":
            return self.lease is handle
        return any(each.owner is handle and each.state == "reserved" for each in self.messages)

    @rule(index=HANDLE, size=SIZES, how=BLOCKING)
    def begin_reserve(self, index: int, size: int, how: tuple[bool, float | None]) -> None:
        handle, message = self.of(index), Message(self.new(size), "reserved", self.of(index))
        if self.is_inside(handle, "reserve"):
            with pytest.raises(RuntimeError, match="same thread"):
                handle.do("begin_reserve", message.data, *how)
        elif self.shut:
            with pytest.raises(ShutDown):
                handle.do("begin_reserve", message.data, *how)
        else:
            try:
                handle.do("begin_reserve", message.data, *how)
            except Full:
                self.did_not(message)
            else:
                self.went_in(message)

    @rule(index=HANDLE, keep=st.booleans())
    def end_reserve(self, index: int, keep: bool) -> None:
        for each in self.messages:
            if each.state == "reserved" and each.owner is self.of(index):
                self.of(index).do("end", "reserve", keep)
                each.state = "whole" if keep else "aborted"

    @rule(index=HANDLE, how=BLOCKING)
    def begin_peek(self, index: int, how: tuple[bool, float | None]) -> None:
        handle = self.of(index)
        expected = self.look(handle)
        if expected is not None:
            with pytest.raises(expected):
                handle.do("begin_peek", *how)
        else:
            assert handle.do("begin_peek", *how) == self.messages[0].data
            self.lease = handle

    @rule(index=HANDLE, keep=st.booleans())
    def end_peek(self, index: int, keep: bool) -> None:
        if self.lease is self.of(index):
            self.lease.do("end", "peek", keep)
            self.lease = None
            if keep:
                self.messages.popleft()

    @precondition(lambda self: self.lease is None and not self.shut)
    @precondition(lambda self: all(each.state != "reserved" for each in self.messages))
    @rule(index=HANDLE, size=SIZES | LARGER)
    def drain_and_fill(self, index: int, size: int) -> None:
        """Where nothing is left, whatever can ever fit does."""
        handle = self.of(index)
        left = [each.data for each in self.messages if each.state == "whole"]
        for data in left:
            assert handle.do("get", False) == data
        with pytest.raises(Empty):
            handle.do("get", False)
        self.messages.clear()
        message = Message(self.new(min(size, self.limit - FRAME_BYTES)))
        handle.do("put", message.data, False)
        self.went_in(message)

    # ---- what must always hold ----

    def may_be_killed(self, child: Child) -> bool:
        dead = [each for each in self.messages if each.state == "reserved" and not each.owner]
        return not (dead and self.is_inside(child, "reserve"))

    def forget(self, handle: Handle) -> None:
        super().forget(handle)
        if self.lease is handle:
            self.lease = None
        for each in self.messages:
            if each.owner is handle:
                each.owner = None

    @invariant()
    def is_counted(self) -> None:
        if not self.handles:
            return
        statistics = self.here()[0].handle.statistics()
        dropped = self.shut == 2
        assert statistics.messages == (0 if dropped else len(self.messages))
        assert statistics.used_bytes == (0 if dropped else self.used)
        assert statistics.shut_down == bool(self.shut)
        assert not statistics.poisoned
        assert statistics.capacity <= self.limit
        if self.lease is None and not dropped:
            self.pass_over_aborted()  # after the counts, statistics() looked at the front

    def teardown(self) -> None:
        try:
            if self.handles and self.lease is None and self.shut < 2:
                handle = self.here()[0]
                while self.look(handle) is None:
                    assert handle.do("get", False) == self.messages.popleft().data
        finally:
            super().teardown()


# ---- queues ----------------------------------------------------------------------------------


OBJECTS = {
    "a number": 0,
    "nothing": None,
    "text": "text",
    "raw": b"bytes",
    "long and raw": b"long" * 3000,
    "a tree": {"id": 1, "list": [1, 2.5, ("a", "b")]},
    "a large tree": [f"{number:060}" for number in range(400)],
    "pickled": {1, 2, 3},
    "beside the pickle": [bytearray(b"beside" * 300), bytearray(b"another" * 1000)],
    "a class": Exception,
}
OBJECT = st.sampled_from(sorted(OBJECTS))


class QueueMachine(Machine):
    """A queue with or without a limit, and how many of its objects were worked off."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: deque[Any] = deque()
        self.put_count = 0
        self.done_count = 0

    @initialize(maxsize=st.sampled_from([0, 0, 1, 3, 10]))
    def make(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self.begin(JoinableQueue(maxsize, max_capacity=1 << 24))

    @property
    def room(self) -> int:
        """How many objects go in now."""
        return self.maxsize - len(self.objects) if self.maxsize else 1 << 30

    @property
    def taken_count(self) -> int:
        """How many came out."""
        return self.put_count - len(self.objects)

    @property
    def due(self) -> int:
        """How many objects are, or were, to be worked off."""
        return self.taken_count if self.shut == 2 else self.put_count

    def look(self) -> type[Exception] | None:
        """What a get raises now."""
        if self.shut == 2 or (self.shut and not self.objects):
            return ShutDown
        return None if self.objects else Empty

    @rule(index=HANDLE, what=OBJECT, how=BLOCKING)
    def put(self, index: int, what: str, how: tuple[bool, float | None]) -> None:
        handle, obj = self.of(index), OBJECTS[what]
        if self.shut or not self.room:
            with pytest.raises(ShutDown if self.shut else Full):
                handle.do("put", obj, *how)
        else:
            handle.do("put", obj, *how)
            self.objects.append(obj)
            self.put_count += 1

    @rule(index=HANDLE, names=st.lists(OBJECT, max_size=5), how=BLOCKING)
    def put_many(self, index: int, names: list[str], how: tuple[bool, float | None]) -> None:
        handle, room, objects = self.of(index), self.room, [OBJECTS[name] for name in names]
        if self.shut and objects:
            with pytest.raises(ShutDown):
                handle.do("put_many", objects, *how)
            return
        if len(objects) > room:
            with pytest.raises(Full) as full:
                handle.do("put_many", objects, *how)
            assert full.value.count == room
        else:
            handle.do("put_many", objects, *how)
        self.objects += objects[:room]
        self.put_count += len(objects[:room])

    @rule(index=HANDLE, how=BLOCKING)
    def get(self, index: int, how: tuple[bool, float | None]) -> None:
        expected = self.look()
        if expected is not None:
            with pytest.raises(expected):
                self.of(index).do("get", *how)
        else:
            assert self.of(index).do("get", *how) == self.objects.popleft()

    @rule(index=HANDLE, most=MOST, how=BLOCKING)
    def get_many(self, index: int, most: int | None, how: tuple[bool, float | None]) -> None:
        expected = self.look()
        if expected is not None:
            with pytest.raises(expected):
                self.of(index).do("get_many", most, *how)
            return
        count = len(self.objects) if most is None else min(most, len(self.objects))
        taken = [self.objects.popleft() for _ in range(count)]
        assert self.of(index).do("get_many", most, *how) == taken

    @rule(index=HANDLE)
    def task_done(self, index: int) -> None:
        if self.done_count < self.due:
            self.of(index).do("task_done")
            self.done_count += 1
        else:
            with pytest.raises(ValueError, match="too many"):
                self.of(index).do("task_done")

    @rule(index=HANDLE, timeout=st.sampled_from([0, 0.003]))
    def join(self, index: int, timeout: float) -> None:
        assert self.of(index).do("join", timeout) == (self.done_count >= self.due)

    @invariant()
    def is_counted(self) -> None:
        if not self.handles:
            return
        queue = self.here()[0].handle
        size = 0 if self.shut == 2 else len(self.objects)
        assert queue.qsize() == size
        assert queue.empty() == (size == 0)
        assert queue.full() == bool(self.maxsize and size >= self.maxsize)
        statistics = queue.statistics()
        assert statistics.messages_put == self.put_count
        assert statistics.messages_taken == self.taken_count
        assert not statistics.poisoned

    def teardown(self) -> None:
        try:
            if self.handles and self.objects and self.shut < 2:
                assert self.here()[0].do("get_many") == list(self.objects)
        finally:
            super().teardown()


MACHINES = pytest.mark.parametrize("machine", [RingMachine, QueueMachine])


@MACHINES
def test_any_sequence_of_calls(machine):
    run_state_machine_as_test(machine, settings=SHORT)


@MACHINES
@pytest.mark.torture
@pytest.mark.parametrize("turn", range(4))
def test_any_sequence_of_calls_at_length(machine, turn):
    run_state_machine_as_test(machine, settings=LONG)

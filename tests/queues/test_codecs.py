"""Codecs: objects that travel, and the errors for those that do not."""

from __future__ import annotations

import asyncio
import collections
import copyreg
import functools
import marshal
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import tracemalloc
from multiprocessing.reduction import ForkingPickler
from typing import ClassVar

import numpy as np
import pytest

import shmring
from shmring import DecodeError, EncodeError, JoinableQueue, Queue, SimpleQueue
from shmring.ipc.message import Message, MessageCodec, MessageType
from shmring.queues import codec as codec_module
from shmring.queues.codec import PickleCodec
from shmring.queues.pickle_errors import unpicklable_part
from support import own_name, run_in_process

if shmring.backend == "ring":
    from header import first_frame, word

NAME = own_name("codecs")

# ---- one way into the ring ------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["pickle", "bytes", "msgpack"])
@pytest.mark.parametrize(
    "obj",
    [b"raw", {"a": [1, 2.5]}, {"large": "x" * 10_000}, {1, 2}, [np.arange(5000.0), b"y"]],
    ids=["bytes", "dict", "large dict", "set", "array"],
)
def test_every_put_stores_the_same_frame(codec, obj):
    calls = {
        "put": lambda queue: queue.put(obj),
        "_put_position": lambda queue: queue._put_position(obj),
        "put_many": lambda queue: queue.put_many([obj]),
        "aput": lambda queue: asyncio.run(queue.aput(obj)),
    }
    frames = []
    for put in calls.values():
        with Queue(codec=codec) as queue:
            try:
                put(queue)
            except EncodeError as error:
                frames.append(str(error))
                continue
            length = word(queue, first_frame(queue) + 8)
            kind = word(queue, first_frame(queue) + 20, size=4)
            frames.append((kind, os.pread(queue._fileno(), length, first_frame(queue) + 32)))
    assert frames == frames[:1] * len(calls)


def test_messages_share_one_pickler(monkeypatch):
    made = []

    class Counted(codec_module.ReusedPickler):
        def __init__(self, table):
            made.append(self)
            super().__init__(table)

    monkeypatch.setattr(codec_module, "ReusedPickler", Counted)
    monkeypatch.setattr(PickleCodec, "_spare_picklers", [])
    codec = MessageCodec()
    for i in range(20):
        data = [{i, 2}, np.full(1000, i)]  # neither is a tree of builtins
        kind, (head, buffer) = codec.encode(Message(MessageType.DATA, "a", data=data))
        taken = codec.decode(kind, head, [bytearray(buffer)]).data
        assert taken[0] == data[0]
        assert np.array_equal(taken[1], data[1])
    assert len(made) == 1
    with pytest.raises(EncodeError):
        codec.encode(Message(MessageType.DATA, "a", data=threading.Lock()))
    codec.encode(Message(MessageType.DATA, "a", data={1}))
    assert len(made) == 2  # the one that failed is not used again


def test_an_object_that_encodes_while_it_is_being_pickled():
    kind, segments = PickleCodec().encode([_EncodesToo(), {2}])
    assert PickleCodec().decode(kind, segments[0], ()) == ["[{1}]", {2}]


class _EncodesToo:
    def __reduce__(self):
        kind, segments = PickleCodec().encode([{1}])
        return str, (repr(PickleCodec().decode(kind, segments[0], ())),)


# ---- reducers ------------------------------------------------------------------------------


class Late:
    """Its reducer is registered while the queue is in use."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        raise AssertionError("not by the registered reducer")


@pytest.fixture
def registered():
    yield ForkingPickler.register
    ForkingPickler._extra_reducers.pop(Late, None)


def _reduce_late(late: Late) -> tuple[object, ...]:
    return _rebuild_late, (late.value,)


def _rebuild_late(value: int) -> Late:
    return Late(value + 1)


def _answer(queue: Queue[object], answers: Queue[object]) -> None:
    connection, server = queue.get(timeout=60)
    connection.send("over a connection")
    connection.close()
    client, _ = server.accept()
    client.sendall(b"over a socket")
    client.close()
    server.close()
    answers.put("done")


REFUSED = {
    "a Lock": multiprocessing.Lock,
    "an Event": multiprocessing.Event,
    "a Value": lambda: multiprocessing.Value("i"),
    "an Array": lambda: multiprocessing.Array("i", 3),
    "a stock SimpleQueue": multiprocessing.SimpleQueue,
    "a thread's lock": threading.Lock,
    "a generator": lambda: (i for i in ()),
    "a lambda": lambda: lambda: None,
    "a file": lambda: open(os.devnull),  # noqa: SIM115
    "a module": lambda: sys,
}


WITHOUT_DESCRIPTORS = """
import os, resource, sys, threading, time
import shmring
from shmring import DecodeError, EncodeError
from shmring.errors import Full

class Unreadable:
    def __reduce__(self):
        return int, ("seven",)

queue, small = shmring.Queue(), shmring.Queue(8, max_capacity=1 << 17)
queue.put(Unreadable())
deadline = time.monotonic() + 30
while queue.empty() and time.monotonic() < deadline:
    threading.Event().wait(0.01)
lowest = os.dup(0)
os.close(lowest)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for call in (lambda: queue.put(threading.Lock()), lambda: queue.get(timeout=30)):
    try:
        call()
    except (EncodeError, DecodeError) as error:
        print(error)
try:
    while True:
        small.put(bytes(30_000), timeout=0.3)
except Full:
    print("full")
print("shmring.queues.pickle_errors" in sys.modules)
small.cancel_join_thread()
"""


@pytest.mark.both_backends
def test_an_error_stands_where_its_explanation_fails():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    encode, decode, full, imported = done.stdout.splitlines()
    assert encode == "a lock cannot be put (cannot pickle '_thread.lock' object)"
    assert "was taken and cannot be decoded: ValueError: invalid literal" in decode
    assert (full, imported) == ("full", "False"), done.stderr


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Mute:
    def __reduce__(self):
        raise Speechless

    dumps = loads = lambda self, obj: self.__reduce__()


@pytest.mark.both_backends
@pytest.mark.parametrize("codec", ["pickle", Mute()], ids=["pickle", "own"])
def test_an_error_without_words_is_named(codec):
    with (
        Queue(codec=codec) as queue,
        pytest.raises(EncodeError, match=r"Mute cannot be put \(Speechless\)") as caught,
    ):
        queue.put(Mute())
    assert type(caught.value.__cause__) is Speechless


# ---- the other codecs ----------------------------------------------------------------------


class Strict:
    def dumps(self, obj: object) -> bytes:
        return str(int(obj)).encode()

    def loads(self, data: bytes) -> int:
        return int(data)


def test_an_own_codec_that_fails_fails_by_name_and_alone():
    with Queue(codec=Strict(), name=NAME) as queue:
        with pytest.raises(EncodeError, match=r"a str cannot be put .*invalid literal"):
            queue.put("no number")
        assert queue.empty()
        with Queue.attach(NAME, codec=Nonsense()) as wrong:
            wrong.put(None)
        queue.put(7)
        with pytest.raises(DecodeError, match=r"8 bytes was taken.*ValueError"):
            queue.get()
        assert queue.get() == 7


class Nonsense(Strict):
    def dumps(self, obj: object) -> bytes:
        return b"nonsense"


def _take_one(there: Queue | SimpleQueue, back: Queue) -> None:
    back.put([type(there).__name__, there.get()])


@pytest.mark.both_backends
@pytest.mark.parametrize("kind", [Queue, JoinableQueue, SimpleQueue])
@pytest.mark.parametrize("codec", [marshal, pickle, Strict()], ids=["marshal", "pickle", "own"])
def test_a_module_as_codec_goes_to_a_child(codec, kind, start_method):
    sent = 7 if isinstance(codec, Strict) else {"a": [7]}
    context = multiprocessing.get_context(start_method)
    with kind(ctx=context, codec=codec) as there, Queue(ctx=context) as back:
        there.put(sent)
        with run_in_process(_take_one, there, back, method=start_method):
            assert back.get(timeout=60) == [kind.__name__, sent]


def test_the_codec_bytes_refuses_a_buffer_that_is_not_c_contiguous():
    with Queue(codec="bytes") as queue:
        for array in (np.zeros((2, 3), order="F"), np.zeros(6)[::2]):
            with pytest.raises(EncodeError, match=r"this ndarray is not one: .*bytes"):
                queue.put(array)
        assert queue.empty()


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.arange(3, dtype=">i4")])
def test_the_codec_bytes_carries_any_shape_and_format(array):
    with Queue(codec="bytes") as queue:
        queue.put(array)
        assert queue.get(timeout=5) == array.tobytes()


def test_msgpack_says_how_long_what_it_cannot_read_was():
    pytest.importorskip("msgspec")
    with (
        Queue(codec="msgpack", name=NAME) as queue,
        Queue.attach(NAME, codec="bytes") as wrong,
    ):
        wrong.put(b"\xc1")
        with pytest.raises(DecodeError, match="1 bytes"):
            queue.get()


# ---- bad input -----------------------------------------------------------------------------


class Carrier:
    def __init__(self, part: object) -> None:
        self.good = 1
        self.part = part


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: object) -> None:
        self.inner = inner


class Chosen(Carrier):
    """What its state is made of cannot be found in it."""

    def __getstate__(self) -> object:
        return {"fresh": threading.Lock()}


def _cyclic() -> Carrier:
    carrier = Carrier(None)
    carrier.part = [carrier, {"deep": (1, Slotted(threading.Lock()))}]
    return carrier


def _local() -> object:
    class Local:
        pass

    return Local()


def _nested(depth: int) -> object:
    made: object = threading.Lock()
    for _ in range(depth):
        made = [made]
    return made


class Part:
    asked: ClassVar[collections.Counter[Part]] = collections.Counter()

    def __reduce__(self) -> tuple[object, ...]:
        self.asked[self] += 1
        return Part, ()


def test_naming_costs_no_more_than_the_attempt():
    """Each part is asked once, and what is large is not copied."""
    Part.asked.clear()
    obj = {"large": [np.zeros(10**7), b"x" * 10**7], "many": [Part() for _ in range(1000)]}
    obj["bad"] = threading.Lock()
    tracemalloc.start()
    try:
        assert unpicklable_part(obj, copyreg.dispatch_table) == "['bad'] (a lock)"
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert list(Part.asked.values()) == [1] * 1000


class Unruly:
    """Raises whatever it is asked."""

    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("no")

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Grudging:
    def __init__(self) -> None:
        self.state = b"x" * 100

    def __setstate__(self, state: object) -> None:
        raise KeyError("not here")


def test_a_type_that_this_process_does_not_have():
    program = (
        "import sys, shmring\n"
        "class OnlyHere: pass\n"
        "shmring.Queue.attach(sys.argv[1]).put([OnlyHere()])"
    )
    with Queue(name=NAME) as queue:
        command = [sys.executable, "-c", program, queue.name]
        subprocess.run(command, check=True, timeout=60)
        with pytest.raises(DecodeError, match=r"__main__\.OnlyHere"):
            queue.get(timeout=10)


def test_bytes_that_are_no_pickle_at_all():
    assert isinstance(PickleCodec().decode(0, b"plain", ()), bytes)
    for head in (b"", b"\x80", b"nonsense", pickle.dumps({"a": 1})[:-3], b"\x80\x05\x93."):
        with pytest.raises(DecodeError, match=rf"{len(head)} bytes"):
            PickleCodec().decode(1, head, ())


# ---- on either back end ---------------------------------------------------------------------


class TestCodecs:
    """What travels, on either back end."""

    @pytest.fixture
    def queue(self, backend):
        with backend.Queue() as made:
            yield made
            made.cancel_join_thread()

    def test_a_reducer_counts_while_it_is_registered(self, queue, registered):
        with pytest.raises(EncodeError, match="not by the registered"):
            queue.put(Late(1))
        registered(Late, _reduce_late)
        queue.put(Late(1))
        queue.put_many([Late(2)])
        registered(Late, lambda late: (_rebuild_late, (late.value + 10,)))
        queue.put(Late(1))
        del ForkingPickler._extra_reducers[Late]
        with pytest.raises(EncodeError, match="not by the registered"):
            queue.put(Late(1))
        assert [queue.get(timeout=10).value for _ in range(3)] == [2, 3, 12]

    def test_a_reducer_of_copyreg_counts_after_that_of_multiprocessing(self, queue, registered):
        copyreg.pickle(Late, lambda late: (_rebuild_late, (late.value + 100,)))
        try:
            queue.put(Late(1))
            assert queue.get(timeout=10).value == 102
            registered(Late, _reduce_late)
            queue.put(Late(1))
            assert queue.get(timeout=10).value == 2
        finally:
            del copyreg.dispatch_table[Late]

    def test_a_reducer_for_arrays_goes_before_ours(self, queue):
        ForkingPickler.register(np.ndarray, lambda array: (list, ((1, 2),)))
        try:
            queue.put(np.zeros(3))
            assert queue.get(timeout=10) == [1, 2]
        finally:
            del ForkingPickler._extra_reducers[np.ndarray]

    @pytest.mark.usefixtures("backend")
    def test_arrays_travel_out_of_band_though_numpy_came_after_the_queue(self):
        code = """if True:
            import sys
            from shmring import Queue
            queue = Queue()
            queue.put({1})
            assert "numpy" not in sys.modules
            import numpy
            queue.put(numpy.zeros(1000))
            queue.get()
            print(type(queue.get(timeout=10).base).__name__)
        """
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.stderr) == ("bytearray\n", "")

    def test_connections_and_sockets_travel(self, backend, start_method):
        context = multiprocessing.get_context(start_method)
        with (
            backend.Queue(ctx=context) as queue,
            backend.Queue(ctx=context) as answers,
            socket.create_server(("127.0.0.1", 0)) as server,
            run_in_process(_answer, queue, answers, method=start_method),
        ):
            mine, theirs = multiprocessing.Pipe()
            queue.put((theirs, server))
            assert mine.poll(60)
            assert mine.recv() == "over a connection"
            with socket.create_connection(server.getsockname(), timeout=60) as client:
                assert client.recv(100) == b"over a socket"
            assert answers.get(timeout=60) == "done"
            mine.close()
            theirs.close()

    @pytest.mark.parametrize("what", REFUSED)
    def test_what_the_standard_library_refuses_is_refused_in_put(self, queue, what):
        obj = REFUSED[what]()
        with pytest.raises(Exception) as stock:  # noqa: PT011
            ForkingPickler.dumps(obj)
        with pytest.raises(EncodeError, match=type(obj).__qualname__) as ours:
            queue.put(obj)
        assert type(ours.value.__cause__) is type(stock.value)
        assert queue.empty()
        if hasattr(obj, "close"):
            obj.close()

    @pytest.mark.parametrize(
        "returned", [None, "text", 5, [b"x"], np.arange(6.0).reshape(2, 3).T.data]
    )
    def test_an_own_codec_that_returns_no_bytes(self, backend, returned):
        codec = Strict()
        codec.dumps = lambda obj: returned
        with backend.Queue(codec=codec) as queue:
            with pytest.raises((EncodeError, TypeError), match="bytes"):
                queue.put(1)
            assert queue.empty()

    @pytest.mark.parametrize(
        ("obj", "said"),
        [
            (Carrier(Carrier(threading.Lock())), r"a Carrier .*\.part\.part \(a lock\)"),
            (
                {"a": [1, (2, {"b": threading.Lock()})]},
                r"a dict .*\['a'\]\[1\]\[1\]\['b'\] \(a lock\)",
            ),
            ({(1, _cyclic): 1, Slotted(threading.Lock()): 2}, r"\.key\.inner \(a lock\)"),
            (_cyclic(), r"\.part\[1\]\['deep'\]\[1\]\.inner \(a lock\)"),
            (Carrier(lambda: 1), r"\.part \(a function .*<lambda>\)"),
            ([functools.partial(print, threading.Lock())], r"\[0\]\.args\[0\] \(a lock\)"),
            ([Carrier(threading.Lock()).__init__], r"\[0\]\.__self__\.part \(a lock\)"),
            (collections.deque([1, threading.Lock()]), r"a deque .*\[1\] \(a lock\)"),
            (collections.OrderedDict(a=threading.Lock()), r"\['a'\] \(a lock\)"),
            (Chosen(1), r"a Chosen .*a lock inside it"),
            ([_local()], r"\[0\]\.__class__ \(a type .*Local\)"),
            ([*range(500_000), threading.Lock()], r"\[500000\] \(a lock\)"),
            (_nested(50), r"a list .*\(a lock\)"),
            (_nested(100_000), r"a list cannot be put"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_put_names_the_part_that_cannot_travel(self, queue, obj, said):
        with pytest.raises(EncodeError, match=said):
            queue.put(obj)
        assert queue.empty()

    def test_put_names_a_lock_of_multiprocessing(self, queue):
        # made here: where each child imports this file, it would make a semaphore for each
        with pytest.raises(EncodeError, match=r"through inheritance.*\.part \(a Lock\)"):
            queue.put(Carrier(multiprocessing.Lock()))
        assert queue.empty()

    def test_a_part_that_only_multiprocessing_can_pickle_is_not_named(self, queue):
        mine, theirs = multiprocessing.Pipe()
        with mine, theirs, pytest.raises(EncodeError, match=r"\[1\] \(a lock\)"):
            queue.put([theirs, threading.Lock()])

    def test_an_object_that_refuses_every_question(self, queue):
        with pytest.raises(EncodeError, match="a Unruly"):
            queue.put(Unruly())
        with pytest.raises(EncodeError, match=r"\(a lock\)|Unruly"):
            queue.put([{"u": Unruly()}, threading.Lock()])
        assert queue.empty()

    @pytest.mark.parametrize("size", [0, 100_000])
    def test_get_says_how_large_and_of_which_type(self, queue, size):
        queue.put_many([1, {"n": Grudging(), "data": np.zeros(size, "u1")}, 2])
        assert queue.get(timeout=10) == 1
        with pytest.raises(DecodeError, match=r"test_codecs\.Grudging") as caught:
            queue.get()
        assert isinstance(caught.value, pickle.UnpicklingError)
        assert isinstance(caught.value.__cause__, KeyError)
        told = int(str(caught.value).split("a message of ")[1].split()[0])
        assert size + 100 < told < size + 1000
        assert queue.get(timeout=10) == 2
        assert queue.empty()

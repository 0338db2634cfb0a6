"""The encoder for trees of exact builtins: what it carries, what it leaves to pickle, and
what it makes of bytes that no encoder made."""

from __future__ import annotations

import collections
import enum
import gc
import math
import random
import struct
import sys
import threading
from typing import Any

import pytest

pytest.importorskip(
    "shmring._core.object_ring", reason="the extension cannot be loaded", exc_type=ImportError
)

from hypothesis import given, settings
from hypothesis import strategies as st

import shmring
from shmring._core.object_ring import decode_builtins as decode
from shmring._core.object_ring import encode_builtins as encode
from shmring.errors import DecodeError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()), max_size=80)
    | st.binary(max_size=80)
)
KEYS = st.none() | st.booleans() | st.integers(-300, 300) | st.text(max_size=40) | st.binary()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.lists(inner, max_size=20).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=20)
    ),
    max_leaves=40,
)

EDGES = [
    *(sign * 2**bits + by for bits in range(64) for by in (-1, 0, 1) for sign in (1, -1)),
    *(0.0, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308),
    *(
        "",
        "a",
        "é",
        "中",
        "😀",
        "\ud800",
        "\0",
        "\x7f",
        "\x80",
        "\xff",
        "Ā",
        "\uffff",
        "\U0010ffff",
    ),
    *(letter * count for letter in "aé中😀" for count in (63, 64, 65, 5000)),
    *(b"", b"\0", b"x" * 63, b"x" * 64, b"x" * 60_000),
    *((), (1,), [], {}, [()] * 3, {(1, (2, "x")): [3]}),
    *(list(range(15)), list(range(16)), tuple(range(16)), {i: i for i in range(16)}),
    *({i: str(i) for i in range(1000)}, [[[i] for i in range(10)] for _ in range(30)]),
]
IN_RANGE = [each for each in EDGES if type(each) is not int or -(2**63) <= each < 2**63]


def alike(one: Any, other: Any) -> bool:
    """Equal, of the same types all the way down, and in the same order."""
    return repr(one) == repr(other) and type(one) is type(other)


@pytest.mark.parametrize("tree", IN_RANGE, ids=lambda tree: repr(tree)[:20])
def test_edges(tree):
    encoded = encode(tree)
    assert encoded is not None
    assert alike(decode(encoded), tree)


def test_nan_keeps_its_bits():
    odd = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_DEAD_BEEF))[0]
    assert struct.pack("<d", decode(encode(odd))) == struct.pack("<d", odd)


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_what_is_carried_arrives_alike(tree):
    encoded = encode(tree)
    if encoded is not None:  # otherwise something occurs twice in it
        assert alike(decode(encoded), tree)


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "other",
    [
        2**63,
        -(2**63) - 1,
        1j,
        {1, 2},
        frozenset(),
        bytearray(b"x"),
        range(3),
        Colour.RED,
        Text("x"),
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        b"x" * 70_000,
        "x" * 70_000,
        object,
        test_edges,
    ],
    ids=lambda other: type(other).__name__,
)
@pytest.mark.parametrize("inside", [lambda x: x, lambda x: [0, x], lambda x: {"a": (x,)}])
def test_all_else_is_pickles(other, inside):
    assert encode(inside(other)) is None
    with shmring.Queue() as queue:
        queue.put(inside(other))
        assert alike(queue.get(), inside(other))


def test_what_occurs_twice_arrives_as_one():
    row, long = [1], "x" * 100
    with shmring.Queue() as queue:
        for twice in ([row, row], {"a": row, "b": (row,)}, [(long,), long]):
            assert encode(twice) is None
            queue.put(twice)
        one, two = queue.get()
        assert one is two
        arrived = queue.get()
        assert arrived["a"] is arrived["b"][0]
        arrived = queue.get()
        assert arrived[0][0] is arrived[1]


def test_what_others_hold_but_occurs_once_is_a_tree():
    rows = [[number] for number in range(16)]
    assert decode(encode(rows)) == rows
    held = [[number] for number in range(17)]  # more than are remembered
    keep = list(held)
    assert encode(held) is None
    assert keep == held


def test_recursion_and_depth():
    loop: list[Any] = [1]
    loop.append(loop)
    assert encode(loop) is None
    deep: list[Any] = []
    for _ in range(31):
        deep = [deep]
    assert decode(encode(deep)) == deep
    assert encode([deep]) is None
    with shmring.Queue() as queue:
        queue.put(loop)
        queue.put([deep])
        arrived = queue.get()
        assert arrived[1] is arrived
        assert queue.get() == [deep]


@pytest.mark.parametrize("size", [10, 5000, 300_000])
def test_through_a_queue_of_each_path(size):
    """Over the stack, over a buffer of its own, and moved with the GIL released."""
    tree = {"numbers": list(range(size)), "name": "x" * 50}
    with shmring.Queue() as queue:
        queue.put(tree)
        queue.put_many([tree, {"second": 2}])
        assert queue.get() == tree
        assert queue.get_many() == [tree, {"second": 2}]


def test_keys_that_look_alike_are_told_apart():
    """The cache of keys compares all of a key, not what it was found by."""
    alike_in_front = [f"sameprefix{middle}z" for middle in range(2000)]
    for _ in range(2):
        assert [decode(encode({key: 1})) for key in alike_in_front] == [
            {key: 1} for key in alike_in_front
        ]
    assert decode(encode({"é": 1, "e": 2, "": 3})) == {"é": 1, "e": 2, "": 3}


# ---- bytes from elsewhere ---------------------------------------------------------------------

BAD = {
    "nothing": b"",
    "an unknown tag": b"\xb0",
    "a tag that does not exist": b"\xff",
    "a string that is too long": b"\x05abc",
    "a string that is not ASCII": b"\x02a\xe9",
    "a long string that is not ASCII": b"\xc8" + struct.pack("<I", 9) + b"abcdefgh\x80",
    "a character that does not exist": b"\xcb" + struct.pack("<II", 1, 0x110000),
    "a character that is negative": b"\xcb" + struct.pack("<II", 1, 0xFFFFFFFF),
    "a huge string": b"\xc8\xff\xff\xff\xffabc",
    "a huge wide string": b"\xcb\xff\xff\xff\xff" + bytes(64),
    "huge bytes": b"\xcc\xff\xff\xff\xffabc",
    "a huge list": b"\xce\xff\xff\xff\xff" + b"\xc0" * 64,
    "a huge tuple": b"\xcf\xff\xff\xff\xff" + b"\xc0" * 64,
    "a huge dict": b"\xcd\xff\xff\xff\xff" + b"\xc0" * 64,
    "a short float": b"\xc3\0\0\0\0\0\0\0",
    "a short int": b"\xc5\0",
    "a key without its value": b"\x81\x41",
    "a list as a key": b"\x81\x90\x41",
    "a tuple with a list as a key": b"\x81\xa1\x90\x41",
    "too deep": b"\x91" * 40 + b"\xc0",
    "more after the end": b"\xc0\xc0",
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_bytes_are_an_error_that_names_them(data):
    with pytest.raises(DecodeError, match=f"a message of {len(data)} bytes was taken and cannot"):
        decode(data)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bits, bytes and lengths changed, pieces cut out, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(5)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(out):
            out[at] = rng.choice((0, 0x7F, 0x8F, 0x9F, 0xAF, *range(0xC0, 0xD0), 0xFF))
        elif what == 2:
            del out[at : at + rng.randint(1, 8)]
        elif what == 3:
            out[at:at] = out[at : at + rng.randint(1, 8)]
        else:
            out[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
    return bytes(out)


@pytest.mark.fault(23)
def test_mutated_bytes_give_an_object_or_an_error_and_leak_nothing():
    rng = random.Random(20261122)
    whole = [
        encode(tree)
        for tree in (
            {"id": 12, "name": "a name", "value": 1.5, "ok": True, "é": None},
            [[(1, 300, -70_000, 2**40), {"k": b"bytes"}], ["中😀"] * 3, "x" * 70],
            {number: [str(number)] for number in range(20)},
        )
    ]
    outcomes: collections.Counter[str] = collections.Counter()

    def attack(count: int) -> None:
        for _ in range(count):
            try:
                decode(mutated(rng, rng.choice(whole)))
                outcomes["object"] += 1
            except DecodeError:
                outcomes["error"] += 1

    attack(2000)  # fills the cache of keys
    gc.collect()
    before = sys.getallocatedblocks()
    attack(40_000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 2000
    assert min(outcomes["object"], outcomes["error"]) > 1000, outcomes


def test_every_prefix_is_an_error():
    whole = encode({"id": 12, "list": [1.5, None, (b"x", "中")], "n": 2**40})
    for end in range(len(whole)):
        with pytest.raises(DecodeError):
            decode(whole[:end])


def test_a_frame_that_is_no_tree_costs_only_itself():
    with shmring.Queue(codec="pickle") as queue:
        queue._set_codec(lambda obj: (4, [obj]), None, False)
        queue.put(b"\xff\xff")
        queue._choose("pickle")
        queue.put("next")
        with pytest.raises(DecodeError, match="a message of 2 bytes was taken"):
            queue.get()
        assert queue.get() == "next"


def test_other_codecs_do_not_read_trees():
    with shmring.Queue(codec="bytes") as queue:
        queue._set_codec(lambda obj: (4, [obj]), None, False)
        queue.put(encode({"a": 1}))
        queue._choose("bytes")
        with pytest.raises(DecodeError, match="kind 4"):
            queue.get()


def test_a_container_that_another_thread_changes_is_encoded_as_it_was_or_left_to_pickle():
    """Without a GIL nothing else keeps the two apart."""
    tree: dict[Any, Any] = {"same": list(range(20)), "table": {}, "ends": ("first", "last")}
    stop = threading.Event()

    def change() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            tree["table"][f"key {turn % 50}"] = [float(turn), str(turn) * 30]
            tree["table"].pop(f"key {turn * 7 % 50}", None)
            tree["same"].append(turn)
            del tree["same"][20:]

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3000):
            encoded = encode(tree)
            if encoded is None:
                continue
            made = decode(encoded)
            assert made["same"][:20] == list(range(20))
            assert made["ends"] == ("first", "last")
            assert all(text == str(int(number)) * 30 for number, text in made["table"].values())
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)

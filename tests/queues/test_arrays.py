"""Arrays and scalars of numpy through a queue."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from shmring.queues.codec import PickleCodec

SIZES = [3, 40_000]  # inside the pickle, and beside it


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _overlapping() -> np.dtype:
    return np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 0]})


MAKERS = {
    "C": lambda n: np.arange(n * 4.0).reshape(n, 4),
    "Fortran": lambda n: np.asfortranarray(np.arange(n * 4).reshape(n, 4)),
    "strided": lambda n: np.arange(n * 8)[::2],
    "reversed": lambda n: np.arange(n)[::-1],
    "three axes swapped": lambda n: np.arange(n * 6).reshape(n, 2, 3).transpose(1, 0, 2),
    "four axes swapped": lambda n: np.arange(n * 6).reshape(n, 2, 3, 1).transpose(2, 3, 0, 1),
    "axes swapped, read-only": lambda n: _read_only(np.ones((n, 2, 3)).transpose(1, 0, 2)),
    "axes swapped, dates": lambda n: np.zeros((n, 2, 3), "M8[s]").transpose(1, 0, 2),
    "axes swapped, strided": lambda n: (
        np.arange(n * 24).reshape(n, 4, 6)[:, ::2].transpose(2, 0, 1)
    ),
    "axes swapped, reversed": lambda n: np.arange(n * 6).reshape(n, 2, 3).transpose(1, 0, 2)[::-1],
    "broadcast": lambda n: np.broadcast_to(np.float32(2), (n, 3)),
    "read-only": lambda n: _read_only(np.arange(n * 2.0)),
    "read-only Fortran": lambda n: _read_only(np.asfortranarray(np.ones((n, 3)))),
    "over bytes": lambda n: np.frombuffer(bytes(n * 8), dtype="i8"),
    "over half of some bytes": lambda n: np.frombuffer(bytes(n * 16), "i8", count=n, offset=8),
    "big-endian": lambda n: np.arange(n, dtype=">f8"),
    "float16": lambda n: np.arange(n, dtype="f2"),
    "long double": lambda n: np.arange(n, dtype="g"),
    "complex": lambda n: np.arange(n) * 1j,
    "bool": lambda n: np.arange(n) % 3 == 0,
    "dates": lambda n: np.arange(n).astype("M8[s]"),
    "differences, read-only": lambda n: _read_only(np.arange(n).astype("m8[D]")),
    "text": lambda n: np.array(["äö", "x"] * n),
    "bytes": lambda n: np.array([b"ab", b"c"] * n),
    "void": lambda n: np.zeros(n, "V7"),
    "structured": lambda n: np.ones(n, [("a", "i4"), ("b", "f8", (2,)), ("c", "S3")]),
    "structured, read-only": lambda n: _read_only(np.ones(n, [("a", "i4"), ("b", "f8")])),
    "aligned": lambda n: np.ones(n, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "structured with dates": lambda n: np.zeros(n, [("a", "M8[s]"), ("b", "f8")]),
    "overlapping fields": lambda n: _read_only(np.zeros(n, _overlapping())),
    "objects": lambda n: np.array([{"an": "object"}, None, 1.5] * n, dtype=object),
    "objects, read-only": lambda n: _read_only(np.array([None, 1.5] * n, dtype=object)),
    "objects in a structure": lambda n: np.array([(1, [2])] * n, [("a", "i4"), ("b", "O")]),
    "described": lambda n: np.ones(n, np.dtype("f8", metadata={"unit": "m"})),
    "no rows": lambda n: np.zeros((0, n)),
    "no rows, read-only": lambda n: _read_only(np.zeros((n, 0), order="F")),
    "no bytes": lambda n: np.zeros(n, "S0"),
    "one value": lambda n: np.array(float(n)),
    "one value, read-only": lambda n: _read_only(np.array(float(n))),
    "a record array": lambda n: np.rec.array([(1, 2.5)] * n, dtype=[("a", "i4"), ("b", "f8")]),
    "a masked array": lambda n: np.ma.masked_less(np.arange(n), n // 2),
    "a matrix": lambda n: np.ones((n, 2)).view(np.matrix),
    "a subclass, read-only": lambda n: _read_only(np.ones(n).view(Labelled)),
}


class Labelled(np.ndarray):
    """What a library might derive."""


def assert_same(taken: np.ndarray, array: np.ndarray) -> None:
    assert type(taken) is type(array)
    assert taken.dtype == array.dtype
    assert taken.dtype.metadata == array.dtype.metadata
    assert taken.shape == array.shape
    assert np.array_equal(np.ma.getdata(taken), np.ma.getdata(array))
    assert taken.flags.writeable
    assert taken.flags.aligned


def test_a_buffer_around_larger_memory_is_cut_out():
    """A codec may hand over views into one block, also where the source was read-only."""
    array = _read_only(np.arange(1000))
    kind, (head, buffer) = PickleCodec().encode(array)
    block = bytearray(b"x" * 8 + bytes(buffer) + b"x" * 8)
    taken = PickleCodec().decode(kind, bytes(head), [memoryview(block)[8:-8]])
    assert_same(taken, array)


class TestArrays:
    """What travels, on either back end."""

    @pytest.fixture
    def queue(self, backend):
        with backend.Queue() as made:
            yield made
            made.cancel_join_thread()

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("what", MAKERS)
    def test_an_array_arrives_equal_writable_and_on_its_own(self, queue, what, size):
        array = MAKERS[what](size)
        for carried in (
            array,
            {"a": [array, array], "view": array[..., :1] if array.ndim else array},
        ):
            queue.put(carried)
            taken = queue.get(timeout=10)
            if isinstance(carried, dict):
                assert_same(taken["view"], carried["view"])
                assert taken["a"][0] is taken["a"][1]
                taken = taken["a"][0]
            assert_same(taken, array)
            if array.nbytes and not array.dtype.hasobject:  # which numpy encodes
                assert taken.strides == array.copy("K").strides
            before = np.ma.getdata(array).copy()
            taken[...] = np.zeros(1, taken.dtype)[0]  # and the source does not see it
            assert np.array_equal(np.ma.getdata(array), before)

    @pytest.mark.parametrize("size", SIZES)
    def test_a_mapped_file_arrives_as_memory(self, queue, tmp_path, size):
        np.save(tmp_path / "mapped.npy", np.arange(size))
        for mode in ("r", "r+", "c"):
            mapped = np.load(tmp_path / "mapped.npy", mmap_mode=mode)
            for carried in (mapped, np.asarray(mapped)):
                queue.put(carried)
                taken = queue.get(timeout=10)
                assert_same(taken, carried)
                taken[:] = 0
                del taken
            assert np.array_equal(mapped, np.arange(size))

    @pytest.mark.parametrize(
        "scalar", [np.float64(1.5), np.int8(3), np.str_("x"), np.datetime64(1, "s")]
    )
    def test_a_scalar_stays_one(self, queue, scalar):
        queue.put(scalar)
        taken = queue.get(timeout=10)
        assert taken == scalar
        assert type(taken) is type(scalar)
        assert taken.dtype == scalar.dtype

    @pytest.mark.usefixtures("backend")
    def test_numpy_is_not_imported_by_us(self):
        program = (
            "import sys, shmring; queue = shmring.Queue()\n"
            "class Own: pass\n"
            "queue.put([Own(), {1: 2}]); queue.get(); queue.close()\n"
            "assert 'numpy' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

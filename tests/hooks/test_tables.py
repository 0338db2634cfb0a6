"""pandas and pyarrow: their buffers travel out of band, and no large copy is made beside."""

from __future__ import annotations

from typing import Any

import pytest

import shmring
from shmring.queues.codec import PickleCodec

np = pytest.importorskip("numpy")

COUNT = 100_000


def address(buffer: Any) -> int:
    return int(np.frombuffer(buffer, "u1").ctypes.data)


def encoded(obj: Any) -> tuple[int, bytes, list[Any]]:
    kind, (head, *buffers) = PickleCodec().encode(obj)
    assert len(head) < 3000, "the data is not in the pickle"
    return kind, bytes(head), buffers


def test_a_dict_of_arrays_hands_over_their_memory() -> None:
    arrays = {name: np.arange(COUNT, dtype=name) for name in ("i4", "f8", "u1")}
    kind, head, buffers = encoded(arrays)
    assert {*map(address, buffers)} == {each.ctypes.data for each in arrays.values()}
    taken = [bytearray(each) for each in buffers]
    arrived = PickleCodec().decode(kind, head, taken)
    assert {*map(address, taken)} == {each.ctypes.data for each in arrived.values()}


def test_a_frame_hands_over_its_columns() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": np.arange(COUNT), "y": np.ones(COUNT, np.float32)})
    columns = [frame[name].to_numpy() for name in frame]
    kind, head, buffers = encoded(frame)
    assert {*map(address, buffers)} >= {each.ctypes.data for each in columns}
    assert sum(each.nbytes for each in buffers) < sum(each.nbytes for each in columns) + 10_000
    taken = [bytearray(each) for each in buffers]
    arrived = PickleCodec().decode(kind, head, taken)
    assert {*map(address, taken)} >= {arrived[name].to_numpy().ctypes.data for name in arrived}
    with shmring.Queue() as queue:
        queue.put({"frame": frame})
        arrived = queue.get(timeout=10)["frame"]
    assert arrived.equals(frame)
    arrived["x"] += 1
    assert frame["x"][0] == 0


def test_a_table_hands_over_its_buffers() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"text {number}" for number in range(COUNT)]
    table = pyarrow.table({"x": np.arange(COUNT), "text": texts})
    held = [
        each.address
        for column in table.columns
        for chunk in column.chunks
        for each in chunk.buffers()
        if each is not None
    ]
    kind, head, buffers = encoded(table)
    assert {*map(address, buffers)} == {*held}
    taken = [bytearray(each) for each in buffers]
    arrived = PickleCodec().decode(kind, head, taken)
    assert arrived.column("x").chunk(0).buffers()[1].address in map(address, taken)
    with shmring.Queue() as queue:
        queue.put([table, table.slice(10, 20)])
        whole, part = queue.get(timeout=10)
    assert whole.equals(table)
    assert part.equals(table.slice(10, 20))

"""Tensors through queues: every kind arrives as it was put, by value."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402  (needs torch)
import shmring.torch
from shmring import DecodeError, EncodeError, Queue
from shmring.torch import TensorCodec
from support import run_in_process, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's: prototype, deprecated

DTYPES = sorted(
    {
        str(each)
        for each in vars(torch).values()
        if isinstance(each, torch.dtype)
        # of these torch makes no tensors, or only quantized ones
        if not str(each).removeprefix("torch.").startswith(("q", "bits", "int1", "uint1"))
        or each in (torch.int16, torch.uint16)
    }
    - {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(2, 8)}
)


class Labelled(torch.Tensor):
    """A subclass whose instances have an attribute."""

    label: str


@pytest.fixture
def queue() -> Any:
    with shmring.torch.get_context("fork").Queue() as made:
        yield made


def through(queue: Any, obj: Any) -> Any:
    queue.put(obj)
    return queue.get(timeout=10)


def same(arrived: Any, sent: Any) -> None:
    assert type(arrived) is type(sent)
    assert arrived.dtype is sent.dtype
    assert arrived.shape == sent.shape
    assert arrived.requires_grad == sent.requires_grad
    assert as_bytes(arrived) == as_bytes(sent)


def as_bytes(tensor: Any) -> bytes:
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).tolist())


def of_type(name: str, count: int = 300) -> Any:
    dtype = getattr(torch, name.removeprefix("torch."))
    whole = torch.arange(count * dtype.itemsize, dtype=torch.int64).to(torch.uint8)
    return (whole % 2 if dtype is torch.bool else whole).view(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_every_data_type_arrives(queue: Any, name: str) -> None:
    for tensor in (of_type(name), of_type(name)[7:9], of_type(name).view(15, 20).t()):
        arrived = through(queue, tensor)
        same(arrived, tensor)
        assert arrived.stride() == tensor.stride()


SHAPES = {
    "scalar": lambda: torch.tensor(2.5),
    "no element": lambda: torch.empty(0),
    "no element in two dimensions": lambda: torch.empty(3, 0, 2, dtype=torch.int8),
    "transposed": lambda: torch.randn(20, 30).t(),
    "channels last": lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "expanded": lambda: torch.randn(5, 1, 4).expand(5, 70, 4),
    "one element, expanded": lambda: torch.ones(1).expand(1000),
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES.keys())
def test_shape_and_strides_arrive(queue: Any, make: Any) -> None:
    tensor = make()
    arrived = through(queue, tensor)
    same(arrived, tensor)
    assert arrived.stride() == tensor.stride()


def test_only_what_a_view_shows_travels(queue: Any) -> None:
    large = torch.arange(1_000_000)
    for view in (
        large[500:600],
        large.view(1000, 1000)[::10, 3:5],
        large[::100_000].expand(50, 10),
    ):
        _, segments = TensorCodec().encode(view)
        assert sum(map(len, map(memoryview, segments))) < 8 * 250 + 300
        arrived = through(queue, view)
        same(arrived, view)
        assert arrived.untyped_storage().nbytes() <= view.numel() * 8


def test_a_tensor_with_gaps_keeps_the_order_of_its_axes(queue: Any) -> None:
    tensor = torch.randn(8, 40, 30).permute(2, 1, 0)[::2, ::3]
    arrived = through(queue, tensor)
    same(arrived, tensor)
    assert arrived.stride() == (1, 15, 15 * 14)


def test_bits_are_resolved(queue: Any) -> None:
    conjugate = torch.randn(50, dtype=torch.complex64).conj()
    negative = conjugate.imag
    assert conjugate.is_conj()
    assert negative.is_neg()
    for tensor in (conjugate, negative):
        arrived = through(queue, tensor)
        assert torch.equal(arrived, tensor)
        assert not arrived.is_conj()
        assert not arrived.is_neg()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_leaf_keeps_its_flag_and_a_parameter_its_class(queue: Any, dtype: Any) -> None:
    leaf = torch.ones(200, dtype=dtype, requires_grad=True)
    arrived = through(queue, leaf)
    same(arrived, leaf)
    assert arrived.is_leaf
    (arrived.abs().sum()).backward()
    assert arrived.grad is not None
    assert leaf.grad is None
    for flag in (True, False):
        parameter = torch.nn.Parameter(torch.ones(200, dtype=dtype), requires_grad=flag)
        same(through(queue, parameter), parameter)


def test_a_module_arrives_with_its_tied_weights(queue: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    module[1].weight = module[0].weight
    arrived = through(queue, module)
    assert arrived[1].weight is arrived[0].weight
    same(arrived[1].bias, module[1].bias)


def test_a_subclass_arrives_with_its_attributes_and_without_the_rest_of_its_storage(
    queue: Any,
) -> None:
    tensor = torch.arange(100_000.0)[10:400].as_subclass(Labelled)
    tensor.label = "front"
    _, segments = TensorCodec().encode(tensor)
    assert sum(map(len, map(memoryview, segments))) < 390 * 4 + 1000
    arrived = through(queue, tensor)
    same(arrived, tensor)
    assert arrived.label == "front"


def quantized() -> Any:
    return torch.quantize_per_tensor(torch.randn(40, 30), 0.1, 3, torch.qint8)


LAYOUTS = {
    "sparse": (lambda: torch.eye(30).to_sparse(), torch.Tensor.to_dense),
    "sparse rows": (lambda: torch.eye(30).to_sparse_csr(), torch.Tensor.to_dense),
    "sparse columns": (lambda: torch.eye(30).to_sparse_csc(), torch.Tensor.to_dense),
    "sparse blocks": (lambda: torch.eye(30).to_sparse_bsr((2, 2)), torch.Tensor.to_dense),
    "quantized": (quantized, torch.Tensor.int_repr),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(200), torch.zeros(3)]),
        lambda tensor: tensor.to_padded_tensor(-1.0),
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(200), torch.zeros(3)], layout=torch.jagged),
        lambda tensor: tensor.to_padded_tensor(-1.0),
    ),
}


@pytest.mark.parametrize(("make", "dense"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_other_layouts_travel_by_their_parts(queue: Any, make: Any, dense: Any) -> None:
    tensor = make()
    arrived = through(queue, tensor)
    assert arrived.layout == tensor.layout
    assert arrived.dtype == tensor.dtype
    assert torch.equal(dense(arrived), dense(tensor))
    if not tensor.is_quantized:
        leaf = through(queue, tensor.requires_grad_())
        assert leaf.requires_grad
        assert leaf.is_leaf


def test_storages_travel_by_value(queue: Any) -> None:
    storage = torch.arange(500, dtype=torch.int16).untyped_storage()
    assert through(queue, storage).tolist() == storage.tolist()
    assert through(queue, torch.UntypedStorage(0)).nbytes() == 0


def test_tensors_of_one_storage_arrive_apart_and_one_tensor_twice_as_one(queue: Any) -> None:
    whole = torch.zeros(1000)
    left, right, again = through(queue, [whole[:600], whole[400:], whole[400:]])
    left += 1
    assert right.sum() == 0
    same_twice = through(queue, (whole, whole))
    assert same_twice[0] is same_twice[1]
    assert again.untyped_storage().data_ptr() != right.untyped_storage().data_ptr()


def test_the_receiver_writes_without_effect_on_the_sender(queue: Any) -> None:
    for count in (1, 10, 10_000):
        tensor = torch.zeros(count)
        arrived = through(queue, tensor)
        arrived += 1
        assert arrived.sum() == count
        assert tensor.sum() == 0
        assert not tensor.is_shared()


def test_nothing_is_copied_beside_the_ring() -> None:
    """The codec hands over the tensor's own memory, and takes over the buffer that arrived."""
    tensor = torch.randn(1000, 1000)
    kind, (head, buffer) = TensorCodec().encode({"x": tensor})
    assert np.frombuffer(buffer, "u1").ctypes.data == tensor.data_ptr()
    taken = bytearray(buffer)
    arrived = TensorCodec().decode(kind, bytes(head), [taken])["x"]
    assert arrived.data_ptr() == np.frombuffer(taken, "u1").ctypes.data


def test_a_graph_cannot_travel(queue: Any) -> None:
    result = torch.ones(3, requires_grad=True) * 2
    with pytest.raises(EncodeError, match=r"put tensor\.detach\(\).*\['x'\]\[1\] \(a Tensor\)"):
        queue.put({"x": [1, result]})
    with pytest.raises(EncodeError, match=r"put tensor\.detach"):
        queue.put(result.as_subclass(Labelled))
    assert queue.empty()
    same(through(queue, result.detach()), result.detach())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_an_opaque_layout_cannot_travel(queue: Any) -> None:
    with pytest.raises(EncodeError, match=r"layout torch\._mkldnn.*put tensor\.to_dense\(\)"):
        queue.put(torch.ones(2, 2).to_mkldnn())


@pytest.mark.parametrize("change", [-4, 4, 400])
@pytest.mark.parametrize(
    "tensor", [torch.ones(300), torch.ones(30, 10).t(), torch.ones(300, 1).expand(300, 5)]
)
def test_bytes_that_do_not_fit_the_shape_are_an_error(tensor: Any, change: int) -> None:
    kind, (head, buffer) = TensorCodec().encode(tensor)
    wrong = (bytearray(buffer) + bytearray(400))[: buffer.nbytes + change]
    with pytest.raises(DecodeError, match="cannot be decoded"):
        TensorCodec().decode(kind, bytes(head), [wrong])


def test_meta_tensors_travel_without_memory(queue: Any) -> None:
    arrived = through(queue, torch.empty(1000, 1000, device="meta"))
    assert arrived.device.type == "meta"
    assert arrived.shape == (1000, 1000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_tensor_goes_torchs_way(queue: Any) -> None:
    with run_in_process(put_many_ways, queue, method="spawn"):
        arrived = queue.get(timeout=60)
        assert arrived.is_cuda
        assert arrived.sum().item() == 100


def put_many_ways(queue: Any) -> None:
    queue.put(torch.ones(100, device="cuda"))
    threading.Event().wait(60)


# ---- contexts and processes -------------------------------------------------------------


def put_and_die(queue: Any, count: int) -> None:
    for number in range(count):
        queue.put({"number": number, "x": torch.full((5000,), number), "y": torch.tensor(number)})
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_what_was_put_outlives_its_sender(start_method: str, kind: str) -> None:
    context = shmring.torch.get_context(start_method)
    with getattr(context, kind)() as queue:
        child = context.Process(target=put_and_die, args=(queue, 20))
        child.start()
        child.join(100)  # to import torch takes long on a busy machine
        assert child.exitcode == -9
        for number in range(20):
            taken = queue.get()
            assert taken["number"] == number
            assert (taken["x"] == number).all()


def test_the_context_is_one_of_its_own() -> None:
    context = shmring.torch.get_context("fork")
    assert context is shmring.torch.get_context("fork")
    assert context is not shmring.get_context("fork")
    assert context.get_context("spawn") is shmring.torch.get_context("spawn")
    assert pickle.loads(pickle.dumps(context)) is context
    with context.Queue(codec="pickle") as shares:
        tensor = torch.zeros(3)
        through(shares, tensor)[0] = 1
        assert tensor[0] == 1, "by torch's own reducers the memory is shared"


def test_other_queues_keep_torchs_way() -> None:
    tensor = torch.zeros(10)
    with Queue() as queue:
        through(queue, tensor)[0] = 1
    assert tensor[0] == 1


def test_a_queue_of_one_program_is_opened_by_name_with_its_codec() -> None:
    with Queue(codec=TensorCodec()) as queue:
        with Queue.attach(queue.name, codec=TensorCodec()) as other:
            other.put(torch.ones(1000))
        assert queue.get(timeout=10).sum() == 1000


@pytest.mark.both_backends
def test_the_fallback_carries_tensors_by_value_too(backend: Any) -> None:
    with backend.Queue(codec=TensorCodec()) as queue:
        tensor = torch.zeros(1000)
        arrived = through(queue, {"x": tensor})["x"]
        arrived += 1
        assert tensor.sum() == 0


def test_threads_share_a_queue_of_tensors(queue: Any) -> None:
    def put(number: int) -> None:
        for _ in range(50):
            queue.put([torch.full((200,), number), {number}])

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        tensor, (number,) = queue.get(timeout=10)
        assert (tensor == number).all()
    wait_for(lambda: not any(thread.is_alive() for thread in threads))


def test_no_descriptor_is_used() -> None:
    with shmring.torch.get_context("fork").Queue() as queue:
        before = len(os.listdir("/proc/self/fd"))
        arrived = through(queue, [torch.ones(200) for _ in range(10_000)])
        assert len(arrived) == 10_000
        assert len(os.listdir("/proc/self/fd")) == before


def test_without_torch_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import shmring\n"
        "try:\n"
        "    import shmring.torch\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == 'shmring.torch needs torch: pip install "shmring[torch]"\n'


def test_queues_do_not_import_torch() -> None:
    program = "import sys, shmring; shmring.Queue().close(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_hooks_are_warned_about(queue: Any) -> None:
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda grad: grad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        queue.put(leaf)
    assert any("hook" in str(each.message) for each in caught)

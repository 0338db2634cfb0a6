"""torch's DataLoader, unmodified, on the context of shmring.torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

import shmring

torch = pytest.importorskip("torch")
if shmring.backend != "ring":
    pytest.skip(
        "a killed process blocks a pipe, and a pipe waits for no memory", allow_module_level=True
    )

# ruff: noqa: E402  (needs torch)
import shmring.torch
from support import run_with_mounts, wait_for

data = torch.utils.data

# Of torch: that nothing is pinned without a device, and more workers than CPUs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

Sample = namedtuple("Sample", ["image", "label"])
MAKE = {
    "tensor": lambda number: torch.full((300,), number),
    "array": lambda number: np.full(300, number, np.float32),
    "dict": lambda number: {"x": torch.full((300,), number), "y": number, "name": str(number)},
    "dict of arrays": lambda number: {"x": np.full(300, number), "y": np.float64(number)},
    "tuple": lambda number: (torch.full((300,), number), number),
    "named tuple": lambda number: Sample(torch.full((3, 20, 20), number), number),
    "number": lambda number: number,
    "text": str,
}


class Items(data.Dataset[Any]):
    """Samples of one kind; a number in `fatal` names one that kills or raises."""

    def __init__(self, kind: str, count: int = 40, fatal: dict[int, str] | None = None) -> None:
        self.kind, self.count, self.fatal = kind, count, fatal or {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        match self.fatal.get(number):
            case "raises":
                raise LookupError(f"no sample {number}")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return MAKE[self.kind](number)


class Stream(data.IterableDataset[Any]):
    """Samples that each worker takes its share of."""

    def __iter__(self) -> Any:
        worker = data.get_worker_info()
        assert worker is not None
        for number in range(worker.id, 40, worker.num_workers):
            yield MAKE["dict"](number)


def loader(dataset: Any, method: str = "fork", **options: Any) -> Any:
    context = shmring.torch.get_context(method)
    options = {"num_workers": 2, "batch_size": 8, **options}
    return data.DataLoader(dataset, multiprocessing_context=context, **options)


def same(arrived: Any, expected: Any) -> None:
    assert type(arrived) is type(expected)
    if isinstance(expected, torch.Tensor | np.ndarray):
        assert arrived.dtype == expected.dtype
        assert arrived.tolist() == expected.tolist()
    elif isinstance(expected, dict):
        assert arrived.keys() == expected.keys()
        for key in expected:
            same(arrived[key], expected[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(arrived, expected, strict=True):
            same(one, other)
    else:
        assert arrived == expected


@pytest.mark.parametrize("kind", MAKE)
def test_batches_are_those_of_a_loader_without_workers(kind: str) -> None:
    dataset = Items(kind)
    same(list(loader(dataset)), list(data.DataLoader(dataset, batch_size=8)))


def test_batches_come_by_every_start_method(start_method: str) -> None:
    dataset = Items("dict")
    same(list(loader(dataset, start_method)), list(data.DataLoader(dataset, batch_size=8)))


def test_samples_come_without_batches() -> None:
    for kind in ("dict", "array"):
        same(
            list(loader(Items(kind), batch_size=None)),
            list(data.DataLoader(Items(kind), batch_size=None)),
        )


def test_workers_share_a_stream() -> None:
    numbers = [int(y) for batch in loader(Stream()) for y in batch["y"]]
    assert sorted(numbers) == list(range(40))


def test_persistent_workers_serve_every_epoch() -> None:
    batches = loader(Items("tuple"), persistent_workers=True, prefetch_factor=4)
    expected = list(data.DataLoader(Items("tuple"), batch_size=8))
    for _ in range(3):
        same(list(batches), expected)


def test_pinning_is_asked_for() -> None:
    """A thread of the parent pins where there is a device; elsewhere torch ignores it."""
    batches = loader(Items("dict"), pin_memory=True)
    for batch, expected in zip(batches, data.DataLoader(Items("dict"), batch_size=8), strict=True):
        same(batch, expected)
        assert batch["x"].is_pinned() == torch.cuda.is_available()


def joined(samples: list[Any]) -> Any:
    return torch.cat(samples), len(samples)


def test_a_custom_collate_function_is_called() -> None:
    for tensor, count in loader(Items("tensor"), collate_fn=joined):
        assert tensor.shape == (300 * count,)


def test_batches_are_private_memory_and_stay_valid() -> None:
    kept = [batch for batch in loader(Items("tensor", 200)) if not batch.is_shared()]
    assert len(kept) == 25
    for number, batch in enumerate(kept):
        batch += 1
        assert batch[:, 0].tolist() == list(range(8 * number + 1, 8 * number + 9))


def test_an_exception_in_a_worker_is_raised_in_the_loop() -> None:
    batches = iter(loader(Items("dict", fatal={19: "raises"})))
    next(batches)
    next(batches)
    with pytest.raises(LookupError, match=r"in DataLoader worker process 0(.|\n)*no sample 19"):
        next(batches)
    same(next(batches)["y"], torch.arange(24, 32))


@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_torchs_error(persistent: bool) -> None:
    """The fifth batch is asked for when the first one has come."""
    taken: list[Any] = []
    batches = loader(Items("dict", fatal={35: "killed"}), persistent_workers=persistent, timeout=30)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed by signal|exited)"):
        taken.extend(batches)
    assert 1 <= len(taken) <= 4
    same(taken, list(data.DataLoader(Items("dict", len(taken) * 8), batch_size=8)))


def put_batches(queue: Any) -> None:
    """Collate and put as a worker does, and be killed at once."""
    for number in range(30):
        queue.put((number, data.default_collate([MAKE["dict"](number)] * 64)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_no_batch_is_lost_with_its_worker() -> None:
    context = shmring.torch.get_context("fork")
    with context.Queue() as queue:
        worker = context.Process(target=put_batches, args=(queue,))
        worker.start()
        wait_for(lambda: not worker.is_alive(), 60)
        for number in range(30):
            taken, batch = queue.get_nowait()
            assert taken == number
            assert (batch["x"] == number).all()


def printed_by(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FEW_DESCRIPTORS = """
import os, resource, torch
import shmring.torch

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

class Many(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, number):
        return [torch.full((2,), number) for _ in range(10_000)]

batches = torch.utils.data.DataLoader(
    Many(), batch_size=None, num_workers=2,
    multiprocessing_context=shmring.torch.get_context("fork"),
)
kept = []
for number, batch in enumerate(batches):
    assert len(batch) == 10_000 and (torch.stack(batch) == number).all()
    kept.append(batch)
print(len(kept), len(os.listdir("/proc/self/fd")) < 40)
"""


def test_ten_thousand_tensors_a_batch_need_no_descriptors() -> None:
    assert printed_by(FEW_DESCRIPTORS) == "6 True\n"


IMPORTED = """
import sys
import torch
import shmring.torch

class Modules(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, number):
        return sorted(sys.modules)

context = shmring.torch.get_context("fork")
loader = torch.utils.data.DataLoader(
    Modules(), None, num_workers=1, multiprocessing_context=context)
for names in loader:
    print(sorted({*names} - {*sys.modules}))
"""


def test_a_forked_worker_imports_nothing() -> None:
    """What it needs was imported before the fork, once for all workers."""
    assert printed_by(IMPORTED) == "[]\n"


DRAWN = """
import numpy
import shmring.torch

def draw(queue):
    queue.put(numpy.random.random())

context = shmring.torch.get_context("fork")
with context.Queue() as queue:
    children = [context.Process(target=draw, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    print(len({queue.get(timeout=60) for _ in children}))
    for child in children:
        child.join()
"""


def test_other_forked_children_draw_numbers_of_their_own() -> None:
    """The generator of numpy, which each of them seeds when it imports it."""
    assert printed_by(DRAWN) == "2\n"


SMALL_MEMORY = """
import torch
import shmring.torch

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, number):
        if SIZE == "too large" and number == 7:
            return torch.zeros(100 << 20, dtype=torch.uint8)
        return torch.full((8 << 20,), number, dtype=torch.uint8)

batches = iter(torch.utils.data.DataLoader(
    Large(), batch_size=None, num_workers=2, prefetch_factor=8,
    multiprocessing_context=shmring.torch.get_context("fork"),
))
seen = 0
try:
    for number, batch in enumerate(batches):
        assert (batch[:: 1 << 16] == number).all()
        seen += 1
except RuntimeError as error:
    print(seen, "killed by signal" in str(error), "exited unexpectedly" in str(error))
else:
    print(seen)
"""


@pytest.mark.parametrize(("size", "told"), [("small", "40\n"), ("too large", "7 False True\n")])
def test_a_small_dev_shm_is_waited_for_or_an_error(size: str, told: str) -> None:
    """64 MiB, as a container has: 16 batches of 8 MiB wait; one of 100 MiB ends its worker."""
    mounts = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    done = run_with_mounts(mounts, f"SIZE = {size!r}\n{SMALL_MEMORY}")
    assert done.stdout == told, done.stderr
    if size == "too large":
        assert "MessageTooLarge" in done.stderr

"""Rows of the report about tensors: torch's DataLoader and queues of tensors.

Each side is torch.multiprocessing, or shmring.torch's context, with the same start method.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import Row, Settings, Target, progress
from benchmarks.pools import compared, take_turns

WORKERS = 2

try:
    import torch

    import shmring.torch

    Dataset = torch.utils.data.Dataset
except ImportError:
    Dataset = object

STOCK = "torch.multiprocessing"


def contexts(method: str = "fork") -> dict[str, Any]:
    """Ours, and torch's."""
    return {
        "shmring": shmring.torch.get_context(method),
        STOCK: torch.multiprocessing.get_context(method),
    }


class Ready(Dataset):  # type: ignore[misc]
    """Batches that cost their worker nothing but the memory."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.batch = count, torch.zeros(nbytes, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.batch.clone()


class Rows(Dataset):  # type: ignore[misc]
    """Dicts of a row of 16 floats and a number."""

    def __init__(self, count: int) -> None:
        self.count, self.rows = count, torch.randn(4096, 16)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return {"x": self.rows[number % len(self.rows)], "y": number}


class Images(Dataset):  # type: ignore[misc]
    """64 images of 3 x 224 x 224 bytes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.images = torch.randint(0, 255, (64, 3, 224, 224), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.images[number % len(self.images)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The workers take the CPUs; torch's threads in the parent would fight for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loaded(
    question: str,
    dataset: Callable[[int], Any],
    batch_size: int | None,
    batches: int,
    bound: float,
    settings: Settings,
) -> Row:
    """Batches a second of both, from the first request of an epoch to its last batch."""
    progress(question)
    count = max(2 * WORKERS, int(batches * settings.scale))
    samples = dataset(count * (batch_size or 1))

    def epoch(loader: Any) -> None:
        for batch in loader:
            first = batch["x"] if isinstance(batch, dict) else batch
            first.view(-1)[-1].item()

    with one_thread():
        loaders = {
            name: torch.utils.data.DataLoader(
                samples,
                batch_size,
                num_workers=WORKERS,
                persistent_workers=True,
                multiprocessing_context=context,
            )
            for name, context in contexts().items()
        }
        found = take_turns(
            settings.runs,
            {name: (count, functools.partial(epoch, each)) for name, each in loaders.items()},
        )
    return compared(question, found, {STOCK: bound})


def _take(taken: Any, count: int, done: Any) -> None:
    for _ in range(count):
        taken.get()
    done.put(None)


def through_a_queue(settings: Settings) -> Row:
    """One dict of ten tensors of 1 KB, put here and taken in a child."""
    question = "dict of 10 tensors of 1 KB through a queue"
    progress(question)
    count = max(20, int(2000 * settings.scale))
    message = {str(each): torch.randn(256) for each in range(10)}

    def run(context: Any) -> None:
        queue, done = context.Queue(), context.SimpleQueue()
        child = context.Process(target=_take, args=(queue, count, done), daemon=True)
        child.start()
        for _ in range(count):
            queue.put(message)
        done.get()
        child.join()
        for each in (queue, done):
            each.close()

    sides = {name: (count, functools.partial(run, each)) for name, each in contexts().items()}
    return compared(question, take_turns(settings.runs, sides), {STOCK: 8.0})


def first_batch(method: str, settings: Settings) -> Row:
    """Seconds from the loader to its first batch, its workers started."""
    samples = Ready(2 * WORKERS, 8192)
    found: dict[str, list[float]] = {name: [] for name in contexts(method)}
    for _ in range(settings.runs):
        for name, context in contexts(method).items():
            began = time.perf_counter()
            loader = torch.utils.data.DataLoader(
                samples, None, num_workers=WORKERS, multiprocessing_context=context
            )
            batches = iter(loader)
            next(batches)
            found[name].append(time.perf_counter() - began)
            del batches
    ours, theirs = (statistics.median(each) for each in found.values())
    text = f"{{}} times {STOCK} ({1000 * theirs:.1f} ms)"
    target = Target(text, 1.0, ours / theirs, at_most=True)
    return Row(
        f"first batch of a DataLoader, {method}", f"{1000 * ours:.1f} ms", [target], raw=found
    )


_ready = functools.partial(Ready, nbytes=8192)
_large = functools.partial(Ready, nbytes=4 << 20)
_loaded = functools.partial(functools.partial, loaded)

ROWS: dict[str, Callable[[Settings], Row]] = {
    "loader-8-kb": _loaded("DataLoader, ready batches of 8 KB", _ready, None, 8000, 8.0),
    "loader-rows": _loaded("DataLoader, dict of two tensors, 256 rows", Rows, 256, 600, 2.8),
    "loader-4-mb": _loaded("DataLoader, ready batches of 4 MB", _large, None, 400, 3.0),
    "loader-images": _loaded("DataLoader, 64 images collated, 9.6 MB", Images, 64, 200, 1.1),
    "tensors": through_a_queue,
    **{f"loader-first-{name}": functools.partial(first_batch, name) for name in ("fork", "spawn")},
}
if Dataset is object:  # no torch: no rows
    ROWS = {}

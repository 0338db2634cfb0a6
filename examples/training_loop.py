"""A training loop whose workers collate each batch straight into shared memory.

    loader, 2 processes ──> ring ──> training

A worker reserves the room for a batch in the ring and stacks its images there. The parent
looks at the batch in place and copies it to its device, if that is a GPU; on a CPU the model
reads the ring. In between nothing is copied. A worker that is killed loses the batch that it
was writing, and no other.
"""

from __future__ import annotations

import multiprocessing

import torch

from shmring import Ring
from shmring.torch import tensor_over

WORKERS, BATCHES, BATCH = 2, 20, 32
SHAPE = (BATCH, 3, 32, 32)
NBYTES = BATCH * 8 + BATCH * 3 * 32 * 32  # the labels, then the images


def sample(generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A noisy image: bright, or dark."""
    label = int(torch.randint(2, (), generator=generator))
    noise = torch.randint(96, (3, 32, 32), dtype=torch.uint8, generator=generator)
    return noise + 64 * label, label


def load(ring: Ring, seed: int) -> None:
    """Collate batches into the ring."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(BATCHES):
        images, labels = zip(*(sample(generator) for _ in range(BATCH)), strict=True)
        with ring.reserve(NBYTES) as view:
            tensor_over(view[: 8 * BATCH], torch.int64).copy_(torch.tensor(labels))
            torch.stack(images, out=tensor_over(view[8 * BATCH :], torch.uint8, SHAPE))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, view: memoryview) -> float:
    """Train on the batch in place; returns the loss."""
    device = next(model.parameters()).device
    # On a GPU to() copies, and has read the view when it returns.
    labels = tensor_over(view[: 8 * BATCH], torch.int64).to(device)
    images = tensor_over(view[8 * BATCH :], torch.uint8, SHAPE).to(device)
    loss = torch.nn.functional.cross_entropy(model(images.float().flatten(1) / 128 - 1), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = torch.nn.Linear(3 * 32 * 32, 2).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    context = multiprocessing.get_context("spawn")  # a process that uses CUDA cannot fork
    with Ring.create(8 * NBYTES) as ring:
        workers = [context.Process(target=load, args=(ring, seed)) for seed in range(WORKERS)]
        for worker in workers:
            worker.start()
        losses = []
        for _ in range(WORKERS * BATCHES):
            with ring.peek(timeout=60, peers=workers) as view:
                losses.append(step(model, optimizer, view))
        for worker in workers:
            worker.join()
    print(f"{len(losses)} batches on {device.type}: loss {losses[0]:.2f}, then {losses[-1]:.2f}")


if __name__ == "__main__":
    main()

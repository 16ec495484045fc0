"""What one optimizer step learns from: which samples, and the gradients of their mean loss.

A step's samples may be shared between processes, and each share may be cut into pieces, one after the other, to save
memory. Neither changes the step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training.processes import sum_over_all, world_size


@dataclass
class Steps(Dataset):
    """Item i is what process `rank` of `world_size` learns from in step first + i: a list of `pieces` batches."""

    data: Callable[[range], dict[str, Tensor]]
    batch: int  # samples in a step, over all processes
    first: int
    end: int
    rank: int = 0
    world_size: int = 1
    pieces: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.world_size * self.pieces):
            pieces = f", in {self.pieces} pieces each" if self.pieces > 1 else ""
            raise ValueError(f"{self.batch} samples cannot be divided among {self.world_size} processes{pieces}")

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, i: int) -> list[dict[str, Tensor]]:
        if i >= len(self):
            raise IndexError(i)
        samples = range((self.first + i) * self.batch, (self.first + i + 1) * self.batch)
        mine = samples[self.rank :: self.world_size]  # they may be sorted by length, so each gets some of all lengths
        share = len(mine) // self.pieces
        return [self.data(mine[start : start + share]) for start in range(0, len(mine), share)]

    def loader(self, workers: int) -> DataLoader:
        """The items in order. `workers` processes prepare them while this one learns."""
        return DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=3 if workers else None)


def backward(
    objective: nn.Module,
    count: Callable[[dict[str, Tensor]], Tensor],
    batches: list[dict[str, Tensor]],
    device: str,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """Compute the gradients of the mean loss over one step, all pieces and processes included. Returns that loss.

    `objective` is a module of losses.py, perhaps inside a DistributedDataParallel, and `count` is the module's own.
    """
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    total = sum_over_all(torch.stack([count(batch).float() for batch in batches]).sum())
    whole = torch.zeros((), device=device)
    for batch in batches:
        with autocast():
            loss = objective(batch) / total
        # DistributedDataParallel takes the mean of the processes' gradients, and we want their sum. It averages again
        # after each piece; the mean of what is equal everywhere does not change it, so pieces give the same step.
        (loss * world_size()).backward()
        whole += loss.detach()
    return sum_over_all(whole)

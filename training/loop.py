"""The training loop. Resuming, logging, processes and pieces of a step are around it: run_stage.py and steps.py."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

LARGEST_NORM = 1.0  # of all gradients together: longer ones are shortened to it


def train(
    data: Iterable,
    backward: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    first: int = 0,
) -> Iterator[tuple[int, float]]:
    """Take one step for each batch of `data`, of which the first is step `first`.

    `backward(batch)` computes the gradients and returns the loss. Yields the number of steps taken so far and the last
    one's loss. Raises ValueError before a step whose loss or gradients are not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, batch in enumerate(data, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        loss = backward(batch)
        norm = nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        if not (loss.isfinite() and norm.isfinite()):
            raise ValueError(f"training diverged in step {step + 1} (loss {loss:.4g}): try a lower learning rate")
        optimizer.step()
        yield step + 1, loss.item()

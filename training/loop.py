"""The training loop. run_stage.py and steps.py add resuming, the log, processes and pieces of a step."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from training.processes import all_agree
from training.stages import Stage, learning_rate

LARGEST_NORM = 1.0  # of all gradients together: if it is larger, they are scaled down to it


def train(
    stage: Stage, data: Iterable, backward: Callable[..., Tensor], optimizer: torch.optim.Optimizer, first: int = 0
) -> Iterator[tuple[int, float]]:
    """Take a step for each batch of `data`, of which the first is that of step `first`.

    `backward(batch)` computes the gradients and returns the loss. Yields the number of steps taken so far and the loss
    of the last one. Raises ValueError before a step whose loss or gradients are not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, batch in enumerate(data, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage, group.get("highest"))
        optimizer.zero_grad()
        loss = backward(batch)
        norm = nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        stop_if_diverged(stage, step + 1, "loss", [loss])
        stop_if_diverged(stage, step + 1, "norm of the gradients", [norm])
        optimizer.step()
        yield step + 1, loss.item()


def stop_if_diverged(stage: Stage, step: int, what: str, tensors: list[Tensor]) -> None:
    """Raise ValueError, in all processes together, if a number in these tensors is not finite in one of them."""
    if not all_agree(all(bool(tensor.isfinite().all()) for tensor in tensors), tensors[0].device):
        raise ValueError(
            f"{stage.name} diverged: the {what} of step {step} is not finite, so no model is written. Choose a lower "
            "learning rate (--lr with --data, else in training/stages.py) and another --out"
        )

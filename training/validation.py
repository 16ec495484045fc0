"""The loss on records that are held back from training: it rises when a model learns its records by heart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.loop import stop_if_diverged
from training.processes import rank, sum_over_all, world_size
from training.stages import Stage


@dataclass
class Validation:
    stage: Stage
    data: Callable[[range], dict[str, Tensor]]  # the batch of some of the records
    records: int
    batch: int  # records in a forward pass

    @torch.no_grad()
    def loss(self, objective: nn.Module, place, step: int) -> float:
        """The mean over all labels of all records after `step` steps; the same in every process.

        `place`: a run_stage.Place. Raises ValueError if it is not finite.
        """
        decoder = objective.model.language_model
        decoder.eval()  # without dropout, which only the decoder can have
        total, share = torch.zeros(2, dtype=torch.float64, device=place.device), world_size() * self.batch
        for start in range(0, self.records, share):
            mine = range(start + rank(), min(start + share, self.records), world_size())
            # A process without a record left still takes part: the weights may be divided over all processes.
            batch = {name: tensor.to(place.device) for name, tensor in self.data(mine or range(1)).items()}
            with place.autocast():
                loss = objective(batch)
            if mine:
                total += torch.stack([loss.double(), objective.count(batch).double()])
        decoder.train()
        if place.shard:
            objective.reshard()  # else the gathered weights are kept for a backward pass
        loss, count = sum_over_all(total)
        stop_if_diverged(self.stage, step, "validation loss", [loss / count])
        return (loss / count).item()

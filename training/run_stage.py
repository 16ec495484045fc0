"""One stage: the loop, with what learns, resuming an interrupted run, log.csv and processes around it."""

import logging
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hub.device import fast_dtype
from llava import LlavaForConditionalGeneration
from training.attention import use_training_attention
from training.loop import stop_if_diverged, train
from training.losses import ContrastiveLoss
from training.processes import rank, world_size
from training.progress import Log
from training.recompute import recompute_layers
from training.stages import Stage
from training.steps import Steps, backward
from training.validation import Validation


@dataclass
class Place:
    """Where and how a run happens: its folder, its device, its share of the work."""

    folder: Path
    device: str = "cpu"
    source: str = "the emoji world"  # what it learns from: an interrupted run resumes only with the same source
    accumulate: int = 1  # pieces of a step, one after the other, to save memory
    workers: int = 0  # processes that prepare batches
    save_every: int = 100  # steps
    compile: bool = False  # torch.compile: faster steps after some minutes of compiling in each stage
    recompute: bool = False  # compute the decoder layers' activations twice instead of keeping them, to save memory
    shard: bool = False  # each process holds its own part of the model (shard.py)

    @property
    def start(self) -> str:  # where a model is loaded: it is divided from there, a layer at a time
        return "cpu" if self.shard else self.device

    def autocast(self) -> AbstractContextManager:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if fast_dtype(self.device) == torch.bfloat16 else nullcontext()

    def steps(self, stage: Stage, data: Callable[[range], dict[str, Tensor]] | None, first: int = 0) -> Steps:
        """This process's share of a stage. Raises ValueError if the samples cannot be divided equally."""
        # The contrastive loss compares all samples of a batch with each other, so it is not cut into pieces.
        pieces = 1 if stage.loss is ContrastiveLoss else self.accumulate
        return Steps(data, stage.batch, first, stage.steps, rank(), world_size(), pieces)


def run_stage(
    stage: Stage,
    model: LlavaForConditionalGeneration,
    data: Callable[[range], dict[str, Tensor]],
    place: Place,
    validation: Validation | None = None,
) -> None:
    """Train one stage, or the rest of it. Logs to log.csv (progress.py).

    Every place.save_every steps, and at the end, validates and saves to NAME.pt; it also validates before the start.
    """
    objective, optimizer, saved = prepare(stage, model, place)
    first, losses = saved.load()
    log = Log(stage, place.folder / "log.csv", first, quiet=rank() > 0, losses=losses)
    if first == stage.steps:
        return
    if place.compile:
        torch._logging.set_logs(dynamo=logging.ERROR)  # it warns at length that it cannot compile int(sum)
        objective.compile(dynamic=True)
    parallel = DistributedDataParallel(objective) if dist.is_initialized() and not place.shard else objective
    batches = place.steps(stage, data, first).loader(place.workers)
    gradients = partial(backward, parallel, objective.count, device=place.device, autocast=place.autocast)
    if first and parallel is not objective:
        # DistributedDataParallel orders its buffers in its first backward pass, and the order decides how sums of three
        # and more processes are rounded. So the first pass of a resumed run is that of the whole run, without a step.
        gradients(place.steps(stage, data)[0])
    if validation and not first:
        log.validated(0, validation.loss(objective, place, 0))
    for done, loss in train(stage, log.counted(batches), gradients, optimizer, first):
        log.add(done, loss)
        if done % place.save_every == 0 or done == stage.steps:
            if validation:
                log.validated(done, validation.loss(objective, place, done))
            saved.save(done, log.losses)  # after the log, so that the log of what is saved is complete


def prepare(stage: Stage, model: LlavaForConditionalGeneration, place: Place) -> tuple:
    """The loss with the model in it, an optimizer of what learns, and the stage's Saved or SavedParts."""
    objective = stage.loss(model).to(place.start).train()
    use_training_attention(objective)
    if place.recompute:
        recompute_layers(model)
    learning = choose_parameters(objective, stage.trainable)
    if place.shard:
        from training.shard import SavedParts, shard

        learning = shard(objective, place.device)
    optimizer = torch.optim.AdamW(groups(learning, stage), lr=stage.lr, betas=stage.betas, weight_decay=0.0, fused=True)
    saved = Saved(stage, objective, optimizer, place)
    return objective, optimizer, SavedParts(saved) if place.shard else saved


def choose_parameters(objective: nn.Module, trainable: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze all parameters of the model but the trainable parts. The loss's own parameters always learn."""
    for name, parameter in objective.named_parameters():
        of_the_loss = not name.startswith("model.")
        parameter.requires_grad_(of_the_loss or any(part in name for part in trainable))
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}


def groups(learning: dict[str, nn.Parameter], stage: Stage) -> list[dict]:
    """The parameters that learn at the stage's rate, and those that learn at the projector's own."""
    if stage.projector_lr is None:
        return [{"params": list(learning.values())}]
    projector = [name for name in learning if "multi_modal_projector" in name]
    rates = (stage.lr, [name for name in learning if name not in projector]), (stage.projector_lr, projector)
    return [{"params": [learning[name] for name in names], "highest": rate} for rate, names in rates]


class Saved:
    """The file NAME.pt of a stage: how many steps were taken, and the weights and the optimizer after them."""

    def __init__(self, stage: Stage, objective: nn.Module, optimizer: torch.optim.Optimizer, place: Place):
        self.stage, self.objective, self.optimizer, self.device = stage, objective, optimizer, place.device
        self.learning = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.left_out = set() if stage.saves_frozen else objective.state_dict().keys() - self.learning.keys()
        self.file = place.folder / f"{stage.name}.pt"
        self.settings = f"{stage.steps} steps of {stage.batch} at {stage.lr}, from {place.source}"
        place.folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> tuple[int, list[float]]:
        """Restore what the file holds; returns the number of steps taken, and the losses since the log's last row.

        Raises ValueError if the file belongs to a run with other settings, or is damaged.
        """
        remedy = "delete it, or choose another --out"
        if (parts := self.file.with_suffix(".parts")).is_dir():
            raise ValueError(f"{parts} belongs to a run with --shard: {remedy}")
        if not self.file.is_file():
            return 0, []
        try:
            state = torch.load(self.file, map_location=self.device, weights_only=True)
            if (settings := state["settings"]) == self.settings:
                frozen = {name: self.objective.state_dict()[name] for name in self.left_out}
                self.objective.load_state_dict(state["objective"] | frozen)
                self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.file} cannot be resumed ({type(error).__name__}): {remedy}") from error
        if settings != self.settings:
            raise ValueError(f"{self.file} belongs to another run ({settings}): {remedy}")
        if rank() == 0:
            print(f"{self.stage.name}: resumes after step {state['step']} of {self.stage.steps}, from {self.file}")
        return state["step"], state.get("losses", [])

    def weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.objective.state_dict().items() if name not in self.left_out}

    def save(self, step: int, losses: list[float]) -> None:
        """Replace the file. Raises ValueError, and keeps the old one, if a number is not finite."""
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        stop_if_diverged(self.stage, step, "result", [*self.weights().values(), *moments])
        if rank() == 0:
            state = {"objective": self.weights(), "optimizer": self.optimizer.state_dict()}
            state |= {"step": step, "settings": self.settings, "losses": losses}
            torch.save(state, self.file.with_suffix(".new"))
            self.file.with_suffix(".new").replace(self.file)

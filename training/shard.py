"""`train.py --shard`: the model divided over the processes, for models that one device cannot hold.

PyTorch's fully_shard (FSDP2) cuts each parameter along its first dimension, and each process keeps its own rows, their
gradients and their optimizer state. Before a layer runs, in the forward and in the backward pass, the processes gather
its rows, and drop those of others afterwards. Each process still learns from its own share of the samples, and the sum
over the processes is the same as without --shard, so the losses are too. A group is gathered at once: each layer of the
decoder is one, and all else (tower, projector, embedding, head) is another, which stays whole during a step. So it does
not matter that a process without a picture in its samples never runs the tower.

Numbers in int8 and int4 are parameters that do not learn, and are divided like the others: by rows.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hub.files import file_errors_as_value_error
from hub.writer import write_json
from training.loop import stop_if_diverged
from training.processes import rank, wait_for_all, world_size


def shard(objective: nn.Module, device: str) -> dict[str, nn.Parameter]:
    """Divide a loss and its model, which are on the CPU, over the devices of all processes, a layer at a time.

    Returns the parameters that learn, each a DTensor that holds this process's rows. They are then in float32, even
    those that were mapped from a file in 16 bits.
    """
    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    for module in (*objective.model.language_model.layers, objective):
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        fully_shard(module.to(device), mesh=mesh)
    objective.model.language_model.register_forward_pre_hook(with_gradient)
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}


def with_gradient(decoder: nn.Module, args: tuple) -> tuple:
    """The decoder's arguments, the first of which, the vectors (B, T, D), requires a gradient.

    Otherwise, if all that precedes the decoder is frozen and there is no picture, autograd would not reach the end of
    the first layer's backward pass, and this process would send gradients in another order than those with a picture.
    """
    x, *others = args
    return (x if x.requires_grad else x.detach().requires_grad_(), *others)


def make_whole(model: nn.Module, frozen: bool) -> None:
    """Gather what learnt, and with `frozen` all else, in process 0 on the CPU. The model can then be saved, not run."""
    whole = {}  # a shared parameter has several names, and stays shared
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not (frozen or parameter.requires_grad):
            continue
        if parameter not in whole:
            full = parameter.full_tensor()  # all processes take part, one parameter at a time
            whole[parameter] = nn.Parameter(full.detach().cpu()) if rank() == 0 else None
        if rank() == 0:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, whole[parameter])


class SavedParts:
    """The folder NAME.parts of a stage: what run_stage.Saved is without --shard, written and read by all processes.

    step-100/ has a safetensors file from each process, and run.json, which is written last: without it the folder is
    not complete. Another number of processes can read the same files.
    """

    def __init__(self, saved):  # a run_stage.Saved
        self.saved, self.folder = saved, saved.file.with_suffix(".parts")
        self.remedy = "delete it, or choose another --out"

    def load(self) -> tuple[int, list[float]]:
        """Restore the newest complete step; returns what Saved.load does, and raises ValueError as it does."""
        if self.saved.file.is_file():
            raise ValueError(f"{self.saved.file} belongs to a run without --shard: {self.remedy}")
        if not (steps := self.complete()):
            return 0, []
        folder = self.folder / f"step-{max(steps)}"
        settings, files, losses = steps[max(steps)]
        if settings != self.saved.settings:
            raise ValueError(f"{self.folder} belongs to another run ({settings}): {self.remedy}")
        if files != len(list(folder.glob("*.safetensors"))):  # rows that are missing would stay what they were
            raise ValueError(f"{folder} should have {files} files of weights: {self.remedy}")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with file_errors_as_value_error(folder):  # dcp.load would print a traceback
            reader.read_metadata()
        for parameter in self.saved.learning.values():  # AdamW makes its state in its first step
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            taken = torch.tensor(float(max(steps)), device=self.saved.device)
            self.saved.optimizer.state[parameter] = {"step": taken, **moments}
        self.in_all(lambda: dcp.load(self.tensors(), storage_reader=reader), folder)
        if rank() == 0:
            stage = self.saved.stage
            print(f"{stage.name}: resumes after step {max(steps)} of {stage.steps}, from {folder}")
        return max(steps), losses

    def save(self, step: int, losses: list[float]) -> None:
        """Write step-N, and delete what it replaces. Raises ValueError if a number is not finite."""
        tensors, folder = self.tensors(), self.folder / f"step-{step}"
        stop_if_diverged(self.saved.stage, step, "result", [tensor.to_local() for tensor in tensors.values()])
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        wait_for_all()
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        self.in_all(lambda: dcp.save(tensors, storage_writer=writer), folder)
        if rank() == 0:
            files = len(list(folder.glob("*.safetensors")))
            state = {"step": step, "settings": self.saved.settings, "files": files, "losses": losses}
            write_json(folder / "run.new", state)
            (folder / "run.new").rename(folder / "run.json")
            for old in self.folder.glob("step-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    def complete(self) -> dict[int, tuple[str, int, list[float]]]:
        """The settings, the number of files and the losses since the last row of the log, of each complete step."""
        found = {}
        for file in self.folder.glob("step-*/run.json"):
            try:
                state = json.loads(file.read_text("utf-8"))
                found[int(state["step"])] = state["settings"], state["files"], state["losses"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{file} is damaged: {self.remedy}") from error
        return found

    def tensors(self) -> dict[str, Tensor]:
        """This process's rows of what NAME.pt holds: weights, and the optimizer's two moments of what learns."""
        moments = {
            f"optimizer.{moment}.{name}": self.saved.optimizer.state[parameter][moment]
            for name, parameter in self.saved.learning.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        weights = dict(self.saved.objective.named_parameters())  # a shared parameter once
        return {name: p for name, p in weights.items() if name not in self.saved.left_out} | moments

    def in_all(self, work: Callable[[], None], folder: Path) -> None:
        """Read or write in all processes. An error in one of them is a ValueError in all."""
        try:
            work()
        except CheckpointException as error:
            _, (why, _) = next(iter(error.failures.items()))
            if isinstance(why, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            what = f"{folder} cannot be read or written ({type(why).__name__})"
            raise ValueError(f"{what}: {self.remedy}") from error

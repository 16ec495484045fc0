"""Small files that keep what a stage changed, so that evaluation/ can go back to the model after an earlier stage."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hub.writer import check_finite, replaced_files, write_tensors

# The title of a stage -> its file's stem in the folder stages/; None for the finished model, which has all tensors.
STAGE_FILES = {"before alignment": "before-alignment", "after alignment": "after-alignment", "after tuning": None}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def save_stage(then: dict[str, Tensor], other: dict[str, Tensor], file: Path) -> None:
    """Write the tensors of `then` that differ from those of `other`, in bfloat16. ValueError if one is not finite."""
    changed = {name: tensor for name, tensor in then.items() if not torch.equal(tensor, other[name])}
    changed = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in changed.items()}
    check_finite(changed)
    with replaced_files(file.parent) as scratch:
        write_tensors(changed, scratch / file.name)


def load_stage(model: nn.Module, final: dict[str, Tensor], folder: Path, name: str | None) -> None:
    """Give the model the weights that it had after a stage: a value of STAGE_FILES.

    before-alignment holds what differs from the finished model, and after-alignment what differs from before-alignment.
    Raises ValueError if a file holds a tensor that the model does not have.
    """
    model.load_state_dict(final)
    for stem in dict.fromkeys(("before-alignment", name)) if name else ():
        file = folder / f"{stem}.safetensors"
        if unknown := model.load_state_dict(load_file(file), strict=False).unexpected_keys:
            raise ValueError(f"{file} is not of this model, which has no tensor {unknown[0]}")

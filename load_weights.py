"""Checkpoints: from the files in a folder to a model's parameters.

A safetensors file is 8 bytes with the length of a header, the header (JSON: dtype, shape and place of each tensor), and
then the numbers. It is mapped into memory: a tensor is a view of the file, read from the disk when it is first used.
Changing a parameter does not change the file. But changing the file changes the parameters, and a file cut short under
a running program kills it: to replace a checkpoint, rename new files over the old ones.

The same tensor has different names in the hub's files, in those of newer releases of transformers and in those of
LLaVA's authors; RENAME turns all of them into ours. Loading is strict: a tensor that is missing, unknown, given twice,
of another shape or not a floating-point number is an error that names it. hub/writer.py goes the other way.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hub.device import DTYPES
from hub.files import read_json, tower_folder, weight_files

# A prefix in a file and its replacement. All are tried in this order, so a name can be changed twice.
RENAME = [
    ("model.language_model.", "language_model."),  # transformers in memory
    ("model.vision_tower.vision_tower.", "vision_tower."),  # LLaVA's authors
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("language_model.lm_head.", "lm_head."),  # the hub's files
    ("language_model.model.", "language_model."),
    ("model.", "language_model."),  # a decoder on its own
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_model.", "vision_tower."),  # a CLIP on its own
]
IGNORE = (".position_ids", ".inv_freq")  # tables that are computed, not learned


def our_name(name: str) -> str:
    for prefix, ours in RENAME:
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    return name


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds tensors and nothing else, mapped into memory."""
    try:
        if file.suffix != ".bin":
            with safe_open(file, framework="pt", device="cpu") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{file} is truncated or not a safetensors file ({why})") from error
    except Exception as error:  # torch.load raises half a dozen kinds
        raise ValueError(f"{file} is broken, or holds more than tensors and is not read for safety") from error
    if not isinstance(tensors, dict) or {type(value) for item in tensors.items() for value in item} != {str, Tensor}:
        raise ValueError(f"{file} does not hold tensors by name")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}  # a pickle keeps strides, too


def match(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors by the model's names, and a sentence for each one that does not fit the model."""
    wanted = dict(model.named_parameters())
    tied = set(dict(model.named_parameters(remove_duplicate=False))) - set(wanted)  # second names of a tensor
    stored = [(file, *item) for file in weight_files(folder) for item in read_tensors(file).items()]
    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config and not any(".vision_tower." in name for _, name, _ in stored):
        for file in weight_files(tower_folder(config, folder)):
            stored += [(file, *item) for item in read_tensors(file).items() if item[0].startswith("vision_model.")]
    found, sources, mismatches = {}, {}, []
    for file, stored_name, tensor in stored:
        name, where = our_name(stored_name), f"tensor {stored_name} in {file}"
        if name not in wanted:
            if name not in tied and not stored_name.endswith(IGNORE):
                mismatches.append(f"{where} is unknown")
            continue
        if name in found:
            mismatches.append(f"{where} is also in {sources[name]}")
        elif tensor.dtype not in DTYPES:
            mismatches.append(f"{where} is {tensor.dtype}, not floating-point numbers")
        elif tensor.shape != wanted[name].shape:
            mismatches.append(f"{where} is {list(tensor.shape)}, but config.json makes it {list(wanted[name].shape)}")
        found[name], sources[name] = tensor, file
    return found, mismatches + [f"tensor {name} is missing in {folder}" for name in wanted if name not in found]


def load(model: nn.Module, folder: Path) -> None:
    """Give a model that was built on the meta device the tensors of a checkpoint, mapped, in the files' own dtypes.

    Tied parameters are the caller's to tie again. Raises ValueError, naming the tensor, if anything does not fit.
    """
    found, mismatches = match(model, folder)
    if mismatches:
        more = f" ({len(mismatches)} tensors do not fit)" if len(mismatches) > 1 else ""
        raise ValueError(mismatches[0] + more)
    names: dict[Tensor, str] = {}  # tied parameters are one tensor with two names: a file needs only the first
    for name, parameter in model.named_parameters():
        names[parameter] = name
    every_name = model.named_parameters(remove_duplicate=False)
    model.load_state_dict({name: found[names[parameter]] for name, parameter in every_name}, assign=True)

"""Checkpoints: from the files in a folder to a model's parameters.

A tensor's name differs between the hub's files, those of newer releases of transformers and those of LLaVA's authors;
RENAME turns all of them into ours. Loading is strict: a tensor that is missing, unknown, given twice,
of another shape or kind of dtype is an error that names it. hub/writer.py goes the other way.

A safetensors file is 8 bytes with the length of a header, the header (JSON: dtype, shape and place of each tensor), and
then the numbers. It is mapped into memory: a tensor is a view of the file, read from the disk when it is first used.
Changing a parameter does not change the file. But changing the file changes the parameters, and truncating it crashes
the process: to replace a checkpoint, rename new files over the old ones.
"""

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from hub.files import file_errors_as_value_error, read_pickle, tensor_files
from hub.tensors import DTYPES

# A prefix in a file and its replacement. All are tried in this order, so a name can be changed twice:
# model.vision_tower.vision_tower.vision_model.x -> vision_tower.vision_model.x -> vision_tower.x
RENAME = [
    ("model.vision_tower.vision_tower.", "vision_tower."),  # LLaVA's authors
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.language_model.", "language_model."),  # newer releases of transformers
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("language_model.lm_head.", "lm_head."),  # the hub's files
    ("language_model.model.", "language_model."),
    ("model.image_newline", "image_newline"),  # LLaVA-1.6
    ("model.", "language_model."),  # the decoder in LLaVA's authors' files, or on its own
    ("vision_tower.vision_model.", "vision_tower."),  # in the files of the hub and of the authors
    ("vision_model.", "vision_tower."),  # a CLIP on its own
]
IGNORE = (".position_ids", ".inv_freq", ".weight_shape")  # positions, frequencies, shapes: known from config.json


def our_name(name: str) -> str:
    for prefix, ours in RENAME:
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    return name


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names there, mapped into memory. Raises ValueError for a damaged file."""
    if file.suffix == ".bin":
        return read_pickle(file)
    with file_errors_as_value_error(file), safe_open(file, framework="pt", device="cpu") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Each tensor of a checkpoint: our name for it, its name and file for error messages, and the tensor."""
    for file, prefix in tensor_files(folder):  # "vision_model." skips the text encoder of a whole CLIP; else ""
        for name, tensor in read_tensors(file).items():
            if name.startswith(prefix) and not name.endswith(IGNORE):
                yield our_name(name), f"tensor {name} in {file}", tensor


def mismatch(tensor: Tensor, parameter: nn.Parameter) -> str | None:
    """Why a tensor does not fit a parameter, or None if it does."""
    real = parameter.is_floating_point()  # other parameters hold numbers packed by quantize.py
    if tensor.dtype not in (DTYPES if real else [parameter.dtype]):
        return f"is {tensor.dtype}, not {'floating-point numbers' if real else parameter.dtype}"
    if tensor.shape != parameter.shape:
        return f"is {list(tensor.shape)}, but config.json makes it {list(parameter.shape)}"
    return None


def match(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors by the model's names, and a sentence for each one that does not fit the model."""
    wanted = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - wanted  # second names of shared parameters
    found, places, mismatches = {}, {}, []
    for name, where, tensor in stored_tensors(folder):
        if name in tied:  # it is loaded under its first name, and tie_weights shares it again
            continue
        if name not in wanted:
            mismatches.append(f"{where} is unknown")
            continue
        if name in found:
            mismatches.append(f"{where} is given twice: {places[name]} has the same place in the model")
        if why := mismatch(tensor, wanted[name]):
            mismatches.append(f"{where} {why}")
        found[name], places[name] = tensor, where  # even if it does not fit: it is not missing
    return found, mismatches + [f"tensor {name} is missing in {folder}" for name in wanted if name not in found]


def load(model: nn.Module, folder: Path) -> None:
    """Replace the meta parameters of a model by a checkpoint's tensors, memory-mapped and in their stored dtypes.

    A shared parameter is no longer shared afterwards: call tie_weights. Tensors of a pickle are copied if they are not
    contiguous. Raises ValueError, naming the tensor, if anything does not fit.
    """
    found, mismatches = match(model, folder)
    if mismatches:
        more = f" ({len(mismatches)} tensors do not fit)" if len(mismatches) > 1 else ""
        raise ValueError(mismatches[0] + more)
    found = {name: tensor.contiguous() for name, tensor in found.items()}
    model.load_state_dict(found, strict=False, assign=True)  # only second names of shared parameters are absent

"""Checkpoints: from a folder of files to a model's tensors.

A safetensors file is 8 bytes that give the length of a header, the header (JSON: each tensor's dtype, shape and place),
and then the numbers. So a tensor can be read straight into the memory where the model wants it, one after the other.

The same tensor goes by different names: those of the hub's files, those that newer releases of transformers write, and
those of LLaVA's authors. RENAME turns all of them into ours. Loading is strict: a tensor that is missing, unknown,
given twice, of another shape or not a floating-point number is an error that names it.

`python load_weights.py FOLDER` says what a checkpoint is without reading its weights.

Left out: quantized checkpoints and LoRA adapters. The way back, from a model to a folder, is in save_checkpoint.py.
"""

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import DTYPES, read_settings, take_memory, tower_folder, weight_files
from quantize import put_int8, read_int8

# A prefix in a file, and what it becomes. All are tried in this order, so that a name can be changed twice.
RENAME = [
    ("model.language_model.", "language_model."),  # transformers in memory
    ("model.vision_tower.vision_tower.", "vision_tower."),  # LLaVA's authors
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("language_model.lm_head.", "lm_head."),  # the hub's files
    ("language_model.model.", "language_model."),
    ("model.", "language_model."),  # a decoder by itself
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_model.", "vision_tower."),  # a CLIP by itself
]
IGNORE = (".position_ids", ".inv_freq")  # tables that are computed, not learned


def our_name(name: str) -> str:
    for prefix, ours in RENAME:
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    return name


class StoredTensor(NamedTuple):
    """A tensor in a file: known, not yet read."""

    file: Path
    name: str  # as the file spells it
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[Tensor], object]  # into memory of the same shape


def tensors_in(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file, or of a pickle that holds tensors and nothing else."""
    if file.suffix != ".bin":
        yield from tensors_in_safetensors(file)
        return
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds here
        raise ValueError(f"{file} is broken, or holds more than tensors and is not read for safety") from error
    if not isinstance(tensors, dict) or {type(value) for item in tensors.items() for value in item} != {str, Tensor}:
        raise ValueError(f"{file} does not hold tensors by name")
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        dtype, shape = names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
        yield StoredTensor(file, name, dtype, shape, lambda into, tensor=tensor: into.copy_(tensor))


def tensors_in_safetensors(file: Path) -> Iterator[StoredTensor]:
    """Check a safetensors header against the file's size, then yield its tensors in the order of their bytes."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))
        if 8 + length > min(size, 100_000_000):
            raise ValueError(f"{file} is truncated or not a safetensors file")
        try:
            entries = []
            for name, entry in json.loads(f.read(length)).items():
                if name != "__metadata__":
                    start, end = map(int, entry["data_offsets"])
                    entries.append((start, end, name, str(entry["dtype"]), tuple(map(int, entry["shape"]))))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{file} has a broken header") from error
    place = 0
    for start, end, name, dtype, shape in sorted(entries):
        width = DTYPES[dtype].itemsize if dtype in DTYPES else None
        if start != place or end < start or min(shape, default=0) < 0 or (width and end - start != prod(shape) * width):
            raise ValueError(f"{file} has a broken header: tensor {name} lies at bytes {start} to {end}")
        place = end
        yield StoredTensor(file, name, dtype, shape, partial(read_tensor, file, 8 + length + start, dtype, shape))
    if 8 + length + place != size:
        raise ValueError(f"{file} is truncated or too long: {size} bytes, but its header says {8 + length + place}")


def read_tensor(file: Path, offset: int, dtype: str, shape: tuple[int, ...], into: Tensor) -> None:
    """Into the tensor's own memory where dtypes agree (a memory map would stay beside it), else by way of a copy."""
    direct = into.dtype == DTYPES[dtype] and into.device.type == "cpu"
    tensor = into if direct else torch.empty(shape, dtype=DTYPES[dtype])
    with open(file, "rb") as f:
        f.seek(offset)
        if f.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:
            raise ValueError(f"{file} is truncated")
    if not direct:
        into.copy_(tensor)


def named_parts(model: nn.Module, keep_tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by a checkpoint's names: for each part of a FusedLinear a view of its rows."""
    for name, parameter in model.named_parameters(remove_duplicate=not keep_tied):
        module, _, leaf = name.rpartition(".")
        if parts := getattr(model.get_submodule(module), "parts", None):
            stem = module.rpartition(".")[0]
            for part, rows in zip(parts, parameter.split(tuple(parts.values())), strict=True):
                yield f"{stem}.{part}.{leaf}", rows
        else:
            yield name, parameter


def survey(model: nn.Module, folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Match a checkpoint's tensors with a model's: our name -> stored tensor, and a sentence for each misfit."""
    wanted = dict(named_parts(model))
    tied = set(dict(named_parts(model, keep_tied=True))) - set(wanted)  # a second name of a tensor already there
    config = read_settings(folder / "config.json")
    stored = [tensor for file in weight_files(folder) for tensor in tensors_in(file)]
    if "mm_vision_tower" in config and not any(".vision_tower." in tensor.name for tensor in stored):
        for file in weight_files(tower_folder(config, folder)):
            stored += (tensor for tensor in tensors_in(file) if tensor.name.startswith("vision_model."))
    found, misfits = {}, []
    for tensor in stored:
        name, where = our_name(tensor.name), f"tensor {tensor.name} in {tensor.file}"
        if name in found:
            misfits.append(f"{where} is also in {found[name].file}")
        elif name not in wanted:
            if name not in tied and not tensor.name.endswith(IGNORE):
                misfits.append(f"{where} is unknown")
            continue
        elif tensor.dtype not in DTYPES:
            misfits.append(f"{where} is {tensor.dtype!r}, not floating-point numbers")
        elif tensor.shape != wanted[name].shape:
            misfits.append(f"{where} is {list(tensor.shape)}, but config.json makes it {list(wanted[name].shape)}")
        found[name] = tensor
    return found, misfits + [f"tensor {name} is missing in {folder}" for name in wanted if name not in found]


@torch.no_grad()
def load(
    model: nn.Module, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu", quantize: str | None = None
) -> None:
    """Fill a model that was built on the meta device, tensor by tensor; `dtype` is the first tensor's unless given.

    With `quantize`, "int8", the decoder's matrices are rounded as they come. Memory peaks at the model and the largest
    tensor.
    Tied tensors are the caller's to tie again. Raises ValueError, naming the tensor, where anything does not fit.
    """
    found, misfits = survey(model, folder)
    if misfits:
        raise ValueError(misfits[0] + (f" ({len(misfits)} tensors do not fit)" if len(misfits) > 1 else ""))
    total, done, start = sum(prod(tensor.shape) for tensor in found.values()), 0, time.monotonic()
    dtype = dtype or DTYPES[next(iter(found.values())).dtype]
    if quantize:
        put_int8(model, quantize)
    take_memory(model.to(dtype), device)
    places = dict(named_parts(model))
    for name, tensor in found.items():
        if name in places:
            tensor.read(places[name])
        else:
            read_int8(tensor, *(places[name.removesuffix("weight") + leaf] for leaf in ("q", "scale")))
        done += prod(tensor.shape)
        if sys.stderr.isatty() and time.monotonic() - start > 1:
            end = "\n" if done == total else ""
            print(f"\rLoading {total / 1e9:.1f} billion weights: {done / total:4.0%}", end=end, file=sys.stderr)


if __name__ == "__main__":
    from command import describe_checkpoint

    sys.exit(describe_checkpoint())

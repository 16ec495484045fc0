"""Checkpoints: from a folder of files to a model's tensors.

A safetensors file is 8 bytes that give the length of a header, the header (JSON: each tensor's dtype, shape and place),
and then the numbers. So a tensor can be read straight into the memory where the model wants it, one after the other.

The same tensor goes by different names: those of the hub's files, those that newer releases of transformers write, and
those of LLaVA's authors. RENAME turns all of them into ours. Loading is strict: a tensor that is missing, unknown,
doubled, of another shape or not a floating-point number is an error that names it.

`python load_weights.py FOLDER` says what a checkpoint is without reading its weights.

Left out: quantized checkpoints and LoRA adapters. The way back, from a model to a folder, is in save_checkpoint.py.
"""

import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenizer import read_settings

# A prefix in a file, and what it becomes; tried in this order, each once.
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
# Tables that are computed, not learned, and the half of CLIP that reads text.
IGNORE = re.compile(r"\.(position_ids|inv_freq)$|^(text_model\.|text_projection|visual_projection|logit_scale)")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def our_name(name: str) -> str:
    for prefix, ours in RENAME:
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    return name


# --- Finding and describing ------------------------------------------------------------------------------------------


def find_checkpoint(path: str | Path) -> Path:
    """A folder as it is; a hub id such as llava-hf/llava-1.5-7b-hf from the local hub cache, or fetched into it."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path} is neither a folder nor a hub id such as llava-hf/llava-1.5-7b-hf")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser() / f"models--{str(path).replace('/', '--')}"
    if (cache / "refs" / "main").is_file():
        snapshot = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
        if (snapshot / "config.json").is_file():
            return snapshot
    try:
        from huggingface_hub import snapshot_download

        files = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.bin"]
        return Path(snapshot_download(str(path), allow_patterns=files))
    except Exception as error:  # not installed, no network, no such id: to the user it is all the same
        get = f"pip install huggingface_hub && hf download {path}"
        raise FileNotFoundError(f"{path} is not in the local hub cache; get it with: {get}") from error


def read_config(folder: Path) -> dict:
    """config.json in the hub's form, whichever form it is in; FileNotFoundError or ValueError if it is not usable."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a checkpoint")
    config = read_settings(folder / "config.json")
    if "mm_vision_tower" in config:
        return hub_config(config, folder)
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part, {}), dict):
            raise ValueError(f"{folder / 'config.json'}: {part} is not a JSON object")
    if config.get("model_type", "llava") != "llava" or "text_config" not in config:
        raise ValueError(f"{folder / 'config.json'} describes a model of type {config.get('model_type')}, not a LLaVA")
    return config


def hub_config(config: dict, folder: Path) -> dict:
    """The config.json of LLaVA's authors, which is the decoder's with additions, in the hub's form."""
    kind = config.get("mm_projector_type", "linear"), config.get("image_aspect_ratio", "square")
    if kind[0] != "mlp2x_gelu" or kind[1] not in ("pad", "square"):
        raise ValueError(f"{folder} has projector {kind[0]} and pictures cut {kind[1]}: it is no LLaVA-1.5")
    tower = read_settings(tower_folder(config, folder) / "config.json")
    return {
        "vision_config": tower.get("vision_config", tower),
        "text_config": {**config, "model_type": "mistral" if "mistral" in config.get("model_type", "") else "llama"},
        "image_token_index": config.get("vocab_size", 32000),  # the id after the last: it has no row of its own
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": {"cls_patch": "full"}.get(config.get("mm_vision_select_feature"), "default"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "torch_dtype": config.get("torch_dtype"),
    }


def tower_folder(config: dict, folder: Path) -> Path:
    tower = config["mm_vision_tower"]
    return folder / tower if (folder / tower).is_dir() else find_checkpoint(tower)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one, or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_settings(index).get("weight_map")
            shards = set(shards.values()) if isinstance(shards, dict) else {None}
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise ValueError(f"{index} does not map tensors to files of its own folder")
            files = [folder / shard for shard in sorted(shards)]
        else:
            files = [folder / name]
        if index.is_file() or files[0].is_file():
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, and {index.name} names it")
            return files
    raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin is there")


class StoredTensor(NamedTuple):
    """A tensor in a file: known, not yet read."""

    file: Path
    name: str  # as the file spells it
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    return tensors_of_pickle(file) if file.suffix == ".bin" else tensors_of_safetensors(file)


def tensors_of_pickle(file: Path) -> Iterator[StoredTensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds here
        raise ValueError(f"{file} is broken, or holds more than tensors and is not read for safety") from error
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        yield StoredTensor(file, name, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.clone)


def tensors_of_safetensors(file: Path) -> Iterator[StoredTensor]:
    """Check a safetensors header against the file's size, then yield its tensors in the order of their bytes."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))
        if 8 + length > min(size, 100_000_000):
            raise ValueError(f"{file} is truncated or not a safetensors file")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            entries = [
                (*map(int, entry["data_offsets"]), name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for name, entry in header.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} has a broken header") from error
    place = 0
    for start, end, name, dtype, shape in sorted(entries):
        width = DTYPES[dtype].itemsize if dtype in DTYPES else None
        if start != place or end < start or min(shape, default=0) < 0 or (width and end - start != prod(shape) * width):
            raise ValueError(f"{file} has a broken header: tensor {name} lies at bytes {start} to {end}")
        place = end
        yield StoredTensor(file, name, dtype, shape, reader(file, 8 + length + start, dtype, shape))
    if 8 + length + place != size:
        raise ValueError(f"{file} is truncated or too long: {size} bytes, where its header tells {8 + length + place}")


def reader(file: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        with open(file, "rb") as f:  # into the tensor's own memory: a map of the file would be held beside it
            f.seek(offset)
            if f.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:
                raise ValueError(f"{file} is truncated")
        return tensor

    return read


def survey(model: nn.Module, folder: Path) -> tuple[dict[str, StoredTensor], list[str], list[str]]:
    """Match a checkpoint's tensors with a model's: our name -> stored tensor, what is missing, what is unknown."""
    wanted = dict(model.named_parameters())
    tied = set(model.state_dict()) - set(wanted)  # a second name of a tensor that is already there
    config = read_settings(folder / "config.json")
    files = weight_files(folder)
    stored = [tensor for file in files for tensor in stored_tensors(file)]
    if "mm_vision_tower" in config and not any(".vision_tower." in tensor.name for tensor in stored):
        for file in weight_files(tower_folder(config, folder)):
            stored += (t for t in stored_tensors(file) if t.name.startswith("vision_model."))
    found, unknown = {}, []
    for tensor in stored:
        name = our_name(tensor.name)
        if name in found:
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is there twice, also in {found[name].file}")
        if name in wanted:
            found[name] = tensor
        elif name not in tied and not IGNORE.search(tensor.name):
            unknown.append(f"{tensor.name} in {tensor.file.name}")
    return found, sorted(set(wanted) - set(found)), unknown


# --- Loading ---------------------------------------------------------------------------------------------------------


def load(model: nn.Module, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
    """Fill a model that was built on the meta device, tensor by tensor; `dtype` is the file's unless given.

    Memory peaks at the model and its largest tensor. Raises ValueError, naming the tensor, where anything does not fit.
    """
    found, missing, unknown = survey(model, folder)
    if missing or unknown:
        kind, names = ("lacks the tensor", missing) if missing else ("has an unknown tensor", unknown)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{folder} {kind} {names[0]}{more}: it does not match its config.json")
    for name, parameter in model.named_parameters():
        tensor = found[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, not floating-point numbers")
        if tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)}, but config.json makes it {list(parameter.shape)}"
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is {shapes}")
    total, done, start = sum(prod(tensor.shape) for tensor in found.values()), 0, time.monotonic()
    for name, tensor in found.items():
        value = tensor.read().to(device, dtype or DTYPES[tensor.dtype])
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))
        done += value.numel()
        if sys.stderr.isatty() and time.monotonic() - start > 1:
            end = "\n" if done == total else ""
            print(f"\rLoading the weights: {done / total:4.0%} of {total / 1e9:.1f}e9", end=end, file=sys.stderr)


def describe(folder: Path) -> str:
    """What a checkpoint is: family, sizes, dtype, memory, and what does not match."""
    from llava import LlavaConfig, LlavaForConditionalGeneration  # which imports this file; only here is it needed

    config = LlavaConfig.from_dict(read_config(folder))
    vision, text = config.vision_config, config.text_config
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    found, missing, unknown = survey(model, folder)
    n = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # keys and values, two bytes each
    return f"""\
family    LLaVA: {vision.model_type} and {text.model_type}
tower     {vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads, \
{vision.image_size} pixels in patches of {vision.patch_size}: {config.image_seq_length} tokens a picture
decoder   {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads \
on {text.num_key_value_heads} key/value heads, {text.vocab_size} tokens
weights   {len(found)} tensors, {n:,} numbers, {" ".join(sorted({t.dtype for t in found.values()}))}
memory    {4 * n / 1e9:.3g} GB in fp32, {2 * n / 1e9:.3g} GB in bf16 or fp16, {cache / 1e3:.3g} kB a token of context
missing   {", ".join(missing) or "nothing"}
unknown   {", ".join(unknown) or "nothing"}"""


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python load_weights.py FOLDER_OR_HUB_ID")
    try:
        print(describe(find_checkpoint(sys.argv[1])))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

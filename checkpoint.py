"""A checkpoint's folder: where it is, and what its settings say, in whichever layout they are written.

There are three layouts: the hub's older files, what transformers 5 writes, and that of LLaVA's authors
(`liuhaotian/llava-v1.5-*`), whose config.json is the decoder's with additions and whose tower is a checkpoint by
itself. Here all of them become the first. What a setting may be is said in RANGES: a file from somewhere else can hold
anything, and a wrong number should end in a sentence here and not in a traceback later.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# The numbers a model can be made of, as safetensors spells them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # as config.json spells them

# How the prompt of LLaVA-1.5 begins, tokenizer.TEMPLATES["v1"].
VICUNA = "A chat between a curious user and an artificial intelligence assistant."

SIZE = (int, 1, 2**24)
TOKEN = (int, -1, 2**24)  # -1 is some files' word for none
# What a number may be, wherever in the settings its name stands: its type, the least and the largest.
RANGES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "vocab_size"), SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"), SIZE),
    **dict.fromkeys(("num_channels", "patch_size", "max_position_embeddings"), SIZE),
    **dict.fromkeys(("image_size", "shortest_edge", "height", "width"), (int, 1, 4096)),  # a picture's side
    "num_hidden_layers": (int, 1, 1000),  # a layer costs memory before a weight is read
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), (float, 0, 1)),
    **dict.fromkeys(("rope_theta", "factor"), (float, 1e-3, 1e12)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "multimodal_projector_bias"), (bool, 0, 1)),
    **dict.fromkeys(("do_pad", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_sample"), (bool, 0, 1)),
    **dict.fromkeys(("image_mean", "image_std"), (float, 0, 1)),
    "rescale_factor": (float, 0, 1),
    "resample": (int, 0, 5),  # Pillow's filters
    **dict.fromkeys(("image_token_index", "eos_token_id", "pad_token_id"), TOKEN),
    "vision_feature_layer": (int, -1001, 1000),
    **dict.fromkeys(("max_new_tokens", "max_length"), SIZE),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (float, 0, 1e6)),
    "top_k": (int, 0, 2**24),
}
THREE = {"image_mean", "image_std"}  # one for each colour
ONE_OR_MORE = {"vision_feature_layer", "eos_token_id"}
MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window", "pad_token_id"}


def read_settings(path: Path) -> dict:
    """A JSON object from an optional file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not a JSON object")
    return settings


def check_ranges(settings: dict, file: Path) -> dict:
    """The settings themselves, or a ValueError that names the first number that is not in its range."""
    for name, value in settings.items():
        if name in RANGES:
            check_range(name, value, file)
        elif isinstance(value, dict):
            check_ranges(value, file)
    return settings


def check_range(name: str, value: object, file: Path) -> None:
    kind, low, high = RANGES[name]
    if name in THREE and not (isinstance(value, list) and len(value) == 3):
        raise ValueError(f"{file}: {name} must be a list of three numbers")
    for number in value if isinstance(value, list) and name in THREE | ONE_OR_MORE else [value]:
        fits = isinstance(number, (int, float) if kind is float else kind)
        fits = fits and isinstance(number, bool) == (kind is bool) and low <= number <= high
        if not fits and not (number is None and name in MAY_BE_NULL):
            span = f"number from {low} to {high}"
            what = {int: f"a whole {span}", float: f"a {span}", bool: "true or false"}[kind]
            raise ValueError(f"{file}: {name} must be {what}, not {str(number)[:80]!r}")
    if value == [] and name == "vision_feature_layer":
        raise ValueError(f"{file}: {name} names no layer")


def find_checkpoint(path: str | Path) -> Path:
    """A folder as it is; a hub id such as llava-hf/llava-1.5-7b-hf from the local hub cache, or fetched into it."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
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
        why = f"is not a folder here, not in the hub cache, and could not be fetched ({type(error).__name__})"
        raise FileNotFoundError(f"{path} {why}; if it is a hub id, run: {get}") from error


def read_config(folder: Path) -> dict:
    """config.json in the hub's form, whichever form it is in, `dtype` a torch.dtype or None.

    Raises FileNotFoundError or ValueError where it is not usable.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a checkpoint")
    config = read_settings(folder / "config.json")
    if "mm_vision_tower" in config:
        config = hub_config(config, folder)
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part, {}), dict):
            raise ValueError(f"{folder / 'config.json'}: {part} is not a JSON object")
    if config.get("model_type", "llava") != "llava":
        raise ValueError(f"{folder / 'config.json'} describes a model of type {config['model_type']!r}, not a LLaVA")
    if "text_config" not in config:
        raise ValueError(f"{folder / 'config.json'} has no text_config")
    check_ranges(config, folder / "config.json")
    return config | {"dtype": DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")))}


def as_dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """A caller's dtype, which may be a name: "bfloat16". None for None and for "auto": the checkpoint's own."""
    if asked is None or asked == "auto":
        return None
    if (dtype := DTYPE_NAMES.get(str(asked).removeprefix("torch."))) is None:
        *names, last = DTYPE_NAMES
        raise ValueError(f"dtype must be auto, {', '.join(names)} or {last}, not {asked}")
    return dtype


def hub_config(config: dict, folder: Path) -> dict:
    """The config.json of LLaVA's authors, which is the decoder's with additions, in the hub's form."""
    projector, aspect = config.get("mm_projector_type", "linear"), config.get("image_aspect_ratio", "square")
    if projector != "mlp2x_gelu" or aspect not in ("pad", "square"):
        raise ValueError(f"{folder} is not LLaVA-1.5: mm_projector_type is {projector}, image_aspect_ratio {aspect}")
    tower = read_settings(tower_folder(config, folder) / "config.json")
    return {
        "vision_config": tower.get("vision_config", tower),
        "text_config": {**config, "model_type": "mistral" if "mistral" in str(config.get("model_type")) else "llama"},
        "image_token_index": config.get("vocab_size", 32000),  # the id after the last: it has no row of its own
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full"
        if config.get("mm_vision_select_feature") == "cls_patch"
        else "default",
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "torch_dtype": config.get("torch_dtype"),
    }


def tower_folder(config: dict, folder: Path) -> Path:
    tower = config["mm_vision_tower"]
    if not isinstance(tower, str):
        raise ValueError(f"{folder / 'config.json'}: mm_vision_tower is not the path of a tower")
    return folder / tower if (folder / tower).is_dir() else find_checkpoint(tower)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one, or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_settings(index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
                raise ValueError(f"{index} does not map tensors to files of its own folder")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, and {index.name} names it")
            return files
    raise FileNotFoundError(f"{folder} has no weights (model.safetensors or pytorch_model.bin): download them too")


def read_processor_settings(folder: Path) -> tuple[dict, str]:
    """The image processor's settings, and which of tokenizer.TEMPLATES its files ask for."""
    config = read_settings(folder / "config.json")
    if "mm_vision_tower" in config:
        file, template = tower_folder(config, folder) / "preprocessor_config.json", VICUNA
        settings = read_settings(file) | {"do_pad": config.get("image_aspect_ratio") == "pad"}
    else:
        file, template = folder / "preprocessor_config.json", folder / "chat_template.jinja"
        settings = read_settings(file)
        if not settings:  # transformers 5 keeps the image processor's settings inside the processor's
            file = folder / "processor_config.json"
            settings = read_settings(file).get("image_processor", {})
        old = read_settings(folder / "chat_template.json").get("chat_template", "")
        template = template.read_text("utf-8", "replace") if template.is_file() else str(old)
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: image_processor is not a JSON object")
    for name in ("size", "crop_size"):
        size = settings.get(name, 1)
        if not isinstance(size, dict):
            check_ranges({"height": size}, file)  # an older file's single number
        elif not ({"height", "width"} <= set(size) or (name == "size" and "shortest_edge" in size)):
            raise ValueError(f"{file}: {name} does not say a height and a width")
    if 0 in (settings.get("image_std") or []):
        raise ValueError(f"{file}: image_std must not be 0")
    return check_ranges(settings, file), "v1" if VICUNA in template else "hub"


def read_tokenizer_settings(folder: Path) -> tuple[dict[str, int], str]:
    """The special tokens that the files add to tokenizer.model, with their ids, and which of them fills up a batch."""
    file = folder / "tokenizer_config.json"
    settings = read_settings(file)
    pad = settings.get("pad_token") or "<pad>"
    try:
        added = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
        if not added:
            file = folder / "added_tokens.json"  # where older checkpoints keep them
            added = {token: int(i) for token, i in read_settings(file).items()}
        if not added:
            file = folder / "tokenizer.json"
            tokens = read_settings(file).get("added_tokens", [])
            added = {token["content"]: int(token["id"]) for token in tokens}
        pad = pad if isinstance(pad, str) else pad["content"]
        fits = all(name and isinstance(name, str) and 0 <= i < 2**24 for name, i in (*added.items(), (pad, 0)))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"{file} does not describe special tokens: each has a name and an id")
    if max(added.values(), default=0) > 2 and "<image>" not in added:  # <unk>, <s> and </s> are always there
        raise ValueError(f"{folder} has special tokens, but <image> is not one of them")
    return added, pad


def read_generation_settings(folder: Path) -> dict:
    file = folder / "generation_config.json"
    settings = {name: value for name, value in read_settings(file).items() if value is not None}
    return check_ranges(settings, file)


class NoInit(TorchFunctionMode):
    """Build modules without drawing their first weights, for which the meta device would import half of PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def take_memory(model: nn.Module, device: str) -> None:
    """From the meta device to another: memory that is not yet filled, and so not yet taken from the system.

    Module.to_empty does the same, but imports sympy for it, which takes longer than to load a tiny model.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            empty = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, p.requires_grad))

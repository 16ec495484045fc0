"""A checkpoint's folder: where it is, and what its settings say, in whichever layout they are written.

There are three layouts: the hub's older files, what transformers 5 writes, and that of LLaVA's authors
(`liuhaotian/llava-v1.5-*`), whose config.json is the decoder's with additions and whose tower is a checkpoint by
itself. Here all of them become the first.
"""

import os
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from tokenizer import TEMPLATES, read_settings

# The numbers a model can be made of, as safetensors spells them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        raise ValueError(f"{folder / 'config.json'} describes a model of type {config['model_type']}, not a LLaVA")
    if "text_config" not in config:
        raise ValueError(f"{folder / 'config.json'} has no text_config")
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    return config | {"dtype": names.get(str(config.get("dtype") or config.get("torch_dtype")))}


def hub_config(config: dict, folder: Path) -> dict:
    """The config.json of LLaVA's authors, which is the decoder's with additions, in the hub's form."""
    projector, aspect = config.get("mm_projector_type", "linear"), config.get("image_aspect_ratio", "square")
    if projector != "mlp2x_gelu" or aspect not in ("pad", "square"):
        raise ValueError(f"{folder} is not LLaVA-1.5: mm_projector_type is {projector}, image_aspect_ratio {aspect}")
    tower = read_settings(tower_folder(config, folder) / "config.json")
    return {
        "vision_config": tower.get("vision_config", tower),
        "text_config": {**config, "model_type": "mistral" if "mistral" in config.get("model_type", "") else "llama"},
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
        settings = read_settings(tower_folder(config, folder) / "preprocessor_config.json")
        return settings | {"do_pad": config.get("image_aspect_ratio") == "pad"}, "v1"
    settings = read_settings(folder / "preprocessor_config.json")
    # transformers 5 keeps the image processor's settings inside the processor's
    settings = settings or read_settings(folder / "processor_config.json").get("image_processor", {})
    template = read_settings(folder / "chat_template.json").get("chat_template", "")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return settings, "v1" if TEMPLATES["v1"].system in template else "hub"


class NoInit(TorchFunctionMode):
    """Build modules without drawing their first weights, for which the meta device would import half of PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)

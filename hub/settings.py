"""Reads the settings in a checkpoint's folder, in any of three layouts.

The layouts: the hub's older files, those that transformers 5 writes, and those of LLaVA's authors
(`liuhaotian/llava-v1.5-*`), whose config.json is the decoder's with additions and whose vision tower is a checkpoint
of its own. All are returned in the first layout, and ranges.py checks each number.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from hub.files import read_json
from hub.tensors import DTYPE_NAMES

# Defaults of a text_config, by its model_type, where they differ from llama.LlamaConfig's.
DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
        "qkv_bias": True,
    },
}  # fmt: skip


@contextmanager
def as_value_error() -> Iterator[None]:
    """Turns the various errors that odd settings cause while a model is built into one ValueError."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"config.json does not describe a model ({str(error).splitlines()[0]})") from error


def known_fields(cls: type, settings: dict) -> dict:
    """The entries of a checkpoint's JSON that the dataclass `cls` has a field for: files hold many others."""
    return {f.name: settings[f.name] for f in fields(cls) if f.init and f.name in settings}


def decoder_settings(settings: dict) -> dict:
    """A checkpoint's text_config with the names and defaults that llama.LlamaConfig expects.

    Older files have rope_theta and rope_scaling, newer ones a single dictionary rope_parameters. Raises ValueError for
    a decoder or a kind of RoPE that is not implemented.
    """
    family = settings.get("model_type", "llama")
    require("text_config: model_type", family, DEFAULTS)
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require("text_config: rope_type", kind, ("default", "linear", "llama3"))
    theta = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
    factor = rope.get("factor", settings.get("rope_factor", 1.0))
    if kind == "llama3" and not rope.get("high_freq_factor", 4.0) > rope.get("low_freq_factor", 1.0):
        raise ValueError("text_config: high_freq_factor must be above low_freq_factor")
    llama3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {name: rope[name] for name in llama3 if kind == "llama3" and name in rope}
    rope |= {"rope_theta": theta, "rope_factor": factor, "rope_type": kind}
    settings = DEFAULTS[family] | settings | rope
    return settings | (qwen2_windows(settings) if family == "qwen2" else {"layer_types": None})


def qwen2_windows(settings: dict) -> dict:
    """Which of Qwen2's layers have a window, if it uses one: those in layer_types, or from max_window_layers on."""
    if not settings.get("use_sliding_window"):
        return {"sliding_window": None, "layer_types": None}
    n, first = settings.get("num_hidden_layers", 32), settings.get("max_window_layers", 28)
    kinds = settings.get("layer_types") or ["full_attention"] * min(first, n) + ["sliding_attention"] * (n - first)
    if not isinstance(kinds, list) or len(kinds) != n or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"text_config: layer_types must name full_attention or sliding_attention for {n} layers")
    return {"sliding_window": settings.get("sliding_window", 4096), "layer_types": kinds}


def require(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError, naming the setting, unless its value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")


def read_config(folder: Path) -> dict:
    """config.json of any layout in the hub's form, with `dtype` as a torch.dtype or None.

    Raises FileNotFoundError or ValueError if it is not usable.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a checkpoint")
    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config:
        from hub.authors import hub_config

        config = hub_config(config, folder)
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part, {}), dict):
            raise ValueError(f"{folder / 'config.json'}: {part} is not a JSON object")
    if (kind := config.get("model_type", "llava")) not in ("llava", "llava_next"):
        raise ValueError(f"{folder / 'config.json'} describes a model of type {kind!r}, not a LLaVA")
    if "text_config" not in config:
        raise ValueError(f"{folder / 'config.json'} has no text_config")
    from hub.ranges import check_ranges, read_grids

    check_ranges(config, folder / "config.json")
    config["image_grid_pinpoints"] = read_grids(config)
    return config | {"dtype": DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")))}

"""The settings in a checkpoint's folder, whichever of three layouts they are written in, checked number by number.

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

# The first words of the prompt template of LLaVA-1.5, tokenizer.TEMPLATES["v1"].
VICUNA = "A chat between a curious user and an artificial intelligence assistant."

# Defaults of a text_config, by its model_type, where they differ from llama.LlamaConfig's.
DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
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
    require("text_config: rope_type", kind, ("default", "linear"))
    theta = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
    factor = rope.get("factor", settings.get("rope_factor", 1.0))
    return DEFAULTS[family] | settings | {"rope_theta": theta, "rope_factor": factor}


def require(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError, naming the setting, unless its value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")


def read_config(folder: Path) -> dict:
    """config.json in the hub's form, whichever form it is in, `dtype` a torch.dtype or None.

    Raises FileNotFoundError or ValueError where it is not usable.
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
    if config.get("model_type", "llava") != "llava":
        raise ValueError(f"{folder / 'config.json'} describes a model of type {config['model_type']!r}, not a LLaVA")
    if "text_config" not in config:
        raise ValueError(f"{folder / 'config.json'} has no text_config")
    from hub.ranges import check_ranges

    check_ranges(config, folder / "config.json")
    return config | {"dtype": DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")))}


def read_processor_settings(folder: Path) -> tuple[dict, str]:
    """The image processor's settings, and which of tokenizer.TEMPLATES its files ask for."""
    from hub.ranges import check_ranges

    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config:
        from hub.authors import tower_folder

        file, template = tower_folder(config, folder) / "preprocessor_config.json", VICUNA
        settings = read_json(file) | {"do_pad": config.get("image_aspect_ratio") == "pad"}
    else:
        file, template = folder / "preprocessor_config.json", folder / "chat_template.jinja"
        settings = read_json(file)
        if not settings:  # transformers 5 keeps the image processor's settings inside the processor's
            file = folder / "processor_config.json"
            settings = read_json(file).get("image_processor", {})
        old = read_json(folder / "chat_template.json").get("chat_template", "")
        template = template.read_text("utf-8", "replace") if template.is_file() else str(old)
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: image_processor is not a JSON object")
    settings = {name: value for name, value in settings.items() if value is not None}
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
    settings = read_json(file)
    pad = settings.get("pad_token") or "<pad>"
    try:
        added = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
        if not added:
            file = folder / "added_tokens.json"  # where older checkpoints keep them
            added = {token: int(i) for token, i in read_json(file).items()}
        if not added:
            file = folder / "tokenizer.json"
            tokens = read_json(file).get("added_tokens", [])
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

"""Reads the settings of a checkpoint's processor: image processor, prompt template and special tokens."""

from pathlib import Path

from hub.chat_template import find_chat_template
from hub.files import read_json
from hub.ranges import check_ranges

# The first words of the prompt template of LLaVA-1.5, tokenizer.TEMPLATES["v1"].
VICUNA = "A chat between a curious user and an artificial intelligence assistant."


def check_image_token(folder: Path, tokenizers: int | None, configs: int) -> None:
    if tokenizers != configs:
        ids = f"token {tokenizers} for the tokenizer and token {configs} in config.json"
        raise ValueError(f"{folder}: <image> is {ids}")


def read_processor_settings(folder: Path, side: int = 336) -> tuple[dict, str]:
    """The image processor's settings, and the name of the prompt template: "own" or one of tokenizer.TEMPLATES.

    `side` is that of the pictures, in pixels, where the files do not say it.
    """
    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config:
        from hub.authors import tower_folder

        file, template = tower_folder(config, folder) / "preprocessor_config.json", VICUNA
        settings = read_json(file) | {"do_pad": config.get("image_aspect_ratio") == "pad"}
    else:
        file = folder / "preprocessor_config.json"
        settings = read_json(file)
        if not settings:  # transformers 5 keeps the image processor's settings inside the processor's
            file = folder / "processor_config.json"
            settings = read_json(file).get("image_processor", {})
        template = find_chat_template(folder) or ""
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: image_processor is not a JSON object")
    settings = {name: value for name, value in settings.items() if value is not None}
    tower = config.get("vision_config")
    is_siglip = isinstance(tower, dict) and tower.get("model_type") == "siglip_vision_model"
    if is_siglip or str(settings.get("image_processor_type")).startswith("Siglip"):
        half = [0.5, 0.5, 0.5]
        size = {"height": 224, "width": 224}
        settings = {"size": size, "image_mean": half, "image_std": half} | settings | {"do_center_crop": False}
    for name in ("size", "crop_size"):
        size = settings.get(name, 1)
        if not isinstance(size, dict):
            check_ranges({"height": size}, file)  # an older file's single number
        elif not ({"height", "width"} <= set(size) or (name == "size" and "shortest_edge" in size)):
            raise ValueError(f"{file}: {name} has no height and width")
    if 0 in (settings.get("image_std") or []):
        raise ValueError(f"{file}: image_std must not be 0")
    # The chat templates of LLaVA-1.5 need no interpreter: tokenizer.py has the same ones.
    name = "v1" if VICUNA in template else "hub" if "ASSISTANT:" in template or not template else "own"
    return {"size": {"shortest_edge": side}, "crop_size": side} | check_ranges(settings, file), name


def read_tokenizer_settings(folder: Path) -> tuple[dict[str, int], str]:
    """The special tokens that the files add to tokenizer.model, with their ids, and which of them pads a batch."""
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


def read_vocabulary(folder: Path) -> bytes:
    """A checkpoint's tokenizer.model. Raises FileNotFoundError if there is none."""
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.model: copy it there from the original checkpoint")
    return (folder / "tokenizer.model").read_bytes()

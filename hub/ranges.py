"""The allowed range of each number in a checkpoint's settings.

A file from elsewhere can hold anything. A number out of range raises a ValueError that names it and its file, instead
of failing somewhere in the model.
"""

from pathlib import Path

SIZE = (int, 1, 2**24)
TOKEN = (int, -1, 2**24)  # some files write -1 for none
# The type, least and largest value of a number, wherever its name occurs in the settings.
RANGES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "vocab_size"), SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"), SIZE),
    **dict.fromkeys(("num_channels", "patch_size"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), SIZE),
    **dict.fromkeys(("image_size", "shortest_edge", "height", "width"), (int, 1, 4096)),  # a picture's side
    "num_hidden_layers": (int, 1, 1000),  # a layer costs memory before a weight is read
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), (float, 0, 1)),
    **dict.fromkeys(("rope_theta", "factor"), (float, 1e-3, 1e12)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), (float, 1e-3, 1e6)),
    "max_window_layers": (int, 0, 1000),
    **dict.fromkeys(("qkv_bias", "use_sliding_window"), (bool, 0, 1)),
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
MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window", "eos_token_id", "pad_token_id"}
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-1.6's default


def read_grids(config: dict) -> list | None:
    """LLaVA-1.6's image_grid_pinpoints, which family/llava_next.py checks; None for other models."""
    grids = config.get("image_grid_pinpoints")
    return (GRIDS if grids is None else grids) if config.get("model_type") == "llava_next" else None


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

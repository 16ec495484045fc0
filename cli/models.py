"""The table of `python llava.py --models`: checkpoints for photographs, and in which form this computer can run each.

The sizes of the layers are those in each config.json. The memory is computed from them.
"""

from collections.abc import Callable

import torch

from cli.memory import needed_bytes
from hub.device import free_bytes
from hub.ranges import GRIDS

NOTE = """\
Sizes are in GB. Open one with --model NAME; for int4 write it with quantize.py first. The licence is the decoder's: the
checkpoint's page may add conditions. LLaVA-1.6 (v1.6, next) reads up to five times as many tokens for a picture.
None of them has been run with this code on its real weights yet: tests/real_weights.py does that."""
WORDS = 324  # tokens in the cache besides the picture's: a question and an answer
CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32064,
}  # fmt: skip
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
}  # fmt: skip
TINY_LLAMA = LLAMA_7B | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4,
}  # fmt: skip
PHI_3 = LLAMA_7B | {"hidden_size": 3072, "intermediate_size": 8192}  # its matrices have been split like Llama's
MISTRAL = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "model_type": "mistral"}
LLAMA_3 = MISTRAL | {"vocab_size": 128320, "model_type": "llama"}
QWEN = {
    "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 152000, "tie_word_embeddings": True,
}  # fmt: skip
WHOLE = {"vision_feature_select_strategy": "full"}  # SigLIP has no class token to drop
LAST = WHOLE | {"vision_feature_layer": -1, "vision_config": SO400M | {"num_hidden_layers": 26}}
TILES = {"image_grid_pinpoints": GRIDS}  # LLaVA-1.6
# (hub id, licence, bytes of a number in its file, vision_config, text_config, other settings), the better ones last
MODELS = [
    ("llava-hf/llava-interleave-qwen-0.5b-hf", "research only", 2, SO400M, QWEN, LAST),
    ("YouLiXiya/tinyllava-v1.0-1.1b-hf", "Apache-2.0", 2, CLIP_L | {"image_size": 224}, TINY_LLAMA, {}),
    ("bczhou/tiny-llava-v1-hf", "Apache-2.0", 4, CLIP_L, TINY_LLAMA, {}),
    ("xtuner/llava-phi-3-mini-hf", "MIT", 2, CLIP_L, PHI_3, {}),
    ("llava-hf/bakLlava-v1-hf", "Apache-2.0", 2, CLIP_L, MISTRAL, {}),
    ("fancyfeast/llama-joycaption-beta-one-hf-llava", "Llama 3.1", 2, SO400M, LLAMA_3, WHOLE),
    ("llava-hf/llava-v1.6-vicuna-7b-hf", "Llama 2", 2, CLIP_L, LLAMA_7B, TILES),
    ("llava-hf/llava-v1.6-mistral-7b-hf", "Apache-2.0", 2, CLIP_L, MISTRAL, TILES),
    ("llava-hf/llama3-llava-next-8b-hf", "Llama 3", 2, CLIP_L, LLAMA_3, TILES),
    ("llava-hf/llava-v1.6-vicuna-13b-hf", "Llama 2", 2, CLIP_L, LLAMA_13B, TILES),
    ("llava-hf/llava-1.5-7b-hf", "Llama 2", 2, CLIP_L, LLAMA_7B, {}),
    ("xtuner/llava-llama-3-8b-v1_1-transformers", "Llama 3", 2, CLIP_L, LLAMA_3, {}),
    ("llava-hf/llava-1.5-13b-hf", "Llama 2", 2, CLIP_L, LLAMA_13B, {}),
]


def config_of(name: str) -> dict:
    """The settings that determine a checkpoint's shapes, as in its config.json."""
    vision, text, others = next(row[3:] for row in MODELS if row[0] == name)
    return {"vision_config": vision, "text_config": text} | others


def measured(Model: type, config: dict, measure: Callable) -> int:
    """measure(model) of a large model, extrapolated from three small ones, because all layers are alike."""
    vision, text = config["vision_config"], config["text_config"]

    def size(tower: int, decoder: int) -> int:
        layers = {"vision_config": vision | {"num_hidden_layers": tower}}
        layers["text_config"] = text | {"num_hidden_layers": decoder}
        return measure(Model.without_weights(config | layers))

    smallest, tower, decoder = size(1, 1), size(2, 1), size(1, 2)
    more = (vision["num_hidden_layers"] - 1) * (tower - smallest)
    return smallest + more + (text["num_hidden_layers"] - 1) * (decoder - smallest)


def count_numbers(Model: type, config: dict) -> int:
    return measured(Model, config, lambda model: sum(parameter.numel() for parameter in model.parameters()))


def memory(Model: type, config: dict, dtype: torch.dtype = torch.bfloat16, quantize: str | None = None) -> int:
    """The bytes that a checkpoint needs for one picture, with its weights in `dtype` or quantized to int8 or int4."""

    def needed(model) -> int:
        tokens = WORDS + getattr(model, "most_image_tokens", model.config.image_seq_length)
        return needed_bytes(model, dtype, quantize, tokens, mapped=lambda name: name.endswith(".packed"))

    return measured(Model, config, needed)


def table(Model: type) -> str:
    """A line for each of MODELS, with the GB of memory that it needs and the best form that fits this computer."""
    free = free_bytes("cpu")
    form = "{:45} {:13} {:>9} {:>9} {:>5} {:>5}  {}"
    lines = [form.format("checkpoint", "licence", "download", "bfloat16", "int8", "int4", "fits here in")]
    for name, licence, width, *_ in MODELS:
        config = config_of(name)
        needed = {how: memory(Model, config, quantize=how) for how in (None, "int8", "int4")}
        fits = [how or "bfloat16" for how, size in needed.items() if free is None or size <= free]
        sizes = [f"{size / 1e9:.1f}" for size in (width * count_numbers(Model, config), *needed.values())]
        lines.append(form.format(name, licence, *sizes, fits[0] if fits else "-"))
    return "\n".join([*lines, "", NOTE])


def hint(Model: type, device: str, dtype: torch.dtype) -> str:
    """Advice for a user whose picture the tiny model does not know."""
    name = best(Model, device, dtype)
    larger = "a larger model" if name is None else f"{name}, which fits into memory here"
    return f"For photographs use {larger}; see python llava.py --models."


def best(Model: type, device: str, dtype: torch.dtype) -> str | None:
    """The last of MODELS that fits into a device's free memory; None if none fits or the memory is unknown.

    LLaVA-1.6 is left out, because it is slow.
    """
    free = free_bytes(device)
    if free is None:
        return None
    names = [name for name, *_, others in reversed(MODELS) if others != TILES]
    return next((name for name in names if memory(Model, config_of(name), dtype) <= free), None)

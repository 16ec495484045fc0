"""The table of `python llava.py --models`: checkpoints for photographs, and in which form this computer can run each.

The sizes of the layers are those in each config.json. The memory is computed from them.
"""

import torch

from cli.memory import needed_bytes
from hub.device import free_bytes

NOTE = """\
Sizes are in GB. Open one with --model NAME; for int4 write it with quantize.py first. None of them has been run with
this code on its real weights yet: tests/real_weights.py does that."""
TOKENS = 900  # in the cache: a picture, a question and an answer
CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
TINY_LLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32064,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 152000, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA_3 = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128320}
# (hub id, licence, GB to download, vision_config, text_config)
MODELS = [
    ("llava-hf/llava-interleave-qwen-0.5b-hf", "research only", 1.7, SO400M, QWEN),
    ("YouLiXiya/tinyllava-v1.0-1.1b-hf", "Apache-2.0", 2.8, CLIP_L | {"image_size": 224}, TINY_LLAMA),
    ("bczhou/tiny-llava-v1-hf", "Apache-2.0", 5.6, CLIP_L, TINY_LLAMA),
    ("llava-hf/llava-1.5-7b-hf", "Llama 2", 14.1, CLIP_L, {"vocab_size": 32064}),
    ("xtuner/llava-llama-3-8b-v1_1-transformers", "Llama 3", 16.7, CLIP_L, LLAMA_3),
    ("llava-hf/llava-1.5-13b-hf", "Llama 2", 26.7, CLIP_L, LARGE | {"vocab_size": 32064}),
]


def table(Model: type) -> str:
    """A line for each of MODELS, with the GB of memory that it needs and the best form that fits this computer."""
    free = free_bytes("cpu")
    form = "{:42} {:13} {:>9} {:>9} {:>5} {:>5}  {}"
    lines = [form.format("checkpoint", "licence", "download", "bfloat16", "int8", "int4", "fits here in")]
    for name, licence, download, vision, text in MODELS:
        model = Model.without_weights({"vision_config": vision, "text_config": text})
        needed = {
            how: needed_bytes(model, torch.bfloat16, how, TOKENS, mapped=lambda name: name.endswith(".packed")) / 1e9
            for how in (None, "int8", "int4")
        }
        fits = [how or "bfloat16" for how, gb in needed.items() if free is None or gb * 1e9 <= free]
        sizes = [f"{gb:.1f}" for gb in (download, *needed.values())]
        lines.append(form.format(name, licence, *sizes, fits[0] if fits else "-"))
    return "\n".join([*lines, "", NOTE])

"""What a checkpoint contains, for `python llava.py --describe PATH`: its files are mapped, but no weight is read."""

from pathlib import Path

import torch

from cli.memory import cache_bytes
from hub.settings import read_config
from load_weights import match


def describe(Model: type, folder: Path) -> str:
    """Family, sizes, dtypes, memory, and a sentence for each tensor that does not fit config.json."""
    model = Model.without_weights(read_config(folder))
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    found, mismatches = match(model, folder)
    n = sum(parameter.numel() for parameter in model.parameters())
    fp32, half = f"{4 * n / 1e9:.3g} GB in fp32", f"{2 * n / 1e9:.3g} GB in bf16 or fp16"
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.values()})
    cache = cache_bytes(config, torch.bfloat16)
    return f"""\
family      LLaVA: {vision.model_type} and {text.model_type}
tower       {vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads, \
{vision.image_size} pixels in patches of {vision.patch_size}: {config.image_seq_length} tokens per picture
decoder     {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads \
on {text.num_key_value_heads} key/value heads, a vocabulary of {text.vocab_size}
weights     {len(found)} tensors, {n:,} numbers, {" ".join(dtypes)}
memory      {fp32}, {half}, {cache / 1e3:.3g} kB per token of context
mismatches  {", ".join(mismatches) or "none"}"""

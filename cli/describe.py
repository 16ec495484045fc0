"""What a checkpoint contains, for `python llava.py --describe PATH`: its files are mapped, but no weight is read."""

from pathlib import Path

import torch

from cli.memory import cache_bytes, weight_bytes
from hub.settings import read_config
from load_weights import match
from quantize import expect_packed, unpack


def describe(Model: type, folder: Path) -> str:
    """Family, sizes, dtypes, memory, and a sentence for each tensor that does not fit config.json."""
    settings = read_config(folder)
    model, kinds = Model.without_weights(settings), {}
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    n = sum(parameter.numel() for parameter in model.parameters())
    if settings.get("quantization_config"):
        bits = expect_packed(model, folder, settings).bits
        kinds = {torch.int32: f"int32 (holds weights of {bits} bits)"}
    found, mismatches = match(model, folder)
    dtypes = sorted(kinds.get(dtype, str(dtype).removeprefix("torch.")) for dtype in {t.dtype for t in found.values()})
    if kinds:
        unpack(model, bits)
    name, tokens = "LLaVA", config.image_seq_length
    if config.image_grid_pinpoints:
        name, tokens = "LLaVA-1.6", f"up to {model.most_image_tokens}"
    fp32, half = (f"{weight_bytes(model, dtype) / 1e9:.3g} GB" for dtype in (torch.float32, torch.bfloat16))
    cache = cache_bytes(config, torch.bfloat16)
    return f"""\
family      {name}: {vision.model_type} and {text.model_type}
tower       {vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads, \
{vision.image_size} pixels in patches of {vision.patch_size}: {tokens} tokens per picture
decoder     {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads \
on {text.num_key_value_heads} key/value heads, a vocabulary of {text.vocab_size}
weights     {len(found)} tensors, {n:,} numbers, {" ".join(dtypes)}
memory      {fp32} in fp32, {half} in bf16 or fp16, {cache / 1e3:.3g} kB per token of context
mismatches  {", ".join(mismatches) or "none"}"""

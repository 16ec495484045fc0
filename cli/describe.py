"""What a checkpoint contains, for `python llava.py --describe PATH`: its files are mapped, but no weight is read."""

from pathlib import Path

import torch

from cli.memory import cache_bytes, needed_bytes
from hub.settings import read_config
from load_weights import match
from quantize import expect_packed, unpack


def describe(Model: type, folder: Path) -> str:
    """Family, sizes, dtypes, memory, and a sentence for each tensor that does not fit config.json."""
    settings = read_config(folder)
    model, bits = Model.without_weights(settings), None
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    n = sum(parameter.numel() for parameter in model.parameters())
    if settings.get("quantization_config"):
        bits = expect_packed(model, folder, settings).bits
    found, mismatches = match(model, folder)
    fp32, half = f"{4 * n / 1e9:.3g} GB in fp32", f"{2 * n / 1e9:.3g} GB in bf16 or fp16"
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.values()})
    if bits:
        unpack(model, bits)
        dtypes.append(f"(of int32 those that hold weights in {bits} bits)")
        half = f"{needed_bytes(model, torch.bfloat16, None, 0) / 1e9:.3g} GB in bf16 or fp16"
        fp32 = f"{needed_bytes(model, torch.float32, None, 0) / 1e9:.3g} GB in fp32"
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

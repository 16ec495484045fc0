"""Small models with random weights, without files and without transformers, and what to run through them."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llama import KVCache
from llava import LlavaConfig, LlavaForConditionalGeneration
from quantize import quantize_model

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
both = pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)  # the interpreter does not support bfloat16
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# PyTorch's int8 product in bfloat16 reads beyond a row whose length is no multiple of 8.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 70,
}
IMAGE, PATCHES = 60, 4
# What to change in TEXT, and how to quantize.
KINDS = {
    "MHA": ({}, None),
    "GQA and window": ({"num_key_value_heads": 1, "sliding_window": 3}, None),
    "biases": ({"attention_bias": True, "mlp_bias": True}, None),
    "tied head": ({"tie_word_embeddings": True}, None),
    "int8": ({"num_key_value_heads": 1}, "int8"),
    "int8 and biases": ({"attention_bias": True}, "int8"),
    "int4": ({"num_key_value_heads": 1}, "int4"),
    "int4 and biases": ({"attention_bias": True, "mlp_bias": True}, "int4"),
}


def close(ours: Tensor, exact: Tensor) -> None:
    """A kernel's result has the float32 numbers, up to rounding in its dtype."""
    assert ours.shape == exact.shape
    tolerance = {FP32: 1e-5, FP16: 3e-3}[ours.dtype]
    assert_close(ours.float(), exact.float(), atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype=FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@torch.no_grad()
def make(kind: str = "MHA", dtype: torch.dtype = FP32, layers: int = 2) -> LlavaForConditionalGeneration:
    """A plain model."""
    text, quantize = KINDS[kind]
    text = TEXT | text | {"num_hidden_layers": layers}
    model = LlavaForConditionalGeneration(LlavaConfig(VISION, text, image_token_index=IMAGE)).eval()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        mean = float("norm" in name and name.endswith("weight"))
        parameter.normal_(mean, 0.2, generator=torch.Generator().manual_seed(i))
    if quantize:
        quantize_model(model, quantize)
    model.to(dtype)
    model.generation_config = {"eos_token_id": []}
    return model


def batch(dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    """Two prompts with a picture each; the second one is shorter, and padded."""
    ids = torch.tensor([[1, 5, 9, *[IMAGE] * PATCHES, 8], [0, 0, 1, *[IMAGE] * PATCHES, 30]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": random(2, 3, 28, 28, dtype=dtype)}


def filled(cache: KVCache) -> list[Tensor]:
    """The keys and values in a cache where a token is not padding: (tokens, K, d) for each layer."""
    real = torch.ones(cache.batch, cache.length, dtype=torch.bool)
    if (mask := cache.attention_mask) is not None:
        real[:, : mask.shape[1]] = mask
    return [part[:, :, : cache.length].transpose(1, 2)[real] for part in (*cache.k, *cache.v)]


def answer(model, dtype: torch.dtype = FP32) -> tuple[Tensor, list[Tensor]]:
    """The scores of a padded batch with pictures, of two tokens after it, and of one more; and the cache's contents."""
    given = batch(dtype)
    cache = model.language_model.new_cache(2, given["input_ids"].shape[1] + 3)
    real = given["attention_mask"].bool()
    position_ids = (real.cumsum(-1) - 1).clamp(min=0)
    first = model(**given, position_ids=position_ids, past_key_values=cache).logits[real]
    last = position_ids[:, -1:]
    two = model(torch.tensor([[3, 4], [5, 6]]), position_ids=last + torch.tensor([1, 2]), past_key_values=cache).logits
    one = model.step(torch.tensor([7, 8]), last + 3, cache)
    return torch.cat([first, two.flatten(0, 1), one]), filled(cache)

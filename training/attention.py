"""Attention for training: the formula where it is faster, PyTorch's function elsewhere. The results are the same.

PyTorch's function never stores the T x S weights, but computes them again in its backward pass. On a CPU and for short
texts it is faster to keep them, as the formula does. For long texts they would not fit into memory.
"""

from torch import Tensor, nn

import clip
import llama

LARGEST_WEIGHTS = 256_000_000  # bytes of weights (B, H, T, S) that the formula may keep for the backward pass


def formula_is_faster(q: Tensor, k: Tensor) -> bool:  # (B, H, T, d), (B, K, S, d)
    B, H, T, _ = q.shape
    return q.is_cpu and q.requires_grad and B * H * T * k.shape[2] * q.element_size() <= LARGEST_WEIGHTS


def decoder_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if formula_is_faster(q, k):
        return llama.eager_attention(q, k, v, mask)[0]
    return llama.attention(q, k, v, mask)


def tower_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return clip.eager_attention(q, k, v) if formula_is_faster(q, k) else clip.attention(q, k, v)


def use_training_attention(model: nn.Module) -> None:
    """Swap the attention of every layer of a plain model (one loaded with kernels="torch")."""
    for module in model.modules():
        if isinstance(module, llama.LlamaAttention):
            module.attention = decoder_attention
        elif isinstance(module, clip.CLIPAttention):
            module.attention = tower_attention

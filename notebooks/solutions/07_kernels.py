"""Solutions to the puzzles of notebook 7."""

import torch
from torch import Tensor

from llama import LlamaConfig


def prefill_operations(config: LlamaConfig, T: int) -> int:
    D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projections = D * H * d + 2 * D * K * d + H * d * D  # q, k and v, o
    mlp = 3 * D * config.intermediate_size
    attention = 2 * T * T * H * d  # q k^T, and the weights times v
    layer = T * (projections + mlp) + attention
    return 2 * (config.num_hidden_layers * layer + D * config.vocab_size)


def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = []
    for keys, values in zip(k.chunk(2, 2), v.chunk(2, 2), strict=True):
        scores = q @ keys.mT / q.shape[-1] ** 0.5
        m = scores.amax(-1, keepdim=True)  # (B, H, 1, 1)
        terms = (scores - m).exp()
        parts.append((m, terms.sum(-1, keepdim=True), terms @ values))
    largest = torch.maximum(parts[0][0], parts[1][0])
    total = sum(part * (m - largest).exp() for m, part, _ in parts)
    return sum(acc * (m - largest).exp() for m, _, acc in parts) / total


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, product) -> Tensor:
    T, out = q.shape[2], torch.empty_like(q)
    for top in range(0, T, 16):
        queries = q[:, :, top : top + 16]
        m = torch.full((*queries.shape[:3], 1), -torch.inf)
        total, acc = torch.zeros_like(m), torch.zeros_like(queries)
        for left in range(0, top + 16, 16):
            keys = slice(left, left + 16)
            scores = product(queries, k[:, :, keys]) / q.shape[-1] ** 0.5
            if left == top:  # the tile on the diagonal
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
            terms, rescale = (scores - m_new).exp(), (m - m_new).exp()
            total = total * rescale + terms.sum(-1, keepdim=True)
            acc = acc * rescale + terms @ v[:, :, keys]
            m = m_new
        out[:, :, top : top + 16] = acc / total
    return out

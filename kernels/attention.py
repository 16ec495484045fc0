"""Attention of many queries over many keys, without storing the T x S weights.

    out[i] = sum over j of softmax_j(q[i] . k[j] / sqrt(d)) v[j]      Vaswani et al. 2017, equation 1

Computed by the formula, attention writes and reads T x S weights several times: for 4096 tokens and 32 heads in
bfloat16, a gigabyte each time. Here only q, k, v and out are moved. There is no mask in memory: two comparisons decide
which keys a query attends to.

A program takes BLOCK_M queries of one head and goes through their keys once, BLOCK_N at a time. The softmax divides
by a sum over all keys, which is not known until the end. The online softmax (Milakov & Gimelshein 2018, algorithm 3;
used in attention by Dao et al. 2022) keeps for each query

    m    the largest score so far
    l    the sum of exp(score - m) so far
    acc  the sum of exp(score - m) * v so far

and multiplies l and acc by exp(old m - new m) when a later step has a larger score. At the end out = acc / l. Scores
are multiplied by log2(e), because the hardware's exponential is 2^x.

The references are llama.eager_attention and clip.eager_attention. There is no backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import capability, check_attention

LOG2E = 1.4426950408889634


@triton.jit
def online_softmax(m, l, acc, scores, v):
    """Update m (M,), l (M,) and acc (M, D) with N more keys: their scores (M, N) and values (N, D)."""
    m_new = tl.maximum(m, tl.max(scores, 1))  # (M,)
    weights = tl.exp2(scores - m_new[:, None])  # (M, N), not divided by their sum yet
    rescale = tl.exp2(m - m_new)  # (M,)
    acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")  # ieee: no TF32
    return m_new, l * rescale + tl.sum(weights, 1), acc


@triton.jit
def key_bounds(p, first_key, window, S, CAUSAL: tl.constexpr):
    """Token p of a row of S attends to the keys low <= j < high. p is a number or a block of numbers."""
    low, high = 0, S
    if CAUSAL:
        low, high = tl.maximum(first_key, p - window + 1), tl.minimum(p + 1, S)
    return low, high


@triton.jit(do_not_specialize=["T", "S", "window"])  # one compiled kernel for prompts of all lengths
def attention_kernel(
    q_ptr, q_batch, q_head, q_token, q_d,  # (B, H, T, d): address of the first number, and the four strides
    k_ptr, k_batch, k_head, k_token, k_d,  # (B, K, S, d)
    v_ptr, v_batch, v_head, v_token, v_d,  # (B, K, S, d)
    out_ptr,  # (B, T, H, d), the order that o_proj reads
    first_key_ptr,  # (B,), each row's first key that is not padding; or None
    T, S, H, K, window, scale,  # a query attends to `window` keys, its own included; scale is log2(e) / sqrt(d)
    CAUSAL: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr,  # head width, and d rounded up to a power of two
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # queries per program, keys per step
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # last queries first: they have the most keys and take longest
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H  # int64: b * stride can exceed int32
    kv_head = h // (H // K)  # H / K query heads share each key head
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1), queries
    n = tl.arange(0, BLOCK_N)[:, None]  # (BLOCK_N, 1), keys of one step
    c = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D), positions in a head's vector
    q_at = q_ptr + b * q_batch + h * q_head + i * q_token + c * q_d  # (BLOCK_M, BLOCK_D)
    k_at = k_ptr + b * k_batch + kv_head * k_head + n * k_token + c * k_d  # (BLOCK_N, BLOCK_D)
    v_at = v_ptr + b * v_batch + kv_head * v_head + n * v_token + c * v_d  # (BLOCK_N, BLOCK_D)
    q = tl.load(q_at, mask=(i < T) & (c < d), other=0.0)  # (BLOCK_M, BLOCK_D)

    first_key = 0 if first_key_ptr is None else tl.load(first_key_ptr + b)
    top = block * BLOCK_M + S - T  # the position of the block's first query in its row
    low, high = key_bounds(i + S - T, first_key, window, S, CAUSAL)  # (BLOCK_M, 1)
    # low and high never decrease from query to query, so the first and the last query bound those of all the others.
    any_low, all_high = key_bounds(top, first_key, window, S, CAUSAL)
    all_low, any_high = key_bounds(top + BLOCK_M - 1, first_key, window, S, CAUSAL)

    m = tl.full([BLOCK_M], -1e30, tl.float32)  # not -inf: exp(-inf - -inf) is NaN
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(any_low, any_high, BLOCK_N):
        real = (j + n < S) & (c < d)  # (BLOCK_N, BLOCK_D)
        k = tl.load(k_at + j * k_token, mask=real, other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_at + j * v_token, mask=real, other=0.0)  # (BLOCK_N, BLOCK_D)
        start = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if (j < all_low) | (j + BLOCK_N > all_high):  # steps between the edges need no mask
            key = j + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
            start = tl.where((low <= key) & (key < high), start, float("-inf"))  # (BLOCK_M, BLOCK_N)
        # The product is added to `start`. Masking afterwards is the same, but goes through shared memory on Ampere.
        scores = tl.dot(q, tl.trans(k), start, input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        m, l, acc = online_softmax(m, l, acc, scores, v)
    out = acc / tl.where(l > 0, l, 1.0)[:, None]  # a query that is padding has no keys: its output is 0
    tl.store(out_ptr + ((b * T + i) * H + h) * d + c, out, mask=(i < T) & (c < d))


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, first_key: Tensor | None = None, window: int | None = None
) -> Tensor:
    """T queries (B, H, T, d) over S keys and values (B, K, S, d): (B, H, T, d).

    If `causal`, the queries are the last T of the S tokens. Then `first_key` (B,) int32 may give the end of each row's
    left padding, and `window` the number of keys that a query attends to. The output of a query that is padding is 0.
    Raises ValueError for unsupported shapes, dtypes and devices, and if gradients are needed.
    """
    B, H, K, T, S, d = check_attention(q, k, v, first_key)
    if causal and S < T:
        raise ValueError(f"{T} causal queries need at least as many keys, but there are {S}")
    if not causal and (first_key is not None or window is not None):
        raise ValueError("first_key and window are for causal attention")
    out = torch.empty(B, T, H, d, dtype=q.dtype, device=q.device)
    BLOCK_M, BLOCK_N, num_warps, num_stages = 128, 64, 8, 3  # as large as registers and shared memory allow
    if q.dtype == torch.float32 or d > 128:
        BLOCK_M, BLOCK_N, num_warps, num_stages = (32, 32, 8, 2) if d <= 128 else (16, 16, 4, 2)
    elif d > 64 and capability(q.device)[0] not in (9, 10):  # those have 227 kB of shared memory, others 99
        BLOCK_N = 32
    if out.numel():  # an empty grid is an error
        attention_kernel[(triton.cdiv(T, BLOCK_M), B * H)](
            q, *q.stride(), k, *k.stride(), v, *v.stride(), out, first_key, T, S, H, K,
            S if window is None else window, LOG2E / d**0.5, causal, d, max(16, triton.next_power_of_2(d)),
            BLOCK_M, BLOCK_N, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out.transpose(1, 2)

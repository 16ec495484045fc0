"""Attention of many queries over many keys, without ever writing the T x S weights to memory.

    out[i] = sum over j of softmax_j(q[i] . k[j] / sqrt(d)) v[j]      Vaswani et al. 2017, equation 1

A program takes BLOCK_M queries of one head and goes once through the keys, BLOCK_N at a time. The softmax needs the sum
over all keys, which it does not know yet; the online softmax (Milakov & Gimelshein 2018, algorithm 3; attention with
it is Dao et al. 2022) keeps for each query

    m    the largest score so far
    l    the sum of exp(score - m) so far
    acc  the sum of exp(score - m) * v so far

and when a later block has a larger score, multiplies l and acc by exp(old m - new m). In the end out = acc / l. Scores
are kept times log2(e), because the hardware's exponential is 2^x.

Plain attention writes and reads T x S weights several times; 4096 tokens and 32 heads are a gigabyte each time in
bfloat16. Here only q, k, v and out travel. Which keys a query sees is never a tensor either, but three numbers: it is
token p = i + S - T of its row, and sees key j if first_key <= j <= p and j > p - window; without `causal`, all of them.

The references are llama.attention_by_hand and clip.attention. Forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import capability, check_int32, check_shape, check_tensors

LOG2E = 1.4426950408889634


@triton.jit
def online_softmax(m, l, acc, scores, v):  # noqa: E741
    """Take N more keys, by their scores (M, N) and v (N, D), into m (M,), l (M,) and acc (M, D)."""
    m_new = tl.maximum(m, tl.max(scores, 1))  # (M,)
    weights = tl.exp2(scores - m_new[:, None])  # (M, N), not yet divided by their sum
    shrink = tl.exp2(m - m_new)  # (M,)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return m_new, l * shrink + tl.sum(weights, 1), acc


@triton.jit
def visible_keys(
    block, first_key, T, S, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys low to high that each query of a block sees, and what that makes of the steps of BLOCK_N keys.

    No query of the block sees a key outside [begin, end), and each of them sees all of [full_begin, full_end): only the
    steps between the two, at the edges, need a mask.
    """
    low, high = tl.zeros([BLOCK_M], tl.int32), tl.full([BLOCK_M], S - 1, tl.int32)  # (BLOCK_M,)
    begin, full_begin, full_end, end = 0, 0, S // BLOCK_N * BLOCK_N, S
    if CAUSAL:
        top = block * BLOCK_M + S - T  # the block's first query is this token of its row
        bottom = top + BLOCK_M - 1
        low, high = low + first_key, top + tl.arange(0, BLOCK_M)
        begin, full_begin = first_key, first_key
        if WINDOW:
            low = tl.maximum(low, high - window + 1)
            begin = tl.maximum(begin, top - window + 1)
            full_begin = tl.maximum(full_begin, bottom - window + 1)
        begin, full_begin = begin // BLOCK_N * BLOCK_N, tl.cdiv(full_begin, BLOCK_N) * BLOCK_N
        full_end = tl.maximum(tl.minimum(S, top + 1) // BLOCK_N * BLOCK_N, full_begin)
        end = tl.minimum(S, bottom + 1)
    return low, high, begin, full_begin, full_end, end


@triton.jit
def attention_kernel(
    q_ptr, q_batch, q_head, q_token, q_d,  # (B, H, T, d): its first number, and the four strides
    k_ptr, k_batch, k_head, k_token, k_d,  # (B, K, S, d)
    v_ptr, v_batch, v_head, v_token, v_d,  # (B, K, S, d)
    out_ptr,  # (B, T, H, d), the order in which the next matrix reads it
    first_key_ptr,  # (B,), the first key that is not padding; or None
    T, S, H, K,
    window,  # how many keys a query sees, its own included; read only if WINDOW
    scale,  # log2(e) / sqrt(d)
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    d: tl.constexpr, BLOCK_D: tl.constexpr,  # head width, and that rounded up to a power of two
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # queries of a program, keys of a step
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # last queries first: they see most keys, and take longest
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,), queries
    n = tl.arange(0, BLOCK_N)  # (BLOCK_N,), keys of a step
    c = tl.arange(0, BLOCK_D)  # (BLOCK_D,), places in a head's vector
    q_at = q_ptr + b * q_batch + h * q_head + i[:, None] * q_token + c[None, :] * q_d
    k_at = k_ptr + b * k_batch + h // (H // K) * k_head + n[:, None] * k_token + c[None, :] * k_d
    v_at = v_ptr + b * v_batch + h // (H // K) * v_head + n[:, None] * v_token + c[None, :] * v_d
    q = tl.load(q_at, mask=(i < T)[:, None] & (c < d)[None, :], other=0.0)  # (BLOCK_M, BLOCK_D)
    first_key = 0
    if first_key_ptr is not None:
        first_key = tl.load(first_key_ptr + b)
    low, high, begin, full_begin, full_end, end = visible_keys(
        block, first_key, T, S, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )

    m = tl.full([BLOCK_M], -1e30, tl.float32)  # not -inf: exp(-inf - -inf) would be no number
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):  # the first edge, the middle, the last edge
        start, stop = begin, full_begin
        if part == 1:
            start, stop = full_begin, full_end
        if part == 2:
            start, stop = full_end, end
        for j in range(start, stop, BLOCK_N):
            real = (j + n < S)[:, None] & (c < d)[None, :]
            k = tl.load(k_at + j * k_token, mask=real, other=0.0)  # (BLOCK_N, BLOCK_D)
            v = tl.load(v_at + j * v_token, mask=real, other=0.0)  # (BLOCK_N, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
            if part != 1:
                visible = (j + n[None, :] >= low[:, None]) & (j + n[None, :] <= high[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            m, l, acc = online_softmax(m, l, acc, scores, v)  # noqa: E741
    out = acc / tl.where(l > 0, l, 1.0)[:, None]  # a query that is padding sees nothing: it gets 0
    out_at = out_ptr + ((b * T + i[:, None]) * H + h) * d + c[None, :]
    tl.store(out_at, out, mask=(i < T)[:, None] & (c < d)[None, :])


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, first_key: Tensor | None = None, window: int | None = None
) -> Tensor:
    """T queries (B, H, T, d) over S keys and values (B, K, S, d): (B, H, T, d).

    With `causal` the queries are the last T of the S tokens; then `first_key` (B,) int32 may say where each row's left
    padding ends, and `window` how many tokens a query sees. A query in the padding gets 0. Raises ValueError for
    shapes, dtypes, devices or gradients it cannot serve.
    """
    check_tensors(q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}, but both must be (batch, heads, tokens, width)")
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    check_shape("k", k, B, K, S, d)
    check_shape("v", v, B, K, S, d)
    if H % K or d > 256:
        raise ValueError(f"{H} heads of width {d} on {K} key heads: they must divide, and be at most 256 wide")
    if causal and S < T:
        raise ValueError(f"{T} causal queries need at least as many keys, but there are {S}")
    if not causal and (first_key is not None or window is not None):
        raise ValueError("first_key and window are for causal attention")
    if first_key is not None:
        check_int32("first_key", first_key, B, q.device)
    out = torch.empty(B, T, H, d, dtype=q.dtype, device=q.device)
    BLOCK_M, BLOCK_N, num_warps, num_stages = block_sizes(q.dtype, d, capability(q.device))
    if out.numel():  # a grid must not be empty
        attention_kernel[(triton.cdiv(T, BLOCK_M), B * H)](
            q, *q.stride(), k, *k.stride(), v, *v.stride(), out, first_key, T, S, H, K, window or 0, LOG2E / d**0.5,
            causal, window is not None, d, max(16, triton.next_power_of_2(d)), BLOCK_M, BLOCK_N,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out.transpose(1, 2)


def block_sizes(dtype: torch.dtype, d: int, capability: tuple[int, int]) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps, and how many steps are loaded ahead: what fits into registers and shared memory."""
    if dtype == torch.float32 or d > 128:
        return (32, 16, 4, 2) if d <= 128 else (16, 16, 4, 2)
    data_center = capability[0] in (9, 10)  # Hopper and its successor: 227 kB of shared memory; others have 99
    return (128, 64, 8, 3) if d <= 64 or data_center else (128, 32, 8, 3)

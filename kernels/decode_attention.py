"""Attention of one new token per row over all keys in the cache.

    out = sum over j of softmax_j(q . k[j] / sqrt(d)) v[j]            Vaswani et al. 2017, equation 1

With one query per head, reading the cache determines the time, so the whole GPU should read. The keys of a head are
split into SPLITS ranges, each with a program of its own (flash-decoding, Dao et al. 2023), which computes m, l and
acc as in attention.py. A second kernel joins them: with M the largest m,

    out = sum of exp(m - M) * acc / sum of exp(m - M) * l

The query heads that share a key head are in one program, so that grouped keys and values are read once and not once per
query head: 2 * K * d numbers per token of the context. No intermediate result is as long as the context.

The length of the cache is read on the device. So the launches are the same for every token, and a recorded CUDA graph
can be replayed; programs whose range is still empty end at once.

The reference is llama.eager_attention with one query. Forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import LOG2E, key_bounds, online_softmax
from kernels.checks import check_attention, check_int32, check_shape

MOST_SPLITS = 64  # of the keys of a head


@triton.jit(do_not_specialize=["capacity", "window"])  # one compiled kernel for caches of all sizes
def decode_kernel(
    q_ptr, q_batch, q_head, q_d,  # (B, H, 1, d): address of the first number, and three of its strides
    k_ptr, v_ptr,  # (B, K, capacity, d), contiguous
    past_ptr,  # (1,), the number of tokens before the new one
    first_key_ptr,  # (B,), each row's first key that is not padding; or None
    m_ptr, l_ptr,  # (B, H, SPLITS) float32
    acc_ptr,  # (B, H, SPLITS, d) float32
    capacity, window, scale,  # the query attends to `window` keys, its own included; scale is log2(e) / sqrt(d)
    K: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,  # key heads, query heads per key head, ranges
    d: tl.constexpr, BLOCK_D: tl.constexpr,  # head width, and d rounded up to a power of two
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,  # query heads (tl.dot needs at least 16), keys per step
):  # fmt: skip
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # one program for each row, key head and range
    b, kv_head = pair // K, pair % K
    g = tl.arange(0, BLOCK_G)  # (BLOCK_G,), the query heads of this key head
    n = tl.arange(0, BLOCK_N)  # (BLOCK_N,), keys of one step
    c = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D), positions in a head's vector
    head = kv_head * GROUP + g  # (BLOCK_G,)
    ours = (g < GROUP)[:, None] & (c < d)  # (BLOCK_G, BLOCK_D)
    q = tl.load(q_ptr + b * q_batch + head[:, None] * q_head + c * q_d, mask=ours, other=0.0)  # (BLOCK_G, BLOCK_D)

    past = tl.load(past_ptr)
    first_key = 0 if first_key_ptr is None else tl.load(first_key_ptr + b)
    low, high = key_bounds(past, first_key, window, past + 1, True)
    share = tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N  # a multiple of BLOCK_N
    start = low + split * share
    stop = tl.minimum(start + share, high)

    m = tl.full([BLOCK_G], -1e30, tl.float32)  # not -inf: exp(-inf - -inf) is NaN
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for j in range(start, stop, BLOCK_N):
        real = j + n < stop  # (BLOCK_N,)
        at = (pair * capacity + j + n[:, None]) * d + c  # (BLOCK_N, BLOCK_D)
        k = tl.load(k_ptr + at, mask=real[:, None] & (c < d), other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + at, mask=real[:, None] & (c < d), other=0.0)  # (BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_G, BLOCK_N)
        m, l, acc = online_softmax(m, l, acc, tl.where(real[None, :], scores, float("-inf")), v)
    part = (pair * GROUP + g) * SPLITS + split  # (BLOCK_G,)
    tl.store(m_ptr + part, m, mask=g < GROUP)
    tl.store(l_ptr + part, l, mask=g < GROUP)
    tl.store(acc_ptr + part[:, None] * d + c, acc, mask=ours)


@triton.jit
def join_kernel(
    m_ptr, l_ptr, acc_ptr,  # (B, H, SPLITS), (B, H, SPLITS), (B, H, SPLITS, d), from decode_kernel
    out_ptr,  # (B, H, d)
    SPLITS: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # one program for each row and head
    s = head * SPLITS + tl.arange(0, SPLITS)  # (SPLITS,)
    c = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    m = tl.load(m_ptr + s)  # (SPLITS,)
    weight = tl.exp2(m - tl.max(m, 0))  # (SPLITS,)
    l = tl.sum(weight * tl.load(l_ptr + s), 0)  # one number
    acc = tl.load(acc_ptr + s[:, None] * d + c[None, :], mask=(c < d)[None, :], other=0.0)  # (SPLITS, BLOCK_D)
    tl.store(out_ptr + head * d + c, tl.sum(weight[:, None] * acc, 0) / l, mask=c < d)  # (BLOCK_D,)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, first_key: Tensor | None = None, window: int | None = None
) -> Tensor:
    """One query per row (B, H, 1, d) over the first past + 1 keys of the cache (B, K, capacity, d): (B, H, 1, d).

    `past` (1,) int32 is the number of tokens before it, `first_key` (B,) int32 the end of each row's left padding.
    Raises ValueError for unsupported shapes, dtypes and devices, and if gradients are needed.
    """
    B, H, K, _, capacity, d = check_attention(q, k, v, first_key)
    check_shape("q", q, B, H, 1, d)
    check_int32("past", past, 1, q.device)
    if not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError("k and v must be contiguous: pass the whole cache")
    # About 512 programs occupy the largest GPUs. In a short cache some have no keys, and end at once.
    SPLITS = min(triton.next_power_of_2(triton.cdiv(512, B * K)), MOST_SPLITS)
    m, l = torch.empty(2, B, H, SPLITS, dtype=torch.float32, device=q.device)
    acc = torch.empty(B, H, SPLITS, d, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, 1, d, dtype=q.dtype, device=q.device)
    BLOCK_D, BLOCK_G = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(H // K))
    BLOCK_N = 16 if q.dtype == torch.float32 or d > 128 else 64  # as large as registers and shared memory allow
    decode_kernel[(B * K, SPLITS)](
        q, q.stride(0), q.stride(1), q.stride(3), k, v, past, first_key, m, l, acc, capacity,
        capacity if window is None else window, LOG2E / d**0.5, K, H // K, SPLITS, d, BLOCK_D, BLOCK_G, BLOCK_N,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    join_kernel[(B * H,)](m, l, acc, out, SPLITS, d, BLOCK_D, num_warps=4)
    return out

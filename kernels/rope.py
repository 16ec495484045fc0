"""Rotates new queries and keys (RoPE) and writes new keys and values to the cache, in one launch.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)    Su et al. 2021, section 3.2.2

x1 and x2 are the halves of a head's vector: number i forms a pair with number i + d / 2. Plain PyTorch takes sixteen
launches for this in each layer, and moves 18 bytes per number of q in bfloat16, 22 of k and 4 of v. Here it is 4 of
each: everything is read once and written once, keys and values straight to their place in the cache. That place is
read on the device, so that a recorded CUDA graph, which repeats every number passed by the host, can be replayed for
the next token.

The reference is llama.apply_rope, then llama.KVCache.update. Forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_int32, check_shape, check_tensors


@triton.jit(do_not_specialize=["T", "capacity"])  # one compiled kernel for prompts and caches of all sizes
def rope_kernel(
    q_ptr, q_batch, q_head, q_token,  # (B, H, T, d): address of the first number, strides of rows, heads and tokens
    k_ptr, k_batch, k_head, k_token,  # (B, K, T, d)
    v_ptr, v_batch, v_head, v_token,  # (B, K, T, d)
    cos_ptr, sin_ptr,  # (B or 1, 1, T, d / 2)
    angle_batch,  # stride of the angles' rows; 0 if all rows share them
    rotated_ptr,  # (B, H, T, d), the rotated queries
    k_cache_ptr, v_cache_ptr,  # (B, K, capacity, d)
    past_ptr,  # (1,), the number of tokens in the cache
    T, capacity,  # new tokens; tokens that fit into the cache
    H: tl.constexpr, K: tl.constexpr, d: tl.constexpr,  # query heads, key heads, head width
    BLOCK: tl.constexpr,  # d / 2 rounded up to a power of two
):  # fmt: skip
    token, b = tl.program_id(0) % T, (tl.program_id(0) // T).to(tl.int64)
    head = tl.program_id(1)  # one program per token and head: the H of q, then the K of k, then the K of v
    place = tl.load(past_ptr) + token  # the token's place in the cache
    i = tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < tl.where(place < capacity, d // 2, 0)  # never write beyond the cache, though the caller checks it
    angle = b * angle_batch + token * (d // 2) + i
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)

    if head < H:
        source = q_ptr + b * q_batch + head * q_head + token * q_token
        target = rotated_ptr + ((b * H + head) * T + token) * d
    elif head < H + K:
        source = k_ptr + b * k_batch + (head - H) * k_head + token * k_token
        target = k_cache_ptr + ((b * K + head - H) * capacity + place) * d
    else:
        source = v_ptr + b * v_batch + (head - H - K) * v_head + token * v_token
        target = v_cache_ptr + ((b * K + head - H - K) * capacity + place) * d
        cos, sin = tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32)  # values are not rotated
    x1 = tl.load(source + i, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
    x2 = tl.load(source + d // 2 + i, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
    tl.store(target + i, x1 * cos - x2 * sin, mask=inside)
    tl.store(target + d // 2 + i, x2 * cos + x1 * sin, mask=inside)


def rope_into_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor
) -> Tensor:
    """Rotate q (B, H, T, d) and k (B, K, T, d); write k and v to the cache (B, K, capacity, d). Returns the rotated q.

    `cos` and `sin` are (B or 1, 1, T, d / 2); `past` (1,) int32 is the earlier length of the cache. Raises ValueError
    for unsupported shapes, dtypes and devices, and if gradients are needed.
    """
    check_tensors(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    (B, H, T, d), K, capacity = q.shape, k.shape[1], k_cache.shape[2]
    for name, tensor in {"k": k, "v": v}.items():
        check_shape(name, tensor, B, K, T, d)
    for name, tensor in {"k_cache": k_cache, "v_cache": v_cache}.items():
        check_shape(name, tensor, B, K, capacity, d)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is written in place")
    for name, tensor in {"cos": cos, "sin": sin}.items():
        check_shape(name, tensor, B if len(cos) == B else 1, 1, T, d // 2)
    check_int32("past", past, 1, q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rope_kernel[(B * T, H + 2 * K)](
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], cos, sin, cos.stride(0) if len(cos) > 1 else 0,
        rotated, k_cache, v_cache, past, T, capacity, H, K, d, triton.next_power_of_2(d // 2), num_warps=1,
    )  # fmt: skip
    return rotated

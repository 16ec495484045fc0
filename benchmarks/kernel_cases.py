"""The kernels at the shapes of LLaVA-1.5 7B and Mistral 7B, for gpu.py to check and time, and targets.py to compile."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import llama
from kernels.attention import attention
from kernels.decode_attention import decode_attention
from kernels.int8 import int8_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_into_cache
from kernels.swiglu import swiglu

class Case(NamedTuple):
    kernel: Callable
    plain: Callable  # computes the same result in the plain model's way
    bytes: int  # that must be read and written
    flops: int = 0  # on tensor cores


# heads, key heads, tokens, head width, causal, window
ATTENTION = {
    "attention, CLIP, 577 tokens": (16, 16, 577, 64, False, None),
    "attention, causal, 608 tokens": (32, 32, 608, 128, True, None),
    "attention, causal, 4096 tokens": (32, 32, 4096, 128, True, None),
    "attention, Mistral, 608 tokens": (32, 8, 608, 128, True, 4096),
}
DECODE = {"decode attention, token 640": (32, 32, None), "decode attention, Mistral": (32, 8, 4096)}
# rows of x, and the matrix
INT8 = {
    "int8, 1 row, 4096 to 22016": (1, 22016, 4096),
    "int8, 4 rows, 4096 to 22016": (4, 22016, 4096),
    "int8, 1 row, 11008 to 4096": (1, 4096, 11008),
    "int8, 1 row, 4096 to 32064": (1, 32064, 4096),
}


def cases(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Case]:
    found = {what: attention_case(*sizes, device, dtype) for what, sizes in ATTENTION.items()}
    found |= {what: decode_case(*sizes, device, dtype) for what, sizes in DECODE.items()}
    found |= {f"add and norm, {rows} rows": norm_case(rows, device, dtype) for rows in (1, 608, 8192)}
    x = torch.randn(1, 1, 4096, device=device).to(dtype)
    norm = llama.RMSNorm(4096, 1e-5).to(device, dtype)
    found["norm, 1 row"] = Case(partial(rms_norm, x, norm.weight, norm.eps), partial(norm, x), 2 * x.nbytes)
    found |= {f"RoPE and cache, {T} tokens": rope_case(T, device, dtype) for T in (1, 608)}
    for rows in (1, 608):
        both = torch.randn(1, rows, 22016, device=device).to(dtype)
        gate, up = both.split(11008, -1)
        found[f"SiLU times up, {rows} rows"] = Case(
            partial(swiglu, gate, up), lambda gate=gate, up=up: F.silu(gate) * up, both.nbytes * 3 // 2
        )
    return found | {what: int8_case(*sizes, device, dtype) for what, sizes in INT8.items()}


def compiled_cases(dtype: torch.dtype) -> dict[str, Case]:
    """The same without numbers, and the widest heads, which need the most shared memory."""
    widest = {
        "attention, heads of 256": attention_case(8, 4, 577, 256, True, None, "meta", dtype),
        "decode attention, heads of 256": decode_case(8, 4, None, "meta", dtype, 256),
    }
    return cases("meta", dtype) | widest


def attention_case(H: int, K: int, T: int, d: int, causal: bool, window: int | None, device, dtype) -> Case:
    q, k, v = (torch.randn(1, T, n, d, device=device).to(dtype).transpose(1, 2) for n in (H, K, K))
    first_key = torch.zeros(1, dtype=torch.int32, device=device) if causal else None
    return Case(
        lambda: attention(q, k, v, causal, first_key, window),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=K != H),
        2 * q.nbytes + k.nbytes + v.nbytes,
        4 * H * T * T * d // (2 if causal else 1),
    )


def decode_case(H: int, K: int, window: int | None, device, dtype, d: int = 128) -> Case:
    q = torch.randn(1, H, 1, d, device=device).to(dtype)
    k, v = (torch.randn(1, K, 1024, d, device=device).to(dtype) for _ in range(2))
    past = torch.full((1,), 639, dtype=torch.int32, device=device)
    first_key = torch.zeros(1, dtype=torch.int32, device=device)
    seen_k, seen_v = k[:, :, :640], v[:, :, :640]
    return Case(
        lambda: decode_attention(q, k, v, past, first_key, window),
        lambda: F.scaled_dot_product_attention(q, seen_k, seen_v, enable_gqa=K != H),
        2 * K * 640 * d * k.itemsize,
    )


def norm_case(rows: int, device, dtype) -> Case:
    x, y = (torch.randn(1, rows, 4096, device=device).to(dtype) for _ in range(2))
    norm = llama.RMSNorm(4096, 1e-5).to(device, dtype)

    def plain() -> tuple[Tensor, Tensor]:
        total = x + y
        return total, norm(total)

    return Case(lambda: add_rms_norm(x, y, norm.weight, norm.eps), plain, 4 * x.nbytes)


def rope_case(T: int, device, dtype) -> Case:
    qkv = torch.randn(1, T, 3 * 4096, device=device).to(dtype)
    q, k, v = (part.unflatten(-1, (32, 128)).transpose(1, 2) for part in qkv.split(4096, -1))
    angles = torch.rand(1, 1, T, 64, device=device) * 700
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = torch.zeros(2, 1, 32, 1024, 128, dtype=dtype, device=device)
    past = torch.full((1,), 32, dtype=torch.int32, device=device)

    def plain() -> Tensor:
        k_cache[:, :, 32 : 32 + T], v_cache[:, :, 32 : 32 + T] = llama.apply_rope(k, cos, sin), v
        return llama.apply_rope(q, cos, sin)

    return Case(
        lambda: rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, past), plain, 2 * qkv.nbytes + 2 * cos.nbytes
    )


def int8_case(rows: int, out: int, n: int, device, dtype) -> Case:
    x = torch.randn(1, rows, n, device=device).to(dtype)
    q = torch.randint(-127, 128, (out, n), dtype=torch.int8, device=device)
    scale = torch.rand(out, device=device).to(dtype) / 127
    return Case(lambda: int8_linear(x, q, scale), lambda: F.linear(x, q * scale[:, None]), q.nbytes)


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])

"""The kernels at the shapes of LLaVA-1.5 7B and Mistral 7B, for gpu.py to check and time, and targets.py to compile."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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

EPS = 1e-5


class Case(NamedTuple):
    """A kernel and the plain computation of the same tensors, as functions of `inputs`."""

    kernel_of: Callable
    plain_of: Callable
    inputs: tuple[Tensor, ...]
    bytes: int  # that must be read and written
    flops: int = 0  # on tensor cores

    def kernel(self) -> Tensor | tuple[Tensor, ...]:
        return self.kernel_of(*self.inputs)

    def plain(self) -> Tensor | tuple[Tensor, ...]:
        return self.plain_of(*self.inputs)

    def exact(self) -> Tensor | tuple[Tensor, ...]:
        """The plain computation in float32."""
        return self.plain_of(*(x.float() if x.is_floating_point() else x for x in self.inputs))


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


def makers(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], Case]]:
    """The cases by name. Each is made when it is called, so that the inputs of one do not stay during the next."""
    where = device, dtype
    found = {what: lambda sizes=sizes: attention_case(*sizes, *where) for what, sizes in ATTENTION.items()}
    found |= {what: lambda sizes=sizes: decode_case(*sizes, *where) for what, sizes in DECODE.items()}
    found |= {f"add and norm, {rows} rows": lambda rows=rows: add_norm_case(rows, *where) for rows in (1, 608, 8192)}
    found["norm, 1 row"] = lambda: norm_case(*where)
    found |= {f"RoPE and cache, {T} tokens": lambda T=T: rope_case(T, *where) for T in (1, 608)}
    found |= {f"SiLU times up, {rows} rows": lambda rows=rows: swiglu_case(rows, *where) for rows in (1, 608)}
    return found | {what: lambda sizes=sizes: int8_case(*sizes, *where) for what, sizes in INT8.items()}


def compiled_makers(dtype: torch.dtype) -> dict[str, Callable[[], Case]]:
    """The same without numbers, and the widest heads, which need the most shared memory."""
    return makers("meta", dtype) | {
        "attention, heads of 256": lambda: attention_case(8, 4, 577, 256, True, None, "meta", dtype),
        "decode attention, heads of 256": lambda: decode_case(8, 4, None, "meta", dtype, 256),
    }


def attention_case(H: int, K: int, T: int, d: int, causal: bool, window: int | None, device, dtype) -> Case:
    q, k, v = (torch.randn(1, T, n, d, device=device).to(dtype).transpose(1, 2) for n in (H, K, K))
    first_key = torch.zeros(1, dtype=torch.int32, device=device) if causal else None
    return Case(
        lambda q, k, v: attention(q, k, v, causal, first_key, window),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=K != H),
        (q, k, v),
        2 * q.nbytes + k.nbytes + v.nbytes,
        4 * H * T * T * d // (2 if causal else 1),
    )


def decode_case(H: int, K: int, window: int | None, device, dtype, d: int = 128) -> Case:
    q = torch.randn(1, H, 1, d, device=device).to(dtype)
    k, v = (torch.randn(1, K, 1024, d, device=device).to(dtype) for _ in range(2))
    past = torch.full((1,), 639, dtype=torch.int32, device=device)
    first_key = torch.zeros(1, dtype=torch.int32, device=device)
    return Case(
        lambda q, k, v: decode_attention(q, k, v, past, first_key, window),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :640], v[:, :, :640], enable_gqa=K != H),
        (q, k, v),
        2 * K * 640 * d * k.itemsize,
    )


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return llama.RMSNorm.forward(SimpleNamespace(weight=weight, eps=EPS), x)


def norm_case(device, dtype) -> Case:
    x, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((1, 1, 4096), (4096,)))
    return Case(lambda x, weight: rms_norm(x, weight, EPS), plain_norm, (x, weight), 2 * x.nbytes + weight.nbytes)


def add_norm_case(rows: int, device, dtype) -> Case:
    x, y, weight = (torch.randn(*shape, device=device).to(dtype) for shape in (*[(1, rows, 4096)] * 2, (4096,)))
    return Case(
        lambda x, y, weight: add_rms_norm(x, y, weight, EPS),
        lambda x, y, weight: (x + y, plain_norm(x + y, weight)),
        (x, y, weight),
        4 * x.nbytes + weight.nbytes,
    )


def swiglu_case(rows: int, device, dtype) -> Case:
    both = torch.randn(1, rows, 22016, device=device).to(dtype)
    return Case(swiglu, lambda gate, up: F.silu(gate) * up, both.split(11008, -1), both.nbytes * 3 // 2)


def rope_case(T: int, device, dtype) -> Case:
    qkv = torch.randn(1, T, 3 * 4096, device=device).to(dtype)
    q, k, v = (part.unflatten(-1, (32, 128)).transpose(1, 2) for part in qkv.split(4096, -1))
    angles = torch.rand(1, 1, T, 64, device=device) * 700
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = torch.zeros(2, 1, 32, 1024, 128, dtype=dtype, device=device)
    past, new = torch.full((1,), 32, dtype=torch.int32, device=device), slice(32, 32 + T)

    def kernel(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        rotated = rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, past)
        return rotated, k_cache[:, :, new], v_cache[:, :, new]

    plain_cache = torch.zeros(2, 1, 32, 1024, 128, dtype=dtype, device=device)

    def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        rotated = llama.apply_rope(k, cos, sin)
        plain_cache[0, :, :, new], plain_cache[1, :, :, new] = rotated, v
        return llama.apply_rope(q, cos, sin), rotated, v

    return Case(kernel, plain, (q, k, v, cos, sin), 2 * qkv.nbytes + 2 * cos.nbytes)


def int8_case(rows: int, out: int, n: int, device, dtype) -> Case:
    x = torch.randn(1, rows, n, device=device).to(dtype)
    q = torch.randint(-127, 128, (out, n), dtype=torch.int8, device=device)
    scale = torch.rand(out, device=device).to(dtype) / 127
    return Case(int8_linear, lambda x, q, scale: F.linear(x, q * scale[:, None]), (x, q, scale), q.nbytes)

"""The small kernels against the formulas, in Triton's interpreter; and what every kernel refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import llama
from kernel_helpers import FP32, both, close, random
from quantize import quantize_linear

pytest.importorskip("triton")
from kernels.attention import attention
from kernels.checks import can_run, runs_kernels
from kernels.decode_attention import decode_attention
from kernels.int8 import int8_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_into_cache
from kernels.swiglu import swiglu


@both
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 33), (1, 1, 64), (5, 100), (2, 4096), (0, 8)], ids=str)
def test_rms_norm(shape, dtype):
    norm = llama.RMSNorm(shape[-1], 1e-5).to(dtype)
    norm.weight.copy_(random(shape[-1], dtype=dtype))
    ours = norm.weight, norm.eps
    x, y = random(2, *shape, dtype=dtype) * 100  # their squares overflow in float16
    close(rms_norm(x, *ours), norm(x))
    for found, wanted in zip(add_rms_norm(x, y, *ours), (x + y, norm(x + y)), strict=True):
        close(found, wanted)
    every_second = random(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    close(rms_norm(every_second, *ours), norm(every_second))
    close(add_rms_norm(x, every_second, *ours)[1], norm(x + every_second))


@both
@pytest.mark.parametrize("shape", [(1, 1, 22), (2, 3, 64), (1, 2, 1100), (4, 1), (0, 6)], ids=str)
def test_swiglu(shape, dtype):
    gate, up = random(*shape[:-1], 2 * shape[-1], dtype=dtype).mul(5).split(shape[-1], -1)  # halves of one product
    close(swiglu(gate, up), F.silu(gate) * up)
    if shape[-1] < 100:  # a program for each row of the transposed one
        close(swiglu(gate.mT, up.mT), F.silu(gate.mT) * up.mT)


@both
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "past", "d"), [(1, 2, 2, 1, 0, 32), (2, 4, 2, 3, 4, 20), (2, 3, 1, 5, 2, 96)]
)
@pytest.mark.parametrize("shared", [True, False], ids=["angles shared", "angles for each row"])
def test_rope_into_the_cache(B, H, K, T, past, d, shared, dtype):
    cache = llama.KVCache(llama.LlamaConfig(8, H * d, 8, 1, H, K), B, past + T + 2, dtype, "cpu")
    cache.k[0].fill_(7), cache.v[0].fill_(7)
    cache.length, number = past, torch.tensor([past], dtype=torch.int32)
    qkv = random(B, T, (H + 2 * K) * d, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in qkv.split((H * d, K * d, K * d), -1))
    angles = random(1 if shared else B, 1, T, d // 2) * 9
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = cache.k[0].clone(), cache.v[0].clone()
    close(rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, number), llama.apply_rope(q, cos, sin))
    cache.update(0, llama.apply_rope(k, cos, sin), v)
    close(k_cache, cache.k[0])
    assert torch.equal(v_cache, cache.v[0])


def test_rope_writes_nothing_beyond_the_cache():
    q, cache, past = random(1, 1, 2, 8), torch.zeros(3, 1, 1, 4, 8), torch.tensor([3], dtype=torch.int32)
    angles = random(1, 1, 2, 4)
    rope_into_cache(q, q, q, angles, angles, cache[0], cache[1], past)  # room for one of the two tokens
    assert (cache[:2, ..., 3, :] != 0).all() and (cache[:2, ..., :3, :] == 0).all() and (cache[2] == 0).all()


@both
@pytest.mark.parametrize(("rows", "out", "n"), [(1, 64, 512), (2, 37, 600), (3, 5, 7), (4, 1, 1100)])
def test_int8_product(rows, out, n, dtype):
    int8 = quantize_linear(random(out, n), None, 8, None).to(dtype)
    x = random(1, rows, n, dtype=dtype)
    close(int8_linear(x, int8.q, int8.scale), x.float() @ int8.dequantize(FP32).T)


# --- Errors ----------------------------------------------------------------------------------------------------------

Q, CACHE, PAST = random(2, 4, 1, 16), random(2, 2, 9, 16), torch.zeros(1, dtype=torch.int32)
COS = random(1, 1, 1, 8)
INT8 = torch.zeros(5, 16, dtype=torch.int8)
WRONG = {
    "k is .* must be": lambda: attention(Q, random(1, 2, 9, 16), CACHE, False),
    "v is .* must be": lambda: attention(Q, CACHE, random(2, 2, 8, 16), False),
    "must be .batch, heads, tokens, width.": lambda: attention(Q[0], CACHE, CACHE, False),
    "divide": lambda: attention(random(2, 3, 1, 16), CACHE, CACHE, False),
    "at most 256": lambda: attention(*(random(1, 1, 2, 300),) * 3, False),
    "at least as many keys": lambda: attention(random(2, 4, 10, 16), CACHE, CACHE, True),
    "for causal attention": lambda: attention(Q, CACHE, CACHE, False, window=3),
    "first_key is": lambda: attention(Q, CACHE, CACHE, True, torch.zeros(3, dtype=torch.int32)),
    "first_key must be int32": lambda: attention(Q, CACHE, CACHE, True, torch.zeros(2, dtype=torch.int64)),
    "k is torch.float16, but q is torch.float32": lambda: attention(Q, CACHE.half(), CACHE, True),
    "q is torch.float64": lambda: attention(Q.double(), CACHE.double(), CACHE.double(), True),
    "k is on meta": lambda: attention(Q, CACHE.to("meta"), CACHE, True),
    "q is on meta, but the kernels run": lambda: attention(*(CACHE.to("meta"),) * 3, True),
    "q is .* must be .2, 4, 1, 16": lambda: decode_attention(random(2, 4, 2, 16), CACHE, CACHE, PAST),
    "k and v must be contiguous": lambda: decode_attention(Q, CACHE[:, :, ::2], CACHE[:, :, ::2], PAST),
    "past must be int32": lambda: decode_attention(Q, CACHE, CACHE, PAST.long()),
    "weight is": lambda: rms_norm(Q, random(15), 1e-5),
    "added is": lambda: add_rms_norm(Q, Q[:1], random(16), 1e-5),
    "up is": lambda: swiglu(Q, Q[:1]),
    "cos is": lambda: rope_into_cache(Q, Q[:, :2], Q[:, :2], COS[..., :3], COS, CACHE, CACHE, PAST),
    "k_cache must be": lambda: rope_into_cache(Q, Q[:, :2], Q[:, :2], COS, COS, CACHE[:, :, ::2], CACHE, PAST),
    "q must be contiguous int8": lambda: int8_linear(Q, INT8.float(), random(5)),
    "8 rows": lambda: int8_linear(Q, INT8, random(5)),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_a_kernel_cannot_serve_is_a_plain_error(words):
    with pytest.raises(ValueError, match=words):
        WRONG[words]()


def test_a_kernel_has_no_gradients():
    x = random(2, 8).requires_grad_()
    assert can_run(x)
    with torch.enable_grad():
        assert not can_run(x)
        with pytest.raises(ValueError, match="no gradients"):
            rms_norm(x, torch.ones(8), 1e-5)
        assert_close(rms_norm(x.detach(), torch.ones(8), 1e-5), llama.RMSNorm(8, 1e-5)(x).detach())


def test_where_kernels_run(monkeypatch):
    assert can_run(Q) and not can_run(Q.double()) and not can_run(Q.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_run(Q)
    monkeypatch.setattr("kernels.checks.INTERPRETED", False)
    assert not runs_kernels(Q) and not can_run(Q)

"""Twins for a CPU: modules with the same weights and results, and faster products.

    nn.Linear -> CpuLinear                 llama.LlamaAttention -> FusedAttention
    quantize.Int8Linear -> CpuInt8         llama.LlamaMLP -> FusedMLP
    quantize.Int4Linear -> CpuInt4

While decoding, each matrix multiplies one row or a few, so reading the weights determines the time. Which of PyTorch's
products reads fastest depends on the processor, the dtype and the number of rows: `linear` has the rules, and
benchmarks/products.py prints the measurements that they are based on. Small matrices with the same input are fused into
one; large ones stay views of the mapped file, because fusing copies them.

A twin runs the plain formula while gradients are recorded and under autocast. benchmarks/README.md has the gains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.twins import FusedLinears, adopt, formula_needed
from llama import LlamaAttention, LlamaMLP, attention
from quantize import Int4Linear, Int8Linear, QuantizedLinear, unpack_int4

LARGEST_FUSED = 64_000_000  # bytes of the matrices that are fused
AMX = torch.cpu._is_amx_tile_supported()
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no AVX-512: no fast products in bfloat16 and float16
HALF = (torch.bfloat16, torch.float16)
BLOCK = 512  # rows of a matrix that stay in the cache between being converted and being multiplied
LARGEST_CONVERTED = 16_000_000  # bytes of a layer's keys in float32: larger ones take longer to allocate than to read


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by the fastest product for this processor, dtype and number of rows of x."""
    rows = x.numel() // weight.shape[1]
    if AMX and x.dtype == torch.bfloat16 and rows == 1 and bias is None:
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    reads_faster = (AMX and x.dtype == torch.bfloat16) or (AVX2 and x.dtype == torch.float32)
    if reads_faster and 1 < rows <= 64 and bias is None:
        return (weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
    if AVX2 and x.dtype in HALF and rows > 8:
        return float32_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in float32; the matrix is converted one block at a time."""
    y = torch.cat([F.linear(x.float(), block.float()) for block in weight.split(BLOCK)], -1)
    return (y if bias is None else y + bias).to(x.dtype)


class CpuLinear(nn.Linear):
    """nn.Linear with the fastest of PyTorch's products."""

    def __init__(self, plain: nn.Linear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        usable = x.is_cpu and x.numel() > 0 and x.ndim > 1 and x.dtype == self.weight.dtype
        return linear(x, self.weight, self.bias) if usable and not formula_needed() else super().forward(x)


class CpuQuantized(QuantizedLinear):
    """Uses PyTorch's product for quantized weights for a few rows; for more, dequantizes the matrix block by block."""

    def __init__(self, plain: QuantizedLinear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not x.is_cpu or x.numel() == 0 or x.dtype != self.scale.dtype or formula_needed():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # Without AVX-512 the products are fast in bfloat16 only. They are faster for up to 4 rows.
        few = len(rows) <= 4 and (x.dtype == torch.bfloat16 or not AVX2) and self.has_product()
        y = self.product(rows) if few else self.in_blocks(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def in_blocks(self, x: Tensor) -> Tensor:  # (rows, in) -> (rows, out)
        if AVX2 and x.dtype in HALF:
            x = x.float()
        starts = range(0, self.out_features, BLOCK)
        return torch.cat([F.linear(x, self.dequantize(x.dtype, i, i + BLOCK)) for i in starts], -1)

    def has_product(self) -> bool:
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:  # (rows, in) -> (rows, out)
        raise NotImplementedError


class CpuInt8(CpuQuantized, Int8Linear):
    def has_product(self) -> bool:
        return self.in_features % 32 == 0  # it crashes on some other widths (20 and 100, for example)

    def product(self, x: Tensor) -> Tensor:  # (rows, in) -> (rows, out)
        return torch._weight_int8pack_mm(x, self.q, self.scale)


class CpuInt4(CpuQuantized, Int4Linear):
    """The int4 product needs the numbers in an order that depends on the processor.

    They are reordered when the first token is decoded, so that the prompt does not wait. The original is kept for later
    prompts; if it is mapped from a file, it is not a second copy in memory.
    """

    def __init__(self, plain: Int4Linear):
        adopt(self, plain)
        self.ordered = None

    def __getstate__(self) -> dict:  # a copy reorders again: the order depends on the processor
        return vars(self) | {"ordered": None}

    def has_product(self) -> bool:
        return self.out_features % 16 == 0 and self.group in (32, 64, 128, 256)

    def product(self, x: Tensor) -> Tensor:  # (rows, in) -> (rows, out)
        if self.bias is not None:  # the bias is added before the sum is rounded
            x = x.float()
        made_from = [(part, part.data_ptr(), version(part)) for part in (self.packed, self.scale)]
        if self.ordered is None or self.ordered[0] != x.dtype or not same(self.ordered[1], made_from):
            self.ordered = x.dtype, made_from, *self.put_in_order(x.dtype)
        _, _, numbers, scales = self.ordered
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, numbers, self.group, scales)

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_in_order(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The numbers in the product's order, and the scales (in / group, out, 2), each with a zero point of 0."""
        q = unpack_int4(self.packed.clone()).int() + 8
        scale = self.scale.clone().to(dtype).T
        scales = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), scales


def version(part: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if part.is_inference() else part._version


def same(old: list[tuple], new: list[tuple]) -> bool:
    """Whether these are the same parameters, at the same place and unchanged."""
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))


TWINS = {nn.Linear: CpuLinear, Int8Linear: CpuInt8, Int4Linear: CpuInt4}


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """llama.attention, faster for one query: (B, H, 1, d) over keys and values (B, K, S, d), mask (B or 1, 1, 1, S).

    The H / K queries that share a key head become the rows of one product, so each key is read once. Without AMX,
    PyTorch's attention in 16 bits is slow for few rows, so it runs in float32.
    """
    if q.shape[2] > 1 or not q.is_cpu or formula_needed():
        return attention(q, k, v, mask)
    rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H / K, d)
    if q.dtype in HALF and not AMX and 4 * k.numel() <= LARGEST_CONVERTED:
        rows, k, v = rows.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(rows, k, v, mask).to(q.dtype).view_as(q)


class FusedAttention(LlamaAttention):
    """LlamaAttention with one product for q, k and v, and a faster attention of one query."""

    attention = staticmethod(one_query_attention)

    def __init__(self, plain: LlamaAttention):
        adopt(self, plain)
        self.fused_qkv = FusedLinears(self, ("q_proj", "k_proj", "v_proj"), LARGEST_FUSED)
        self.fused_qkv.fuse()

    def _apply(self, fn, recurse: bool = True):  # what .to(), .float() and so on call
        self.fused_qkv.forget()
        return super()._apply(fn, recurse)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:  # (B, T, D) -> (B, H, T, d) and two (B, K, T, d)
        if formula_needed() or (qkv := self.fused_qkv.module()) is None:
            return super().qkv(x)
        heads = qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + K + K, T, d)
        H, K = (projection.out_features // self.head_dim for projection in (self.q_proj, self.k_proj))
        return heads.split((H, K, K), dim=1)


class FusedMLP(LlamaMLP):
    """LlamaMLP with one product for gate and up. SiLU overwrites the gate, which saves an allocation of its size."""

    def __init__(self, plain: LlamaMLP):
        adopt(self, plain)
        self.fused_gate_up = FusedLinears(self, ("gate_proj", "up_proj"), LARGEST_FUSED)
        self.fused_gate_up.fuse()

    def _apply(self, fn, recurse: bool = True):
        self.fused_gate_up.forget()
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        if formula_needed():
            return super().forward(x)
        gate, up = self.fused_gate_up(x)
        return self.down_proj(F.silu(gate, inplace=True) * up)


def accelerate_on_cpu(model: nn.Module) -> None:
    """Swap decoder and head modules for their twins; in 16 bits without AVX-512 also tower and projector modules."""
    parts = ("language_model.", "lm_head")
    if AVX2 and model.dtype in HALF:
        parts += ("vision_tower.", "multi_modal_projector.")
    for name, module in list(model.named_modules()):
        if type(module) in TWINS and name.startswith(parts):
            model.set_submodule(name, TWINS[type(module)](module))
    for layer in model.language_model.layers:
        layer.self_attn, layer.mlp = FusedAttention(layer.self_attn), FusedMLP(layer.mlp)

"""Twins for a CPU: the decoder's modules with the same weights and results, and faster products.

    nn.Linear -> FewRowsLinear                 llama.LlamaAttention -> FusedAttention
    quantize.Int8Linear -> FewRowsInt8         llama.LlamaMLP -> FusedMLP
    quantize.Int4Linear -> FewRowsInt4

While decoding, each matrix multiplies one row or a few, which takes the time to read the weights. Which of PyTorch's
products reads fastest depends on the number of rows and the dtype. Small matrices with the same input are fused into
one; large ones stay views of the mapped file, because fusing copies them.

A twin runs the plain formula while gradients are recorded and under autocast. benchmarks/README.md has the gains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.twins import FusedLinears, adopt, formula_needed, swap
from llama import LlamaAttention, LlamaMLP
from quantize import Int4Linear, Int8Linear

LARGEST_FUSED = 64_000_000  # bytes of the matrices that are fused
FEW_ROWS = 64
PRODUCT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FewRowsLinear(nn.Linear):
    """nn.Linear with another of PyTorch's products for one row, and in bfloat16 for up to FEW_ROWS."""

    def __init__(self, plain: nn.Linear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        weight = self.weight
        if self.bias is None and x.is_cpu and x.dtype == weight.dtype and not formula_needed():
            rows = x.numel() // self.in_features
            if rows == 1:
                return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
            if 1 < rows <= FEW_ROWS and x.dtype == torch.bfloat16:
                return (weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return super().forward(x)


QUANTIZED_ROWS = 4  # up to here PyTorch's products for few bits are faster than writing the matrix out


class FewRowsInt8(Int8Linear):
    """Int8Linear with PyTorch's int8 product for a few rows."""

    def __init__(self, plain: Int8Linear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        # The product crashes on some lengths of rows (20 and 100 were seen).
        if not is_for_few_rows(x) or self.q.shape[1] % 32:
            return super().forward(x)
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.q, self.scale).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class FewRowsInt4(Int4Linear):
    """Int4Linear with PyTorch's int4 product for a few rows.

    The product wants the numbers in an order that depends on the processor. They are put into it when the first token
    is decoded, so that the prompt does not wait; for later prompts the matrix is kept in its own order too.
    """

    def __init__(self, plain: Int4Linear):
        adopt(self, plain)
        self.ordered = (None, None, None)  # whose numbers; the numbers, and scales, as the product wants them

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not is_for_few_rows(x) or len(self.packed) % 16 or self.group not in (32, 64, 128, 256):
            return super().forward(x)
        y = self.product(x.flatten(0, -2) if self.bias is None else x.flatten(0, -2).float())
        if self.bias is not None:  # added before the sum is rounded
            y = (y + self.bias).to(x.dtype)
        return y.unflatten(0, x.shape[:-1])

    def product(self, x: Tensor) -> Tensor:  # (rows, in) -> (rows, out)
        whose, numbers, scales = self.ordered
        if whose != (self.packed.data_ptr(), self.packed._version, x.dtype):  # loaded, moved or fused since then
            _, numbers, scales = self.ordered = self.put_in_order(x.dtype)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, numbers, self.group, scales)

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_in_order(self, dtype: torch.dtype) -> tuple[tuple, Tensor, Tensor]:
        q = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(-2).int()  # q + 8, from 0 to 15
        scale = self.scale.to(dtype).T  # (in / group, out)
        scales = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
        whose = (self.packed.data_ptr(), self.packed._version, dtype)
        return whose, torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), scales


def is_for_few_rows(x: Tensor) -> bool:
    """Whether PyTorch's products for few bits are for this x. They have no derivative."""
    few = 0 < x.numel() <= QUANTIZED_ROWS * x.shape[-1]
    return few and x.is_cpu and x.dtype in PRODUCT_DTYPES and not formula_needed()


TWINS = {nn.Linear: FewRowsLinear, Int8Linear: FewRowsInt8, Int4Linear: FewRowsInt4}


class FusedAttention(LlamaAttention):
    """LlamaAttention with one product for q, k and v."""

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
    """LlamaMLP with one product for gate and up. SiLU overwrites the gate, which saves allocating as much again."""

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
    """Swap the modules of the decoder, and the head, for their twins."""
    for name, module in list(model.named_modules()):
        if type(module) in TWINS and name.startswith(("language_model.", "lm_head")):
            swap(model, name, TWINS[type(module)](module))
    for layer in model.language_model.layers:
        layer.self_attn, layer.mlp = FusedAttention(layer.self_attn), FusedMLP(layer.mlp)

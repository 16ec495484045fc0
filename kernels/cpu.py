"""Twins for a CPU: the decoder's modules with the same weights and results, and faster products.

    nn.Linear -> FewRowsLinear    llama.LlamaAttention -> FusedAttention    llama.LlamaMLP -> FusedMLP

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

LARGEST_FUSED = 64_000_000  # bytes of the matrices that are fused
FEW_ROWS = 64


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
        if type(module) is nn.Linear and name.startswith(("language_model.", "lm_head")):
            swap(model, name, FewRowsLinear(module))
    for layer in model.language_model.layers:
        layer.self_attn, layer.mlp = FusedAttention(layer.self_attn), FusedMLP(layer.mlp)

"""Twins for a CPU: the decoder's modules with the same weights and results, and faster products.

While decoding, each matrix multiplies one row, or a few, so the time is the time to read the weights; which of PyTorch's
products reads fastest depends on the number of rows and the dtype. Matrices that read the same x are stored as one
where they are small: fewer, larger products. A large matrix stays a view of the mapped file, because fusing copies it.

    llama.LlamaAttention -> FusedAttention    llama.LlamaMLP -> FusedMLP    nn.Linear -> FewRowsLinear

The ratios measured are in benchmarks/README.md. A twin runs the plain formula while gradients are recorded.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import LlamaAttention, LlamaMLP

LARGEST_FUSED = 64_000_000  # bytes


def adopt(twin: nn.Module, plain: nn.Module) -> None:
    """Make `twin` hold the parameters, children and settings of `plain`, under the same names."""
    nn.Module.__init__(twin)
    vars(twin).update(vars(plain))


def fuse(modules: list[nn.Module], largest: int | None = LARGEST_FUSED) -> nn.Module | None:
    """One module for several that read the same x, whose parameters become views of it; None above `largest` bytes.

    In every parameter (the weight and bias of a Linear, q and scale of an Int8Linear) a row belongs to one output.
    """
    names = [name for name, _ in modules[0].named_parameters()]
    if any({name for name, _ in module.named_parameters()} != set(names) for module in modules):
        return None  # quantized and plain ones
    if largest and sum(p.nbytes for module in modules for p in module.parameters()) > largest:
        return None
    fused = copy.copy(modules[0])
    fused._parameters = dict(modules[0]._parameters)
    for name in names:
        parts = [getattr(module, name) for module in modules]
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
        setattr(fused, name, nn.Parameter(whole, requires_grad=False))
    return fused


class FewRowsLinear(nn.Linear):
    """nn.Linear with another of PyTorch's products for one row, and in bfloat16 for up to 64."""

    def __init__(self, plain: nn.Linear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.is_cpu and x.dtype == self.weight.dtype and self.bias is None and not x.requires_grad:
            rows = x.numel() // self.in_features
            if rows == 1:
                return torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            if rows <= 64 and x.dtype == torch.bfloat16:
                return (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return super().forward(x)


class Fused(nn.Module):
    """What FusedAttention and FusedMLP share: `fused`, one module for their `parts`, made again when weights move."""

    parts: tuple[str, ...]

    def __init__(self, plain: nn.Module):
        adopt(self, plain)
        self.fuse()

    def fuse(self) -> None:  # a list keeps it out of state_dict(), which has the names and values of the plain model
        self.fused = [fuse([getattr(self, part) for part in self.parts])]

    def _apply(self, fn, recurse: bool = True):  # .to(), .float(), ...
        super()._apply(fn, recurse)
        self.fuse()
        return self

    def use_fused(self) -> bool:
        return self.fused[0] is not None and not torch.is_grad_enabled()


class FusedAttention(Fused, LlamaAttention):
    parts = ("q_proj", "k_proj", "v_proj")

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.use_fused():
            return super().qkv(x)
        heads = self.fused[0](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + K + K, T, d)
        return heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)


class FusedMLP(Fused, LlamaMLP):
    """Also overwrites the gate in place, which saves an allocation as large as the prompt's hidden activations."""

    parts = ("gate_proj", "up_proj")

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        if torch.is_grad_enabled():
            return super().forward(x)
        gate, up = self.fused[0](x).chunk(2, -1) if self.use_fused() else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate, inplace=True) * up)


def accelerate_on_cpu(model: nn.Module) -> None:
    """Swap the decoder's and the head's modules for their twins."""
    for parent in (model.language_model, model):
        for name, module in list(parent.named_modules()):
            if type(module) is nn.Linear and (parent is model.language_model or name == "lm_head"):
                swap(parent, name, FewRowsLinear(module))
    for layer in model.language_model.layers:
        layer.self_attn, layer.mlp = FusedAttention(layer.self_attn), FusedMLP(layer.mlp)


def swap(model: nn.Module, name: str, twin: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, twin)

"""LoRA: the base is frozen, and two thin matrices are trained beside each of the decoder layers' matrices.

    y = W x + scale * B A dropout(x)        W (out, in) is frozen, A (r, in) and B (out, r) learn, scale = alpha / r

A starts random and B at zero, so training starts from the base's own answers. W may be in bfloat16 or quantized: it
needs no gradient and no optimizer state, which are what full fine-tuning needs most memory for. A, B and the projector,
which learns whole, and their optimizer state are in float32; the products are in bfloat16 where the device supports
bfloat16. hub/adapter.py has the formula as a module, and PEFT's files. Hu et al. 2021,
https://arxiv.org/abs/2106.09685; on a quantized base it is QLoRA: Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314.

    B batch    T tokens    r rank
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hub.adapter import PROJECTOR, AdaptedLinear, Adapter, check_fits, scale_of
from llava import LlavaForConditionalGeneration
from quantize import QuantizedLinear
from training.dropout import Masks
from training.losses import NextTokenLoss

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    rank: int
    alpha: float
    dropout: float = 0.0  # the share of A's inputs that are set to zero
    rslora: bool = False
    seed: int = 0  # of A and of dropout

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)


class LoraLinear(AdaptedLinear):
    """A trainable AdaptedLinear: initial A and B, dropout, and a perhaps quantized base that passes gradients on."""

    def __init__(self, base: nn.Module, lora: Lora, masks: Masks, number: int):
        super().__init__(base, lora.rank, lora.scale)
        self.masks, self.number = masks, number  # of this matrix in the model
        nn.init.kaiming_uniform_(self.lora_A.weight, math.sqrt(5), generator=random_of(lora.seed, number))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        y = FrozenProduct.apply(x, self.base)
        if self.training and self.masks.dropout:
            x = x * self.masks.keep(x, self.number) / (1 - self.masks.dropout)
        return y + self.scale * self.lora_B(self.lora_A(x))


def random_of(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class FrozenProduct(torch.autograd.Function):
    """The product with a frozen matrix W.

    The backward pass converts or dequantizes W again instead of keeping the converted copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor, base: nn.Module) -> Tensor:  # (..., in) -> (..., out)
        ctx.base, kind = base, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        return F.linear(x.to(dtype), stored_matrix(base, dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # (..., out) -> (..., in)
        return grad @ stored_matrix(ctx.base, grad.dtype), None


def stored_matrix(base: nn.Module, dtype: torch.dtype) -> Tensor:  # (out, in)
    return base.dequantize(dtype) if isinstance(base, QuantizedLinear) else base.weight.to(dtype)


# --- The loss ---------------------------------------------------------------------------------------------------------


class LoraLoss(NextTokenLoss):
    """NextTokenLoss, under bfloat16 autocast if the model's dtype is bfloat16.

    The batch also contains `samples`, the sample numbers.
    """

    def __init__(self, model: LlavaForConditionalGeneration, masks: Masks):
        super().__init__(model)
        self.masks = masks

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        batch = dict(batch)
        self.masks.samples = batch.pop("samples")
        half = self.model.dtype == torch.bfloat16
        with torch.autocast(self.masks.samples.device.type, torch.bfloat16) if half else nullcontext():
            return super().forward(batch)


# --- The model -------------------------------------------------------------------------------------------------------


def matrices(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """The seven matrices of each layer of the decoder, by their names."""
    modules = model.language_model.layers.named_modules(prefix="language_model.layers")
    return {name: module for name, module in modules if name.endswith(MATRICES)}


def multiply_in_float32(model: LlavaForConditionalGeneration) -> None:
    """Convert all but the decoder's stored matrices to float32, for a device whose products in bfloat16 are slow."""
    stored = {id(parameter) for linear in matrices(model).values() for parameter in linear.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in stored and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def add_lora(model: LlavaForConditionalGeneration, lora: Lora, adapter: Adapter | None = None) -> Masks:
    """Put A and B beside the decoder's matrices, new or an adapter's. Only these and the projector will learn.

    Returns the Masks, which LoraLoss needs.
    Raises ValueError for a rank above the width of a matrix, and for an adapter that changes anything else.
    """
    todo, masks = matrices(model), Masks(lora.dropout, lora.seed)
    if lora.rank > (width := min(linear.in_features for linear in todo.values())):
        raise ValueError(f"an adapter of rank {lora.rank} does not fit: the smallest matrix is {width} wide")
    if adapter is not None:
        check_continues(model, lora, adapter)
    model.requires_grad_(False)
    for number, (name, linear) in enumerate(todo.items()):
        learning = LoraLinear(linear, lora, masks, number)
        if adapter is not None and name in adapter.pairs:
            A, B = adapter.pairs[name]
            learning.lora_A.weight.data, learning.lora_B.weight.data = A.float().clone(), B.float().clone()
        learning.lora_A.to(model.device), learning.lora_B.to(model.device)
        model.set_submodule(name, learning)
    projector = model.multi_modal_projector.float().requires_grad_(True)
    for name, tensor in adapter.whole.items() if adapter is not None else ():
        projector.get_parameter(name.removeprefix(f"{PROJECTOR}.")).data = tensor.float().to(model.device, copy=True)
    return masks


def check_continues(model: LlavaForConditionalGeneration, lora: Lora, adapter: Adapter) -> None:
    """Raise ValueError unless training with the settings `lora` can continue from the adapter."""
    check_fits(model, adapter)
    outside = [name for name in adapter.pairs if name not in matrices(model)]
    outside += [name for name in adapter.whole if not name.startswith(f"{PROJECTOR}.")]
    if outside:
        raise ValueError(f"the adapter {adapter.folder} cannot be continued, because it also changes {outside[0]}")
    given, found = (lora.rank, lora.scale), (adapter.rank, adapter.scale)
    if given != found:
        raise ValueError(
            f"the adapter {adapter.folder} has rank {found[0]} and scale {found[1]:g}, and cannot be continued with "
            f"rank {given[0]} and scale {given[1]:g}"
        )

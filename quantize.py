"""Weights in few bits: a decoded token reads a half (int8) or a quarter (int4) of the bytes of bfloat16.

    w[o, i] is about q[o, i] * scale[o, i // group]

q is a small whole number, and a group of numbers side by side in a row shares a scale. int8 has one group per row, and
the scale is the row's largest magnitude over 127. int4 has groups of 32 to 128, and of a few scales takes the one with
the smallest squared error. Only weights are rounded, activations keep their dtype; and only the decoder's matrices,
which are nine tenths of the bytes and are all read for every token. A prompt multiplies hundreds of rows at once: then
arithmetic is the limit, and few bits save no time.

    python quantize.py MODEL --to int4 --out DIR      writes a checkpoint (hub/packed.py has the format)

Not implemented: activations in few bits, 2 or 3 bits, scales that are chosen by how a model's answers change.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hub.packed import Scheme, packed_names, read_scheme
from load_weights import load, our_name

# A scale is tried for each: the group's number of largest magnitude over it. -8 is the only q of magnitude 8, so the
# scale may be negative, to let the largest number be -8 times it. Beyond -8 the largest number is cut off.
TRIED = (-7.5, -8, -8.5, -9, -9.5, -10, -10.5, -11)
GROUPS = (32, 64, 128)
WIDE = 2048  # from this width on, groups of 128 are small beside a row


# --- Rounding --------------------------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:  # (out, in) -> int8 (out, in), bfloat16 (out,)
    """int8: q from -127 to 127, and scales such that q * scale, row by row, is as near as possible to `weight`."""
    scale = (weight.float().abs().amax(-1).clamp(min=1e-12) / 127).bfloat16()
    return (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int4: (out, in) -> q from -8 to 7 in int8 (out, in), and scales in bfloat16 (out, in / group)."""
    w = weight.float().unflatten(-1, (-1, group))  # (out, in / group, group)
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    best_q, best_scale, least = torch.zeros_like(w), torch.ones_like(largest), w.square().sum(-1, keepdim=True)
    for steps in TRIED:
        scale = (largest / steps).bfloat16().float()  # q is for the scale as it is stored
        q = (w / scale).round_().clamp_(-8, 7)
        error = (q * scale - w).square_().sum(-1, keepdim=True)
        better = error < least  # not in a group of zeros, where q is not a number
        best_q, best_scale = torch.where(better, q, best_q), torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    return best_q.flatten(-2).to(torch.int8), best_scale.squeeze(-1).bfloat16()


def choose_group(widths: set[int]) -> int:
    """The default size of a group for matrices of these widths. Raises ValueError if no size divides all of them."""
    fitting = [group for group in GROUPS if all(width % group == 0 for width in widths)]
    if not fitting:
        raise ValueError(f"int4 needs matrices whose widths are multiples of {GROUPS[0]}, not {sorted(widths)}")
    return 128 if 128 in fitting and min(widths, default=WIDE) >= WIDE else fitting[-1]


# --- Matrices --------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A matrix in few bits, by the formula: written out in x's dtype, some rows at a time, and multiplied.

    Its parameters hold a row for each output, as those of nn.Linear do.
    """

    scale: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return len(self.scale)

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        rows = self.rows_at_once()
        biases = [None] * math.ceil(self.out_features / rows) if self.bias is None else self.bias.split(rows)
        starts = range(0, self.out_features, rows)
        parts = [F.linear(x, self.dequantize(x.dtype, i, i + rows), b) for i, b in zip(starts, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def rows_at_once(self) -> int:
        """Rows that stay in a CPU's cache between being written out and being multiplied."""
        return 512 if self.scale.is_cpu else self.out_features

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:  # (rows, in)
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """q (out, in) in int8, scale (out,)."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.q, self.scale, self.bias = fixed(q), fixed(scale), fixed(bias)

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:  # (rows, in)
        return self.q[start:stop].to(dtype) * self.scale[start:stop, None].to(dtype)


class Int4Linear(QuantizedLinear):
    """packed (out, in / 2) in uint8: two q + 8 in a byte, the first in the low bits; scale (out, in / group)."""

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.packed, self.scale, self.bias = fixed(packed), fixed(scale), fixed(bias)

    @property
    def in_features(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def group(self) -> int:
        return self.in_features // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:  # (rows, in)
        packed, scale = self.packed[start:stop], self.scale[start:stop].to(dtype)
        q = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(dtype) - 8  # (rows, in)
        return (q.unflatten(-1, (-1, self.group)) * scale[..., None]).flatten(-2)


def fixed(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)


def quantize_linear(weight: Tensor, bias: Tensor | None, bits: int, group: int | None) -> QuantizedLinear:
    """An nn.Linear's weight (out, in) in few bits: some rows at a time, so that little memory is needed."""
    if weight.is_meta:  # shapes only: the memory of a quantized model is known before it is loaded
        q, scale = weight.to(torch.int8), weight[:, ::group].bfloat16() if bits == 4 else weight[:, 0].bfloat16()
    else:
        parts = [quantize_groups(w, group) if bits == 4 else quantize_rows(w) for w in weight.detach().split(256)]
        q, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if bits == 8:
        return Int8Linear(q, scale, bias)
    q = (q + 8).to(torch.uint8)
    return Int4Linear(q[:, ::2] | q[:, 1::2] << 4, scale, bias)


# --- Models ----------------------------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantized: the decoder's matrices by their names, and the head's if it is not the embedding too."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = () if model.config.tie_word_embeddings else ("lm_head",)
    return {name: linear for name, linear in linears.items() if name.startswith(("language_model.", *head))}


def choose_scheme(model: nn.Module, how: str, group: int | None = None) -> Scheme:
    """Bits, and the size of a group or None. Raises ValueError unless `how` is "int8" or "int4"."""
    if how not in ("int8", "int4"):
        raise ValueError(f"weights can be quantized to int8 or int4, not to {how!r}")
    if how == "int8":
        return Scheme(8, None)
    widths = {linear.in_features for linear in matrices(model).values()}
    if group and any(width % group for width in widths):
        raise ValueError(f"groups of {group} do not divide matrices of the widths {sorted(widths)}")
    return Scheme(4, group or choose_group(widths))


@torch.no_grad()
def quantize_model(model: nn.Module, how: str, group: int | None = None) -> None:
    """Replace the decoder's matrices and an untied head by an Int8Linear or Int4Linear each."""
    scheme = choose_scheme(model, how, group)
    for name, linear in matrices(model).items():
        parent, _, leaf = name.rpartition(".")
        quantized = quantize_linear(linear.weight, linear.bias, scheme.bits, scheme.group)
        setattr(model.get_submodule(parent), leaf, quantized)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A matrix as it is stored (hub/packed.py), until `unpack`: parameters for `load` to fill."""

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__()
        out, width = linear.weight.shape
        self.weight_packed = fixed(torch.empty(out, width * scheme.bits // 32, dtype=torch.int32, device="meta"))
        self.weight_scale = fixed(torch.empty(out, width // (scheme.group or width), device="meta"))
        self.bias = linear.bias

    def unpack(self, bits: int) -> QuantizedLinear:
        data = self.weight_packed.view(torch.uint8)  # of a mapped file: int4 stays there
        if bits == 4:
            return Int4Linear(data, self.weight_scale, self.bias)
        q = data if data.is_meta else data ^ 128
        return Int8Linear(q.view(torch.int8), self.weight_scale[:, 0], self.bias)


def expect_packed(model: nn.Module, folder: Path, settings: dict) -> Scheme:
    """Replace each nn.Linear that a quantized checkpoint has packed by a PackedLinear, on the meta device.

    Raises ValueError for a form of quantization that is not implemented, and for matrices that it does not fit.
    """
    scheme = read_scheme(settings["quantization_config"], folder / "config.json")
    for stored in packed_names(folder):
        name = our_name(f"{stored}.weight").removesuffix(".weight")
        parent, _, leaf = name.rpartition(".")
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{folder} has a packed matrix {stored}, but the model has no such matrix")
        width = linear.in_features
        if width % (scheme.group or 1) or width * scheme.bits % 32:
            raise ValueError(f"{folder}: {stored} is {width} wide, which groups of {scheme.group} do not divide")
        setattr(model.get_submodule(parent), leaf, PackedLinear(linear, scheme))
    return scheme


def unpack(model: nn.Module, bits: int) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.unpack(bits))


def load_quantized(model: nn.Module, folder: Path, settings: dict, how: str | None) -> None:
    """load_weights.load for a checkpoint that is quantized, or for one that is to be quantized ("int8" or "int4")."""
    if "quantization_config" not in settings:
        load(model, folder)
        return quantize_model(model, how)
    if how:
        raise ValueError(f"{folder} is quantized already: load it without quantize")
    scheme = expect_packed(model, folder, settings)
    load(model, folder)
    unpack(model, scheme.bits)


if __name__ == "__main__":
    import cli
    from cli.quantizing import quantize_checkpoint
    from llava import LlavaForConditionalGeneration

    raise SystemExit(cli.run(lambda: quantize_checkpoint(LlavaForConditionalGeneration)))

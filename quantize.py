"""Quantized weights: each matrix of the decoder and the head as small whole numbers q and a few scales.

    w[o, i] is approximately q[o, i] * scale[o, i // group]

The weights 0.50, -0.21, 0.03, 0.36 with the scale -0.0625, for example, become q = -8, 3, 0, -6, which stand for 0.50,
-0.1875, 0, 0.375: rounding loses the rest. The weights of a group, side by side in a row, share a scale. In int4 its
sign is the one that makes the largest of them -8.

    int8    q from -127 to 127 in a byte, one group per row. Answers hardly change.
    int4    q from -8 to 7 in half a byte, groups of 32 to 128. notebooks/15_few_bits.ipynb measures the loss.

Decoding a token reads all of these weights once, which takes most of the time, so fewer bits make it faster: on a CPU
(kernels/cpu.py), and in int8 on a GPU. In the other cases (int4 on a GPU, and prompts) a matrix is first expanded to
the dtype of the activations, which saves memory but no time. Embedding, tower, projector and activations do not change:
the matrices that do have nine tenths of the 7B's weights. On a CPU, a model quantized to int4 while loading needs as
much memory as int8, because it keeps a second copy in the order that PyTorch's product needs. A checkpoint that is
already quantized stays in its file, and needs half as much.

    python quantize.py MODEL --to int4 --out DIR      writes a checkpoint (hub/packed.py has the format)

Not implemented: quantized activations, 2 or 3 bits, calibration on data (GPTQ, AWQ), a GPU kernel for int4.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports at once; the last lines switch KeyboardInterrupt on again
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hub.packed import Scheme, packed_names, read_scheme
from load_weights import load, our_name

# For each group, int4 tries the scales m / d for these d and keeps the best; m is the weight of largest magnitude. With
# d = -8, m becomes q = -8 exactly. Below -8 the scale is smaller: m is clamped to q = -8, but all other weights are
# rounded more finely. d is negative because q reaches -8 but not +8.
DIVISORS = (-7.5, -8, -8.5, -9, -9.5, -10, -10.5, -11)
GROUPS = (32, 64, 128)


# --- Rounding --------------------------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:  # (out, in) -> int8 (out, in), bfloat16 (out,)
    """int8: the scale of a row is its largest magnitude over 127. A search as for int4 would gain next to nothing."""
    scale = (weight.float().abs().amax(-1).clamp(min=1e-12) / 127).bfloat16()
    return (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:  # (out, in) -> (out, in), (out, in / group)
    """int4: q in int8 and scales in bfloat16, for each group the scale with the smallest squared error."""
    w = weight.float().unflatten(-1, (-1, group))  # (out, in / group, group)
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    best_q, best_scale, least = torch.zeros_like(w), torch.ones_like(largest), w.square().sum(-1, keepdim=True)
    for divisor in DIVISORS:
        scale = (largest / divisor).bfloat16().float()  # q is for the scale as it is stored
        q = (w / scale).round_().clamp_(-8, 7)
        error = (q * scale - w).square_().sum(-1, keepdim=True)
        better = error < least  # false for NaN: a group of zeros, where q is 0 / 0, keeps q = 0 and scale = 1
        best_q, best_scale = torch.where(better, q, best_q), torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    return best_q.flatten(-2).to(torch.int8), best_scale.squeeze(-1).bfloat16()


def pack_int4(q: Tensor) -> Tensor:  # int8 (out, in) from -8 to 7 -> uint8 (out, in / 2)
    """Two numbers in a byte, each plus 8: the first in the lower four bits, the second in the upper four."""
    q = (q + 8).to(torch.uint8)
    return q[:, ::2] | (q[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:  # uint8 (out, in / 2) -> int8 (out, in)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8


# --- Matrices --------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A quantized nn.Linear. Its parameters hold a row for each output, as those of nn.Linear do, and do not learn."""

    scale: Tensor  # set by the subclasses
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:  # -> (rows, in)
        """The rows `start` to `stop` of the matrix, as numbers of `dtype`."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        return len(self.scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantizedLinear):
    """q (out, in) in int8, scale (out,)."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.q, self.scale, self.bias = frozen(q), frozen(scale), frozen(bias)

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.q[start:stop].to(dtype) * self.scale[start:stop, None].to(dtype)


class Int4Linear(QuantizedLinear):
    """packed (out, in / 2) as in pack_int4, scale (out, in / group)."""

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.packed, self.scale, self.bias = frozen(packed), frozen(scale), frozen(bias)

    @property
    def in_features(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def group(self) -> int:
        return self.in_features // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        q = unpack_int4(self.packed[start:stop]).to(dtype).unflatten(-1, (-1, self.group))  # (rows, in / group, group)
        return (q * self.scale[start:stop, :, None].to(dtype)).flatten(-2)


def frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)


def quantize_linear(weight: Tensor, bias: Tensor | None, bits: int, group: int | None) -> QuantizedLinear:
    """An nn.Linear's weight (out, in) in 8 bits, or in 4 with groups, 256 rows at a time to save memory.

    On the meta device the result has shapes only. Raises ValueError for numbers that are not finite.
    """
    if weight.is_meta:  # for estimates of memory (cli/memory.py)
        q = weight.to(torch.int8)
        scale = weight[:, 0].bfloat16() if bits == 8 else weight[:, ::group].bfloat16()
    else:
        parts = []
        for rows in weight.detach().split(256):
            if not rows.isfinite().all():
                raise ValueError("numbers that are not finite cannot be quantized")
            parts.append(quantize_rows(rows) if bits == 8 else quantize_groups(rows, group))
        q, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Int8Linear(q, scale, bias) if bits == 8 else Int4Linear(pack_int4(q), scale, bias)


# --- Models ----------------------------------------------------------------------------------------------------------


def matrices_to_quantize(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's matrices by their names, and the head unless it is the embedding too."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = () if model.config.tie_word_embeddings else ("lm_head",)
    return {name: linear for name, linear in linears.items() if name.startswith(("language_model.", *head))}


def choose_scheme(model: nn.Module, how: str, group: int | None = None) -> Scheme:
    """Bits, and the size of a group or None, for `how`: "int8" or "int4".

    The default is the largest of GROUPS that divides all widths. ValueError for what cannot be quantized this way.
    """
    if how not in ("int8", "int4"):
        raise ValueError(f"weights can be quantized to int8 or int4, not to {how!r}")
    if how == "int8":
        if group:
            raise ValueError("in int8 the weights of a row share a scale: there are no groups")
        return Scheme(8, None)
    widths = {linear.in_features for linear in matrices_to_quantize(model).values()}
    fitting = [size for size in GROUPS if all(width % size == 0 for width in widths)]
    if group and group not in fitting:
        raise ValueError(f"groups of {group} do not fit matrices of the widths {sorted(widths)}")
    if not fitting:
        raise ValueError(f"int4 needs matrices whose widths are multiples of {GROUPS[0]}, not {sorted(widths)}")
    return Scheme(4, group or fitting[-1])


@torch.no_grad()
def quantize_model(model: nn.Module, how: str, group: int | None = None) -> None:
    """Replace the decoder's matrices and an untied head by an Int8Linear or Int4Linear each."""
    scheme, todo = choose_scheme(model, how, group), matrices_to_quantize(model)
    if not todo:
        raise ValueError("the model's matrices are quantized already")
    for name, linear in todo.items():
        model.set_submodule(name, quantize_linear(linear.weight, linear.bias, *scheme))


# --- Checkpoints -----------------------------------------------------------------------------------------------------


class StoredLinear(nn.Module):
    """A placeholder with a file's names and shapes (hub/packed.py). `load` fills it, and `unpack` then replaces it."""

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__()
        out, width = linear.weight.shape
        self.weight_packed = frozen(torch.empty(out, width * scheme.bits // 32, dtype=torch.int32, device="meta"))
        self.weight_scale = frozen(torch.empty(out, width // (scheme.group or width), device="meta"))
        self.bias = linear.bias

    def unpack(self, bits: int) -> QuantizedLinear:
        """In 4 bits a view of the mapped file. In 8 bits a copy, because a file holds q + 128."""
        numbers = self.weight_packed.view(torch.uint8)
        if bits == 4:
            return Int4Linear(numbers, self.weight_scale, self.bias)
        return Int8Linear(signed(numbers), self.weight_scale[:, 0], self.bias)


def signed(numbers: Tensor) -> Tensor:
    """q + 128 in uint8 -> q in int8. Adding 128 modulo 256 flips the highest bit, so this undoes itself."""
    return (numbers if numbers.is_meta else numbers ^ 128).view(torch.int8)


def expect_packed(model: nn.Module, folder: Path, settings: dict) -> Scheme:
    """Replace each nn.Linear that a quantized checkpoint has packed by a StoredLinear, on the meta device.

    Raises ValueError for a form of quantization that is not implemented, and for matrices that it does not fit.
    """
    scheme, names = read_scheme(settings["quantization_config"], folder / "config.json"), packed_names(folder)
    if not names:
        raise ValueError(f"{folder}: config.json has a quantization_config, but no matrix is quantized")
    modules = dict(model.named_modules())
    for stored in names:
        name = our_name(f"{stored}.weight").removesuffix(".weight")
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{folder} has a packed matrix {stored}, but the model has no such matrix")
        width = linear.in_features
        if width % (scheme.group or 1) or width * scheme.bits % 32:
            raise ValueError(f"{folder}: {stored} is {width} wide, which groups of {scheme.group} do not divide")
        model.set_submodule(name, StoredLinear(linear, scheme))
    return scheme


def unpack(model: nn.Module, bits: int) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredLinear):
            model.set_submodule(name, module.unpack(bits))


def load_quantized(model: nn.Module, folder: Path, settings: dict, how: str | None) -> None:
    """`load` for a quantized checkpoint, or for one that is then quantized in memory: `how`, "int8" or "int4"."""
    if not settings.get("quantization_config"):
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

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # each ends the command like Ctrl-C: nothing half-written is left
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    raise SystemExit(cli.run(lambda: quantize_checkpoint(LlavaForConditionalGeneration)))

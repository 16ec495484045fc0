"""int8 weights: half the bytes of bfloat16, and so about twice the tokens a second where memory is the limit.

Each row of a matrix is divided by its own scale, its largest number over 127, and rounded: w is about q * scale. Only
weights are rounded; what flows through the model stays in its dtype. Only the decoder's matrices are: they are nine
tenths of the bytes, and a token reads all of them. A picture or a prompt has hundreds of rows to multiply at once; then
arithmetic is the limit, so the matrix is first written out in the model's dtype, into memory that all of them share.

Left out: int8 activations, 4 bits, scales for groups of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from llama import Linear

FEW_ROWS = 4  # up to here PyTorch's int8 product is the faster one


def quantize_rows(weight: Tensor, q: Tensor, scale: Tensor) -> None:  # (out, in) -> (out, in) int8, (out,)
    """Fill `q` and `scale` so that q * scale, row by row, is as near to `weight` as int8 comes."""
    scale.copy_(weight.abs().amax(-1).float().clamp(min=1e-12) / 127)
    q.copy_((weight / scale[:, None]).round().clamp(-127, 127))  # by the scale as its own dtype rounded it


class Int8Linear(nn.Module):
    """A matrix of the decoder in int8, without bias: q (out, in) and scale (out,)."""

    shared = torch.empty(0)  # where a whole matrix is written out

    def __init__(self, linear: Linear):
        super().__init__()
        self.parts = getattr(linear, "parts", None)
        self.q = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty_like(linear.weight[:, 0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        few = x[..., 0].numel() <= FEW_ROWS
        if few and kernels.usable(x):
            return kernels.int8_linear(x, self.q, self.scale)
        if few and x.device.type == "cpu":
            return torch._weight_int8pack_mm(x.flatten(0, -2), self.q, self.scale).unflatten(0, x.shape[:-1])
        return F.linear(x, self.written_out(x.dtype))

    def written_out(self, dtype: torch.dtype) -> Tensor:  # (out, in)
        n, shared = self.q.numel(), Int8Linear.shared
        if shared.numel() < n or shared.dtype != dtype or shared.device != self.q.device:
            with torch.inference_mode(False):  # or nobody else could write into it
                Int8Linear.shared = shared = torch.empty(n, dtype=dtype, device=self.q.device)
        return torch.mul(self.q, self.scale[:, None], out=shared[:n].view_as(self.q))


def put_int8(model: nn.Module, how: str) -> None:
    """Put Int8Linear in the place of every matrix of the decoder and of its head; one with a bias, or tied, stays."""
    if how != "int8":
        raise ValueError(f"weights can be quantized to 'int8', not to {how!r}")
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and module.bias is None and id(module.weight) not in tied:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module))


def read_int8(stored, q: Tensor, scale: Tensor) -> None:
    """From a checkpoint's tensor (see load_weights.StoredTensor) to its rows of an Int8Linear."""
    weight = torch.empty(q.shape, dtype=scale.dtype, device=q.device)
    stored.read(weight)
    quantize_rows(weight, q, scale)

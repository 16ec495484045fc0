"""int8 weights: half the bytes of bfloat16, so a decoded token reads half as much memory.

Each row of a matrix is divided by its own scale, its largest absolute value over 127, and rounded: w is about q times
scale. Only weights are rounded, activations keep their dtype; and only the decoder's matrices, which are nine tenths of
the bytes and are all read for every token. A prompt multiplies hundreds of rows at once: then arithmetic is the limit,
and the matrix is first written out in the model's dtype.

Not implemented: int8 activations, 4 bits, scales for groups within a row.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x in PyTorch's int8 product
FEW_ROWS = 4  # up to here PyTorch's int8 product is faster than writing the matrix out


def rows_at_once(matrix: Tensor) -> int:
    """Rows that stay in a CPU's cache between one step and the next, which is 3 times as fast as whole matrices."""
    return max(1, 2**18 // matrix.shape[1]) if matrix.device.type == "cpu" else len(matrix)


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (out, in) -> (out, in), (out,)
    """q in int8 and scale in `dtype`, such that q * scale, row by row, is as near as possible to `weight`."""
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=dtype, device=weight.device)
    if weight.is_meta:  # shapes only: the memory of a quantized model is known before it is loaded
        return q, scale
    n = rows_at_once(weight)
    for rows, q_rows, scale_rows in zip(weight.split(n), q.split(n), scale.split(n), strict=True):
        rows = rows.to(dtype).float()  # float: a bfloat16 above 64 is a multiple of 1/2, and would be rounded twice
        scale_rows.copy_(rows.abs().amax(-1).clamp(min=1e-12) / 127)
        q_rows.copy_((rows / scale_rows[:, None]).round_().clamp_(-127, 127))  # divided by the scale as it is stored
    return q, scale


class Int8Linear(nn.Module):
    """A matrix in int8, without bias: q (out, in) and scale (out,)."""

    shared = threading.local()  # each thread has a buffer for the matrix that it has written out

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        q, scale = quantize_rows(weight.detach(), dtype)
        self.q, self.scale = nn.Parameter(q, requires_grad=False), nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        few = x.numel() <= FEW_ROWS * x.shape[-1]
        # PyTorch's product is for a CPU, has no derivative, and crashes on some lengths of rows (20 and 100 were seen).
        if few and x.is_cpu and x.dtype in DTYPES and not x.requires_grad and x.shape[-1] % 32 == 0:
            return torch._weight_int8pack_mm(x.flatten(0, -2), self.q, self.scale).unflatten(0, x.shape[:-1])
        return F.linear(x, self.dequantize(x.dtype))

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # (out, in)
        buffer, n = getattr(self.shared, "buffer", torch.empty(0)), self.q.numel()
        if buffer.numel() < n or buffer.dtype != dtype or buffer.device != self.q.device:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
                self.shared.buffer = buffer = torch.empty(n, dtype=dtype, device=self.q.device)
        weight, n = buffer[:n].view_as(self.q), rows_at_once(self.q)
        for rows, q, scale in zip(weight.split(n), self.q.split(n), self.scale[:, None].split(n), strict=True):
            rows.copy_(q).mul_(scale)
        return weight


@torch.no_grad()
def quantize_model(model: nn.Module, how: str, dtype: torch.dtype) -> None:
    """Replace every matrix of the decoder and its head by an Int8Linear, except those with a bias and a tied head.

    `dtype` is that of the scales, and of the model that will run. Raises ValueError for anything but "int8".
    """
    if how != "int8":
        raise ValueError(f"weights can be quantized to 'int8', not to {how!r}")
    embedding = model.language_model.embed_tokens.weight
    for name, module in list(model.named_modules()):
        is_decoder = name.startswith(("language_model.", "lm_head"))
        if is_decoder and isinstance(module, nn.Linear) and module.bias is None and module.weight is not embedding:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module.weight, dtype))

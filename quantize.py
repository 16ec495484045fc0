"""int8 weights: half the bytes of bfloat16 for a token to read, so 1.3 to 1.6 times the tokens a second on a CPU.

Each row of a matrix is divided by its own scale, its largest number over 127, and rounded: w is about q * scale. Only
weights are rounded; what flows through the model stays in its dtype. Only the decoder's matrices are: they are nine
tenths of the bytes, and a token reads all of them. A picture or a prompt has hundreds of rows to multiply at once; then
arithmetic is the limit, so the matrix is first written out in the model's dtype, into one buffer for each thread.

Left out: int8 activations, 4 bits, scales for groups of a row.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from llama import Linear

FEW_ROWS = 4  # up to here PyTorch's int8 product is the faster one


def rows_at_once(matrix: Tensor) -> int:
    """So many rows as stay in a CPU's cache from one step to the next: on whole matrices each is 3 times as slow."""
    return max(1, 2**18 // matrix.shape[1]) if matrix.device.type == "cpu" else len(matrix)


def quantize_rows(weight: Tensor, q: Tensor, scale: Tensor) -> None:  # (out, in) -> (out, in) int8, (out,)
    """Fill `q` and `scale` so that q * scale, row by row, is as near to `weight` as int8 comes."""
    n = rows_at_once(q)
    for rows, q_rows, scale_rows in zip(weight.split(n), q.split(n), scale.split(n), strict=True):
        rows = rows.float()  # a bfloat16 above 64 is a multiple of 1/2, and would be rounded twice
        scale_rows.copy_(rows.abs().amax(-1).clamp(min=1e-12) / 127)
        q_rows.copy_((rows / scale_rows[:, None]).round_().clamp_(-127, 127))  # by the scale as its dtype rounded it


class Int8Linear(nn.Module):
    """A matrix of the decoder in int8, without bias: q (out, in) and scale (out,)."""

    # Where a whole matrix is written out. All layers use it in turn, for new memory would take longer to get than to
    # fill. Threads run different layers at the same time, so each thread has its own.
    buffers = threading.local()

    def __init__(self, linear: Linear):
        super().__init__()
        self.parts, w = getattr(linear, "parts", None), linear.weight
        self.q = nn.Parameter(torch.empty(w.shape, dtype=torch.int8, device=w.device), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(len(w), dtype=w.dtype, device=w.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        few = x.numel() <= FEW_ROWS * x.shape[-1]
        if few and kernels.usable(x):
            return kernels.int8_linear(x, self.q, self.scale)
        if few and x.is_cpu:
            return torch._weight_int8pack_mm(x.flatten(0, -2), self.q, self.scale).unflatten(0, x.shape[:-1])
        return F.linear(x, self.written_out(x.dtype))

    def written_out(self, dtype: torch.dtype) -> Tensor:  # (out, in)
        """The whole matrix, valid until this thread asks for the next one."""
        n, buffer = self.q.numel(), getattr(self.buffers, "buffer", None)
        if buffer is None or buffer.numel() < n or buffer.dtype != dtype or buffer.device != self.q.device:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
                self.buffers.buffer = buffer = torch.empty(n, dtype=dtype, device=self.q.device)
        weight, n = buffer[:n].view_as(self.q), rows_at_once(self.q)
        for rows, q, scale in zip(weight.split(n), self.q.split(n), self.scale[:, None].split(n), strict=True):
            rows.copy_(q).mul_(scale)
        return weight


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

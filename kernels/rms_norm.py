"""RMSNorm in one launch, alone or together with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight            Zhang & Sennrich 2019, equation 4

A GPU multiplies far faster than it reads, so the bytes moved determine the time. Plain PyTorch launches eight kernels,
most of which send the rows through memory in float32: 36 bytes per number in bfloat16. Here a program keeps its row
in registers: 4 bytes per number, read once and written once. With the addition it is 8 bytes instead of 42.

The reference is llama.RMSNorm. Forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_shape, check_tensors


@triton.jit
def rms_norm_kernel(
    x_ptr,  # (rows, D)
    added_ptr,  # (rows, D), added to x first; or None
    weight_ptr,  # (D,)
    sum_ptr,  # (rows, D), where x + added is written; or None
    y_ptr,  # (rows, D), the result
    D, eps,  # numbers per row; eps prevents a division by zero
    BLOCK: tl.constexpr,  # D rounded up to a power of two, which tl.arange requires
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D  # one program per row; int64: row * D can exceed int32
    i = tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < D
    x = tl.load(x_ptr + row + i, mask=inside, other=0.0)  # (BLOCK,)
    if added_ptr is not None:
        x += tl.load(added_ptr + row + i, mask=inside, other=0.0)
        tl.store(sum_ptr + row + i, x, mask=inside)
    x32 = x.to(tl.float32)  # as in llama.RMSNorm
    x32 *= tl.rsqrt(tl.sum(x32 * x32) / D + eps)
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0)  # (BLOCK,)
    y = weight * x32.to(x.dtype)  # Llama rounds before it multiplies by the weight
    tl.store(y_ptr + row + i, y, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., D), (D,) -> (..., D)
    """llama.RMSNorm. Raises ValueError for unsupported shapes, dtypes and devices, and if gradients are needed."""
    check_tensors(x=x, weight=weight)
    check_shape("weight", weight, x.shape[-1])
    return launch(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added and its norm, both (..., D): the residual stream after a sublayer, and the input of the next one."""
    check_tensors(x=x, added=added, weight=weight)
    check_shape("weight", weight, x.shape[-1])
    check_shape("added", added, *x.shape)
    return launch(x, added.contiguous(), weight, eps)


def launch(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    """x + added (None if `added` is None) and the norm, both (..., D)."""
    x, D = x.contiguous(), x.shape[-1]
    y, total = torch.empty_like(x), None if added is None else torch.empty_like(x)
    if rows := x.numel() // D:  # an empty grid is an error
        BLOCK = triton.next_power_of_2(D)
        rms_norm_kernel[(rows,)](x, added, weight.contiguous(), total, y, D, eps, BLOCK, num_warps=8)
    return total, y

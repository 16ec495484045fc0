"""A few rows times a matrix of int8 weights.

    y[row, o] = scale[o] * sum over i of x[row, i] * q[o, i]          weights as in quantize.py: w is about q * scale

With one row every weight is used in a single product, so reading the matrix determines the time: one byte per weight in
int8 instead of the two of bfloat16. Without a kernel the matrix is first dequantized to bfloat16, which moves 5 bytes
per weight: it reads one, writes two and reads two.

The scale is the same for a whole row of q, so it multiplies the sum once. The reference is F.linear with
quantize.Int8Linear.dequantize. Forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_shape, check_tensors

MOST_ROWS = 4  # of x; for more, dequantizing the matrix for the tensor cores is faster


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(
    x_ptr,  # (rows, IN)
    q_ptr,  # (OUT, IN) int8
    scale_ptr,  # (OUT,)
    y_ptr,  # (rows, OUT), the result
    rows, OUT, IN,
    ROWS: tl.constexpr,  # rows rounded up to a power of two
    BLOCK_OUT: tl.constexpr,  # outputs per row and program
    BLOCK_IN: tl.constexpr,  # weights per output and step
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None, None]  # (ROWS, 1, 1)
    out = (tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[None, :, None]  # (1, BLOCK_OUT, 1)
    i = tl.arange(0, BLOCK_IN)[None, None, :]  # (1, 1, BLOCK_IN)
    acc = tl.zeros([ROWS, BLOCK_OUT, BLOCK_IN], tl.float32)  # partial sums, one for each position in a step
    for start in range(0, IN, BLOCK_IN):
        inside = start + i < IN
        x = tl.load(x_ptr + row * IN + start + i, mask=(row < rows) & inside, other=0.0)  # (ROWS, 1, BLOCK_IN)
        q = tl.load(q_ptr + out * IN + start + i, mask=(out < OUT) & inside, other=0)  # (1, BLOCK_OUT, BLOCK_IN)
        acc += x.to(tl.float32) * q.to(tl.float32)  # (ROWS, BLOCK_OUT, BLOCK_IN)
    y = tl.sum(acc, 2)  # (ROWS, BLOCK_OUT)
    row, out = tl.arange(0, ROWS)[:, None], tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    y *= tl.load(scale_ptr + out, mask=out < OUT, other=0.0).to(tl.float32)  # (1, BLOCK_OUT)
    tl.store(y_ptr + row * OUT + out, y, mask=(row < rows) & (out < OUT))


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:  # (..., in), (out, in) int8, (out,) -> (..., out)
    """x @ (q * scale[:, None]).T for 1 to MOST_ROWS rows. Raises ValueError for anything else."""
    check_tensors(x=x, scale=scale)
    OUT, IN = len(scale), x.shape[-1]
    check_shape("scale", scale, OUT)
    check_shape("q", q, OUT, IN)
    if q.dtype != torch.int8 or q.device != x.device or not q.is_contiguous():
        raise ValueError(f"q must be contiguous int8 on {x.device}, but it is {q.dtype} on {q.device}")
    rows = x.numel() // IN
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"x has {rows} rows, but this product is for 1 to {MOST_ROWS}")
    y = torch.empty(*x.shape[:-1], OUT, dtype=x.dtype, device=x.device)
    BLOCK_OUT, BLOCK_IN = 4, 512
    int8_kernel[(triton.cdiv(OUT, BLOCK_OUT),)](
        x.contiguous(), q, scale.contiguous(), y, rows, OUT, IN, triton.next_power_of_2(rows), BLOCK_OUT, BLOCK_IN,
        num_warps=4,
    )  # fmt: skip
    return y

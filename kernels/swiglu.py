"""The element-wise part of SwiGLU, silu(gate) * up, as one kernel: the shortest one, so read it first.

    y = gate / (1 + exp(-gate)) * up                  Shazeer 2020, equation 6

PyTorch runs two kernels. In bfloat16, silu reads 2 bytes per element and writes 2; the product reads 4 and writes 2: 10
in all. One kernel reads 4 and writes 2, and saves a launch. `gate` and `up` may be slices of the output of one matrix
product. Their row stride is then larger than N, so the kernel takes the strides.

kernels/decoder.py calls it instead of F.silu(...) * ... in llama.LlamaMLP.forward. There is no backward pass.

How to read a kernel: `kernel[grid](...)` starts one program for each index of the grid. All programs run the same
lines; tl.program_id tells them apart. A program computes with blocks: small tensors whose sides are powers of two that
are known at compile time (tl.constexpr), and that broadcast as in PyTorch. The comment on a line gives its block's
shape. A tensor is passed as the address of its first element. Offsets count elements, not bytes: with a block i,
`x_ptr + i` is a block of the addresses of elements i. tl.load and tl.store access all of them at once, except where
`mask` is False; there tl.load gives `other`. Only these two access the GPU's memory; everything between them stays on
the chip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_shape, check_tensors


@triton.jit
def swiglu_kernel(
    gate_ptr,  # (rows, N)
    up_ptr,  # (rows, N)
    y_ptr,  # (rows, N), the result
    gate_stride,  # distance from one row to the next, in elements
    up_stride,
    N,  # elements per row
    BLOCK: tl.constexpr,  # elements per program
):
    row = tl.program_id(0).to(tl.int64)  # one program for each BLOCK of each row; int64: row * stride can exceed int32
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < N
    gate = tl.load(gate_ptr + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
    up = tl.load(up_ptr + row * up_stride + i, mask=inside, other=0.0)  # (BLOCK,)
    y = (gate * tl.sigmoid(gate)).to(up.dtype) * up  # (BLOCK,), rounded where PyTorch rounds
    tl.store(y_ptr + row * N + i, y, mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # two (..., N) -> (..., N)
    """F.silu(gate) * up. Raises ValueError for unsupported shapes, dtypes and devices, and if gradients are needed."""
    check_tensors(gate=gate, up=up)
    check_shape("up", up, *gate.shape)
    N = gate.shape[-1]
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not y.numel():  # an empty grid is an error
        return y
    # a slice keeps its row stride; a tensor whose last dimension is not contiguous is copied
    gate, up = (x.reshape(-1, N) if x.stride(-1) == 1 else x.contiguous().view(-1, N) for x in (gate, up))
    BLOCK = 1024  # for num_warps=4 (a warp is 32 threads that run together): 8 elements per thread
    grid = (gate.shape[0], triton.cdiv(N, BLOCK))
    swiglu_kernel[grid](gate, up, y, gate.stride(0), up.stride(0), N, BLOCK, num_warps=4)
    return y

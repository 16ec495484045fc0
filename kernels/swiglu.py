"""SiLU(gate) * up, the middle of the decoder's MLP, in one launch.

    y = gate / (1 + exp(-gate)) * up                  Shazeer 2020, equation 6

Plain PyTorch writes SiLU(gate) to memory and reads it again: 10 bytes a number in bfloat16. Here it stays in a
register: 6 bytes, and one launch less in each layer. `gate` and `up` are halves of what one matrix gave
(llama.FusedLinear), so their rows lie further apart than they are long; the kernel takes the distance.

The reference is llama.swiglu. Forward only.
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
    gate_stride,  # numbers from one row to the next
    up_stride,
    N,  # numbers in a row
    BLOCK: tl.constexpr,  # numbers of a program
):
    row = tl.program_id(0).to(tl.int64)  # a program for each row and each BLOCK of it
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < N
    gate = tl.load(gate_ptr + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
    up = tl.load(up_ptr + row * up_stride + i, mask=inside, other=0.0)  # (BLOCK,)
    y = (gate * tl.sigmoid(gate)).to(up.dtype) * up  # (BLOCK,), rounded where plain PyTorch rounds
    tl.store(y_ptr + row * N + i, y, mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # two (..., N) -> (..., N)
    """What llama.swiglu gives. Raises ValueError for shapes, dtypes, devices or gradients it cannot serve."""
    check_tensors(gate=gate, up=up)
    check_shape("up", up, *gate.shape)
    N = gate.shape[-1]
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not y.numel():  # a grid must not be empty
        return y
    gate, up = (x.reshape(-1, N) if x.stride(-1) == 1 else x.contiguous().view(-1, N) for x in (gate, up))
    BLOCK = 1024
    grid = (gate.shape[0], triton.cdiv(N, BLOCK))
    swiglu_kernel[grid](gate, up, y, gate.stride(0), up.stride(0), N, BLOCK, num_warps=4)
    return y

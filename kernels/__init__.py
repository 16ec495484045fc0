"""The same results, faster: `accelerate` swaps modules of a loaded model for twins with the same weights.

The model in the six core files is the plain formula. A twin computes the same, up to rounding, in a way that suits the
device. After accelerate, state_dict() has the same names and values.

    on a CPU           cpu.py: other products for few rows, small matrices fused
    on an NVIDIA GPU   decoder.py: fused matrices and Triton kernels; graph.py: the decode step as a CUDA graph

How to read a kernel, best swiglu.py first: `kernel[grid](...)` starts one program for each place of the grid. All
programs run the same lines; tl.program_id tells them apart. A program computes with blocks, whose shapes are the comments
on its lines: powers of two, known at compile time (tl.constexpr), broadcast as in PyTorch. A tensor is passed as the
address of its first number, so `x_ptr + i` with a block i is a block of addresses. tl.load and tl.store access all of
them at once, except where `mask` is false. Everything between the two stays on the chip; only they move bytes.
"""

import importlib.util

import torch
from torch import nn

from kernels.checks import DTYPES, runs_kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None


def accelerate(model: nn.Module, how: str = "auto") -> nn.Module:
    """Swap modules of a LLaVA for faster twins, in place, and return it.

    "auto": the GPU's twins on an NVIDIA GPU of 2020 or newer, the CPU's on a CPU, none elsewhere. "triton": the GPU's, or
    a ValueError where they cannot run. "torch": none.
    """
    if how not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, not {how!r}")
    x = model.language_model.norm.weight
    if how == "torch":
        return model
    if HAS_TRITON and x.dtype in DTYPES and runs_kernels(x) and (x.is_cuda or how == "triton"):
        from kernels.decoder import accelerate_on_gpu
        from kernels.graph import GraphStep

        accelerate_on_gpu(model)
        model.step = GraphStep(model)
    elif how == "triton":
        needs = "float32, float16 or bfloat16 on an NVIDIA GPU of 2020 or newer, and Linux"
        raise ValueError(f"Triton cannot run on {x.device} in {str(x.dtype).removeprefix('torch.')} here: it needs {needs}")
    elif x.is_cpu:
        from kernels.cpu import accelerate_on_cpu

        accelerate_on_cpu(model)
    return model

"""The same results, faster: `accelerate` swaps modules of a loaded model for twins with the same weights.

The model in the six core files is the plain formula. A twin computes the same, up to rounding, in a way that suits the
device, and has one test that holds it to the plain module. After accelerate, state_dict() has the same names and values.

    on a CPU        cpu.py: other products for few rows, small matrices fused
    on an NVIDIA GPU decoder.py: fused matrices and Triton kernels; graph.py: the decode step as a CUDA graph

How to read a kernel, best swiglu.py first: `kernel[grid](...)` starts a program for each place of the grid. All programs
run the same lines; tl.program_id tells them apart. A program computes with blocks, whose shapes are the comments on its
lines: powers of two, known at compile time (tl.constexpr), broadcast as in PyTorch. A tensor is passed as the address of
its first number, so `x_ptr + i` with a block i is a block of addresses. tl.load and tl.store access all of them at once,
except where `mask` is false. Between the two everything stays on the chip; only they move bytes.
"""

import importlib.metadata
import importlib.util

import torch
from torch import nn

from kernels.checks import INTERPRETED, has_a_gpu

namesake = None  # Hugging Face's package of the same name, if something asks for it
HAS_TRITON = importlib.util.find_spec("triton") is not None


def accelerate(model: nn.Module, how: str = "auto") -> nn.Module:
    """Swap modules of a LLaVA for faster twins, in place, and return it.

    "auto": the GPU's twins on an NVIDIA GPU of 2020 or newer, the CPU's on a CPU, none elsewhere. "triton": the GPU's, or
    a ValueError where they cannot run. "torch": none.
    """
    if how not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, not {how!r}")
    x = model.lm_head.weight if hasattr(model.lm_head, "weight") else model.lm_head.scale
    can_run = HAS_TRITON and (has_a_gpu(x) or (how == "triton" and INTERPRETED and x.is_cpu))
    if how == "triton" and not can_run:
        raise ValueError(f"Triton cannot run on {x.device} here: it needs an NVIDIA GPU of 2020 or newer, and Linux")
    if how != "torch" and can_run:
        accelerate_on_gpu(model)
    elif how == "auto" and x.is_cpu:
        from kernels.cpu import accelerate_on_cpu

        accelerate_on_cpu(model)
    return model


def accelerate_on_gpu(model: nn.Module) -> None:
    from kernels.cpu import swap
    from kernels.decoder import FastInt8Linear, FastLlama, tower_attention
    from kernels.graph import GraphStep
    from quantize import Int8Linear

    for name, module in list(model.named_modules()):
        if type(module) is Int8Linear:
            swap(model, name, FastInt8Linear(module))
    for layer in model.vision_tower.encoder.layers:
        layer.self_attn.attention = tower_attention
    model.language_model = FastLlama(model.language_model)
    if torch.cuda.is_available() and model.device.type == "cuda":
        model.step = GraphStep(model)


def __getattr__(name: str):
    """A name that this folder lacks comes from Hugging Face's package `kernels`, if that is installed.

    Python that runs in this repository finds this folder before the package, which transformers imports from.
    """
    global namesake
    if namesake is None:
        try:
            init = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        __path__.append(str(init.parent))  # its modules import each other as kernels.layer and so on
        spec = importlib.util.spec_from_file_location(__name__, init)
        namesake = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(namesake)
    return getattr(namesake, name)

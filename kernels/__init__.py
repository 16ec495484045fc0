"""The same results, faster: `accelerate` swaps modules of a loaded model for twins with the same weights.

The model in the six core files is the plain formula. A twin computes the same, up to rounding, in a way that suits the
device. After accelerate, state_dict() has the same names and values.

    on a CPU           cpu.py: other products for few rows, small matrices fused
    on an NVIDIA GPU   decoder.py: fused matrices and Triton kernels; graph.py: the decode step as a CUDA graph
"""

import importlib.metadata
import importlib.util
import sys

import torch
from torch import Tensor, nn

from kernels.checks import DTYPES, runs_kernels

namesake = None  # Hugging Face's package of the same name, once it is imported
HAS_TRITON = importlib.util.find_spec("triton") is not None


def accelerate(model: nn.Module, how: str = "auto") -> nn.Module:
    """Swap modules of a LLaVA for faster twins, in place, and return the model.

    "auto": the GPU's twins on an NVIDIA GPU of 2020 or newer, the CPU's on a CPU, none elsewhere. "triton": the GPU's.
    "torch": none. Raises ValueError for "triton" where Triton cannot run.
    """
    if how not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, not {how!r}")
    x = model.language_model.norm.weight
    on_gpu = HAS_TRITON and x.dtype in DTYPES and runs_kernels(x) and (x.is_cuda or how == "triton")
    if how == "triton" and not on_gpu:
        where = f"{x.device} in {str(x.dtype).removeprefix('torch.')}"
        needs = "Linux, an NVIDIA GPU of 2020 or newer, and float32, float16 or bfloat16"
        raise ValueError(f"Triton cannot run on {where} here: it needs {needs}")
    if on_gpu and how != "torch":
        if why := why_triton_fails(x):
            if how == "triton":
                raise ValueError(f"Triton cannot run here: {why}")
            print(f"Triton cannot run here, so the plain model is used: {why}", file=sys.stderr)
            return model
        from kernels.decoder import accelerate_on_gpu
        from kernels.graph import GraphStep

        accelerate_on_gpu(model)
        model.step = GraphStep(model)
    elif how == "auto" and x.is_cpu:
        from kernels.cpu import accelerate_on_cpu

        accelerate_on_cpu(model)
    return model


def why_triton_fails(x: Tensor) -> str | None:
    """Launch a first small kernel on the device of x (D,). Returns None if it works, else one line that says why not.

    In this launch Triton builds a part of itself, which needs a C compiler and a folder that it can write to.
    """
    from kernels.rms_norm import rms_norm

    try:
        with torch.no_grad():
            rms_norm(x.detach()[None], x.detach(), 1e-5)
    except Exception as error:  # of the compiler, the file system or the driver
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def __getattr__(name: str):
    """Look up a name that this folder lacks in Hugging Face's package `kernels`, if that is installed.

    Python run in this repository finds this folder before that package, from which transformers imports names.
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

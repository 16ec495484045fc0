"""Triton kernels: the few places where a GPU gains from doing several things at once.

A plain function of the model hands over to its kernel where `usable` says so. Nothing here changes what is computed,
up to rounding. Without a GPU or without Triton all of it stays unused, and nothing of it is imported.

How to read a kernel, best swiglu.py first: `kernel[grid](...)` starts a program for each place of the grid. All run the
same lines; tl.program_id tells them apart. A program computes with blocks, whose shapes are the comments on its lines:
powers of two, known when it is compiled (tl.constexpr), and broadcast as in PyTorch. A tensor arrives as the address
of its first number, so `x_ptr + i` with a block i is a block of addresses. tl.load and tl.store take all of them at
once, those apart where `mask` is false. Between the two everything stays on the chip: only they cost bytes.
"""

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from kernels.checks import DTYPES, INTERPRETED, has_a_gpu

__all__ = [
    "add_rms_norm",
    "attend",
    "attention",
    "choose_kernels",
    "decode_attention",
    "int8_linear",
    "rms_norm",
    "rope_into_cache",
    "swiglu",
    "usable",
]
THERE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
choice = "auto"  # what choose_kernels was told, for every model of this process
namesake = None  # Hugging Face's package of the same name, once it is asked for

if THERE:
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
    from kernels.int8 import int8_linear
    from kernels.rms_norm import add_rms_norm, rms_norm
    from kernels.rope import rope_into_cache
    from kernels.swiglu import swiglu


def choose_kernels(name: str, device: str | torch.device) -> None:
    """For all models of this process: "auto" takes kernels on CUDA devices, "torch" never, "triton" or not at all.

    Raises ValueError for another name, and for "triton" where this device or installation cannot run it.
    """
    global choice
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, not {name!r}")
    if name == "triton" and not (THERE and (INTERPRETED or has_a_gpu(torch.empty(0, device=device)))):
        raise ValueError(f"Triton cannot run on {device} here: it wants an NVIDIA GPU of 2020 or newer, and Linux")
    choice = name


def usable(x: Tensor) -> bool:
    """Whether kernels may take over here: x lies on a GPU that runs them, under torch.no_grad() and without autocast.

    A test may ask for Triton's interpreter: TRITON_INTERPRET=1 and choose_kernels("triton") take the CPU's tensors too.
    """
    if choice == "torch" or not THERE or x.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):  # no gradients, and no mixture of dtypes
        return False
    return has_a_gpu(x) or (choice == "triton" and INTERPRETED)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache, layer: int, window: int | None
) -> Tensor:
    """What llama.LlamaAttention does between its matrices: q (B, H, T, d), new k and v (B, K, T, d) -> (B, T, H * d).

    RoPE, the update of the llama.KVCache and the attention over it. What is padding, the cache knows.
    """
    k_cache, v_cache, end = cache.k[layer], cache.v[layer], cache.length + q.shape[2]
    q = rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, cache.past)
    if q.shape[2] == 1:
        out = decode_attention(q, k_cache, v_cache, cache.past, cache.first_key, window)
    else:
        out = attention(q, k_cache[:, :, :end], v_cache[:, :, :end], True, cache.first_key, window)
    return out.transpose(1, 2).flatten(-2)


def __getattr__(name: str):
    """A name that this folder lacks, from Hugging Face's package `kernels` if that is installed.

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

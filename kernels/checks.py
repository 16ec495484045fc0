"""Which dtypes and devices the kernels support, and the checks of every wrapper before it launches a kernel."""

import os
from functools import cache

import torch
from torch import Tensor

from kernels.twins import formula_needed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once: it must be set before triton is imported
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """An NVIDIA GPU's generation: (8, 0) to (8, 9) are Ampere and Ada, (9, 0) is Hopper. (0, 0) for anything else."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels run on x's device: this thread's current NVIDIA GPU, if it is an Ampere (2020) or newer.

    In Triton's interpreter, on a CPU only.
    """
    if INTERPRETED:
        return x.is_cpu
    return x.is_cuda and x.device.index == torch.cuda.current_device() and capability(x.device) >= (8, 0)


def can_run(x: Tensor) -> bool:
    """Whether the kernels support x's dtype and device, no gradients are recorded and autocast is off."""
    return x.dtype in DTYPES and runs_kernels(x) and not formula_needed()


def check_tensors(**tensors: Tensor) -> None:
    """Raise ValueError unless all have one dtype and one device that the kernels support, and none needs gradients."""
    (first, x), *_ = tensors.items()
    if x.dtype not in DTYPES:
        raise ValueError(f"{first} is {x.dtype}, but the kernels support float32, float16 and bfloat16")
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but {first} is {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {x.device}")
    if not runs_kernels(x):
        raise ValueError(f"{first} is on {x.device}, but the kernels run on the current CUDA device, from Ampere on")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise ValueError("the kernels have no gradients: use torch.no_grad(), or the plain functions to train")


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless `tensor` has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, but must be {list(shape)}")


def check_int32(name: str, tensor: Tensor, length: int, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is (length,) int32 on this device."""
    check_shape(name, tensor, length)
    if tensor.dtype != torch.int32 or tensor.device != device:
        raise ValueError(f"{name} must be int32 on {device}, but it is {tensor.dtype} on {tensor.device}")


def check_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None) -> tuple[int, ...]:
    """Check q (B, H, T, d), k and v (B, K, S, d) and first_key (B,) int32 or None. Returns B, H, K, T, S, d."""
    check_tensors(q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}, but both must be (batch, heads, tokens, width)")
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    check_shape("k", k, B, K, S, d)
    check_shape("v", v, B, K, S, d)
    if H % K or d > WIDEST_HEAD:
        heads = f"{H} query heads of width {d} for {K} key heads"
        raise ValueError(f"{heads}: the second number must divide the first, and the width be at most {WIDEST_HEAD}")
    if first_key is not None:
        check_int32("first_key", first_key, B, q.device)
    return B, H, K, T, S, d

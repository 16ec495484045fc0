"""Where and in which numbers a model runs: devices, dtypes, and modules built without memory for their weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what the tensors of a checkpoint may be


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float16 on a CUDA GPU and float32 elsewhere."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if kind == "cpu" and has_bf16 else torch.float32


def as_dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype given as such or by name ("bfloat16"); None for None and "auto", which mean the checkpoint's own."""
    if asked is None or asked == "auto":
        return None
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if (dtype := names.get(str(asked).removeprefix("torch."))) is None:
        *first, last = names
        raise ValueError(f"dtype must be auto, {', '.join(first)} or {last}, not {asked}")
    return dtype


def check_device(name: str) -> None:
    """Raise ValueError unless this machine has the device, and it is a CPU or a GPU of NVIDIA or Apple."""
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError):  # no such name, or no such hardware
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"there is no device {name!r} here: use --device cpu")


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def no_weights() -> Iterator[None]:
    """Modules built inside are on the meta device: shapes without memory, for a checkpoint's tensors to replace.

    torch.nn.init is skipped: on the meta device it computes nothing, but imports PyTorch's compiler (a second).
    """
    with torch.device("meta"), _NoInit():
        yield

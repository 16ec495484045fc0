"""The dtypes a checkpoint's tensors may have, and modules that are built without memory for their weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what the tensors of a checkpoint may be
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def as_dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype given as such or by name ("bfloat16"); None for None and "auto", which mean the checkpoint's own."""
    if asked is None or asked == "auto":
        return None
    if (dtype := DTYPE_NAMES.get(str(asked).removeprefix("torch."))) is None:
        *first, last = DTYPE_NAMES
        raise ValueError(f"dtype must be auto, {', '.join(first)} or {last}, not {asked}")
    return dtype


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

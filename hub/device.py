"""Which device a model runs on, and which dtype is fast there."""

import torch


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float16 on a CUDA GPU and float32 elsewhere."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if kind == "cpu" and has_bf16 else torch.float32


def check_device(name: str) -> None:
    """Raise ValueError unless this machine has the device, and it is a CPU or a GPU of NVIDIA or Apple."""
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError):  # no such name, or no such hardware
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"there is no device {name!r} here: use --device cpu")

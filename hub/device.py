"""Which device a model runs on, which dtype is fast there, and how much memory is free."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float16 on a CUDA GPU and float32 elsewhere."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if kind == "cpu" and has_bf16 else torch.float32


def check_device(name: str) -> None:
    """Raise ValueError unless this machine has the device, and it is a CPU or a GPU from NVIDIA or Apple."""
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError):  # no such name, or no such hardware
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"there is no device {name!r} here: use --device cpu")


def free_bytes(device: str) -> int | None:
    """Free memory of a GPU, or of the computer within the limit of its container. None if it is unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    with suppress(AttributeError, OSError, ValueError, KeyError):  # each line improves on the one before it
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all memory
        free = kernel_counts("/proc/meminfo")["MemAvailable:"] * 1024  # Linux
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used + kernel_counts("/sys/fs/cgroup/memory.stat")["inactive_file"])  # file pages
    return free


def kernel_counts(file: str) -> dict[str, int]:
    """The lines of a file that are a name and a whole number."""
    lines = map(str.split, Path(file).read_text().splitlines())
    return {name: int(rest[0]) for name, *rest in lines if rest and rest[0].isdecimal()}


def own_bytes(process: int | str = "self") -> int | None:
    """The memory of a process, this one by default, without what is mapped from files. None if it is unknown."""
    with suppress(OSError, KeyError):
        return kernel_counts(f"/proc/{process}/status")["RssAnon:"] * 1024  # Linux
    return None


def return_freed_memory() -> None:
    """Make Linux's malloc give tensors of 1 MB and more back to the system when they are freed.

    By default malloc keeps freed blocks of up to 32 MB and, because tensors are aligned, cannot reuse one for a tensor
    of the same size: a step took up to 1.6 times as much memory. The cost: the system fills new memory with zeros.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD in glibc's malloc.h

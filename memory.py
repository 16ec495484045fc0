"""Does a model fit? Asked before its weights are read, so that the answer comes in a second and not after minutes.

    needed = the weights in the dtype and form they will have + the KV cache of the tokens to come

The rest of a process, PyTorch and what flows through the model, is a few hundred megabytes more: OVERHEAD. The words
of the prompts, which are short beside pictures and answers, are left to it.
"""

import os
from pathlib import Path

import torch

from llava import LlavaConfig, LlavaForConditionalGeneration
from quantize import Int8Linear, put_int8

OVERHEAD = 300_000_000  # bytes


def cache_bytes(config: LlavaConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize


def needed_bytes(settings: dict, dtype: torch.dtype, quantize: str | None, tokens: int) -> int:
    """The memory of the model that a config.json describes (see checkpoint.read_config), with `tokens` in its cache."""
    model = LlavaForConditionalGeneration.without_weights(settings).to(dtype)
    if quantize:
        put_int8(model, quantize)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    written_out = max((m.q.numel() * dtype.itemsize for m in model.modules() if isinstance(m, Int8Linear)), default=0)
    return weights + written_out + tokens * cache_bytes(model.config, dtype) + OVERHEAD


def free_bytes(device: str) -> int | None:
    """What is free on a GPU, or of the computer's memory within the limit of a container; None where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all there is has to do
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    group = Path("/sys/fs/cgroup")
    try:
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        return min(free, left + int(used["inactive_file"]))  # files read before give way
    except (OSError, KeyError, ValueError):  # no container, or one without a limit
        return free


def check_memory(settings: dict, dtype: torch.dtype, device: str, quantize: str | None, tokens: int) -> None:
    """Raises ValueError where the model cannot fit: what it needs, what is there, and which flags would make it fit."""
    needed, free = needed_bytes(settings, dtype, quantize, tokens), free_bytes(device)
    if free is None or needed <= free:
        return
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    flags = "" if dtype == half else "--dtype bfloat16"
    fitting = "it takes a smaller model, --batch-size or --max-new-tokens, or a computer with more memory"
    for how, flag in ((None, flags), ("int8", f"{flags} --quantize int8".strip())):
        smaller = needed_bytes(settings, half, how, tokens)
        if smaller < needed and smaller <= free:
            fitting = f"{flag} needs {smaller / 1e9:.3g} GB and fits"
            break
    kind = str(dtype).removeprefix("torch.") + (f" with {quantize} weights" if quantize else "")
    where = "the GPU" if torch.device(device).type == "cuda" else "the computer"
    needs = f"this model needs {needed / 1e9:.3g} GB of memory in {kind}"
    raise ValueError(f"{needs}, and {where} has {free / 1e9:.3g} GB free: {fitting}")

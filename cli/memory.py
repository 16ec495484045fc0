"""Whether a model fits into memory, checked before its weights are read, so that an error comes at once.

    needed = the weights in the dtype and form they will have + the KV cache + OVERHEAD
             + the activations of long prompts: batches, and LLaVA-1.6's up to 2,928 tokens a picture

Weights mapped from a file count too: the system can drop their pages, but every token reads all of them again, which
is slow. So a model that does not fit runs if it is mapped, with a warning.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from hub.device import free_bytes
from quantize import Int4Linear, QuantizedLinear, quantize_model

OVERHEAD = 300_000_000  # bytes: PyTorch, the words of the prompts, and the activations of a short prompt
SHORT = 1000  # tokens: one picture of LLaVA-1.5 and a question


def cache_bytes(config, dtype: torch.dtype) -> int:
    """The keys and values of one token in all layers of the model that a LlavaConfig describes."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize


def activation_bytes(config, dtype: torch.dtype) -> int:
    """Bytes that the activations of one layer take for each token of a prompt."""
    vision, text = config.vision_config, config.text_config
    tower = 4 * vision.hidden_size + 2 * vision.intermediate_size  # a picture has about as many patches as tokens
    return max(tower, 6 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize


def weight_bytes(model: nn.Module, dtype: torch.dtype, mapped: Callable[[str], bool] = lambda name: False) -> int:
    """The parameters of a model that will run in `dtype`, without those that are mapped from a file."""
    kept = [parameter for name, parameter in model.named_parameters() if not mapped(name)]
    return sum(p.numel() * (dtype.itemsize if p.is_floating_point() else 1) for p in kept)


def needed_bytes(
    model: nn.Module,
    dtype: torch.dtype,
    quantize: str | None,
    tokens: int,
    device: str = "cpu",
    mapped: Callable[[str], bool] = lambda name: False,
) -> int:
    """The memory that a model, here on the meta device, will need with `tokens` tokens in its cache.

    `mapped` says which parameters stay in their file and are not counted.
    """
    if quantize:
        model = copy.deepcopy(model)
        quantize_model(model, quantize)
    needed = weight_bytes(model, dtype, mapped) + tokens * cache_bytes(model.config, dtype) + OVERHEAD
    more = tokens if model.config.image_grid_pinpoints else max(0, tokens - SHORT)  # beyond what OVERHEAD covers
    needed += more * activation_bytes(model.config, dtype)
    if device != "cpu":  # one matrix at a time is dequantized
        sizes = [m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)]
        needed += max(sizes, default=0) * dtype.itemsize
    else:  # the reordered copy that PyTorch's product needs (kernels/cpu.py)
        needed += sum(m.packed.numel() for m in model.modules() if isinstance(m, Int4Linear))
    return needed


def is_in_file(name: str) -> bool:
    """Whether a parameter can be a view of a file: int8 cannot, because files hold q + 128."""
    return not name.endswith(".q")


def check_memory(
    model: nn.Module, dtype: torch.dtype, device: str, quantize: str | None, tokens: int, mapped: bool
) -> None:
    """Raise ValueError if the model cannot fit, with the memory it needs and has, and flags that would make it fit.

    With `mapped`, the weights stay in their file, and a computer with too little memory for all of them reads them from
    the disk for every token: a warning is printed to stderr.
    """
    needed, free = needed_bytes(model, dtype, quantize, tokens, device), free_bytes(device)
    if free is None or needed <= free:
        return
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    flags = "" if dtype == half else "--dtype bfloat16"
    remedy = "use a smaller model, --batch-size or --max-new-tokens, or a computer with more memory"
    for how, what, stays in (
        (None, flags, lambda name: False),
        ("int8", f"{flags} --quantize int8".strip(), lambda name: False),
        ("int4", "what `python quantize.py MODEL --to int4 --out DIR` writes", lambda name: name.endswith(".packed")),
    ):
        with suppress(ValueError):  # matrices that int4 does not support
            smaller = needed_bytes(model, half, how, tokens, device, stays)
            if smaller < needed and smaller <= free:
                remedy = f"{what} needs {smaller / 1e9:.3g} GB and fits"
                break
    kind = str(dtype).removeprefix("torch.") + (f" with {quantize} weights" if quantize else "")
    where = "the GPU" if torch.device(device).type == "cuda" else "the computer"
    needs = f"this model needs {needed / 1e9:.3g} GB of memory in {kind}, and {where} has {free / 1e9:.3g} GB free"
    if not mapped or needed_bytes(model, dtype, quantize, tokens, device, is_in_file) > free:
        raise ValueError(f"{needs}: {remedy}")
    print(f"{needs}: it will be slow, because each token reads weights from the disk; {remedy}.", file=sys.stderr)

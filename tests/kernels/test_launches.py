"""What a decode step of the 7B gives a GPU to do, counted without one: tensors on the meta device have no numbers."""

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hub.tensors import no_weights
from llava import LlavaConfig, LlavaForConditionalGeneration

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction  # what the tests' conftest.py makes of kernels

from kernels.decoder import accelerate_on_gpu

WITHOUT_LAUNCH = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach")


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that launch a kernel: all but views and allocations."""

    def __init__(self, counted: Counter):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, result = operation.overloadpacket.__name__, operation(*args, **kwargs or {})
        converts = name == "to" and result.dtype != args[0].dtype
        if converts or not (operation.is_view or name in WITHOUT_LAUNCH):
            self.counted[name] += 1
        return result


def launches_of_a_step() -> Counter:
    """The launches of one decode step, by name. Reading a number on the host would fail: there is none."""
    with no_weights():
        model = LlavaForConditionalGeneration(LlavaConfig()).to(torch.bfloat16).eval()
    counted = Counter()
    with (
        mock.patch.object(InterpretedFunction, "run", lambda kernel, *_, **__: counted.update([kernel.fn.__name__])),
        mock.patch("kernels.checks.runs_kernels", lambda x: True),
    ):
        accelerate_on_gpu(model)
        cache = model.language_model.new_cache(1, 1024)
        cache.length = 600
        ids, position = (torch.zeros(shape, dtype=torch.long, device="meta") for shape in ((1,), (1, 1)))
        with torch.inference_mode(), Operations(counted):
            model.step(ids, position, cache)
    return counted


def test_a_layer_is_ten_launches_five_are_around_them_and_nothing_waits_for_the_gpu():
    counted, layers = launches_of_a_step(), LlavaConfig().text_config.num_hidden_layers
    assert counted["linear"] == 4 * layers + 1  # qkv, o, gate and up, down; the head
    kernels = ("rope_kernel", "decode_kernel", "join_kernel", "swiglu_kernel")
    assert all(counted[name] == layers for name in kernels) and counted["rms_norm_kernel"] == 2 * layers + 1
    outside = {"embedding", "index", "fill_"}  # of RoPE's table; of the cache's length, which a graph does not record
    assert all(counted[name] == 1 for name in outside)
    assert counted.total() == 10 * layers + 5, counted  # with the last norm and the head

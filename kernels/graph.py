"""The decode step as a CUDA graph: recorded once, then replayed for every token.

A step of the 7B launches more than 320 kernels, and a launch takes the host longer than most kernels run. A graph
keeps the list of launches on the GPU, and one call runs it. It records addresses and numbers: a replay makes the same
launches with the same arguments on the same memory. So whatever changes from token to token must be read from memory at
a fixed address: the ids and positions here, the cache's length in FastCache.past. The plain decoder cannot be replayed,
because it slices the cache at a length that only the host knows; nor can a step that waits for a result.
"""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.decoder import FastCache, FastLlama
from llama import KVCache

RECORDING = threading.Lock()  # PyTorch records all graphs on one stream


class RecordedStep:
    """The decode step of one cache: tensors at fixed addresses, and the graph once it is recorded."""

    @torch.inference_mode(False)  # tensors made in inference mode could not be written to outside it
    def __init__(self, input_ids: Tensor, position_ids: Tensor, moves: int):
        self.ids, self.position_ids = input_ids.clone(), position_ids.clone()  # (B,), (B, 1): what the graph reads
        self.moves = moves  # FastLlama.moves when it was made: the graph has the addresses that the weights had then
        self.scores: Tensor | None = None  # (B, V): what it writes
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False  # recording it failed, and is not tried again


class GraphStep:
    """Replaces a model's `step`: the same arguments and the same scores (B, V), which the next call overwrites.

    A graph belongs to one cache and is stored there. The first step with a cache, or after the weights were moved, runs
    normally, because Triton compiles the kernels and matrices are fused during it; the second step is recorded.
    """

    def __init__(self, model: nn.Module):
        self.model, self.plain_step = model, type(model).step

    def __reduce__(self):  # for copy.deepcopy and pickle
        return GraphStep, (self.model,)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        if not self.can_replay(cache):
            return self.plain_step(self.model, input_ids, position_ids, cache)
        step, moves = cache.recorded, self.model.language_model.moves
        if step is None or step.moves != moves:
            cache.recorded = RecordedStep(input_ids, position_ids, moves)
            return self.plain_step(self.model, input_ids, position_ids, cache)
        cache.check(len(input_ids), cache.length + 1)
        if step.graph is None and not step.failed:
            self.record(step, cache)
        if step.failed:
            return self.plain_step(self.model, input_ids, position_ids, cache)
        step.ids.copy_(input_ids)
        step.position_ids.copy_(position_ids)
        cache.begin()
        step.graph.replay()
        cache.length += 1
        return step.scores

    def can_replay(self, cache: KVCache) -> bool:
        """Whether a step with this cache runs on a GPU and does not fall back to the plain formula."""
        decoder = self.model.language_model
        x = decoder.norm.weight  # for its dtype and device
        return isinstance(decoder, FastLlama) and on_gpu(x) and decoder.can_use(cache, x)

    def record(self, step: RecordedStep, cache: FastCache) -> None:
        """Record a step. Its kernels are not run."""
        length, graph = cache.length, torch.cuda.CUDAGraph()
        try:
            with (
                RECORDING,
                interrupts_later(),
                no_collection(),
                cache.recording(),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),  # other threads may allocate memory
            ):
                step.scores = self.plain_step(self.model, step.ids, step.position_ids, cache)
            step.graph = graph
        except RuntimeError:  # the driver refused an operation while recording
            step.failed = True
        finally:
            cache.length = length


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and not while a graph is recorded: freeing an old graph's memory would invalidate it."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Ctrl-C during the block takes effect at its end: in PyTorch's own code it could leave the stream recording."""
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def on_gpu(x: Tensor) -> bool:  # a function, so that tests can record a stand-in for a graph without a GPU
    return x.is_cuda

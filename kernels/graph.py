"""The decode step as a CUDA graph: recorded once, then replayed for every token.

A step of the 7B launches some four hundred kernels, and each launch costs the host longer than most kernels run. A
graph keeps the whole list on the GPU, and one call runs it. What it records are addresses and numbers: a replay runs the
same launches with the same arguments on the same memory. So everything that changes from token to token has to be read
from memory at a fixed address: the ids and positions here, the cache's length in FastCache.past. The plain decoder
slices the cache at a length known to the host, so its step cannot be replayed, nor can one that waits for a result.
"""

import torch
from torch import Tensor, nn

from kernels.decoder import FastCache


class GraphStep:
    """Takes the place of a model's `step`: the same arguments, the same scores (B, V), overwritten by the next call.

    A graph belongs to one cache. With another cache the first step runs normally, for Triton compiles in it, and the
    second one is recorded.
    """

    def __init__(self, model: nn.Module):
        self.model, self.plain_step = model, type(model).step
        self.forget()

    def forget(self) -> None:
        self.cache: FastCache | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ids = self.position_ids = self.logits = None  # (B,), (B, 1), (B, V): what the graph reads and writes

    def __call__(self, input_ids: Tensor, position_ids: Tensor, cache) -> Tensor:
        if not isinstance(cache, FastCache) or not cache.k[0].is_cuda or cache.holes:
            return self.plain_step(self.model, input_ids, position_ids, cache)
        if cache is not self.cache:
            self.forget()
            self.cache, self.ids, self.position_ids = cache, input_ids.clone(), position_ids.clone()
            return self.plain_step(self.model, input_ids, position_ids, cache)
        cache.check(cache.batch, cache.length + 1)
        if self.graph is None:
            self.record(cache)
        self.ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        cache.begin()
        self.graph.replay()
        cache.length += 1
        return self.logits

    def record(self, cache: FastCache) -> None:
        length, graph = cache.length, torch.cuda.CUDAGraph()
        try:
            with cache.recording(), torch.cuda.graph(graph):  # kernels are recorded, not run
                self.logits = self.plain_step(self.model, self.ids, self.position_ids, cache)
        finally:
            cache.length = length
        self.graph = graph

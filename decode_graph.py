"""The decode step as a CUDA graph: recorded once, then replayed for every token.

A step of the 7B is some four hundred launches, and each costs the host longer than most of them take on the GPU. A
graph keeps the whole list on the GPU, and one call runs it. What is recorded are addresses and numbers: the same
launches, with the same arguments, on the same memory. So everything that differs from token to token must lie in
memory that stays where it is: the token's id and position here, the length of the cache in KVCache.past, which the
kernels read on the device and the step itself counts up. The plain functions cut the cache at a length that the host
knows, so they cannot be replayed; nor can anything that waits for a result of the GPU.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

import kernels

RECORDING = threading.Lock()  # torch.cuda.graph captures on one stream, which all threads share


class DecodeGraph:
    """In the place of generate.decode_one_token, for one answer: the same arguments, the same scores (B, V).

    The scores lie where the next call will write its own. Every call must bring the same model and the same cache.
    """

    def __init__(self, decode: Callable[..., Tensor]):
        self.decode = decode
        self.ids, self.position_ids = None, None  # (B,), (B, 1): what the graph reads
        self.logits = None  # (B, V): what it writes
        self.graph = None

    @staticmethod
    def fits(cache) -> bool:
        """Whether this answer can be decoded so: on a GPU, and no part of the step takes the plain path."""
        return cache.k[0].is_cuda and kernels.usable(cache.k[0]) and not cache.holes

    def __call__(self, model, ids: Tensor, position_ids: Tensor, cache) -> Tensor:
        if getattr(model, "times_each_step", False):  # explain.Recorder: a replay would pass it by
            return self.decode(model, ids, position_ids, cache)
        if self.ids is None:  # the first step runs as it is, for Triton compiles and libraries set up in it
            self.ids, self.position_ids = ids.clone(), position_ids.clone()
            return self.decode(model, ids, position_ids, cache)
        if self.graph is None:
            self.record(model, cache)
        self.ids.copy_(ids)
        self.position_ids.copy_(position_ids)
        self.graph.replay()
        cache.length += 1  # the graph counts cache.past, on the device; this is the host's count
        return self.logits

    def record(self, model, cache) -> None:
        length = cache.length
        self.graph = torch.cuda.CUDAGraph()
        # While it records nothing runs on the GPU; only Python does, and it counts. Without thread_local, a capture
        # would forbid every other thread to take memory.
        with RECORDING, torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self.decode(model, self.ids, self.position_ids, cache)
        cache.length = length

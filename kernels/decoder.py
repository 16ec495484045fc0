"""Twins for a GPU: the decoder with fused matrices, and Triton kernels for the operations between the matrices.

    llama.Llama -> FastLlama    llama.KVCache -> FastCache    quantize.Int8Linear -> FastInt8Linear
    clip.attention -> tower_attention

FastLlama has the children of the Llama that it replaces, under the same names, and gives the same results. q, k and v
are one product, gate and up another. RoPE's angles are computed once, for all positions. Keys and values go straight
into a FastCache, whose length and padding the kernels read on the device. FastLlama runs the plain formula for
attentions, hidden states, gradients and autocast, without a FastCache, for dtypes and devices that the kernels do not
support, for padding between a row's tokens, and for prompts with positions beyond the model's context and the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import clip
from kernels.attention import attention
from kernels.checks import WIDEST_HEAD, can_run
from kernels.decode_attention import decode_attention
from kernels.int8 import MOST_ROWS, int8_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_into_cache
from kernels.swiglu import swiglu
from kernels.twins import FusedLinears, adopt
from llama import KVCache, Llama, LlamaConfig, RMSNorm, rope_angles
from quantize import Int8Linear


class FastCache(KVCache):
    """A KVCache that keeps on the device what the kernels read. `length`, on the host, is the only count of tokens.

    `past` (1,) is set to `length` by begin(), before each forward. `first_key` (B,) is where the left padding of each
    row ends. `holes`: a row has padding elsewhere too, which the kernels do not support. `rope` is the model's
    FastLlama.rope_table. `recorded` is the decode step of this cache as a CUDA graph (kernels/graph.py).
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, rope: Tensor):
        dtype, device = rope.dtype, rope.device
        self.rope = rope  # kept here too: a graph has its address, and the model may replace it by a longer one
        self.past = torch.zeros(1, dtype=torch.int32, device=device)
        self.first_key = torch.zeros(batch, dtype=torch.int32, device=device)
        self.holes, self.is_recorded, self.recorded = False, False, None
        super().__init__(config, batch, capacity, dtype, device)

    @property
    def attention_mask(self) -> Tensor | None:
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:  # (B, tokens), False on padding
        self._attention_mask = mask
        self.holes = False
        self.first_key.zero_()
        if mask is not None:
            self.first_key.copy_(mask.int().argmax(-1))
            self.holes = bool((self.first_key + mask.sum(-1) < mask.shape[1]).any())

    def begin(self) -> None:
        """Set `past` on the device, except while recording: every replay would set it to that number again."""
        if not self.is_recorded:
            self.past.fill_(self.length)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.is_recorded = True
        try:
            yield
        finally:
            self.is_recorded = False


class FastInt8Linear(Int8Linear):
    """Int8Linear with a kernel for a few rows. For more, the matrix is dequantized to x's dtype."""

    def __init__(self, plain: Int8Linear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.dtype == self.scale.dtype and can_run(x) and 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
            y = int8_linear(x, self.q, self.scale)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class FastLlama(Llama):
    """The twin of Llama, described at the top of this file."""

    def __init__(self, plain: Llama):
        adopt(self, plain)
        self.moves = 0  # how often the weights may have been moved
        self.rope: Tensor | None = None
        self.fused: list[tuple[FusedLinears, FusedLinears]] = []
        for layer in self.layers:
            qkv = FusedLinears(layer.self_attn, ("q_proj", "k_proj", "v_proj"))
            gate_up = FusedLinears(layer.mlp, ("gate_proj", "up_proj"))
            qkv.fuse()
            gate_up.fuse()
            self.fused.append((qkv, gate_up))

    def _apply(self, fn, recurse: bool = True):  # what .to(), .float() and so on call
        self.moves += 1
        self.rope = None
        for qkv, gate_up in self.fused:
            qkv.forget()
            gate_up.forget()
        return super()._apply(fn, recurse)

    def new_cache(self, batch: int, capacity: int) -> FastCache:
        return FastCache(self.config, batch, capacity, self.rope_table(capacity))

    def rope_table(self, tokens: int) -> Tensor:  # (2, N, d / 2), in the dtype of the weights
        """cos and sin of RoPE's angles at positions 0 to N - 1: the model's context, or `tokens` if they are more.

        The formula takes thirteen launches in every step, and indexing the table takes one.
        """
        table, weight = self.rope, self.norm.weight
        if table is None or table.shape[1] < tokens:
            N = max(tokens, self.config.max_position_embeddings)
            angles = rope_angles(self.config, torch.arange(N, device=weight.device))  # (N, d / 2)
            table = self.rope = torch.stack([angles.cos(), angles.sin()]).to(weight.dtype)
        return table

    def can_use(self, cache: KVCache | None, x: Tensor) -> bool:
        """Whether the kernels can run x with this cache."""
        return isinstance(cache, FastCache) and not cache.holes and self.config.head_dim <= WIDEST_HEAD and can_run(x)

    def forward(self, x, attention_mask=None, position_ids=None, cache=None, hidden_states=None, attentions=None):
        B, T, _ = x.shape
        asked = hidden_states is not None or attentions is not None
        if attention_mask is not None and isinstance(cache, FastCache) and not asked:
            self.padding_mask(attention_mask, B, cache.length + T, cache)  # the cache keeps it
            attention_mask = None
        if asked or not self.can_use(cache, x) or not self.in_table(position_ids, cache):
            return super().forward(x, attention_mask, position_ids, cache, hidden_states, attentions)
        cache.check(B, cache.length + T)
        cache.begin()
        new = slice(cache.length, cache.length + T)
        rope = cache.rope[:, None, new] if position_ids is None else cache.rope[:, position_ids]
        rope = rope[:, :, None].unbind()  # cos and sin, (B or 1, 1, T, d / 2) each
        added = None  # what the last sublayer adds to x: the next norm adds it, in the same kernel
        for layer, (qkv, gate_up) in zip(self.layers, self.fused, strict=True):
            attn, mlp = layer.self_attn, layer.mlp
            x, y = self.add_and_norm(x, added, layer.input_layernorm)
            added = attn.o_proj(self.attend(*qkv(y), rope, cache, attn.layer))
            x, y = self.add_and_norm(x, added, layer.post_attention_layernorm)
            added = mlp.down_proj(swiglu(*gate_up(y)))
        cache.length += T
        return self.add_and_norm(x, added, self.norm)[1]

    @staticmethod
    def in_table(position_ids: Tensor | None, cache: FastCache) -> bool:
        """Whether cache.rope has these positions. A decode step is not checked: the host would wait for the GPU."""
        if position_ids is None or position_ids.shape[1] == 1:
            return True
        first, last = position_ids.aminmax()
        return bool((first >= 0) & (last < cache.rope.shape[1]))

    @staticmethod
    def add_and_norm(x: Tensor, added: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """x + added and its norm, in one launch."""
        if added is None:
            return x, rms_norm(x, norm.weight, norm.eps)
        return add_rms_norm(x, added, norm.weight, norm.eps)

    def attend(self, q, k, v, rope: tuple[Tensor, Tensor], cache: FastCache, layer: int) -> Tensor:
        """RoPE, the cache's update and attention: q (B, T, H * d), k and v (B, T, K * d) -> (B, T, H * d)."""
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in (q, k, v))
        window, end = self.windows[layer], cache.length + q.shape[2]
        k_cache, v_cache = cache.k[layer], cache.v[layer]
        q = rope_into_cache(q, k, v, *rope, k_cache, v_cache, cache.past)
        if q.shape[2] == 1:
            out = decode_attention(q, k_cache, v_cache, cache.past, cache.first_key, window)
        else:
            out = attention(q, k_cache[:, :, :end], v_cache[:, :, :end], True, cache.first_key, window)
        return out.transpose(1, 2).flatten(-2)


def tower_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # three (B, H, T, d) -> (B, H, T, d)
    """clip.attention by the kernel."""
    if q.shape[-1] > WIDEST_HEAD or not can_run(q):
        return clip.attention(q, k, v)
    return attention(q, k, v, causal=False)


def accelerate_on_gpu(model: nn.Module) -> None:
    """Swap int8 matrices, the tower's attention and the decoder for their twins."""
    for name, module in list(model.named_modules()):
        if type(module) is Int8Linear:
            model.set_submodule(name, FastInt8Linear(module))
    for layer in model.vision_tower.encoder.layers:
        layer.self_attn.attention = tower_attention
    model.language_model = FastLlama(model.language_model)

"""The decoder's twin for a GPU: fused matrices, and Triton kernels for everything between the matrices.

FastLlama has the children of the llama.Llama that it replaces, under the same names, and gives the same results. q, k
and v are stored as one matrix, gate and up as another; the plain weights are views of them. Keys and values are rotated
straight into a FastCache, whose length and padding the kernels read on the device. It runs the plain formula when
gradients, autocast, attentions or hidden states are asked for, and for masks with padding inside a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.attention import attention
from kernels.cpu import adopt, fuse
from kernels.decode_attention import decode_attention
from kernels.int8 import MOST_ROWS, int8_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_into_cache
from kernels.swiglu import swiglu
from llama import KVCache, Llama, LlamaConfig, rope_angles
from quantize import Int8Linear


class FastCache(KVCache):
    """A KVCache that tells kernels on the device what they need of it. `length`, on the host, is the only count.

    `past` (1,) is set to `length` by begin(), before each forward. `first_key` (B,) is where the left padding of each
    row ends. `holes`: the mask has padding elsewhere too, which the kernels do not support.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device):
        self.past = torch.zeros(1, dtype=torch.int32, device=device)
        self.first_key = torch.zeros(batch, dtype=torch.int32, device=device)
        self.holes, self.is_recorded = False, False
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
        if not self.is_recorded:  # a replay would write the length of the recording
            self.past.fill_(self.length)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.is_recorded = True
        try:
            yield
        finally:
            self.is_recorded = False


class FastInt8Linear(Int8Linear):
    """Int8Linear with a kernel for a few rows."""

    def __init__(self, plain: Int8Linear):
        adopt(self, plain)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_grad_enabled():
            return int8_linear(x, self.q, self.scale)
        return super().forward(x)


class FastLlama(Llama):
    """The twin of Llama. See the top of this file."""

    def __init__(self, plain: Llama):
        adopt(self, plain)
        self.fuse()

    def fuse(self) -> None:  # a list, so that state_dict() has the names of the plain decoder
        self.fused: list[tuple[nn.Module, nn.Module]] = []
        for layer in self.layers:
            attn, mlp = layer.self_attn, layer.mlp
            qkv, gate_up = [attn.q_proj, attn.k_proj, attn.v_proj], [mlp.gate_proj, mlp.up_proj]
            self.fused.append((fuse(qkv, largest=None), fuse(gate_up, largest=None)))

    def _apply(self, fn, recurse: bool = True):  # .to(), .float(), ...
        super()._apply(fn, recurse)
        self.fuse()
        return self

    def new_cache(self, batch: int, capacity: int) -> FastCache:
        return FastCache(self.config, batch, capacity, self.norm.weight.dtype, self.norm.weight.device)

    def forward(self, x, attention_mask=None, position_ids=None, cache=None, hidden_states=None, attentions=None):
        plain = not isinstance(cache, FastCache) or hidden_states is not None or attentions is not None
        if plain or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, attention_mask, position_ids, cache, hidden_states, attentions)
        B, T, _ = x.shape
        if attention_mask is None:
            cache.check(B, cache.length + T)
        else:
            self.padding_mask(attention_mask, B, cache.length + T, cache)  # the cache keeps it
        if cache.holes:
            return super().forward(x, attention_mask, position_ids, cache)
        cache.begin()
        if position_ids is None:
            position_ids = torch.arange(cache.length, cache.length + T, device=x.device)[None]
        angles = rope_angles(self.config, position_ids)[:, None]  # (B, 1, T, d / 2)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer, (qkv, gate_up) in zip(self.layers, self.fused, strict=True):
            y = rms_norm(x, layer.input_layernorm.weight, self.config.rms_norm_eps)
            y = layer.self_attn.o_proj(self.attend(qkv(y), rope, cache, layer.self_attn.layer))
            x, y = add_rms_norm(x, y, layer.post_attention_layernorm.weight, self.config.rms_norm_eps)
            x = x + layer.mlp.down_proj(swiglu(*gate_up(y).chunk(2, dim=-1)))
        cache.length += T
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps)

    def attend(self, qkv: Tensor, rope: tuple[Tensor, Tensor], cache: FastCache, layer: int) -> Tensor:
        """RoPE, the cache's update and attention: (B, T, (H + K + K) * d) -> (B, T, H * d)."""
        H, K, window = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.sliding_window
        heads = qkv.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, H + K + K, T, d)
        q, k, v = heads.split((H, K, K), dim=1)
        k_cache, v_cache, end = cache.k[layer], cache.v[layer], cache.length + q.shape[2]
        q = rope_into_cache(q, k, v, *rope, k_cache, v_cache, cache.past)
        if q.shape[2] == 1:
            out = decode_attention(q, k_cache, v_cache, cache.past, cache.first_key, window)
        else:
            out = attention(q, k_cache[:, :, :end], v_cache[:, :, :end], True, cache.first_key, window)
        return out.transpose(1, 2).flatten(-2)


def tower_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # three (B, H, T, d) -> (B, H, T, d)
    """clip.attention by the kernel."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(q.device.type):
        return nn.functional.scaled_dot_product_attention(q, k, v)
    return attention(q, k, v, causal=False)

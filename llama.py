"""The decoder of Llama, Mistral and Qwen2: a sequence of vectors in, a sequence of vectors out.

    N blocks of  x = x + attention(RMSNorm(x)),  x = x + SwiGLU(RMSNorm(x)),  and a last RMSNorm;  x is (B, T, D)

The decoder does not know where its input vectors come from: word embeddings and projected image patches are treated
alike, which is what lets LLaVA insert pictures. Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971. Mistral
adds grouped-query attention and a sliding window: Jiang et al. 2023, https://arxiv.org/abs/2310.06825. Qwen2 adds
biases to q, k and v: Yang et al. 2024, https://arxiv.org/abs/2407.10671.

    B batch    T new tokens    S all tokens so far, new ones included    D width    H heads    K key/value heads
    d head width

Not implemented: dropout, RoPE scaling other than linear and Llama 3.1's, removing keys that left the window.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LlamaConfig:
    """The decoder's sizes: the fields of a checkpoint's config.json, with the reference's defaults for absent ones."""

    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008  # width inside the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # K; None means H, plain multi-head attention
    head_dim: int | None = None  # d; None means D / H
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # the longest context it was trained on, in tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    rope_type: str = "default"  # "linear" and "llama3" extend the context that the model was first trained on
    rope_factor: float = 1.0  # frequencies are divided by it, in "llama3" only the low ones
    low_freq_factor: float = 1.0  # "llama3": at most this many turns in the old context: the frequency is divided
    high_freq_factor: float = 4.0  # at least this many turns: it is kept; between the two it is interpolated
    original_max_position_embeddings: int = 8192  # "llama3": the old context, in tokens
    attention_bias: bool = False  # q, k, v and o have a bias
    qkv_bias: bool = False  # Qwen2: q, k and v have a bias, o has none
    mlp_bias: bool = False
    sliding_window: int | None = None  # a token attends to this many tokens, itself included; None means all
    layer_types: list[str] | None = None  # "full_attention" or "sliding_attention" per layer; None: all sliding
    tie_word_embeddings: bool = False
    model_type: str = "llama"  # or "mistral", "qwen2": the same decoder with other defaults (hub/settings.py)

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        H, K = self.num_attention_heads, self.num_key_value_heads
        if H % K:
            raise ValueError(f"text_config: {H} heads cannot share {K} key/value heads equally")
        if self.hidden_act != "silu":
            raise ValueError(f"text_config: hidden_act {self.hidden_act!r} is unknown: this decoder uses silu")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: LayerNorm without mean and bias terms (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        x32 = x.float()  # a square can overflow float16, and a mean of squares loses precision in bfloat16
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)  # Llama rounds before it multiplies by the weight


def rope_angles(config: LlamaConfig, position_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, d / 2), float32
    """The angles of rotary position embedding: position / rope_theta^(2i / d) for pair i = 0 ... d / 2 - 1.

    RoPE replaces position embeddings. In each layer, pair i of the numbers in each query and key is rotated by
    this angle, which grows more slowly for larger i. The product q . k then depends on the positions of the two tokens
    only through their distance (Su et al. 2021, section 3.2.2).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # radians per token
    scaled = frequencies / config.rope_factor
    if config.rope_type == "llama3":  # high frequencies, which encode short distances, are kept
        turns = frequencies * config.original_max_position_embeddings / (2 * math.pi)
        kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        scaled = torch.lerp(scaled, frequencies, kept.clamp(0, 1))
    return position_ids[..., None].float() * scaled


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of queries (B, H, T, d) or keys (B, K, T, d). cos and sin are (B or 1, 1, T, d / 2).

    The paper pairs neighbours (0, 1), (2, 3), ...; these checkpoints pair number i with number i + d / 2.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def visible_keys(attention_mask: Tensor | None, past: int, T: int, window: int | None, device) -> Tensor | None:
    """Which of the S = past + T keys each of the T new queries attends to: (B or 1, 1, T, S), True where it does.

    `attention_mask` is (B, S), False at padding, or None. Returns None where `attention` needs no mask: there is no
    padding, S fits the window, and either all tokens are new (each attends to itself and those before it) or only one
    is (it attends to all). A query at padding may see no key. Its output must still be finite: later layers give its
    key and value weight 0, but 0 * NaN is NaN.
    """
    S = past + T
    if attention_mask is None and (T == 1 or past == 0) and (window is None or S <= window):
        return None
    i = torch.arange(past, S, device=device)[:, None]  # positions of the queries
    j = torch.arange(S, device=device)  # and of the keys
    mask = (j <= i)[None, None]
    if window is not None:
        mask = mask & (i - j < window)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :]
    return mask


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of T queries (B, H, T, d) over S keys and values (B, K, S, d), where `mask` is True; None means causal.

    Returns softmax(q k^T / sqrt(d)) v (B, H, T, d) and the softmax's weights (B, H, T, S). Vaswani et al. 2017, eq. 1.
    """
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    groups = q.shape[1] // k.shape[1]  # H / K query heads share each key head (Ainslie et al. 2023, section 2.2)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, K, S, d) -> (B, H, S, d)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, S)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # not -inf: softmax of a row of -inf is NaN
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The output of eager_attention, by a PyTorch function that need not store the weights. It may differ at padding.

    Without a mask T must be 1 or S, as visible_keys ensures: is_causal lets query t see keys 0 to t, whatever S is.
    """
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """The keys and values of all tokens so far, so that only new tokens go through the layers.

    `k[layer]` and `v[layer]` are (B, K, capacity, d); the first `length` places are filled, padding included. Made by
    Llama.new_cache. `attention_mask` (B, tokens): False at padding, None without padding. New tokens are real.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.attention_mask: Tensor | None = None

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError unless the cache is for this batch and has room for `tokens` tokens in total."""
        if batch != self.batch:
            raise ValueError(f"the cache is for a batch of {self.batch}, but the batch is {batch}")
        if tokens > self.capacity:
            raise ValueError(f"the cache is full: it has room for {self.capacity} tokens, and {tokens} are needed")

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, K, T, d) -> (B, K, S, d)
        """Append one layer's new keys and values. Returns all, as views. Llama.forward increases `length` later."""
        batch, heads, _, width = self.k[layer].shape
        if k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != width:
            raise ValueError(f"the cache holds [{batch}, {heads}, tokens, {width}], but it was given {list(k.shape)}")
        end = self.length + k.shape[2]
        self.check(batch, end)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class LlamaAttention(nn.Module):
    attention = staticmethod(attention)  # an attribute, so that it can be replaced

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim = layer, d
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(D, H * d, bias=bias)
        self.k_proj = nn.Linear(D, K * d, bias=bias)
        self.v_proj = nn.Linear(D, K * d, bias=bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.attention_bias)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D) -> (B, H, T, d) and two (B, K, T, d)
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projections)

    def forward(self, x, rope, mask=None, cache=None, attentions=None) -> Tensor:  # (B, T, D) -> (B, T, D)
        """`rope`: cos and sin for apply_rope. `mask`: (B or 1, 1, T, S) or None. `attentions` collects the weights."""
        q, k, v = self.qkv(x)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, d); keys are stored after their rotation
        if attentions is None:
            out = self.attention(q, k, v, mask)
        else:
            out, weights = eager_attention(q, k, v, mask)
            attentions.append(weights)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, rope, mask=None, cache=None, attentions=None) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, attentions)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Llama(nn.Module):
    """The decoder without its output head. Modules have the names of the checkpoints' tensors."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kinds = config.layer_types or ["sliding_attention"] * config.num_hidden_layers
        self.windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""
        return KVCache(self.config, batch, capacity, self.norm.weight.dtype, self.norm.weight.device)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Run T new tokens, given as vectors, after the `cache.length` tokens in the cache.

        `attention_mask` (B, S) is zero or False on padding; without it the mask kept in the cache applies.
        `position_ids` (B or 1, T) continue from the cache unless given. Appends the input of each layer and the final
        output to the list `hidden_states`, and each layer's attention weights (B, H, T, S) to `attentions`, if given.
        """
        B, T, _ = x.shape
        past = cache.length if cache is not None else 0
        if cache is not None:
            cache.check(B, past + T)
        attention_mask = self.padding_mask(attention_mask, B, past + T, cache)
        masks = {window: visible_keys(attention_mask, past, T, window, x.device) for window in set(self.windows)}
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)[None]
        angles = rope_angles(self.config, position_ids)[:, None]  # (B, 1, T, d / 2): the same for all heads
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        for layer, window in zip(self.layers, self.windows, strict=True):
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x, rope, masks[window], cache, attentions)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            cache.length += T
        return x

    @staticmethod
    def padding_mask(attention_mask: Tensor | None, B: int, S: int, cache: KVCache | None) -> Tensor | None:
        """The mask over all S keys as booleans, or None if no key is padding.

        A mask that is passed is kept in the cache. If none is passed, the kept one is returned, extended.
        """
        if attention_mask is None:
            kept = cache.attention_mask if cache is not None else None
            return None if kept is None else F.pad(kept, (0, S - kept.shape[1]), value=True)  # new tokens are real
        if attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask is {[*attention_mask.shape]}, but batch and tokens so far are {[B, S]}")
        mask = None if attention_mask.all() else attention_mask.bool()
        if cache is not None:
            cache.attention_mask = mask
        return mask

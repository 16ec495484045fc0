"""The decoder of Llama and Mistral: vectors in, vectors out.

    x (B, T, D)  ->  N blocks of  [RMSNorm -> attention with RoPE -> +]  [RMSNorm -> SwiGLU -> +]  ->  RMSNorm

The decoder does not care where its vectors come from: word embeddings and projected picture patches are the same to it,
and that is all the trick there is to LLaVA. Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971. Mistral adds
shared key/value heads and a sliding window: Jiang et al. 2023, https://arxiv.org/abs/2310.06825.

    B batch    T new tokens    S tokens so far, the new ones included    D width    H heads    K key/value heads
    d width of a head

Left out: dropout (neither model uses it), RoPE scaling other than linear, and trimming the cache to Mistral's window.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from clip import known_fields


@dataclass
class LlamaConfig:
    """The decoder's sizes, with the field names and defaults of a checkpoint's config.json."""

    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008  # width inside the SwiGLU
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # K; as many as heads unless told, which is plain multi-head attention
    head_dim: int | None = None  # d; D / H unless told
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # the longest context it was trained on, in tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_factor: float = 1.0  # positions are divided by it: the `factor` of linear rope_scaling or rope_parameters
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # a token sees this many tokens, itself included; None for all before it
    tie_word_embeddings: bool = False
    model_type: str = field(default="llama", init=False)

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads equally"
            raise ValueError(f"text_config: {heads}")
        if self.hidden_act != "silu":
            raise ValueError(f"text_config: hidden_act {self.hidden_act!r} is unknown: this decoder's gate is silu")


@dataclass
class MistralConfig(LlamaConfig):
    """Mistral: Llama with grouped queries and a sliding window by default."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096
    model_type: str = field(default="mistral", init=False)


def decoder_config(settings: dict) -> LlamaConfig:
    """A checkpoint's text_config as a LlamaConfig or MistralConfig. Raises ValueError for any other decoder."""
    families = {"llama": LlamaConfig, "mistral": MistralConfig}
    family = settings.get("model_type", "llama")
    if family not in families:
        raise ValueError(f"text_config: the decoder family {family!r} is unknown: this code knows llama and mistral")
    # Old files write rope_theta and rope_scaling, new ones one dictionary rope_parameters.
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"text_config: rope_type {kind!r} is unknown: this code knows default and linear")
    settings = {**settings, "rope_theta": rope.get("rope_theta", settings.get("rope_theta", 10000.0))}
    settings["rope_factor"] = rope.get("factor", settings.get("rope_factor", 1.0))
    return families[family](**known_fields(families[family], settings))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, equation 4): LayerNorm without mean and bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        if kernels.usable(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        x32 = x.float()  # squares overflow in float16 and lose digits in bfloat16; Llama rounds back before the weight
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)

    def after_adding(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (..., D) -> x + y and its norm
        if kernels.usable(x):
            return kernels.add_rms_norm(x, y, self.weight, self.eps)
        x = x + y
        return x, self(x)


def rope_angles(config: LlamaConfig, position_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, d / 2), float32
    """RoPE's angles (Su et al. 2021, section 3.2.2): position times a frequency; each pair of numbers has its own."""
    pairs = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**pairs * config.rope_factor)
    return position_ids[..., None].float() * frequencies


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, H, T, d), two (B, 1, T, d / 2) -> (B, H, T, d)
    """Turn each pair of numbers by its angle, so that positions enter q . k through their distance only.

    The paper pairs neighbours (0, 1), (2, 3), ...; these checkpoints pair number i with number i + d / 2.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def visible_keys(attention_mask: Tensor | None, past: int, T: int, window: int | None, device) -> Tensor | None:
    """Which of S = past + T keys each of the T new queries sees: a boolean (B or 1, 1, T, S), True where it does.

    `attention_mask` is (B, S), False where a key is padding, or None. The result is None where the causal rule is
    enough: no padding, no window within reach, and no past or a single query.
    """
    S = past + T
    if attention_mask is None and (T == 1 or past == 0) and (window is None or S <= window):
        return None
    i = torch.arange(past, S, device=device)[:, None]
    j = torch.arange(S, device=device)
    mask = (j <= i)[None, None]
    if window is not None:
        mask = mask & (i - j < window)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :]
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of T queries (B, H, T, d) over S keys and values (B, K, S, d) -> (B, H, T, d).

    Gives what `attention_by_hand` gives, by PyTorch's function, which never holds the T x S weights.
    """
    if q.requires_grad and q.device.type == "cpu":  # a small decoder trains faster by the formula
        return attention_by_hand(q, k, v, mask)[0]
    if mask is None and kernels.usable(q):
        return kernels.attention(q, k, v, causal=True)
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula itself (Vaswani et al. 2017, equation 1), for whoever wants the weights (B, H, T, S) too."""
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    groups = q.shape[1] // k.shape[1]  # grouped queries (Ainslie et al. 2023): each key head serves H / K query heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, K, S, d) -> (B, H, S, d)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, S)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


class KVCache:
    """The keys and values of every token so far, so that a new token costs one token's work and not the whole text's.

    `k[layer]` and `v[layer]` are (B, K, room, d); the first `length` places are filled. The room is taken once and not
    copied for every token: so one row decodes 1.06 times as fast, and four 1.22 times (161M weights, bf16, 2 cores).
    `attention_mask` (B, room) is False where a key is padding and must never be seen.
    The kernels read what they need of this on the device: `past` (1,) is `length`, `first_key` (B,) is where each row's
    left padding ends. They know no other padding: with `holes` in the mask the model takes the plain path.
    """

    def __init__(self, config: LlamaConfig, batch: int, room: int, dtype: torch.dtype, device) -> None:
        shape = (batch, config.num_key_value_heads, room, config.head_dim)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.attention_mask = torch.ones(batch, room, dtype=torch.bool, device=device)
        self.first_key = torch.zeros(batch, dtype=torch.int32, device=device)
        self.past = torch.zeros(1, dtype=torch.int32, device=device)
        self.padded = self.holes = False
        self.length = 0

    def check_room(self, needed: int) -> None:
        if needed > (room := self.attention_mask.shape[1]):
            raise ValueError(f"the cache is full: it has room for {room} tokens, and {needed} are needed")

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, K, T, d) -> (B, K, S, d)
        """Write one layer's new keys and values behind the old ones and return all of them, as views."""
        batch, heads, _, width = self.k[layer].shape
        if k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != width:
            raise ValueError(f"the cache holds [{batch}, {heads}, tokens, {width}], but it was given {list(k.shape)}")
        end = self.length + k.shape[2]
        self.check_room(end)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class Linear(nn.Linear):
    """nn.Linear, with a faster product on a CPU for the one row or the few of decoding (161M weights, 2 cores)."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.is_cpu and x.dtype == self.weight.dtype and self.bias is None and not x.requires_grad:
            rows = x.numel() // self.in_features
            if rows == 1:  # decodes 1.30 times as fast in bfloat16
                return torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            if rows <= 64 and x.dtype == torch.bfloat16:  # four rows decode 1.21 times as fast, and 64 gain too
                return (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Matrices that read the same x as one, which decodes 1.04 times as fast in bfloat16; the caller splits the result.

    `parts` are their names in a checkpoint and how many rows each has.
    """

    def __init__(self, in_features: int, bias: bool, **parts: int):
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = parts


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim, self.window = layer, H, K, d, config.sliding_window
        self.qkv_proj = FusedLinear(D, config.attention_bias, q_proj=H * d, k_proj=K * d, v_proj=K * d)
        self.o_proj = Linear(H * d, D, bias=config.attention_bias)

    def forward(self, x, rope, mask=None, cache=None, attentions=None) -> Tensor:  # (B, T, D) -> (B, T, D)
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + K + K, T, d)
        q, k, v = qkv.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        if cache is not None and attentions is None and mask is None and kernels.usable(x):  # all that is below at once
            return self.o_proj(kernels.attend(q, k, v, *rope, cache, self.layer, self.window))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if attentions is None:
            out = attention(q, k, v, mask)
        else:
            out, weights = attention_by_hand(q, k, v, mask)
            attentions.append(weights)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


def swiglu(gate: Tensor, up: Tensor, overwrite: bool = False) -> Tensor:
    """One product decides how much of another passes (Shazeer 2020, equation 6, between its matrices).

    What is in `gate` may be lost with `overwrite`: the first token of four pictures comes 1.14 times as fast on a CPU,
    for less memory is taken from the system and given back.
    """
    if kernels.usable(gate):
        return kernels.swiglu(gate, up)
    return F.silu(gate, inplace=overwrite) * up


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = FusedLinear(D, bias, gate_proj=inner, up_proj=inner)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up, overwrite=not gate.requires_grad))


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, rope, mask=None, cache=None, attentions=None) -> Tensor:  # (B, T, D) -> (B, T, D)
        """`rope`: cos and sin for apply_rope, `mask`: what visible_keys gives, `attentions`: a list to fill or None."""
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache, attentions)
        x, normed = self.post_attention_layernorm.after_adding(x, y)
        return x + self.mlp(normed)


class Llama(nn.Module):
    """The decoder without its head, with the checkpoints' module names but for the fused qkv_proj and gate_up_proj."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Run T new tokens, given as vectors, behind the `cache.length` tokens that the cache holds.

        `attention_mask` is (B, S), zero or False for padding; without it the cache's own counts.
        `position_ids` (B or 1, T) count on from the cache unless given. A list given as `hidden_states` receives the
        input of each layer and the final output; one given as `attentions`, each layer's weights (B, H, T, S).
        """
        batch, T, _ = x.shape
        past = cache.length if cache is not None else 0
        attention_mask = self.padding_mask(attention_mask, (batch, past + T), cache)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)[None]
        angles = rope_angles(self.config, position_ids)[:, None]  # (B, 1, T, d / 2): the same for all heads
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = None
        if cache is None or cache.holes or attentions is not None or not kernels.usable(x):  # the kernels ask the cache
            mask = visible_keys(attention_mask, past, T, self.config.sliding_window, x.device)

        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x, rope, mask, cache, attentions)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            cache.length += T
            cache.past += T
        return x

    @staticmethod
    def padding_mask(mask: Tensor | None, shape: tuple[int, int], cache: KVCache | None) -> Tensor | None:
        """The mask over all keys as a boolean (B, S), or None where no key is padding; the cache keeps it for later."""
        if cache is not None:
            cache.check_room(shape[1])
            if (batch := len(cache.attention_mask)) != shape[0]:
                raise ValueError(f"the cache is for a batch of {batch}, but the batch is {shape[0]}")
        if mask is None:
            return cache.attention_mask[:, : shape[1]] if cache is not None and cache.padded else None
        if mask.shape != shape:
            raise ValueError(f"attention_mask is {list(mask.shape)}, but batch and tokens so far are {list(shape)}")
        mask, padded = mask.bool(), not bool(mask.all())
        if cache is not None:
            cache.attention_mask[:, : shape[1]], cache.padded = mask, padded
            cache.first_key[:] = mask.int().argmax(-1)
            cache.holes = bool((cache.first_key + mask.sum(-1) < shape[1]).any())
        return mask if padded else None

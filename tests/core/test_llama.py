"""The decoder's formulas against loops over single numbers, and the decoder with a cache against itself without one."""

import math

import pytest
import torch
from torch.testing import assert_close

from llama import (
    KVCache,
    Llama,
    LlamaConfig,
    LlamaMLP,
    RMSNorm,
    apply_rope,
    attention,
    eager_attention,
    rope_angles,
    visible_keys,
)

pytestmark = pytest.mark.quick
SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def decoder(**changes) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SIZES | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def vectors(B: int, T: int, D: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


# --- Formulas --------------------------------------------------------------------------------------------------------


def test_rms_norm_number_by_number():
    norm = RMSNorm(5, eps=1e-3).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    x = vectors(2, 3, 5)
    expected = torch.empty_like(x)
    for b, t in [(b, t) for b in range(2) for t in range(3)]:
        mean_square = sum(float(number) ** 2 for number in x[b, t]) / 5
        for i in range(5):
            expected[b, t, i] = float(x[b, t, i]) / math.sqrt(mean_square + 1e-3) * float(norm.weight[i])
    assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_of_large_numbers_does_not_overflow(dtype):
    norm = RMSNorm(4, eps=1e-6).to(dtype)
    assert_close(norm(torch.tensor([3e4, -3e4, 3e4, 3e4], dtype=dtype)), torch.tensor([1, -1, 1, 1], dtype=dtype))


def test_rope_rotates_number_i_with_number_i_plus_half():
    config = LlamaConfig(**SIZES, rope_theta=100.0, rope_factor=2.0)  # d = 6
    positions = torch.tensor([[0, 3, 7]])
    angles = rope_angles(config, positions)
    x = vectors(1, 3, 6)[:, None]  # (B, 1 head, T, d)
    y = apply_rope(x, angles.cos()[:, None], angles.sin()[:, None])
    for t, position in enumerate(positions[0].tolist()):
        for i in range(3):
            angle = position / 2 * 100.0 ** (-2 * i / 6)
            assert_close(angles[0, t, i].item(), angle, atol=1e-5, rtol=1e-5)
            turned = complex(*x[0, 0, t, [i, i + 3]].tolist()) * complex(math.cos(angle), math.sin(angle))
            assert_close(complex(*y[0, 0, t, [i, i + 3]].tolist()), turned, atol=1e-5, rtol=1e-5)


def test_with_rope_a_score_depends_on_the_distance_only():
    config = LlamaConfig(**SIZES)
    q, k = vectors(1, 2, 6).split(1, dim=1)

    def score(query_at: int, key_at: int) -> float:
        turned = []
        for vector, position in ((q, query_at), (k, key_at)):
            angles = rope_angles(config, torch.tensor([[position]]))[:, None]
            turned.append(apply_rope(vector[:, None], angles.cos(), angles.sin()))
        return (turned[0] * turned[1]).sum().item()

    assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("past", "T"), [(0, 4), (3, 1), (2, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_visible_keys_key_by_key(past, T, window, padded):
    S = past + T
    padding = torch.ones(2, S, dtype=torch.bool)
    padding[1, :2] = False
    mask = visible_keys(padding if padded else None, past, T, window, "cpu")
    if mask is None:  # attention's own rule: causal, all queries or the last one
        assert not padded and (past == 0 or T == 1) and (window is None or S <= window)
        return
    for b, i, j in [(b, i, j) for b in range(len(mask)) for i in range(T) for j in range(S)]:
        sees = j <= past + i and (window is None or past + i - j < window) and (not padded or bool(padding[b, j]))
        assert bool(mask[b, 0, i, j]) == sees


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (1, 5), (2, 5)])
def test_attention_is_a_weighted_mean_of_values(H, K, T, S):
    q, k, v = vectors(H, T, 6), vectors(K, S, 6, seed=2), vectors(K, S, 6, seed=3)
    expected, weights = torch.zeros(H, T, 6), torch.zeros(H, T, S)
    for h, i in [(h, i) for h in range(H) for i in range(T)]:
        shared = h // (H // K)
        visible = range(S - T + i + 1)
        scores = [math.exp(float(q[h, i] @ k[shared, j]) / math.sqrt(6)) for j in visible]
        for j in visible:
            weights[h, i, j] = scores[j] / sum(scores)
            expected[h, i] += weights[h, i, j] * v[shared, j]
    mask = visible_keys(None, S - T, T, None, "cpu")
    out, found = eager_attention(q[None], k[None], v[None], mask)
    assert_close(out[0], expected)
    assert_close(found[0], weights)
    assert_close(attention(q[None], k[None], v[None], mask)[0], expected)


def test_the_mlp_number_by_number():
    mlp = LlamaMLP(LlamaConfig(**SIZES)).requires_grad_(False)
    x = vectors(1, 1)[0, 0]
    gate, up = mlp.gate_proj.weight @ x, mlp.up_proj.weight @ x
    inner = torch.tensor([g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)])
    assert_close(mlp(x), mlp.down_proj.weight @ inner)


def test_a_layer_adds_attention_and_then_the_mlp():
    model = decoder(num_hidden_layers=1)
    layer, x, rope = model.layers[0], vectors(1, 4), (torch.ones(1, 1, 4, 3), torch.zeros(1, 1, 4, 3))
    middle = x + layer.self_attn(layer.input_layernorm(x), rope)
    assert_close(layer(x, rope), middle + layer.mlp(layer.post_attention_layernorm(middle)))


# --- The decoder and its cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"sliding_window": 3}, {"attention_bias": True}, {"mlp_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("parts", [(6,), (5, 1), (1, 2, 3)], ids=str)
def test_the_cache_changes_nothing(changes, parts):
    model, x = decoder(**changes), vectors(2, 6)
    cache, outputs = model.new_cache(2, 7), []
    for part in x.split(parts, dim=1):
        outputs.append(model(part, cache=cache))
    assert cache.length == 6
    assert_close(torch.cat(outputs, 1), model(x))


def test_the_last_token_depends_on_the_first_and_no_token_on_a_later_one():
    model, x = decoder(), vectors(1, 40)
    changed = x.clone()
    changed[0, 0] += 1
    assert (model(changed) - model(x))[0, -1].abs().max() > 1e-4
    changed = x.clone()
    changed[0, -1] += 1
    assert_close(model(changed)[0, :-1], model(x)[0, :-1])


def test_with_a_window_of_3_two_layers_reach_back_4_tokens():
    model, x = decoder(sliding_window=3), vectors(1, 10)
    for back in range(7):
        changed = x.clone()
        changed[0, -1 - back] += 1
        difference = (model(changed) - model(x))[0, -1].abs().max()
        assert (difference > 1e-4) == (back <= 4)


def test_padding_on_the_left_changes_nothing():
    model, x = decoder(), vectors(1, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    padded, positions = torch.cat([vectors(1, 2, seed=9), x], 1), torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    cache = model.new_cache(1, 8)
    first = model(padded[:, :5], mask[:, :5], positions[:, :5], cache)
    rest = model(padded[:, 5:], None, positions[:, 5:], cache)  # the cache keeps the mask
    assert_close(torch.cat([first[:, 2:], rest], 1), model(x))


def test_a_mask_without_padding_costs_nothing_later():
    model, cache = decoder(), decoder().new_cache(1, 8)
    model(vectors(1, 3), torch.ones(1, 3), cache=cache)
    assert cache.attention_mask is None


def test_attentions_and_hidden_states_are_appended_on_request():
    model, x, hidden_states, attentions = decoder(), vectors(2, 4), [], []
    y = model(x, hidden_states=hidden_states, attentions=attentions)
    assert torch.equal(hidden_states[0], x) and torch.equal(hidden_states[-1], y) and len(hidden_states) == 3
    assert [weights.shape for weights in attentions] == [(2, 4, 4, 4)] * 2
    assert_close(attentions[0].sum(-1), torch.ones(2, 4, 4))
    assert_close(y, model(x))


def test_the_cache_refuses_what_does_not_fit():
    config = LlamaConfig(**SIZES)
    cache = KVCache(config, batch=2, capacity=4, dtype=torch.float32, device="cpu")
    good = torch.zeros(2, config.num_key_value_heads, 3, config.head_dim)
    assert cache.update(0, good, good)[0].shape == good.shape
    for bad in (good[:1], good[:, :1], good[..., :3]):
        with pytest.raises(ValueError, match="the cache holds"):
            cache.update(0, bad, bad)
    cache.length = 3
    with pytest.raises(ValueError, match="room for 4 tokens, and 6"):
        cache.update(0, good, good)
    model = decoder()
    for x, mask, words in [
        (vectors(1, 1), None, "batch of 2"),
        (vectors(2, 2), None, "full"),
        (vectors(2, 1), torch.ones(2, 3), "attention_mask"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(x, mask, cache=cache)
    assert cache.length == 3

"""The vision tower's formulas against loops over single numbers. Parity with the reference is in test_llava.py."""

import math

import pytest
import torch
from torch.testing import assert_close

from clip import (
    CLIPAttention,
    CLIPEmbeddings,
    CLIPLayer,
    CLIPVisionConfig,
    CLIPVisionModel,
    attention,
    eager_attention,
    quick_gelu,
)

pytestmark = pytest.mark.quick
CONFIG = CLIPVisionConfig(32, 48, 32, 4, 4, image_size=28, patch_size=7)


def random_module(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.requires_grad_(False)


def test_attention_is_a_weighted_mean_over_all_tokens():
    q, k, v = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.zeros(2, 5, 8)
    for h, i in [(h, i) for h in range(2) for i in range(5)]:
        scores = [math.exp(float(q[h, i] @ k[h, j]) / math.sqrt(8)) for j in range(5)]
        for j in range(5):
            expected[h, i] += scores[j] / sum(scores) * v[h, j]
    assert_close(eager_attention(q, k, v), expected)
    assert_close(attention(q[None], k[None], v[None])[0], expected)


def test_each_head_sees_its_own_part_of_the_vector():
    module, x = random_module(CLIPAttention(CONFIG)), torch.randn(1, 3, 32)
    q, k, v = (proj(x)[0] for proj in (module.q_proj, module.k_proj, module.v_proj))
    heads = [eager_attention(*(y[:, h * 8 : h * 8 + 8] for y in (q, k, v))) for h in range(4)]
    assert_close(module(x)[0], module.out_proj(torch.cat(heads, -1)))


def test_quick_gelu_is_near_gelu_and_not_equal():
    x = torch.linspace(-6, 6, 100)
    assert_close(quick_gelu(x), torch.tensor([a / (1 + math.exp(-1.702 * a)) for a in x.tolist()]))
    assert 0.015 < (quick_gelu(x) - torch.nn.functional.gelu(x)).abs().max() < 0.025


def test_a_patch_is_one_matrix_times_its_pixels():
    module, pixels = random_module(CLIPEmbeddings(CONFIG)), torch.randn(1, 3, 28, 28)
    x = module(pixels)
    assert x.shape == (1, 17, 32)
    assert_close(x[0, 0], module.class_embedding + module.position_embedding.weight[0])
    for row, column in [(0, 0), (1, 2), (3, 3)]:  # patches are counted row by row, after the class token
        patch, place = pixels[0, :, row * 7 : row * 7 + 7, column * 7 : column * 7 + 7], 1 + row * 4 + column
        vector = module.patch_embedding.weight.flatten(1) @ patch.flatten()
        assert_close(x[0, place], vector + module.position_embedding.weight[place])


def test_a_layer_adds_attention_and_then_the_mlp():
    layer, x = random_module(CLIPLayer(CONFIG)), torch.randn(1, 3, 32)
    middle = x + layer.self_attn(layer.layer_norm1(x))
    inner = quick_gelu(layer.mlp.fc1(layer.layer_norm2(middle)))
    assert_close(layer(x), middle + layer.mlp.fc2(inner))


def test_the_tower_stops_at_the_depth_asked_for():
    tower, ran = CLIPVisionModel(CONFIG), []
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    assert len(tower(torch.zeros(1, 3, 28, 28), depth=3)) == 4
    assert ran == [0, 1, 2]


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="28, 28"):
        CLIPVisionModel(CONFIG)(torch.zeros(1, 3, 30, 30))

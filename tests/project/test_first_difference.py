"""first_difference.py names the module that has a planted bug, and nothing if there is no bug."""

import sys

import pytest
import torch

import cli
import llama
from first_difference import differences, first_difference, main
from llava import LlavaForConditionalGeneration
from reference import IMAGE_TOKEN, reference_model

pytestmark = pytest.mark.parity


@pytest.fixture
def pair(tmp_path):
    reference = reference_model()
    reference.save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, kernels="torch")
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * 16, *range(5, 15)]])
    return model, reference, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}


def found(pair) -> str | None:
    first = first_difference(differences(*pair), tolerance=1e-4)
    return first and first[0]


def test_without_a_bug_nothing_differs(pair):
    assert found(pair) is None


def rope_of_neighbours(x, cos, sin):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2)


def transpose(linear: torch.nn.Linear) -> None:
    linear.weight.data = linear.weight.data.T.contiguous()


def test_a_planted_bug_is_found_where_it_is(pair, monkeypatch):
    model = pair[0]
    layers, tower = model.language_model.layers, model.vision_tower
    with monkeypatch.context() as patch:
        patch.setattr(llama, "apply_rope", rope_of_neighbours)
        assert found(pair) == "language_model.layers.0.self_attn.o_proj"
    with monkeypatch.context() as patch:
        patch.setattr(layers[1].post_attention_layernorm, "eps", 0.1)
        assert found(pair) == "language_model.layers.1.post_attention_layernorm"
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "vision_feature_layer", -1)
        assert found(pair) == "multi_modal_projector.linear_1"
    for linear, name in (
        (tower.encoder.layers[0].self_attn.v_proj, "vision_tower.encoder.layers.0.self_attn.v_proj"),
        (model.multi_modal_projector.linear_2, "multi_modal_projector.linear_2"),
        (layers[0].self_attn.q_proj, "language_model.layers.0.self_attn.q_proj"),
    ):
        transpose(linear)
        assert found(pair) == name
        transpose(linear)
    assert found(pair) is None


def test_a_nan_is_a_difference(pair):
    pair[0].language_model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    assert found(pair) == "language_model.layers.0.mlp.down_proj"


def test_the_command_compares_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_difference.py"])
    assert cli.run(main) == 0 and "outputs are equal" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["first_difference.py", "--tolerance", "-1"])
    assert cli.run(main) == 2 and "error: input_ids is the first of" in capsys.readouterr().err

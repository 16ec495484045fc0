"""Where pictures and text meet, patch by patch and token by token. Parity with the reference is in test_llava.py."""

import pytest
import torch
from torch.testing import assert_close

from hub.interface import merge_embedded
from llava import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaMultiModalProjector

pytestmark = pytest.mark.quick
IMAGE = 40  # the id of <image>


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(16, 24, 16, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4)
    text = LlamaConfig(50, 24, 40, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision, text, image_token_index=IMAGE)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def pictures(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_projector_is_two_matrices_with_a_gelu_between(model):
    projector, x = model.multi_modal_projector, torch.randn(3, 16)
    inner = x @ projector.linear_1.weight.T + projector.linear_1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))  # the exact GELU
    assert_close(projector(x), inner @ projector.linear_2.weight.T + projector.linear_2.bias)


def test_the_layer_before_the_last_is_read_without_its_class_token(model):
    states = model.vision_tower(pictures(2))  # before the first layer, then after each of the four
    expected = model.multi_modal_projector(states[3][:, 1:])
    assert_close(model.get_image_features(pictures(2)), expected)
    assert model.config.image_seq_length == expected.shape[1] == 4


def test_several_layers_are_concatenated(model):
    vision = model.config.vision_config
    config = LlavaConfig(vision, model.config.text_config, vision_feature_layer=[-1, 1])
    projector, states = LlavaMultiModalProjector(config), model.vision_tower(pictures(1))
    assert projector.linear_1.in_features == 2 * vision.hidden_size
    model_projector, model.multi_modal_projector = model.multi_modal_projector, projector
    try:
        both = model.get_image_features(pictures(1), vision_feature_layer=[-1, 1])
    finally:
        model.multi_modal_projector = model_projector
    assert_close(both, projector(torch.cat([states[4][:, 1:], states[1][:, 1:]], dim=-1)))


def test_patches_replace_the_image_tokens_in_order(model):
    ids = torch.tensor([[1, IMAGE, IMAGE, 7], [1, 5, IMAGE, IMAGE]])
    patches = torch.randn(4, 24)
    x, words = model.merge(ids, patches), model.language_model.embed_tokens.weight
    expected = torch.stack([words[1], patches[0], patches[1], words[7], words[1], words[5], patches[2], patches[3]])
    assert torch.equal(x.flatten(0, 1), expected)
    assert torch.equal(merge_embedded(model, words[ids], patches), x)


def test_the_numbers_of_patches_and_tokens_must_agree(model):
    with pytest.raises(ValueError, match="tokens: 1, features: 4"):
        model.merge(torch.tensor([[1, IMAGE]]), torch.randn(4, 24))


def test_each_position_is_scored_for_the_token_after_it(model):
    logits, labels = torch.randn(1, 4, 50), torch.tensor([[3, 4, -100, 6]])
    expected = -(logits[0, 0].log_softmax(-1)[4] + logits[0, 2].log_softmax(-1)[6]) / 2
    assert_close(model.loss(logits, labels), expected)


def test_a_step_gives_the_scores_of_the_whole_text(model):
    ids = torch.tensor([[1, 5, 9, 3]])
    cache = model.language_model.new_cache(1, 8)
    model(ids[:, :3], past_key_values=cache)
    assert_close(model.step(ids[:, 3], torch.tensor([[3]]), cache), model(ids).logits[:, -1])

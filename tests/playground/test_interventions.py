"""Interventions change what they say and nothing else, with a cache too, and leave no trace."""

import pytest
import torch
from torch.testing import assert_close

from llama import eager_attention
from playground.interventions import (
    blind,
    erase_patches,
    keep_patches,
    knockout,
    logit_lens,
    mute_heads,
    swap_features,
)
from small import small

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def pair():
    return small()


@pytest.fixture(scope="module")
def inputs(pair):
    _, processor = pair
    ids = processor.tokenizer.encode("USER: " + "<image>" * 16 + "\nWhat is it? ASSISTANT:")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def image_places(model, inputs) -> list[int]:
    return (inputs["input_ids"][0] == model.config.image_token_index).nonzero().flatten().tolist()


def heads_of(model) -> int:
    return model.config.text_config.num_attention_heads


def interventions(model, inputs) -> dict:
    places = image_places(model, inputs)
    features = model.get_image_features(inputs["pixel_values"]).detach()
    return {
        "mute": lambda: mute_heads(model, {0: [1], 1: [0, 2]}),
        "knockout": lambda: knockout(model, [1], None, places),
        "swap": lambda: swap_features(model, features.flip(1)),
    }


@pytest.mark.parametrize("name", ["mute", "knockout", "swap"])
def test_an_intervention_changes_the_output_and_leaves_no_trace(pair, inputs, name):
    model, _ = pair
    before, names = model(**inputs).logits, set(vars(model))
    intervention = interventions(model, inputs)[name]
    with intervention():
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
    with pytest.raises(KeyError), intervention():
        raise KeyError  # whatever happens inside
    assert torch.equal(model(**inputs).logits, before) and set(vars(model)) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["mute", "knockout", "swap"])
def test_with_a_cache_it_is_the_same_as_in_one_forward(pair, inputs, name):
    model, _ = pair
    with interventions(model, inputs)[name]():
        ids = model.generate(**inputs, max_new_tokens=6)
        at_once = model(ids, inputs["pixel_values"], use_cache=False).logits
    T = inputs["input_ids"].shape[1]
    assert at_once[0, T - 1 : -1].argmax(-1).tolist() == ids[0, T:].tolist()


def test_muting_all_heads_of_a_layer_is_attention_that_adds_nothing(pair, inputs):
    model, _ = pair
    with mute_heads(model, {1: range(heads_of(model))}):
        muted = model(**inputs, output_hidden_states=True, use_cache=False)
    layer = model.language_model.layers[1]
    x = muted.hidden_states[1]
    assert layer.self_attn.o_proj.bias is None
    assert_close(x + layer.mlp(layer.post_attention_layernorm(x)), muted.hidden_states[2])


def test_muting_no_head_and_cutting_nothing_change_nothing(pair, inputs):
    model, _ = pair
    before = model(**inputs).logits
    with mute_heads(model, {0: []}):
        assert torch.equal(model(**inputs).logits, before)
    with knockout(model, [0, 1], [], None):
        assert_close(model(**inputs).logits, before)


def test_a_knockout_is_the_formula_with_a_mask(pair, inputs, monkeypatch):
    model, _ = pair
    places, attention = image_places(model, inputs), model.language_model.layers[0].self_attn
    T = inputs["input_ids"].shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[T - 1, places] = False
    with knockout(model, [0], [T - 1], places):
        cut = model(**inputs, output_attentions=True, use_cache=False)
    assert (cut.attentions[0][0, :, T - 1, places] == 0).all() and (cut.attentions[1][0, :, T - 1, places] > 0).any()
    monkeypatch.setattr(attention, "attention", lambda q, k, v, _: eager_attention(q, k, v, mask)[0])
    assert_close(model(**inputs, use_cache=False).logits, cut.logits)


def test_a_position_cut_from_everything_sees_itself(pair, inputs):
    model, _ = pair
    with knockout(model, [0], None, None):
        out = model(**inputs, output_attentions=True, use_cache=False)
    T = inputs["input_ids"].shape[1]
    assert_close(out.attentions[0][0], torch.eye(T).expand(heads_of(model), T, T))


def test_erasing_patches_of_features(pair, inputs):
    model, _ = pair
    features = model.get_image_features(inputs["pixel_values"])
    assert torch.equal(erase_patches(features, []), features)
    erased = erase_patches(features, [3, 5])
    assert_close(erased[0, [3, 5]], features[0].mean(0).expand(2, -1))
    others = [i for i in range(16) if i not in (3, 5)]
    assert torch.equal(erased[0, others], features[0, others])
    assert not erase_patches(features, [0], fill=torch.zeros(features.shape[-1]))[0, 0].any()


def test_erasing_patches_of_pixels():
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(erase_patches(pixels, [], patch_size=7), pixels)
    erased = erase_patches(pixels, [5], patch_size=7)  # the second row, the second column
    assert_close(erased[:, :, 7:14, 7:14], pixels.mean((2, 3))[:, :, None, None].expand(2, 3, 7, 7))
    erased[:, :, 7:14, 7:14] = pixels[:, :, 7:14, 7:14]
    assert torch.equal(erased, pixels)
    with pytest.raises(ValueError, match="patch_size"):
        erase_patches(pixels, [5])


def test_keeping_patches(pair, inputs):
    model, _ = pair
    features = model.get_image_features(inputs["pixel_values"]).detach()
    few, kept = keep_patches(features, 4)
    longest = sorted(range(16), key=lambda i: -features[0, i].norm().item())[:4]
    assert kept[0].tolist() == sorted(longest) and torch.equal(few[0], features[0, sorted(longest)])
    attention = torch.arange(16.0)[None]
    assert keep_patches(features, 3, by="attention", attention=attention)[1].tolist() == [[13, 14, 15]]
    assert torch.equal(keep_patches(features, 16, by="random")[0], features)
    for wrong in ("attention", "size"):
        with pytest.raises(ValueError, match="by must be"):
            keep_patches(features, 4, by=wrong)
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(model.config.image_token_index)
    with swap_features(model, few):
        short = torch.tensor([ids[: first + 4] + ids[first + 16 :]])
        assert model.generate(short, inputs["pixel_values"], max_new_tokens=2).shape[1] == short.shape[1] + 2


def test_the_logit_lens_ends_in_the_models_own_scores(pair, inputs):
    model, _ = pair
    out = model(**inputs, output_hidden_states=True)
    lens = logit_lens(model, out.hidden_states)
    assert lens.shape == (1 + len(model.language_model.layers), *out.logits.shape)
    assert_close(lens[-1], out.logits)
    assert_close(lens[0], model.lm_head(model.language_model.norm(out.hidden_states[0])))


def test_the_blind_model_does_not_depend_on_the_picture_but_on_every_word(pair, inputs):
    model, _ = pair
    places, ids = image_places(model, inputs), inputs["input_ids"]
    T, after = ids.shape[1], slice(places[-1] + 1, None)
    expected = blind(model, inputs)
    assert_close(expected[0, after].sum(-1), torch.ones(T - places[-1] - 1))
    layers = range(len(model.language_model.layers))
    with knockout(model, layers, [i for i in range(T) if i not in places], places):  # the same, computed in another way
        assert_close(model(**inputs, use_cache=False).logits.softmax(-1)[0, after], expected[0, after])


def test_a_twin_is_refused_in_one_sentence(inputs):
    from kernels import accelerate

    model, _ = small()
    accelerate(model)
    for intervention in (mute_heads(model, {0: [0]}), knockout(model, [0], None, [1]), swap_features(model, None)):
        with pytest.raises(ValueError, match='load it with kernels="torch"'), intervention:
            pass


def test_an_unknown_head_is_refused(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="has heads 0 to"), mute_heads(model, {0: [99]}):
        pass
    assert not model.language_model.layers[0].self_attn.o_proj._forward_pre_hooks

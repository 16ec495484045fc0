"""The whole model against the reference: the same checkpoint, the same inputs, the same numbers."""

import copy

import pytest
import torch
from reference import prompts, reference_model
from torch.testing import assert_close

from llava import LlavaForConditionalGeneration

# name -> (vision_config, text_config, everything else)
VARIANTS = {
    "multi-head": ({}, {}, {}),
    "grouped queries": ({}, {"num_key_value_heads": 2}, {}),
    "one key head": ({}, {"num_key_value_heads": 1}, {}),
    "mistral with a short window": ({}, {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5}, {}),
    "mistral without a window": ({}, {"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": None}, {}),
    "head width by itself": ({}, {"head_dim": 20}, {}),
    "tied head": ({}, {}, {"tie_word_embeddings": True}),
    "tied head in text_config": ({}, {"tie_word_embeddings": True}, {}),
    "biases": ({}, {"attention_bias": True, "mlp_bias": True}, {}),
    "another rope": ({}, {"rope_theta": 500.0}, {}),
    "linear rope": ({}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}, {}),
    "last layer": ({}, {}, {"vision_feature_layer": -1}),
    "layer 2": ({}, {}, {"vision_feature_layer": 2}),
    "several layers": ({}, {}, {"vision_feature_layer": [-2, 1, 0]}),
    "with the class token": ({}, {}, {"vision_feature_select_strategy": "full"}),
    "projector without bias": ({}, {}, {"multimodal_projector_bias": False}),
    "other activations": ({"hidden_act": "gelu"}, {}, {"projector_hidden_act": "gelu_pytorch_tanh"}),
    "tanh and quick": ({"hidden_act": "gelu_pytorch_tanh"}, {}, {"projector_hidden_act": "quick_gelu"}),
    "big patches": ({"image_size": 24, "patch_size": 12}, {}, {}),
    "patches that leave a rest": ({"image_size": 30, "patch_size": 7}, {}, {}),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """The reference's model and ours, loaded from what the reference saved."""
    vision, text, top = copy.deepcopy(VARIANTS[request.param])
    reference = reference_model(vision, text, **top)
    folder = tmp_path_factory.mktemp("checkpoint")
    reference.save_pretrained(folder)
    return reference, LlavaForConditionalGeneration.from_pretrained(folder)


def batch(model, lengths=(9, 4, 6), pictures=(1, 2, 0)) -> dict:
    config = model.config.vision_config
    ids, mask = prompts(list(lengths), list(pictures), model.config.image_seq_length)
    size = (sum(pictures), 3, config.image_size, config.image_size)
    pixels = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask} | ({"pixel_values": pixels} if len(pixels) else {})


def close(ours, theirs, tolerance=2e-4):
    assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_every_output_is_the_references(pair):
    reference, model = pair
    inputs = batch(model)
    mask = inputs["attention_mask"].bool()
    is_word = (inputs["input_ids"] > 2) & (inputs["input_ids"] < 250)  # not <s>: what stands before it is padding
    labels = inputs["input_ids"].where(is_word, -100)
    theirs = reference(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)
    ours = model(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)

    close(ours.loss, theirs.loss)
    close(ours.logits[mask], theirs.logits[mask])
    close(ours.image_hidden_states, theirs.image_hidden_states)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for our, their in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(our[mask], their[mask])
    for our, their in zip(ours.attentions, theirs.attentions, strict=True):
        close(our.transpose(1, 2)[mask], their.transpose(1, 2)[mask])
    # and the fast path, which keeps no attention weights
    close(model(**inputs).logits[mask], theirs.logits[mask])


@torch.no_grad()
def test_cached_steps(pair):
    reference, model = pair
    inputs = batch(model)
    theirs, ours = reference(**inputs), model(**inputs)
    mask = inputs["attention_mask"]
    for step in range(4):
        ids = torch.full((3, 1 + step), 20 + step)  # steps of one, two, three tokens
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        theirs = reference(ids, attention_mask=mask, past_key_values=theirs.past_key_values)
        given = mask if step % 2 else None  # the cache knows the padding without being told
        ours = model(ids, attention_mask=given, past_key_values=ours.past_key_values)
        close(ours.logits, theirs.logits)


@pytest.mark.parametrize(
    ("lengths", "pictures"),
    [((7,), (1,)), ((5,), (0,)), ((9, 4, 6), (1, 2, 3)), ((3, 8), (0, 0)), ((2, 9, 5, 1), (0, 1, 2, 0))],
    ids=["one-prompt", "text-only", "different-numbers-of-pictures", "text-batch", "mixed"],
)
def test_greedy_tokens_are_the_references(pair, lengths, pictures):
    reference, model = pair
    inputs = batch(model, lengths, pictures)
    theirs = reference.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), theirs)

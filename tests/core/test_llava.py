"""The whole model against the reference: the same checkpoint, the same inputs, the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

import kernels
from hub.ranges import check_ranges
from llava import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from load_weights import our_name
from reference import OLD_NAMES, image_vectors, prompts, reference_and_ours, reference_model

ROOT = Path(__file__).parent.parent.parent

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LONG = {"original_max_position_embeddings": 4096, "rope_theta": 500000.0}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
PATCHES = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"}
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
    "rope of llama 3.1": ({}, {"rope_parameters": LLAMA3}, {}),
    "rope of llama 3.1 within its context": ({}, {"rope_parameters": LLAMA3 | {"factor": 2.0, **LONG}}, {}),
    "siglip": ({"model_type": "siglip"}, {}, {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "siglip without its head": ({"model_type": "siglip", "vision_use_head": False}, {}, PATCHES),
    "siglip and qwen2": ({"model_type": "siglip"}, QWEN2, PATCHES),
    "qwen2, tied": ({}, QWEN2 | {"tie_word_embeddings": True}, {}),
    "qwen2 with a window in some layers": ({}, QWEN2 | WINDOWS, {}),
    "qwen2 with a window for no layer": ({}, QWEN2 | {"sliding_window": 5}, {}),
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
    vision, text, top = VARIANTS[request.param]
    return reference_and_ours(tmp_path_factory.mktemp("checkpoint"), vision, text, **top)


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
    is_word = (inputs["input_ids"] > 2) & (inputs["input_ids"] < 250)  # not <s>: the tokens before it are padding
    labels = inputs["input_ids"].where(is_word, -100)
    theirs = reference(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)
    ours = model(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)

    close(ours.loss, theirs.loss)
    close(ours.logits[mask], theirs.logits[mask])
    close(ours.image_hidden_states, image_vectors(theirs.image_hidden_states))
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
        given = mask if step % 2 else None  # the cache keeps the mask of earlier tokens
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


# --- Every argument of forward ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return reference_and_ours(tmp_path_factory.mktemp("checkpoint"))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"vision_feature_layer": 1},
        {"vision_feature_layer": -5},
        {"vision_feature_layer": [3]},
        {"position_ids": torch.arange(30)[None] * 2 + 5},
        {"use_cache": False},
        {"logits_to_keep": 3},
        {"attention_mask": torch.tensor([[1] * 4 + [0] * 3 + [1] * 23])},  # a hole
        {"attention_mask": torch.tensor([[1] * 26 + [0] * 4])},  # padding on the right
    ],
    ids=str,
)
def test_arguments_of_forward(small, change):
    reference, model = small
    inputs = batch(model, (13,), (1,)) | change
    theirs, ours = reference(**inputs), model(**inputs)
    seen = inputs["attention_mask"][:, -ours.logits.shape[1] :].bool()
    close(ours.logits[seen], theirs.logits[seen])
    assert (ours.past_key_values is None) == (change.get("use_cache") is False)


@torch.no_grad()
def test_the_class_token_can_be_kept_in_one_call(small):
    reference, model = small
    inputs = batch(model, (4,), (1,))
    ids = torch.cat([inputs["input_ids"], torch.tensor([[model.config.image_token_index]])], dim=1)
    inputs = {"input_ids": ids, "pixel_values": inputs["pixel_values"], "vision_feature_select_strategy": "full"}
    close(model(**inputs).logits, reference(**inputs).logits)


@torch.no_grad()
def test_embeddings_instead_of_ids(small):
    reference, model = small
    inputs = batch(model, (6,), (1,))
    embeds = model.language_model.embed_tokens(inputs.pop("input_ids"))
    theirs = reference(inputs_embeds=embeds, **inputs)
    close(model(inputs_embeds=embeds, **inputs).logits, theirs.logits)
    del inputs["pixel_values"]
    close(model(inputs_embeds=embeds, **inputs).logits, reference(inputs_embeds=embeds, **inputs).logits)


@torch.no_grad()
def test_a_tuple_instead_of_names(small):
    reference, model = small
    inputs = batch(model, (6,), (1,))
    asked = {"labels": inputs["input_ids"], "output_hidden_states": True, "return_dict": False}
    theirs, ours = reference(**inputs, **asked), model(**inputs, **asked)
    assert len(ours) == len(theirs) == 5
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])
    close(ours[4], image_vectors(theirs[4]))


@torch.no_grad()
@pytest.mark.parametrize("asked", [{}, {"use_cache": False, "output_hidden_states": True}], ids=str)
def test_outputs_are_read_by_name_and_by_place(small, asked):
    reference, model = small
    inputs = batch(model, (6,), (1,)) | asked
    theirs, ours = reference(**inputs), model(**inputs)
    assert list(ours.keys()) == [OLD_NAMES.get(name, name) for name in theirs] == list(ours)
    assert list(ours) == [name for name, _ in ours.items()]
    assert len(ours) == len(theirs) == len(ours.to_tuple())
    assert all(ours[name] is getattr(ours, name) and ours[name] is ours[i] for i, name in enumerate(ours))
    assert len(ours[1:]) == len(theirs[1:]) and ours[-1] is ours.image_hidden_states
    for out in (ours, theirs):
        assert "logits" in out and "loss" not in out and 0 not in out
        assert out.get("loss") is None and out.loss is None
        with pytest.raises(KeyError):
            out["loss"]
        with pytest.raises(IndexError):
            out[9]
    assert set(dict(**ours)) == set(ours)


@torch.no_grad()
def test_the_names_of_newer_releases_are_other_names_of_the_same(small):
    model = small[1]
    inputs = batch(model, (9, 4), (1, 2))
    out, again = model(**inputs), model(**inputs)
    assert out.cache is out.past_key_values is out["cache"]
    features = out.image_outputs.pooler_output
    assert len(features) == 3 and torch.equal(torch.cat(features), out.image_hidden_states)
    ids = torch.tensor([[5], [6]])
    assert torch.equal(model(ids, cache=out.cache).logits, model(ids, past_key_values=again.past_key_values).logits)
    without = model(ids, use_cache=False)
    assert without.cache is None and without.image_outputs is None and list(without) == ["logits"]


@torch.no_grad()
@pytest.mark.parametrize("positions", [[20], [7, 6, 21], [-1, -2], []], ids=str)
def test_the_head_reads_the_positions_asked_for(small, positions):
    reference, model = small
    inputs = batch(model, (13, 8), (1, 1)) | {"logits_to_keep": torch.tensor(positions, dtype=torch.long)}
    close(model(**inputs).logits, reference(**inputs).logits)


def test_gradients_are_the_references(small):
    reference, model = small
    inputs = batch(model, (6,), (1,))
    reference(**inputs, labels=inputs["input_ids"]).loss.backward()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    attention = "language_model.layers.0.self_attn"
    for ours, theirs in {
        "multi_modal_projector.linear_1.weight": ["multi_modal_projector.linear_1.weight"],
        f"{attention}.k_proj.weight": [f"{attention}.k_proj.weight"],
        "vision_tower.embeddings.patch_embedding.weight": ["vision_tower.embeddings.patch_embedding.weight"],
    }.items():
        wanted = torch.cat([reference.get_parameter(f"model.{name}").grad for name in theirs])
        close(model.get_parameter(ours).grad, wanted)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in float16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    reference_model().half().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, tmp_path):
    reference = reference_model(spread=0.05).to(dtype)
    reference.save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == dtype
    inputs = batch(model, (9, 4), (1, 1))
    mask = inputs["attention_mask"].bool()
    ours, theirs = model(**inputs).logits[mask], reference(**inputs).logits[mask]
    assert ours.dtype == dtype
    close(ours, theirs, 3e-2)


@pytest.mark.parametrize(
    "asked",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16"},
        {"dtype": "auto"},
        {"torch_dtype": "auto"},
        {},
        {"dtype": "bfloat16", "torch_dtype": torch.float32},
    ],
    ids=str,
)
def test_the_dtype_is_asked_for_as_in_the_reference(half, asked):
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(half, **asked)
    assert LlavaForConditionalGeneration.from_pretrained(half, **asked).dtype == reference.dtype


@pytest.mark.parametrize("wrong", ["bfloat", "int8", torch.int8, 16])
def test_an_unknown_dtype_is_a_plain_error(half, wrong):
    with pytest.raises(ValueError, match=f"dtype must be auto, float64, float32, float16 or bfloat16, not {wrong}$"):
        LlavaForConditionalGeneration.from_pretrained(half, dtype=wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of input_ids or inputs_embeds"),
        ({"input_ids": torch.tensor([[1, 9999]])}, "ids 1 to 9999 do not fit"),
        ({"input_ids": torch.tensor([[-1]])}, "ids -1 to -1 do not fit"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.zeros(1, 2, 48)}, "exactly one"),
        (
            {"input_ids": torch.tensor([[1, 290, 290]]), "pixel_values": torch.zeros(1, 3, 28, 28)},
            "Image features and image tokens do not match, tokens: 2, features: 16",
        ),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\]"),
        (
            {
                "input_ids": torch.tensor([[1]]),
                "pixel_values": torch.zeros(1, 3, 28, 28),
                "vision_feature_select_strategy": "most",
            },
            "default or full",
        ),
        (
            {"input_ids": torch.tensor([[1]]), "pixel_values": torch.zeros(1, 3, 28, 28), "vision_feature_layer": 9},
            "-5 to 4",
        ),
    ],
)
def test_wrong_arguments_are_plain_errors(small, arguments, words):
    with pytest.raises(ValueError, match=words):
        small[1](**arguments)


@pytest.mark.parametrize("image_token", [300, -1])
def test_embeddings_cannot_mark_pictures_by_a_row_that_is_not_there(small, monkeypatch, image_token):
    model = small[1]
    monkeypatch.setattr(model.config, "image_token_index", image_token)
    inputs = {"inputs_embeds": torch.zeros(1, 20, 48), "pixel_values": torch.zeros(1, 3, 28, 28)}
    with pytest.raises(ValueError, match=f"<image>, token {image_token}, has no embedding: .*pass input_ids"):
        model(**inputs)
    assert model(inputs_embeds=inputs["inputs_embeds"]).logits.shape == (1, 20, 300)  # text needs no such row


def test_a_cache_made_by_forward_says_when_it_is_full(small):
    out = small[1](torch.tensor([[1, 5, 6]]))
    with pytest.raises(ValueError, match="the cache is full: it has room for 515 tokens, and 603 are needed"):
        small[1](torch.ones(1, 600, dtype=torch.long), past_key_values=out.past_key_values)
    ids = torch.tensor([[5] * 514, [6] * 514])
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    out = small[1](ids[:, :3], attention_mask=mask[:, :3])
    for given in (None, torch.ones(2, 517, dtype=torch.long)):
        with pytest.raises(ValueError, match="the cache is full: it has room for 515 tokens, and 517 are needed"):
            small[1](ids, attention_mask=given, past_key_values=out.past_key_values)


@torch.no_grad()
def test_a_token_can_be_decoded_under_autocast(small):
    with torch.autocast("cpu", torch.bfloat16):
        out = small[1](torch.tensor([[1, 5, 6]]))
        logits = small[1](torch.tensor([[7]]), past_key_values=out.past_key_values).logits
    whole = small[1](torch.tensor([[1, 5, 6, 7]])).logits
    assert (logits[:, -1] - whole[:, -1]).std() < 0.05 * whole[:, -1].std()


# --- Next to transformers --------------------------------------------------------------------------------------------


# A stand-in for Hugging Face's package `kernels`, whose modules also import each other by their full names.
KERNELS = """
__version__ = "theirs"
from kernels.layer import *
"""
KERNELS_LAYER = """
names = "CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties get_kernel"
names += " kernelize register_kernel_mapping replace_kernel_forward_from_hub use_kernel_forward_from_hub"
names += " use_kernel_func_from_hub use_kernel_mapping use_kernelized_func"
globals().update((name, lambda *_, **__: lambda x: x) for name in names.split())
Mode = type("Mode", (), {})

def late():
    from kernels import Device, __version__
    return __version__
"""
BESIDE = """
from transformers import LlavaForConditionalGeneration
from transformers.utils import is_kernels_available
import kernels
import llava
assert kernels.late() == "theirs"
assert kernels.accelerate
assert not hasattr(kernels, "nothing")  # a name that neither package has
print(is_kernels_available(), kernels.__file__)
"""


def test_transformers_finds_the_kernels_package_that_our_folder_hides(tmp_path):
    """Python that runs in this folder finds our kernels/ before the installed package of the same name."""
    version = transformers.utils.import_utils.KERNELS_MIN_VERSION
    for path, text in {
        "kernels/__init__.py": KERNELS,
        "kernels/layer.py": KERNELS_LAYER,
        f"kernels-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BESIDE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True", str(ROOT / "kernels" / "__init__.py")], done.stderr


def test_a_name_that_kernels_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kernels' has no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


# --- The page of the reference ---------------------------------------------------------------------------------------


def test_the_configuration_example_of_the_page():
    """The code of the page, on the device that has shapes and no memory: it makes the model at full size."""
    with torch.device("meta"):
        vision_config = CLIPVisionConfig()
        text_config = LlamaConfig()
        configuration = LlavaConfig(vision_config, text_config)
        model = LlavaForConditionalGeneration(configuration)
        configuration = model.config
        theirs = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(), text_config=transformers.LlamaConfig()
            )
        )
    assert configuration.vision_config is vision_config
    ours = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert ours == {our_name(name): parameter.shape for name, parameter in theirs.named_parameters()}


def test_the_default_configuration_is_llava_1_5_7b():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config={"vocab_size": 32064}))
    assert len(dict(model.named_parameters())) == 686
    assert sum(p.nbytes for p in model.bfloat16().parameters()) == 14_126_854_144  # the hub's index says total_size


def test_unknown_settings_are_plain_errors():
    with pytest.raises(ValueError, match="model_type must be llama or mistral or qwen2, not 'gpt2'"):
        LlavaConfig(text_config={"model_type": "gpt2"})
    with pytest.raises(ValueError, match="rope_type must be default or linear or llama3, not 'yarn'"):
        LlavaConfig(text_config={"rope_parameters": {"rope_type": "yarn"}})
    known = "quick_gelu or gelu or gelu_pytorch_tanh"
    with pytest.raises(ValueError, match=f"projector_hidden_act must be {known}, not 'swish'"):
        LlavaConfig(projector_hidden_act="swish")
    with pytest.raises(ValueError, match=f"hidden_act must be {known}, not 'elu'"):
        LlavaConfig(vision_config={"hidden_act": "elu"})
    with pytest.raises(ValueError, match="tie_word_embeddings must be true or false, not 'yes'"):
        check_ranges({"tie_word_embeddings": "yes"}, Path("config.json"))
    with pytest.raises(ValueError, match="6 heads cannot share 4"):
        LlavaConfig(text_config={"num_attention_heads": 6, "num_key_value_heads": 4})

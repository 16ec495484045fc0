"""Checkpoints: every layout loads, what is broken is refused by name, and what we save transformers reads."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import torch
import transformers
from PIL import Image
from reference import IMAGE_TOKEN, TEXT, VISION, prompts, reference_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import save_checkpoint
from clip import ImageProcessor
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from load_weights import find_checkpoint
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}
# What the prefixes of transformers' names in memory become in the files.
HUB = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
AUTHORS = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "vision_model.",
}
AUTHORS_INSIDE = AUTHORS | {"model.vision_tower.": "model.vision_tower.vision_tower.vision_model."}


@pytest.fixture(scope="module")
def reference():
    return reference_model()


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A checkpoint of one's own, to change or to break."""
    return shutil.copytree(saved, tmp_path / "llava")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is in the picture? a cat and a dog on the red mat in the sun."] * 20),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


def load(folder, **options):
    return LlavaForConditionalGeneration.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, image_token=IMAGE_TOKEN):
    ids, mask = prompts([9], [1], 16)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    ids = ids.masked_fill(ids == IMAGE_TOKEN, image_token)
    return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits


def close(ours, theirs, tolerance=2e-4):
    assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def renamed(tensors, prefixes):
    for old, new in prefixes.items():
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def edit_json(path, **changes):
    """Set entries at the top of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(folder, *words):
    """Loading ends in one line that holds `words`."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, FileNotFoundError)
    assert "\n" not in message
    assert all(word in message for word in words), message


# --- What loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [HUB, {}, None], ids=["hub", "in-memory", "transformers-5"])
def test_every_spelling_of_the_names_gives_the_same_model(reference, folder, prefixes):
    if prefixes is not None:
        tensors = renamed(reference.state_dict(), prefixes)
        decoder, tower = ("language_model.model", "vision_tower.vision_model") if prefixes else ("model", "vision_tower")
        tensors[f"{tower}.embeddings.position_ids"] = torch.arange(17)[None]
        tensors[f"{decoder}.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, folder / "model.safetensors")
    close(logits(load(folder)), logits(reference))


def test_shards_load_and_a_missing_one_is_named(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 5
    close(logits(load(tmp_path)), logits(reference))
    shards[3].unlink()
    refused(tmp_path, shards[3].name, "missing")


@pytest.mark.parametrize(
    "index",
    ['{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": {"a": 5}}', '{"weight_map": []}', "{}", "[]", "{"],
)
def test_an_index_that_cannot_be_followed_is_named(folder, index):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_stay_so_unless_told_otherwise(reference, tmp_path, dtype):
    theirs = copy.deepcopy(reference).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    close(logits(ours), logits(theirs), 3e-2)
    for wanted in (torch.float32, torch.float16, torch.bfloat16):
        converted = load(tmp_path, dtype=wanted)
        assert {parameter.dtype for parameter in converted.parameters()} == {wanted}
        assert torch.equal(converted.lm_head.weight, theirs.lm_head.weight.to(wanted))
    edit_json(tmp_path / "config.json", dtype=None)
    assert load(tmp_path).dtype == dtype


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_old_and_new_configs_say_the_same(tmp_path, kind):
    theirs = reference_model({}, LINEAR)
    theirs.save_pretrained(tmp_path)
    close(logits(load(tmp_path)), logits(theirs))
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    del text["rope_parameters"]
    text |= {"rope_theta": 500.0, "rope_scaling": {kind: "linear", "factor": 3.0}}
    edit_json(tmp_path / "config.json", text_config=text, dtype=None, torch_dtype="float16")
    assert load(tmp_path).dtype == torch.float16  # the config's, as in the reference, though the file is float32
    close(logits(load(tmp_path, dtype=torch.float32)), logits(theirs))


@pytest.mark.parametrize("with_head", [False, True], ids=["without-head", "with-head"])
def test_a_tied_head_may_be_in_the_file_or_not(tmp_path, with_head):
    theirs = reference_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tensors = renamed(theirs.state_dict(), HUB)
    if not with_head:
        del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load(tmp_path)
    assert ours.lm_head.weight is ours.language_model.embed_tokens.weight
    close(logits(ours), logits(theirs))


# --- What is refused -------------------------------------------------------------------------------------------------

NORM = "language_model.model.norm.weight"
WRONG_TENSORS = {
    "missing": (lambda t: t.pop(NORM), "language_model.norm.weight is missing"),
    "extra": (lambda t: t.update({"model.more.weight": torch.ones(2)}), "model.more.weight"),
    "wrong shape": (lambda t: t.update({NORM: torch.ones(47)}), f"{NORM} in"),
    "right size in another shape": (lambda t: t.update({NORM: torch.ones(48, 1)}), "[48, 1]"),
    "integers": (lambda t: t.update({NORM: torch.ones(48, dtype=torch.int32)}), f"{NORM} in"),
    "two names of one tensor": (lambda t: t.update({"model.language_model.norm.weight": torch.ones(48)}), "norm.weight"),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(folder, case, kind):
    change, word = WRONG_TENSORS[case]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, word, str(folder))


def test_a_tensor_in_two_shards_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "a.safetensors")
    save_file({NORM: tensors[NORM]}, folder / "b.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(folder, NORM, "a.safetensors", "b.safetensors")


def with_header(change):
    """Bytes of a safetensors file -> the same with `change` done to its header, or with what `change` returns as one."""

    def broken(raw):
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header = change(header) or header
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(header).to_bytes(8, "little") + header + raw[end:]

    return broken


def entry(**changes):
    return with_header(lambda header: header[NORM].update(changes))


def overlap(header):
    other = header["language_model.model.layers.0.input_layernorm.weight"]
    header[NORM]["data_offsets"] = other["data_offsets"]


BROKEN_FILES = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut behind the length": lambda raw: raw[:8],
    "cut in the header": lambda raw: raw[:1000],
    "cut behind the header": lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")],
    "cut in the numbers": lambda raw: raw[: len(raw) * 2 // 3],
    "cut at the last byte": lambda raw: raw[:-1],
    "a byte too many": lambda raw: raw + b"\0",
    "header not JSON": with_header(lambda header: b'{"a": '),
    "header not text": with_header(lambda header: b"\xff\xfe\xfd"),
    "header a list": with_header(lambda header: [header]),
    "header nested deeply": with_header(lambda header: b"[" * 200_000),
    "header of 4 exabytes": lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:],
    "overlapping tensors": with_header(overlap),
    "negative shape": entry(shape=[-6, -8]),
    "infinite shape": entry(shape=[float("inf")]),
    "no shape": entry(shape=None),
    "another dtype": entry(dtype="F64"),
    "no offsets": entry(data_offsets=[]),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "negative offset": entry(data_offsets=[-192, 0]),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(folder, case):
    file = folder / "model.safetensors"
    file.write_bytes(BROKEN_FILES[case](file.read_bytes()))
    refused(folder, "model.safetensors")

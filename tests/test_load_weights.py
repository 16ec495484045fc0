"""Checkpoints: every layout loads, what is broken is refused by name, and what we save transformers reads."""

import json
import os
import pickle
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
from checkpoint import find_checkpoint
from clip import ImageProcessor
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
# What the prefixes of transformers' names in memory become in the hub's files and in those of LLaVA's authors.
HUB = {
    "model.language_model": "language_model.model",
    "lm_head": "language_model.lm_head",
    "model.vision_tower": "vision_tower.vision_model",
    "model.multi_modal_projector": "multi_modal_projector",
}
AUTHORS = {
    "model.vision_tower": "vision_model",
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    "model.language_model": "model",
}
NORM = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def reference():
    return reference_model()


@pytest.fixture
def folder(reference, tmp_path):
    """A checkpoint of one's own, to change or to break."""
    reference.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("tokenizer") / "small")
    text = iter(["USER: what is in the picture? ASSISTANT: a cat and a dog on the red mat"] * 20)
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options |= {"model_type": "bpe", "vocab_size": 300, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=prefix, **options)
    return Path(f"{prefix}.model").read_bytes()


def load(folder, dtype=None):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def logits(model, image_token=IMAGE_TOKEN):
    ids, mask = prompts([9], [1], 16)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    ids = ids.masked_fill(ids == IMAGE_TOKEN, image_token)
    return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits


def close(ours, theirs, tolerance=2e-4):
    assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def renamed(tensors, prefixes):
    """Each name with the first of the prefixes that it has replaced."""
    old = {name: next((prefix for prefix in prefixes if name.startswith(prefix)), "") for name in tensors}
    return {prefixes.get(old[n], "") + n.removeprefix(old[n]): tensor.clone() for n, tensor in tensors.items()}


def edit_json(path, **changes):
    """Set entries at the top of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(folder, *words):
    """Loading ends in one line that holds `words`."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


# --- What loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [HUB, {}, None], ids=["hub", "in-memory", "transformers-5"])
def test_every_spelling_of_the_names_gives_the_same_model(reference, folder, prefixes):
    if prefixes is not None:
        computed = {"model.vision_tower.embeddings.position_ids": torch.arange(17)[None]}
        computed |= {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save_file(renamed(reference.state_dict() | computed, prefixes), folder / "model.safetensors")
    close(logits(load(folder)), logits(reference))


def test_shards_load_and_a_missing_one_is_named(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 5
    close(logits(load(tmp_path)), logits(reference))
    shards[3].unlink()
    refused(tmp_path, shards[3].name, "missing")
    reference.save_pretrained(tmp_path)  # in one file; the reference leaves the old index beside it, and ignores it
    close(logits(load(tmp_path)), logits(reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_stay_so_unless_told_otherwise(reference, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    reference.save_pretrained(tmp_path, state_dict=tensors)
    edit_json(tmp_path / "config.json", dtype=None)
    assert {parameter.dtype for parameter in load(tmp_path).parameters()} == {dtype}
    kind = transformers.LlavaForConditionalGeneration
    close(logits(load(tmp_path)), logits(kind.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa")), 3e-2)
    for wanted in (torch.float32, torch.float16, torch.bfloat16):
        converted = load(tmp_path, wanted)
        assert {parameter.dtype for parameter in converted.parameters()} == {wanted}
        assert torch.equal(converted.lm_head.weight, tensors["lm_head.weight"].to(wanted))


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_old_and_new_configs_say_the_same(tmp_path, kind):
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
    reference = reference_model({}, {"rope_parameters": dict(rope)})
    reference.save_pretrained(tmp_path)
    close(logits(load(tmp_path)), logits(reference))
    edit_json(tmp_path / "config.json", dtype="float16")
    assert load(tmp_path).dtype == torch.float16  # the config's word, as in the reference, though the file is float32
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text.pop("rope_parameters") == rope
    text |= {"rope_theta": 500.0, "rope_scaling": {kind: "linear", "factor": 3.0}}
    edit_json(tmp_path / "config.json", text_config=text, dtype=None, torch_dtype="float16")
    assert load(tmp_path).dtype == torch.float16
    close(logits(load(tmp_path, torch.float32)), logits(reference))


def test_a_tied_head_may_be_in_the_file_or_not(tmp_path):
    reference = reference_model(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    tensors = renamed(reference.state_dict(), HUB)
    save_file(tensors, tmp_path / "model.safetensors")
    close(logits(load(tmp_path)), logits(reference))
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load(tmp_path)
    assert ours.lm_head.weight is ours.language_model.embed_tokens.weight
    close(logits(ours), logits(reference))


MEASURE = """
import sys, torch
from llava import LlavaForConditionalGeneration
def resident(kind): return int(open("/proc/self/status").read().split(kind)[1].split()[0]) * 1024
LlavaForConditionalGeneration.from_pretrained(sys.argv[1])  # a small one, to have imported whatever torch wants
for dtype in (torch.bfloat16, torch.float32):
    before = resident("VmRSS:")
    model = LlavaForConditionalGeneration.from_pretrained(sys.argv[2], dtype)
    print(resident("VmHWM:") - before)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_loading_takes_the_memory_of_the_model_and_one_tensor(folder, tmp_path):
    text = {"vocab_size": 10000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(VISION, text))
    save_checkpoint.write_weights(model.bfloat16().to_empty(device="cpu"), tmp_path, 5e9)
    save_checkpoint.write_json(tmp_path / "config.json", save_checkpoint.config_json(model.config))
    size, largest = (tmp_path / "model.safetensors").stat().st_size, model.lm_head.weight.nbytes
    command = [sys.executable, "-c", MEASURE, folder, tmp_path]  # getrusage's peak would start at pytest's own
    peaks = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    for peak, wanted in zip(map(int, peaks), (size, 2 * size), strict=True):
        assert 0.95 * wanted < peak < wanted + largest + 30e6, f"{peak} bytes for {wanted} of weights"


# --- What is refused -------------------------------------------------------------------------------------------------


def with_tensors(folder, more, without="", kind="safetensors"):
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != without} | more
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
        file.unlink()


def with_shards(folder, places):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder.parent / "outside.safetensors")
    save_file({NORM: torch.ones(48)}, folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places} if places else {}))


def with_entry(folder, **changes):
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[NORM].update(changes)
    with_header(folder, json.dumps(header).encode(), raw[end:])


def with_header(folder, header, numbers=b""):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + numbers)


def cut_at(folder, end, more=b""):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:end] + more)


def with_config(folder, **changes):
    edit_json(folder / "config.json", **changes)


BROKEN = {
    "missing tensor": (lambda f: with_tensors(f, {}, without=NORM), "language_model.norm.weight is missing"),
    "extra tensor": (lambda f: with_tensors(f, {"model.more.weight": torch.ones(2)}), "tensor model.more.weight"),
    "wrong shape": (lambda f: with_tensors(f, {NORM: torch.ones(47)}), f"tensor {NORM}"),
    "wrong shape of the right size": (lambda f: with_tensors(f, {NORM: torch.ones(48, 1)}), f"tensor {NORM}"),
    "integers": (lambda f: with_tensors(f, {NORM: torch.ones(48).int()}), f"tensor {NORM}"),
    "integers in a pickle": (lambda f: with_tensors(f, {NORM: torch.ones(48).int()}, kind="bin"), f"tensor {NORM}"),
    "a number in a pickle": (lambda f: with_tensors(f, {"epoch": 3}, kind="bin"), "pytorch_model.bin"),
    "two names": (lambda f: with_tensors(f, {"model.language_model.norm.weight": torch.ones(48)}), "norm.weight"),
    "two shards": (lambda f: with_shards(f, {NORM: "b.safetensors", "": "a.safetensors"}), f"tensor {NORM}"),
    "shard outside": (lambda f: with_shards(f, {"": "../outside.safetensors"}), "model.safetensors.index.json"),
    "shard without a name": (lambda f: with_shards(f, {"": 5}), "model.safetensors.index.json"),
    "list of shards": (lambda f: with_shards(f, ["a.safetensors"]), "model.safetensors.index.json"),
    "index without shards": (lambda f: with_shards(f, None), "model.safetensors.index.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    **{f"cut at {n}": (lambda f, n=n: cut_at(f, n), "model.safetensors") for n in (0, 5, 8, 1000, 100_000, -1)},
    "a byte too many": (lambda f: cut_at(f, None, b"\0"), "model.safetensors"),
    "header of 4 exabytes": (lambda f: cut_at(f, 0, (1 << 62).to_bytes(8, "little") + b"{}"), "model.safetensors"),
    "header not JSON": (lambda f: with_header(f, b'{"a": '), "safetensors has a broken header"),
    "header not text": (lambda f: with_header(f, b"\xff\xfe\xfd"), "safetensors has a broken header"),
    "header a list": (lambda f: with_header(f, b"[{}]"), "safetensors has a broken header"),
    "header nested deeply": (lambda f: with_header(f, b"[" * 200_000), "safetensors has a broken header"),
    "overlapping tensors": (lambda f: with_entry(f, data_offsets=[0, 192]), "safetensors has a broken header"),
    "negative offsets": (lambda f: with_entry(f, data_offsets=[-192, 0]), "safetensors has a broken header"),
    "no offsets": (lambda f: with_entry(f, data_offsets=[]), "safetensors has a broken header"),
    "three offsets": (lambda f: with_entry(f, data_offsets=[0, 1, 2]), "safetensors has a broken header"),
    "negative shape": (lambda f: with_entry(f, shape=[-6, -8]), "safetensors has a broken header"),
    "infinite shape": (lambda f: with_entry(f, shape=[float("inf")]), "safetensors has a broken header"),
    "no shape": (lambda f: with_entry(f, shape=None), "safetensors has a broken header"),
    "dtype of another width": (lambda f: with_entry(f, dtype="F64"), "safetensors has a broken header"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config nested deeply": (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json"),
    "another model": (lambda f: with_config(f, model_type="qwen2_vl"), "qwen2_vl"),
    "no decoder": (lambda f: with_config(f, text_config=None), "text_config"),
    "decoder a word": (lambda f: with_config(f, text_config="llama"), "text_config"),
    "another decoder": (lambda f: with_config(f, text_config=TEXT | {"model_type": "gpt2"}), "gpt2"),
    "another rope": (lambda f: with_config(f, text_config=TEXT | {"rope_scaling": {"type": "dynamic"}}), "dynamic"),
    "rope_type": (lambda f: with_config(f, text_config=TEXT | {"rope_parameters": {"rope_type": "yarn"}}), "yarn"),
    "width a word": (lambda f: with_config(f, text_config=TEXT | {"hidden_size": "wide"}), "config"),
    "no heads": (lambda f: with_config(f, text_config=TEXT | {"num_attention_heads": None}), "config"),
    "negative width": (lambda f: with_config(f, text_config=TEXT | {"intermediate_size": -4}), "config"),
    "patches of nothing": (lambda f: with_config(f, vision_config=VISION | {"patch_size": 0}), "config"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_by_name(folder, case):
    damage, words = BROKEN[case]
    damage(folder)
    refused(folder, words)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-here",)


def test_a_hostile_pickle_does_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Hostile()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    refused(folder, "pytorch_model.bin")
    assert not (folder / "was-here").exists()


# --- The layout of LLaVA's authors -----------------------------------------------------------------------------------


def hub_cache(monkeypatch, cache, name):
    """The empty snapshot of `name` in a local hub cache that has no network behind it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the network"))
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    return snapshot


def write_authors(reference, folder, tower, tower_folder, layout="bin"):
    tensors = renamed(reference.state_dict(), AUTHORS)
    eyes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("vision_model.")}
    if layout == "tower-inside":
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in eyes.items()}
        eyes = {name: torch.zeros_like(tensor) for name, tensor in eyes.items()}  # the untrained one, not to be read
    eyes |= {f"{name}.weight": torch.ones(2, 2) for name in ("text_model.final_layer_norm", "visual_projection")}
    eyes |= {"logit_scale": torch.ones(()), "vision_model.embeddings.position_ids": torch.arange(17)}
    for path, content in ((folder, tensors), (tower_folder, eyes)):
        path.mkdir(parents=True, exist_ok=True)
        if layout == "safetensors":
            save_file(content, path / "model.safetensors")
        else:
            torch.save(content, path / "pytorch_model.bin")
    config = TEXT | {"model_type": "llava_llama", "torch_dtype": "float32", "image_aspect_ratio": "pad"}
    config |= {"mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    (folder / "config.json").write_text(json.dumps(config))
    (tower_folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION}))
    (tower_folder / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28}))


@pytest.mark.parametrize("tower", ["clip", "../clip", "openai/clip"])
@pytest.mark.parametrize("layout", ["bin", "safetensors", "tower-inside"])
def test_the_authors_layout(reference, tmp_path, monkeypatch, tower, layout):
    in_hub = hub_cache(monkeypatch, tmp_path / "hub", "openai/clip")
    folder = tmp_path / "llava"
    write_authors(reference, folder, tower, in_hub if tower == "openai/clip" else folder / tower, layout)
    ours = load(folder)
    assert ours.config.image_token_index == len(ours.language_model.embed_tokens.weight)  # no row of its own
    close(logits(ours, ours.config.image_token_index), logits(reference))


@pytest.mark.parametrize("added", [{}, {0: "<unk>", 1: "<s>", 2: "</s>"}], ids=["old-tokenizer", "newer-tokenizer"])
def test_the_authors_layout_pads_pictures_and_speaks_v1(reference, tmp_path, tokenizer_model, added):
    write_authors(reference, tmp_path, "clip", tmp_path / "clip")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    settings = {"added_tokens_decoder": {i: {"content": token, "special": True} for i, token in added.items()}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<unk>"}))
    processor = LlavaProcessor.from_pretrained(tmp_path)
    wide, square = Image.new("RGB", (60, 30), "red"), Image.new("RGB", (60, 60), (122, 116, 104))
    square.paste(wide, (0, 15))
    prompt = processor.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert prompt.startswith("A chat between a curious user") and prompt.endswith("USER: hi ASSISTANT:")
    ours, padded = processor(wide, "<image>"), processor(square, "<image>")
    assert ours.pixel_values.shape[-2:] == (28, 28) and torch.equal(ours.pixel_values, padded.pixel_values)
    assert ours.input_ids.tolist() == [[1] + [300] * 16]


# --- What we save ----------------------------------------------------------------------------------------------------


def processor_for(model, tokenizer_model):
    pictures = ImageProcessor(size={"shortest_edge": 28}, crop_size=28, do_pad=True)
    return LlavaProcessor(pictures, Tokenizer(tokenizer_model), model.config.image_seq_length, "v1")


@pytest.mark.parametrize(
    ("text", "top"),
    [
        ({}, {}),
        ({}, {"tie_word_embeddings": True}),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5}, {}),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}, {}),
        ({}, {"vision_feature_layer": [-2, 1]}),
    ],
    ids=["llama", "tied-head", "mistral", "linear-rope", "several-layers"],
)
def test_what_we_save_loads_again_and_answers_alike_in_the_reference(tmp_path, tokenizer_model, text, top):
    top = {"image_token_index": 300, "pad_token_id": 301, **top}
    reference_model({}, text | {"vocab_size": 320}, **top).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    processor = processor_for(model, tokenizer_model)
    save_checkpoint.save(model, processor, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]}]
    their_processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    prompt = their_processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    inputs = their_processor(images=picture, text=prompt, return_tensors="pt")
    ours = LlavaProcessor.from_pretrained(tmp_path / "ours")(images=picture, text=prompt)
    assert torch.equal(ours.input_ids, inputs.input_ids)
    close(ours.pixel_values, inputs.pixel_values, 0.05)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **options), theirs.generate(**inputs, **options))


def test_saving_over_a_checkpoint_leaves_nothing_of_it(folder, tokenizer_model):
    model = load(folder)
    processor = processor_for(model, tokenizer_model)
    save_checkpoint.save(model, processor, folder, shard_bytes=50e3)
    assert 5 < len(list(folder.glob("model-*.safetensors"))) < 20 and not (folder / "model.safetensors").exists()
    assert_close(load(folder).state_dict(), model.state_dict(), atol=0, rtol=0)
    (folder / "model_of_mine.safetensors").write_text("nothing that we wrote")
    save_checkpoint.save(model, processor, folder)
    assert {file.name for file in folder.glob("model*")} == {"model.safetensors", "model_of_mine.safetensors"}
    assert_close(load(folder).state_dict(), model.state_dict(), atol=0, rtol=0)


def test_a_failure_while_saving_leaves_the_folder_as_it_was(folder, tokenizer_model, monkeypatch):
    model, written = load(folder), []
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(save_checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint.save(model, processor_for(model, tokenizer_model), folder, shard_bytes=50e3)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# --- Finding and describing ------------------------------------------------------------------------------------------


def test_a_hub_id_is_looked_up_in_the_local_cache(folder, tmp_path, monkeypatch):
    assert find_checkpoint(str(folder)) == folder
    snapshot = hub_cache(monkeypatch, tmp_path / "hub", "somebody/llava-1.5")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    assert find_checkpoint("somebody/llava-1.5") == snapshot
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert torch.equal(load("somebody/llava-1.5").lm_head.weight, load(folder).lm_head.weight)


@pytest.mark.parametrize("installed", [True, False])
def test_an_unknown_id_says_the_command_that_gets_it(tmp_path, monkeypatch, installed):
    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="hf download somebody/unheard-of"):
        find_checkpoint("somebody/unheard-of")


@pytest.mark.parametrize("path", ["no such folder", "/no/such/folder", "a/b/c", "./nowhere", "../nowhere", "a b/c"])
def test_a_path_that_leads_nowhere(path, tmp_path, monkeypatch):
    hub_cache(monkeypatch, tmp_path, "a/b")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        find_checkpoint(path)


def test_the_command_describes_a_checkpoint_or_refuses_in_one_line(folder, reference):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != NORM}, folder / "model.safetensors")
    command = [sys.executable, ROOT / "load_weights.py", folder]
    out = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert (out.returncode, out.stderr) == (0, "")
    for words in ("llama", "4 layers of width 32", "16 tokens a picture", "3 layers of width 48", "6 key/value heads"):
        assert words in out.stdout
    assert f"{len(tensors) - 1} tensors, {reference.num_parameters():,} numbers, F32" in out.stdout
    assert "0.000495 GB in fp32" in out.stdout
    assert f"misfits   tensor language_model.norm.weight is missing in {folder}" in out.stdout
    (folder / "config.json").unlink()
    out = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert (out.returncode, out.stdout, out.stderr.count("\n")) == (2, "", 1)
    assert f"error: {folder} has no config.json" in out.stderr

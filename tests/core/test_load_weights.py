"""Checkpoints: every layout loads, mapped into memory, and an error names what is broken."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from folders import AUTHORS, HUB, NORM, close, edit_json, hub_cache, load, logits, refused, renamed
from hub import writer
from hub.settings import read_config
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from load_weights import match
from reference import TEXT, VISION, reference_model

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parent.parent.parent


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
    assert load(tmp_path).dtype == torch.float16  # config.json decides, as in the reference; the file is float32
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
import sys, threading, torch
from llava import LlavaForConditionalGeneration
def anonymous():  # memory that is not a file's pages
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
LlavaForConditionalGeneration.from_pretrained(sys.argv[1])  # a small one, so that torch has imported what it needs
for dtype in (torch.bfloat16, torch.float32):
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.0005):
            peak.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    model = LlavaForConditionalGeneration.from_pretrained(sys.argv[2], dtype)
    done.set()
    thread.join()
    print(max(*peak, anonymous()) - before)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_maps_the_file_and_converts_one_tensor_at_a_time(folder, tmp_path):
    text = {"vocab_size": 10000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(VISION, text))
    model = model.bfloat16().to_empty(device="cpu")
    writer.write_shards([((writer.hub_name(name), p) for name, p in model.named_parameters())], tmp_path, 5e9)
    writer.write_json(tmp_path / "config.json", writer.config_json(model.config))
    size, largest = (tmp_path / "model.safetensors").stat().st_size, model.lm_head.weight.nbytes
    command = [sys.executable, "-c", MEASURE, folder, tmp_path]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    in_its_own_dtype, converted = map(int, out.split())
    # q, k and v are fused: they are small enough here; all other weights are pages of the file.
    fused = 3 * model.language_model.layers[0].self_attn.q_proj.weight.nbytes
    assert in_its_own_dtype < fused + 30e6, f"{in_its_own_dtype} bytes for {size} of weights"
    most = 2 * (size + largest + fused) + 30e6
    assert 1.95 * size < converted < most, f"{converted} bytes for {size} in bfloat16"


def test_training_a_mapped_model_leaves_the_file_as_it_was(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = LlavaForConditionalGeneration.from_pretrained(folder, kernels="torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


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
    "header not JSON": (lambda f: with_header(f, b'{"a": '), "not a safetensors file"),
    "header not text": (lambda f: with_header(f, b"\xff\xfe\xfd"), "not a safetensors file"),
    "header a list": (lambda f: with_header(f, b"[{}]"), "not a safetensors file"),
    "header nested deeply": (lambda f: with_header(f, b"[" * 200_000), "not a safetensors file"),
    "overlapping tensors": (lambda f: with_entry(f, data_offsets=[0, 192]), "not a safetensors file"),
    "negative offsets": (lambda f: with_entry(f, data_offsets=[-192, 0]), "not a safetensors file"),
    "no offsets": (lambda f: with_entry(f, data_offsets=[]), "not a safetensors file"),
    "three offsets": (lambda f: with_entry(f, data_offsets=[0, 1, 2]), "not a safetensors file"),
    "negative shape": (lambda f: with_entry(f, shape=[-6, -8]), "not a safetensors file"),
    "infinite shape": (lambda f: with_entry(f, shape=[float("inf")]), "not a safetensors file"),
    "no shape": (lambda f: with_entry(f, shape=None), "not a safetensors file"),
    "dtype of another width": (lambda f: with_entry(f, dtype="F64"), "not a safetensors file"),
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


def test_what_is_found_is_what_the_model_has(folder):
    with_tensors(folder, {"model.more.weight": torch.ones(2)}, without=NORM)
    model = LlavaForConditionalGeneration.without_weights(read_config(folder))
    found, mismatches = match(model, folder)
    assert set(found) == set(dict(model.named_parameters())) - {"language_model.norm.weight"}
    assert len(mismatches) == 2


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


def write_authors(reference, folder, tower, tower_folder, layout="bin"):
    tensors = renamed(reference.state_dict(), AUTHORS)
    eyes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("vision_model.")}
    if layout == "tower-inside":
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in eyes.items()}
        eyes = {name: torch.zeros_like(tensor) for name, tensor in eyes.items()}  # untrained: must not be read
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


def test_llava_1_6_in_the_authors_layout_is_refused_by_name(reference, tmp_path):
    write_authors(reference, tmp_path, "clip", tmp_path / "clip")
    edit_json(tmp_path / "config.json", image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad")
    refused(tmp_path, str(tmp_path), "is LLaVA-1.6 in its authors' layout: use the hub's llava-hf/llava-v1.6-* instead")


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

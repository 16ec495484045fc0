"""Quantized checkpoints: written by quantize.py, opened here and in transformers, and refused where they do not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from cli import run
from cli.describe import describe
from cli.quantizing import quantize_checkpoint
from hub.files import BUNDLED, read_json
from hub.writer import save
from llava import LlavaForConditionalGeneration, LlavaProcessor
from quantize import Int4Linear, Int8Linear
from small import small

ROOT = Path(__file__).parent.parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATRIX = "language_model.model.layers.0.mlp.up_proj"


def write(model, out, *flags) -> int:
    return run(lambda: quantize_checkpoint(LlavaForConditionalGeneration, [str(model), "--out", str(out), *flags]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint in bfloat16 with random weights, whose head is not tied."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model, processor = small(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    save(model.bfloat16(), processor, folder)
    return folder


@pytest.fixture(scope="module", params=["int8", "int4"])
def packed(request, whole, tmp_path_factory):
    """The same checkpoint quantized, and the scheme's name (int8 or int4)."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    assert write(whole, out, "--to", request.param) == 0
    return out, request.param


def load(folder, dtype=torch.float32, **options):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folder_holds_what_quantizing_while_loading_gives(whole, packed, dtype):
    folder, how = packed
    ours, theirs = load(folder, dtype), load(whole, dtype, quantize=how)
    kinds = [type(module) for module in load(folder, dtype, kernels="torch").modules()]
    assert kinds.count(Int8Linear if how == "int8" else Int4Linear) == 7 * 2 + 1  # the head too
    assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parity
def test_transformers_computes_the_same(packed, dtype):
    folder, _ = packed
    processor = LlavaProcessor.from_pretrained(folder)
    picture = Image.linear_gradient("L").convert("RGB")
    inputs = processor(images=[picture], text=["USER: <image>\nWhat? ASSISTANT:"])
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        wanted = theirs(**inputs).logits.float()
        for kernels in ("torch", "auto"):
            logits = load(folder, dtype, kernels=kernels)(**inputs).logits.float()
            assert (logits - wanted).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-2) * wanted.abs().max()


@pytest.mark.parametrize("value", [None, [1], "gptq", 5])
def test_a_quantization_config_that_is_no_object(whole, tmp_path, value):
    """null counts as absent."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    config = read_json(copy / "config.json") | {"quantization_config": value}
    (copy / "config.json").write_text(json.dumps(config))
    if value is None:
        assert load(copy).dtype == torch.float32
    else:
        with pytest.raises(ValueError, match="quantization_config is not a JSON object"):
            load(copy)


def test_a_folder_is_described(packed):
    said = describe(LlavaForConditionalGeneration, packed[0])
    assert "mismatches  none" in said and f"weights of {packed[1][-1]} bits" in said


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_the_bundled_model_answers_from_its_folder(tmp_path, how):
    assert write(BUNDLED, tmp_path / "new" / "tiny", "--to", how) == 0
    assert not list(tmp_path.rglob(".unfinished*"))
    out = tmp_path / "new" / "tiny"
    command = [sys.executable, ROOT / "llava.py", "--model", out, "--image", ROOT / "images" / "cat-and-apple.jpg"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "On the left there is a cat and on the right an apple. The background is blue.\n"
    stored = {file.name for file in out.iterdir()}
    assert stored >= {file.name for file in BUNDLED.iterdir() if file.suffix in (".json", ".model", ".jinja")}
    quantized = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert quantized < (BUNDLED / "model.safetensors").stat().st_size
    config = read_json(out / "config.json")
    assert config.pop("quantization_config")["ignore"][-1] == "lm_head"  # it is the embedding too
    assert config == read_json(BUNDLED / "config.json")


def test_the_command_in_a_process_of_its_own(whole, tmp_path):
    command = [sys.executable, ROOT / "quantize.py", whole, "--to", "int4", "--group", "32", "--out", tmp_path / "four"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote ")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.endswith("four exists already: choose another --out\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_nothing(tmp_path, number):
    """Stopped when the scratch folder appears. If it is ready by then, all of it is there."""
    command = [sys.executable, ROOT / "quantize.py", BUNDLED, "--out", tmp_path / "four"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".unfinished*")):
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    left = os.listdir(tmp_path)
    assert (process.returncode, left) in ((130, []), (130, ["four"]), (0, ["four"]))
    if left:
        assert load(tmp_path / "four").dtype == torch.float32


ANSWER = """
import sys
from llava import LlavaForConditionalGeneration, LlavaProcessor
model, processor = (each.from_pretrained(sys.argv[1]) for each in (LlavaForConditionalGeneration, LlavaProcessor))
print(model.generate(processor(text=["USER: Why? ASSISTANT:"]).input_ids, max_new_tokens=8).tolist())
"""


def test_two_processes_run_one_folder(packed):
    command = [sys.executable, "-c", ANSWER, packed[0]]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = [process.communicate(timeout=120)[0] for process in processes]
    assert first == second and first.startswith("[[1, ")


def test_a_deleted_folder_keeps_working(packed, tmp_path):
    folder = shutil.copytree(packed[0], tmp_path / "copy")
    model, ids = load(folder), torch.tensor([[1, 5, 9]])
    shutil.rmtree(folder)
    assert torch.equal(model.generate(ids, max_new_tokens=5), load(packed[0]).generate(ids, max_new_tokens=5))


MEASURE = """
import resource, sys, threading
sys.path.insert(0, sys.argv[1])
from cli.describe import describe
from cli.quantizing import quantize_checkpoint
from llava import LlavaForConditionalGeneration
def anonymous():  # memory that is not a file's pages
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak.append(anonymous())
thread = threading.Thread(target=watch)
thread.start()
import cli.quantizing
cli.quantizing.SHARD_BYTES = 2e7
quantize_checkpoint(LlavaForConditionalGeneration, [sys.argv[2], "--to", "int4", "--out", sys.argv[3]])
done.set()
thread.join()
print(max(peak) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_quantizing_takes_little_memory(tmp_path):
    """Of a checkpoint of 350 MB, only files of 20 MB and a block of a matrix are in memory at a time."""
    model, processor = small()
    text = vars(model.config.text_config) | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        large = LlavaForConditionalGeneration(type(model.config)(vars(model.config.vision_config), text))
    large = large.bfloat16().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.fill_(0.5)
    large.config.image_token_index = model.config.image_token_index
    save(large, processor, tmp_path / "large")
    size = sum(parameter.nbytes for parameter in large.parameters())
    command = [sys.executable, "-c", MEASURE, ROOT, tmp_path / "large", tmp_path / "small"]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert int(out.split()[-1]) < 2 * 2e7 + 150e6 < size


# --- Written by other tools ------------------------------------------------------------------------------------------


def changed(folder, tmp_path, weights=None, top=None, tensors=None):
    """A copy with other settings of quantization, and other tensors (None: removed)."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = read_json(copy / "config.json")
    config["quantization_config"] |= top or {}
    for group in config["quantization_config"].get("config_groups", {}).values():
        if weights:
            group["weights"] |= weights
    (copy / "config.json").write_text(json.dumps(config))
    held = {}
    for file in copy.glob("*.safetensors"):
        held |= load_file(file)
        file.unlink()
    (copy / "model.safetensors.index.json").unlink()
    held |= tensors(held) if tensors else {}
    save_file({name: tensor.clone() for name, tensor in held.items() if tensor is not None}, copy / "model.safetensors")
    return copy


def newer_names(tensors):
    """The names of transformers 5, as llm-compressor writes them."""
    names = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    found = dict.fromkeys(tensors)
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        found[names[prefix] + name.removeprefix(prefix)] = tensor
    return found


@pytest.mark.parametrize("order", [None, "static", "weight"])
def test_a_folder_as_llm_compressor_writes_it(whole, tmp_path, order):
    assert write(whole, tmp_path / "four", "--to", "int4", "--group", "32") == 0
    weights = {"actorder": order, "block_structure": None, "dynamic": False, "observer": "minmax"}
    top = {"kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {}, "version": "0.9"}
    theirs = changed(tmp_path / "four", tmp_path, weights, top, newer_names)
    assert_close(load(theirs).state_dict(), load(tmp_path / "four").state_dict(), atol=0, rtol=0)


def test_four_bits_with_a_scale_for_each_row(whole, tmp_path):
    assert write(whole, tmp_path / "four", "--to", "int4", "--group", "32") == 0

    def one_scale(tensors):
        return {name: tensor[:, :1] for name, tensor in tensors.items() if name.endswith(".weight_scale")}

    theirs = changed(tmp_path / "four", tmp_path, {"strategy": "channel", "group_size": None}, {}, one_scale)
    model, ids = load(theirs), torch.tensor([[1, 5, 9]])
    plain = load(theirs, kernels="torch")
    assert model.language_model.layers[0].mlp.up_proj.scale.shape[1] == 1
    assert torch.equal(model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))


REFUSED = {
    "method": ({}, {"quant_method": "gptq"}, "quant_method 'gptq' is not implemented: it must be compressed-tensors"),
    "format": ({}, {"format": "float-quantized"}, "format 'float-quantized'"),
    "3 bits": ({"num_bits": 3}, {}, "num_bits 3 is not implemented: it must be 4 or 8"),
    "fp8": ({"type": "float", "num_bits": 8}, {}, "type 'float'"),
    "zero points": ({"symmetric": False}, {}, "symmetric False"),
    "order": ({"actorder": "group"}, {}, "actorder 'group'"),
    "strategy": ({"strategy": "tensor"}, {}, "strategy 'tensor'"),
    "group": ({"num_bits": 4, "strategy": "group", "group_size": 48}, {}, "groups of 48 do not divide"),
    "no group": ({"num_bits": 4, "strategy": "group", "group_size": "many"}, {}, "group_size must be a whole number"),
    "groups in 8 bits": ({"num_bits": 8, "strategy": "group", "group_size": 32}, {}, "8 bits with groups"),
    "activations": ({}, {"config_groups": {"g": {"weights": {}, "input_activations": {}}}}, "input_activations {}"),
    "nothing": ({}, {"config_groups": {}}, "has no config_groups"),
    "no weights": ({}, {"config_groups": {"g": {"targets": ["Linear"], "weights": None}}}, "how weights are quantized"),
    "sparse": ({}, {"sparsity_config": {"format": "dense"}}, "sparsity_config"),
    "cache": ({}, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
}


@pytest.mark.parametrize(("weights", "top", "words"), REFUSED.values(), ids=list(REFUSED))
def test_other_forms_are_refused_by_name(packed, tmp_path, weights, top, words):
    with pytest.raises(ValueError, match=words) as error:
        load(changed(packed[0], tmp_path, weights, top))
    assert str(tmp_path / "changed") in str(error.value)


DAMAGE = {
    "cut short": lambda t: {f"{MATRIX}.weight_packed": t[f"{MATRIX}.weight_packed"][:, :-1]},
    "scale": lambda t: {f"{MATRIX}.weight_scale": t[f"{MATRIX}.weight_scale"][:-1]},
    "floats": lambda t: {f"{MATRIX}.weight_packed": t[f"{MATRIX}.weight_packed"].float()},
    "order": lambda t: {f"{MATRIX}.weight_g_idx": torch.arange(32)},
    "zero points": lambda t: {f"{MATRIX}.weight_zero_point": torch.zeros(4)},
    "twice": lambda t: {f"{MATRIX}.weight": torch.zeros(64, 64)},
    "no scale": lambda t: {f"{MATRIX}.weight_scale": None},
    "no numbers": lambda t: {f"{MATRIX}.weight_packed": None},
    "a norm": lambda t: {"language_model.model.norm.weight_packed": torch.zeros(4, dtype=torch.int32)},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_folders_are_refused_by_name(packed, tmp_path, damage):
    folder = changed(packed[0], tmp_path, tensors=damage)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "up_proj" in str(error.value) or "norm" in str(error.value)


def test_the_command_refuses_in_one_line_and_writes_nothing(packed, whole, tmp_path, capsys):
    how = packed[1]

    def refused(model, out, words, *flags):
        assert write(model, out, "--to", how, *flags) == 2
        _, err = capsys.readouterr()
        assert err.startswith("error: ") and words in err and err.count("\n") == 1

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    refused(whole, tmp_path / "old", "exists already")
    refused(packed[0], tmp_path / "new", "is quantized already")
    refused("absent", tmp_path / "new", "neither a folder nor a hub id")
    refused(whole, tmp_path / "old" / "file" / "new", "cannot be written (Not a directory)")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    refused(whole, tmp_path / "link", "exists already")
    broken = shutil.copytree(whole, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{MATRIX}.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    refused(broken, tmp_path / "new", "up_proj is not finite")
    config = read_json(broken / "config.json")
    (broken / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "clip", "model_type": "llava_llama"}))
    refused(broken, tmp_path / "new", "layout of LLaVA's authors")
    if how == "int4":
        refused(whole, tmp_path / "new", "groups of 128 do not fit", "--group", "128")
    for name in ("tokenizer.model", "tokenizer.json"):
        (broken / name).unlink()
    (broken / "config.json").write_text(json.dumps(config))
    refused(broken, tmp_path / "new", "tokenizer.model")
    assert sorted(os.listdir(tmp_path)) == ["broken", "link", "old"]


def test_a_quantized_model_is_quantized_once(packed):
    with pytest.raises(ValueError, match="quantized already: load it without quantize"):
        load(packed[0], quantize="int8")


def test_a_quantized_model_is_not_saved(packed, tmp_path):
    with pytest.raises(ValueError, match=r"quantize\.py"):
        save(load(packed[0]), LlavaProcessor.from_pretrained(packed[0]), tmp_path / "model")
    assert not (tmp_path / "model").exists()

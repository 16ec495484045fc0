"""Adapters of PEFT and of LLaVA's authors: the logits that PEFT gets from them, and which ones are refused."""

import json
import pickle
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from folders import close, edit_json, hub_cache, load, logits
from hub.adapter import TARGETS, AdaptedLinear, base_of, warning_of_another_base
from llava import LlavaForConditionalGeneration
from reference import reference_model

pytestmark = pytest.mark.parity
OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint whose widths int4 can quantize too."""
    folder = tmp_path_factory.mktemp("base") / "llava"
    text = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    reference_model(None, text, spread=0.1).save_pretrained(folder)
    return folder


def write_peft(base, folder, **options):
    """PEFT's model with a random adapter, which it writes to `folder`."""
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    model = peft.get_peft_model(plain, peft.LoraConfig(**OPTIONS | options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """An adapter with a projector, and the logits of PEFT's model."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    return folder, logits(write_peft(base, folder, modules_to_save=["multi_modal_projector"]))


@pytest.fixture
def adapter(written, tmp_path):
    """A copy to change or to break."""
    return shutil.copytree(written[0], tmp_path / "adapter")


def ours(base, adapter, dtype=None, **options):
    return LlavaForConditionalGeneration.from_pretrained(base, dtype, adapter=adapter, **options)


def rename(adapter, change):
    """Give each tensor the name that `change` makes of it."""
    tensors = {change(name): tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 6},
        {"target_modules": ["q_proj", "fc1", "out_proj", "linear_1", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["plain", "rslora", "other modules", "whole tables"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_an_adapter_of_peft_gives_the_logits_of_peft(base, tmp_path, options, tied):
    if tied:
        reference_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
        base = tmp_path / "tied"
    theirs = logits(write_peft(base, tmp_path / "a", **options))
    assert (theirs - logits(load(base))).abs().max() > 0.1
    close(logits(ours(base, tmp_path / "a")), theirs, 5e-4)
    close(logits(ours(base, str(tmp_path / "a"), kernels="torch")), theirs, 5e-4)


def test_old_names_and_pickles_give_the_same(base, adapter, written):
    assert torch.equal(logits(ours(base, adapter)), logits(ours(base, written[0])))
    old = {"model.language_model.": "language_model.model.", "model.multi_modal_": "multi_modal_"}
    rename(adapter, lambda name: next((name.replace(a, b) for a, b in old.items() if a in name), name))
    close(logits(ours(base, adapter)), written[1], 5e-4)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    close(logits(ours(base, adapter)), written[1], 5e-4)


def test_the_folder_of_llavas_authors(base, adapter, written):
    """Their names of the decoder, and the projector in a pickle of its own."""
    rename(adapter, lambda name: name.replace("model.model.language_model.", "model.model."))
    tensors = load_file(adapter / "adapter_model.safetensors")
    whole = {name: tensors.pop(name) for name in list(tensors) if "projector" in name}
    assert len(whole) == 4
    numbers = {"linear_1": "0", "linear_2": "2"}
    names = {name: name.split(".")[-2:] for name in whole}
    torch.save(
        {f"base_model.model.model.mm_projector.{numbers[a]}.{b}": whole[name] for name, (a, b) in names.items()},
        adapter / "non_lora_trainables.bin",
    )
    save_file(tensors, adapter / "adapter_model.safetensors")
    close(logits(ours(base, adapter)), written[1], 5e-4)


def test_merged_in_bfloat16_it_is_off_by_rounding_only(base, written):
    merged, exact = ours(base, written[0], torch.bfloat16), ours(base, written[0], torch.float32)
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()) or "norm" in name, name


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_it_stays_beside_quantized_matrices(base, written, bits):
    """As the same quantized matrices plus the product; with the twins of a CPU, and what is not quantized merged."""
    model, plain = (ours(base, written[0], quantize=bits, kernels=kernels) for kernels in ("auto", "torch"))
    assert sum(isinstance(module, AdaptedLinear) for module in plain.modules()) == 7 * 3
    without = LlavaForConditionalGeneration.from_pretrained(base, quantize=bits, kernels="torch")
    exact = ours(base, written[0], kernels="torch")
    for name, module in plain.named_modules():
        if isinstance(module, AdaptedLinear):
            delta = module.scale * module.lora_B.weight @ module.lora_A.weight
            wanted = without.get_submodule(name).dequantize(torch.float32) + delta
            exact.get_submodule(name).weight.data = wanted
    exact.lm_head.weight.data = without.lm_head.dequantize(torch.float32)
    close(logits(plain), logits(exact), 5e-4)
    close(logits(model), logits(exact), 5e-4)
    assert not any(parameter.requires_grad for parameter in plain.language_model.layers[0].mlp.parameters())


def test_a_head_with_a_lora_on_a_quantized_base(base, tmp_path):
    """PEFT writes the whole head too. It is then not quantized."""
    write_peft(base, tmp_path / "a", target_modules=["lm_head"])
    model, exact = ours(base, tmp_path / "a", quantize="int8"), ours(base, tmp_path / "a")
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight)


def test_the_base_that_it_names_is_used_if_it_is_here(base, adapter, tmp_path, monkeypatch):
    assert base_of(adapter) == str(base)
    snapshot = hub_cache(monkeypatch, tmp_path / "cache", "someone/llava")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/llava")
    with pytest.raises(FileNotFoundError, match=r"adapter.*someone/llava"):
        base_of(adapter)
    (snapshot / "config.json").write_text("{}")
    assert base_of(adapter) == "someone/llava"
    for name in ("/gone", None, 3, "a/b"):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(FileNotFoundError, match=r"adapter.*--model"):
            base_of(adapter)


@pytest.mark.parametrize(
    "named, model, differ",
    [
        ("lmsys/vicuna-7b-v1.5", "llava-hf/llava-1.5-7b-hf", True),
        ("llava-hf/llava-1.5-7b-hf", "/data/LLaVA-1.5-7b", False),
        ("/data/llava-1.5-7b/", "llava-hf/llava-1.5-7b-hf", False),
        ("/c/models--llava-hf--llava-1.5-7b-hf/snapshots/0a1b", "llava-hf/llava-1.5-7b-hf", False),
        (None, "a/b", False),
        ("", "a/b", False),
    ],
)
def test_an_adapter_that_names_another_base_gets_a_warning(adapter, named, model, differ):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
    warning = warning_of_another_base(adapter, model)
    assert bool(warning) == differ
    assert not differ or (named in warning and model in warning and "\n" not in warning)


# --- Refused ---------------------------------------------------------------------------------------------------------


def refused(base, adapter, *words, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ours(base, adapter, **options)
    message = str(caught.value)
    assert all(word in message for word in ("adapter", *words)) and "\n" not in message, message


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}, {"lora_bias": True},
        {"fan_in_fan_out": True}, {"layers_to_transform": [0]}, {"bias": "all"}, {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 1]]}, {"peft_type": "IA3"}, {"peft_type": None}, {"r": 8}, {"r": "4"}, {"r": 0},
        {"r": True}, {"r": 10**30}, {"r": None}, {"lora_alpha": "8"}, {"lora_alpha": float("nan")},
        {"something_new": 1}, {"trainable_token_indices": [1]}, {"alora_invocation_tokens": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_cannot_do_is_refused_by_name(base, adapter, change):
    edit_json(adapter / "adapter_config.json", **change)
    name = next(iter(change))
    refused(base, adapter, *([name] if name not in ("r", "peft_type") else []))


def test_a_base_of_other_shapes(adapter, tmp_path):
    reference_model().save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", adapter, "does not fit", "layers.0")
    reference_model(None, {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                           "num_hidden_layers": 2}).save_pretrained(tmp_path / "short")  # fmt: skip
    refused(tmp_path / "short", adapter, "layers.2", "no such matrix")


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_pickles_that_hold_more_than_tensors_are_refused(base, adapter, capsys, file):
    if file == "adapter_model.bin":
        (adapter / "adapter_model.safetensors").unlink()
    for content in ({"a.lora_A.weight": Evil()}, {"a": {"b": torch.zeros(1)}}, {"a": 3}, [1]):
        torch.save(content, adapter / file)
        refused(base, adapter, file)
    (adapter / file).write_bytes(pickle.dumps(Evil()))
    refused(base, adapter, file)
    assert capsys.readouterr().out == ""


def broken(name):
    def change(adapter):
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(key for key in tensors if key.endswith("lora_A.weight"))
        if name == "cut":
            return file.write_bytes(file.read_bytes()[:-100])
        if name == "no weights":
            return file.unlink()
        if name == "no settings":
            return (adapter / "adapter_config.json").unlink()
        if name == "not JSON":
            return (adapter / "adapter_config.json").write_text("{")
        if name == "a list":
            return (adapter / "adapter_config.json").write_text("[]")
        if name == "one half":
            del tensors[first]
        if name == "not finite":
            tensors[first][0, 0] = torch.nan
        if name == "integers":
            tensors[first] = tensors[first].int()
        if name == "one row":
            tensors[first] = tensors[first][0]
        if name == "twice":
            tensors[first.replace("model.language_model.", "language_model.model.")] = tensors[first].clone()
        if name == "unknown":
            tensors["base_model.model.model.nowhere.weight"] = torch.zeros(3)
        if name == "no pair":
            tensors = {key: tensor for key, tensor in tensors.items() if "lora" not in key}
        if name == "projector":
            key = next(key for key in tensors if "projector" in key)
            tensors[key] = tensors[key][:3].clone()
        if name == "a norm":
            tensors = {key.replace("self_attn.q_proj", "input_layernorm"): tensor for key, tensor in tensors.items()}
        save_file(tensors, file)

    return change


@pytest.mark.parametrize(
    "what",
    ["cut", "no weights", "no settings", "not JSON", "a list", "one half", "not finite", "integers", "one row", "twice",
     "unknown", "no pair", "projector", "a norm"],
)  # fmt: skip
def test_a_broken_adapter_is_refused(base, adapter, what):
    broken(what)(adapter)
    refused(base, adapter)
    refused(base, adapter, quantize="int8")


def test_a_pickle_of_a_few_bytes_with_a_tensor_of_terabytes(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    for part in ("lora_A", "linear_1.weight"):
        name = next(name for name in tensors if part in name)
        torch.save(tensors | {name: torch.zeros(1).expand(2**20, 2**20)}, adapter / "adapter_model.bin")
        refused(base, adapter, "1048576")


def test_a_folder_that_is_none(base, tmp_path):
    for place in (tmp_path, str(tmp_path / "gone"), "", base):
        refused(base, place)
    assert json.loads((base / "config.json").read_text())["model_type"] == "llava"

"""LoRA: what learns, PEFT's gradients and files, quantized bases, dropout, resuming, merging, and the commands."""

import json
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import cli
import train
from folders import edit_json
from hub.adapter import TARGETS, read_adapter
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load_weights import our_name
from quantize import quantize_model
from small import small
from tiny_world import ROOT, logged_losses, write_file
from training import progress, tune_adapter
from training.dropout import Masks
from training.lora import Lora, LoraLoss, add_lora, matrices, multiply_in_float32
from training.records import Records
from training.run_stage import Place
from training.tune_adapter import merge, train_adapter

KEPT = [0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture(scope="module")
def batch(data):
    processor = LlavaProcessor.from_pretrained(BUNDLED)
    return Records(data, data.parent, processor, 2048).conversations(range(2)) | {"samples": torch.arange(2)}


def bundled(dtype=torch.float32, **options):
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype, **{"kernels": "torch"} | options)
    model.config.ignore_index = -100
    return model


def tune(data, folder, steps=3, lora=None, **options):
    lora = lora or Lora(4, 8)
    place, lr = Place(folder, save_every=2), options.pop("lr", 1e-2)
    train_adapter(place, data, None, BUNDLED, steps, 2, lr, 2e-5, lora, **options)
    return folder


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    """The folder of a short training."""
    return tune(data, tmp_path_factory.mktemp("lora"))


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits


def test_it_starts_from_the_bases_answers_and_only_a_b_and_the_projector_learn(batch):
    base, model = bundled(), bundled()
    add_lora(model, Lora(4, 8, seed=3))
    assert torch.equal(logits(model, batch), logits(base, batch))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in learning} == {"multi_modal_projector", "language_model"}
    assert sum("lora_" in name for name in learning) == 2 * 7 * 4 and len(learning) == 2 * 7 * 4 + 4
    other, same = bundled(torch.bfloat16), bundled()
    add_lora(other, Lora(4, 8, seed=4))
    torch.manual_seed(5)
    add_lora(same, Lora(4, 8, seed=3))
    a, b, c = ([m.lora_A.weight for m in matrices(x).values()] for x in (model, other, same))
    assert all(torch.equal(x, z) and not torch.equal(x, y) for x, y, z in zip(a, b, c, strict=True))
    assert len({tuple(x[0, :3].tolist()) for x in a}) == len(a)
    kinds = {p.dtype for p in other.parameters() if p.requires_grad}, {p.dtype for p in matrices(other)[
        "language_model.layers.0.mlp.up_proj"].base.parameters()}  # fmt: skip
    assert kinds == ({torch.float32}, {torch.bfloat16})


@pytest.mark.parity
def test_the_gradients_are_those_of_peft(batch, tmp_path):
    """Also the loss, from the same A and B."""
    model, lora = bundled(), Lora(4, 8)
    objective = LoraLoss(model, add_lora(model, lora)).train()
    with torch.no_grad():
        for linear in matrices(model).values():
            linear.lora_B.weight.normal_(0, 0.05)
    tune_adapter.write_adapter(model, tmp_path, lora, str(BUNDLED))
    loss = objective(batch) / objective.count(batch)
    loss.backward()
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    out = theirs(**{name: tensor for name, tensor in batch.items() if name != "samples"})
    out.loss.backward()
    assert_close(loss, out.loss, atol=1e-4, rtol=1e-4)
    gradients = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", "")
            gradients[our_name(name)] = parameter.grad
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert learning.keys() == gradients.keys()
    for name, grad in learning.items():
        assert_close(grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parity
def test_peft_opens_what_it_writes_with_equal_logits(written, batch):
    settings = json.loads((written / "adapter_config.json").read_text())
    assert settings["target_modules"] == TARGETS and settings["base_model_name_or_path"] == str(BUNDLED)
    assert {path.name for path in written.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "log.csv", "lora.pt")
    }
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, written).eval()
    ours = bundled(adapter=written, kernels="auto")
    assert (logits(ours, batch) - logits(bundled(), batch)).abs().max() > 0.1
    assert_close(logits(ours, batch), logits(theirs, batch), atol=5e-4, rtol=5e-4)


def test_the_file_of_an_interrupted_run_holds_only_what_learns(written):
    state = torch.load(written / "lora.pt")
    assert all("lora_" in name or "projector" in name for name in state["objective"])
    fast, slow = state["optimizer"]["param_groups"]
    assert (fast["highest"], slow["highest"], len(slow["params"])) == (1e-2, 2e-5, 4)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [None, "int8"])
def test_in_bfloat16_the_gradients_are_in_float32_and_those_of_float32_up_to_rounding(bits):
    """Frozen weights in bfloat16 or int8, products in bfloat16; what learns stays in float32."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = small()
        with torch.no_grad():
            for parameter in model.language_model.layers.parameters():
                parameter.mul_(0.3)
        if bits:
            quantize_model(model, bits)
        model.to(dtype)
        objective = LoraLoss(model, add_lora(model, Lora(4, 8, dropout=0.1))).train()
        ids = torch.arange(5, 45).reshape(2, 20)
        with torch.no_grad():
            for i, linear in enumerate(matrices(model).values()):
                linear.lora_B.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
        objective({"input_ids": ids, "labels": ids, "samples": torch.arange(2)}).backward()
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert frozen <= {dtype, torch.int8}
        learning = [p for name, p in model.named_parameters() if "lora_" in name]
        assert {p.dtype for p in learning} == {p.grad.dtype for p in learning} == {torch.float32}
        results.append(torch.cat([p.grad.flatten() for p in learning]))
    exact, rounded = results
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.95


def test_matrices_stored_in_bfloat16_are_multiplied_in_float32_where_that_is_faster(batch):
    """With the gradients of a base in float32: the bundled file is in bfloat16."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = bundled(dtype)
        objective = LoraLoss(model, add_lora(model, Lora(4, 8))).train()
        multiply_in_float32(model)
        bits = {linear.base.weight.dtype for linear in matrices(model).values()}
        assert bits == {dtype} and model.dtype == torch.float32
        objective(batch).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


# --- Quantized bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_gradients_through_a_quantized_base_are_those_of_its_matrices(bits, batch):
    """And what is kept for the backward pass does not include the matrices."""
    model, exact = bundled(quantize=bits), bundled()
    for name in matrices(model):
        exact.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.float32)
    results = []
    for each in (model, exact):
        objective = LoraLoss(each, add_lora(each, Lora(4, 8))).train()
        with torch.no_grad():
            for i, linear in enumerate(matrices(each).values()):
                linear.lora_B.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=shapes: s.append(x.shape) or x, lambda x: x):
            loss = objective(batch)
        loss.backward()
        results.append([p.grad for p in each.parameters() if p.requires_grad])
        assert torch.Size([704, 256]) not in shapes and torch.Size([256, 704]) not in shapes
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_an_int4_base_learns(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "REPORT_EVERY", 1)
    (data.parent / "new.json").write_text(json.dumps([
        record | {"conversations": [record["conversations"][0], {"from": "gpt", "value": "A zebra on a violin."}]}
        for record in json.loads(data.read_text())
    ]))  # fmt: skip
    tune(data.parent / "new.json", tmp_path, steps=12, quantize="int4")
    assert f"--adapter {tmp_path} --quantize int4" in capsys.readouterr().out
    losses = [float(loss) for loss in logged_losses(tmp_path).values()]
    assert losses[-1] < losses[0] / 3, losses


# --- Dropout, resuming -----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_masks_depend_on_the_sample_and_not_on_what_is_beside_it():
    masks, x = Masks(0.25, 7, torch.tensor([5, 9])), torch.ones(2, 40, 64)
    keep = masks.keep(x, 3)
    assert keep.float().mean() == pytest.approx(0.75, abs=0.02)
    assert all(keep.float().mean(dim).std() < 0.15 for dim in ((0, 1), (0, 2)))
    masks.samples = torch.tensor([9])
    assert torch.equal(masks.keep(x[:1, :30], 3)[0], keep[1, :30])
    for other in (masks.keep(x[:1], 4)[0], Masks(0.25, 8, masks.samples).keep(x[:1], 3)[0], keep[0]):
        assert (other == keep[1]).float().mean() == pytest.approx(0.625, abs=0.03)  # 0.75^2 + 0.25^2: by chance
    assert Masks(0.25, -(10**30), masks.samples).keep(x[:1], 3).shape == (1, 40, 64)


def test_masks_of_a_few_places_are_the_same_as_in_earlier_versions():
    """So that a run which was interrupted before an update of the code can be resumed after it."""
    kept = Masks(0.5, 7, torch.tensor([5, 9])).keep(torch.ones(2, 2, 6), 3)
    assert kept.int().flatten().tolist() == KEPT


def test_without_sample_numbers_dropout_says_what_is_missing(batch):
    model = bundled()
    add_lora(model, Lora(4, 8, dropout=0.5))
    with pytest.raises(RuntimeError, match="LoraLoss"):
        model.train()(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    logits(model.eval(), batch)


def test_dropout_zeroes_a_share_in_training_only(batch):
    model, (one, two) = bundled(), [Lora(4, 8, dropout) for dropout in (0.0, 0.5)]
    masks = add_lora(model, two)
    objective = LoraLoss(model, masks).train()
    with torch.no_grad():
        for linear in matrices(model).values():
            linear.lora_B.weight.normal_(0, 0.1)
        with_dropout, again = objective(batch), objective(batch)
        without = objective.eval()(batch)
    assert with_dropout == again != without and one.dropout == 0


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_EVERY", 1)
    lora = Lora(4, 8, dropout=0.2)
    tune(data, tmp_path / "whole", 5, lora)
    real = Records.conversations
    monkeypatch.setattr(Records, "conversations", lambda self, n: real(self, n) if n.start < 6 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(data, tmp_path / "stopped", 5, lora)
    assert not (tmp_path / "stopped" / "adapter_config.json").exists()
    monkeypatch.setattr(Records, "conversations", real)
    tune(data, tmp_path / "stopped", 5, lora)
    names = ("log.csv", "adapter_model.safetensors", "adapter_config.json")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "stopped" / n).read_bytes() for n in names)
    for changed in (Lora(4, 8), Lora(4, 9, dropout=0.2), Lora(4, 8, dropout=0.2, seed=1)):
        with pytest.raises(ValueError, match="--out"):
            tune(data, tmp_path / "whole", 5, changed)


def test_accumulating_gives_the_same_step(data, tmp_path):
    for pieces in (1, 2):
        place = Place(tmp_path / str(pieces), accumulate=pieces)
        train_adapter(place, data, None, BUNDLED, 2, 2, 1e-3, 2e-5, Lora(4, 8, dropout=0.2))
    one, two = (load_file(tmp_path / str(n) / "adapter_model.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        assert_close(tensor, two[name], atol=2e-4, rtol=0, msg=name)


# --- Continuing and merging ------------------------------------------------------------------------------------------


def test_an_adapter_is_continued(data, written, batch, tmp_path):
    adapter = read_adapter(written, our_name)
    for options in ({}, {"quantize": "int8"}):
        model = bundled(**options)
        add_lora(model, Lora(4, 8), adapter)
        assert_close(logits(model, batch), logits(bundled(adapter=written, **options), batch), atol=1e-3, rtol=1e-3)
    tune(data, tmp_path, steps=1, adapter=written, lr=1e-9)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (written, tmp_path))
    assert before.keys() == after.keys() and all(torch.allclose(before[n], after[n], atol=1e-4) for n in before)


def test_a_folder_with_an_adapter_of_llavas_authors_is_not_written_to(data, tmp_path):
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has a non_lora_trainables"):
        tune(data, tmp_path)


@pytest.mark.parametrize("lora", [Lora(8, 16), Lora(4, 9), Lora(4, 8, rslora=True), Lora(1000, 8)], ids=str)
def test_what_cannot_be_continued_is_refused(written, lora):
    with pytest.raises(ValueError, match="adapter"):
        add_lora(bundled(), lora, read_adapter(written, our_name))


def test_an_adapter_with_other_modules_is_not_continued(written):
    adapter = read_adapter(written, our_name)
    adapter.whole["language_model.norm.weight"] = torch.zeros(256)
    with pytest.raises(ValueError, match=r"adapter.*norm"):
        add_lora(bundled(), Lora(4, 8), adapter)


def test_a_merged_checkpoint_is_complete_and_gives_the_same_logits(written, batch, tmp_path):
    merge(BUNDLED, written, tmp_path / "m")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "m", kernels="torch")
    with_adapter = bundled(None, adapter=written)
    assert merged.dtype == with_adapter.dtype == torch.bfloat16
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, with_adapter.get_parameter(name)), name
    LlavaProcessor.from_pretrained(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {path.name for path in BUNDLED.iterdir()}


@pytest.mark.parity
def test_a_merged_head_is_no_longer_tied(written, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((written / "adapter_config.json").read_bytes())
    A, B = torch.randn(4, 256), torch.randn(bundled().config.vocab_size, 4)
    head = {"base_model.model.lm_head.lora_A.weight": A, "base_model.model.lm_head.lora_B.weight": B}
    save_file(head, adapter / "adapter_model.safetensors")
    merge(BUNDLED, adapter, tmp_path / "m")
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert not torch.equal(ours.lm_head.weight, ours.language_model.embed_tokens.weight)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)


def test_an_adapter_is_not_merged_into_a_quantized_base(written, tmp_path):
    (tmp_path / "q").mkdir()
    config = json.loads((BUNDLED / "config.json").read_text()) | {"quantization_config": {}}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ValueError, match=r"adapter.*quantized"):
        merge(tmp_path / "q", written, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_adapter_beside_a_checkpoint_leaves_its_weights(written, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    model, lora = bundled(), Lora(4, 8)
    add_lora(model, lora)
    tune_adapter.write_adapter(model, tmp_path, lora, "x")
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    with torch.no_grad():
        matrices(model)["language_model.layers.0.mlp.up_proj"].lora_B.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="up_proj"):
        tune_adapter.write_adapter(model, tmp_path / "new", lora, "x")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


# --- Commands --------------------------------------------------------------------------------------------------------


def parse(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return train.parse_arguments()


@pytest.mark.quick
def test_defaults_and_the_base_that_an_adapter_names(data, tmp_path, monkeypatch):
    args = parse(monkeypatch, "--data", data, "--lora", "4")
    assert (args.lr, args.projector_lr, args.model) == (2e-4, 2e-5, BUNDLED)
    assert train.find_lora(args) == Lora(4, 8)
    assert parse(monkeypatch, "--data", data).lr == 2e-5
    (tmp_path / "base").mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1}
    settings |= {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    args = parse(monkeypatch, "--data", data, "--lora", "4", "--adapter", tmp_path, "--dropout", ".05", "--seed", "3")
    assert args.model == str(tmp_path / "base") and train.find_lora(args) == Lora(4, 6, 0.05, True, 3)
    continued = ["--data", data, "--lora", "4", "--adapter", tmp_path]
    assert train.find_lora(parse(monkeypatch, *continued)) == Lora(4, 6, 0.1, True)
    assert train.find_lora(parse(monkeypatch, *continued, "--dropout", "0")) == Lora(4, 6, 0.0, True)
    edit_json(tmp_path / "adapter_config.json", lora_dropout="x")
    with pytest.raises(ValueError, match="lora_dropout"):
        train.find_lora(parse(monkeypatch, *continued))
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="/gone")
    with pytest.raises(FileNotFoundError, match="adapter"):
        parse(monkeypatch, "--merge", "--adapter", tmp_path, "--out", "x")


@pytest.mark.quick
@pytest.mark.parametrize(
    "words, named",
    [
        (["--lora", "4"], "--data"),
        (["--adapter", "x", "--out", "y"], "--merge.*--data.*--lora"),
        (["--adapter", "x", "--lora", "4"], "--data"),
        (["--data", "my.json", "--alpha", "4"], "--lora"),
        (["--data", "my.json", "--projector-lr", "4"], "--lora"),
        (["--data", "my.json", "--quantize", "int4"], "--lora"),
        (["--data", "my.json", "--lora", "4", "--compile"], "--compile"),
        (["--merge", "--adapter", "x"], "--out"),
        (["--merge", "--out", "x"], "--adapter"),
        (["--merge", "--adapter", "x", "--out", "x", "--data", "my.json"], "--data"),
    ],
    ids=" ".join,
)
def test_flags_that_do_not_go_together_are_refused(monkeypatch, words, named):
    with pytest.raises(ValueError, match=named):
        parse(monkeypatch, *words)


@pytest.mark.quick
@pytest.mark.parametrize(
    "words", [["--lora", "0"], ["--dropout", "1"], ["--dropout", "x"], ["--alpha", "nan"], ["--alpha", "0"]]
)
def test_values_out_of_range_are_refused(monkeypatch, words):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--data", "my.json", *words)


@pytest.mark.quick
def test_a_negative_alpha_and_too_little_memory_have_their_own_sentences(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--data", "my.json", "--lora", "4", "--alpha", "-1")
    assert "-1 is not a number above 0" in capsys.readouterr().err

    def work():
        raise MemoryError

    assert cli.run(work, train.NO_MEMORY) == 2
    assert "--accumulate" in (error := capsys.readouterr().err) and "--dtype" not in error


def test_the_commands_use_an_adapter(written, tmp_path, monkeypatch, capsys):
    def ask(*words) -> int:
        image = ["--image", ROOT / "images" / "rocket.jpg", "--max-new-tokens", "8"]
        return cli.main(LlavaForConditionalGeneration, LlavaProcessor, list(map(str, [*image, *words])))

    def run_train(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        return cli.run(train.main)

    assert ask("--adapter", written, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["adapter"] == str(written)
    assert ask("--adapter", written, "--quantize", "int4") == 0
    assert run_train("--merge", "--adapter", written, "--out", tmp_path / "m") == 0
    assert ask("--model", tmp_path / "m") == 0
    assert "warning" not in capsys.readouterr().err
    assert ask("--model", tmp_path / "m", "--adapter", written) == 0
    assert f"warning: the adapter {written} is for" in capsys.readouterr().err
    assert run_train("--merge", "--model", tmp_path / "m", "--adapter", written, "--out", tmp_path / "n") == 0
    assert f"warning: the adapter {written} is for" in capsys.readouterr().err
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    wrong = ["--model", BUNDLED, "--adapter", tmp_path]
    for command, words in ((ask, []), (run_train, ["--merge", "--out", tmp_path / "new"])):
        assert command(*wrong, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "adapter" in error
        assert not (tmp_path / "new").exists()

"""The plan of a run: its arithmetic against the real model, the real step, and what it refuses."""

import json
import sys

import pytest
import torch

import train
from cli.quantizing import quantize_checkpoint
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration
from tiny_world import tiny_world, write_file, write_records
from training import plan as planning
from training.attention import use_training_attention
from training.conversations import tokenize_conversation
from training.lora import Lora, LoraLoss, add_lora, matrices, multiply_in_float32
from training.losses import NextTokenLoss
from training.plan import (
    Living,
    Piece,
    Run,
    largest_piece,
    longest_conversations,
    objective_of,
    plan,
    step_bytes,
    weight_bytes,
)
from training.recompute import recompute_layers
from training.records import Records
from training.run_stage import Place, choose_parameters
from training.stages import STAGES

PROJECTOR = 192 * 256 + 256 + 256 * 256 + 256  # of the bundled model


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(planning, "fast_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "q"
    quantize_checkpoint(LlavaForConditionalGeneration, [str(BUNDLED), "--to", "int4", "--out", str(folder)])
    return folder


@pytest.fixture
def fast(monkeypatch):
    """A step of which each conversation takes 1 GB, or 0.5 GB with --recompute, and no weights to load."""
    step = lambda objective, run, piece: 10**9 * piece.B // (1 + run.place.recompute)  # noqa: E731
    monkeypatch.setattr(planning, "step_bytes", step)
    monkeypatch.setattr(planning, "return_freed_memory", lambda: None)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))


def run_of(tmp_path, checkpoint=BUNDLED, lora=None, quantize=None, batch=2, **place) -> Run:
    return Run(checkpoint, Place(tmp_path, **place), batch, lora, quantize)


def loaded(run: Run) -> torch.nn.Module:
    """The objective of a run with its weights, made as train_on_records and train_adapter make it."""
    dtype = torch.bfloat16 if run.lora else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(run.checkpoint, dtype, "cpu", run.quantize, kernels="torch")
    if run.lora is None:
        objective = NextTokenLoss(model)
        choose_parameters(objective, STAGES[-1].trainable)
        return objective
    masks = add_lora(model, run.lora)
    multiply_in_float32(model)
    return LoraLoss(model, masks)


def sizes(objective) -> dict:
    return {name: (p.dtype, p.shape, p.requires_grad) for name, p in objective.named_parameters()}


@pytest.mark.parametrize("rank, bits", [(None, None), (4, None), (4, "int8"), (4, "int4"), (4, "file")])
def test_weights_are_planned_as_the_loader_makes_them(rank, bits, int4, tmp_path):
    """And the numbers that learn are counted by the formula of each kind of training."""
    checkpoint, bits = (int4, None) if bits == "file" else (BUNDLED, bits)
    run = run_of(tmp_path, checkpoint, Lora(rank, 8) if rank else None, bits)
    real, planned = loaded(run), objective_of(run)
    assert sizes(planned) == sizes(real)
    assert all(p.is_meta for p in planned.parameters())
    frozen = {id(p) for linear in matrices(real.model).values() for p in linear.parameters() if not p.requires_grad}
    in_file = [p for name, p in real.model.named_parameters() if id(p) in frozen and not name.endswith(".q")]
    if rank is None or bits:  # of another dtype than in the file: copies
        in_file = []
    mapped = sum(p.nbytes for p in in_file)
    held = sum(p.nbytes for p in real.model.parameters()) - mapped
    assert weight_bytes(planned, run) == (held, mapped)


def test_what_learns_is_counted_by_the_formula_of_each_kind_of_training(fast, tmp_path):
    piece = Piece(1, 90, 20, 1)
    whole, thin = (plan(run_of(tmp_path, lora=lora, batch=1), piece) for lora in (None, Lora(4, 8)))
    D, inner, layers = 256, 704, 4
    assert thin.learning == PROJECTOR + layers * 4 * (4 * 2 * D + 3 * (D + inner))
    vocabulary = objective_of(run_of(tmp_path)).model.config.vocab_size
    decoder = vocabulary * D + layers * (4 * D * D + 3 * D * inner + 2 * D) + D  # the head is the embedding
    assert whole.learning == PROJECTOR + decoder
    for each in (whole, thin):
        assert (each.gradients, each.state) == (4 * each.learning, 8 * each.learning)
        parts = each.weights + each.gradients + each.state + each.activations + each.process
        assert each.needed == parts


@pytest.mark.parametrize("rank, pieces, recompute", [(None, 2, False), (4, 1, True)])
def test_a_step_on_fake_tensors_allocates_what_a_real_one_does(rank, pieces, recompute, data, tmp_path):
    run = run_of(tmp_path, lora=Lora(rank, 8, 0.1) if rank else None, accumulate=pieces, recompute=recompute)
    records = Records(data, data.parent, tiny_world().processor, 2048)
    piece = largest_piece(longest_conversations(records, run.share), run.share)
    batches = [fitting(records, piece, lora=bool(rank)) for _ in range(pieces)]
    real = loaded(run).train()
    use_training_attention(real)
    if recompute:
        recompute_layers(real.model)
    with Living(list(real.parameters())) as living:
        loss = planning.backward(real, real.count, batches, "cpu", run.place.autocast)
    assert loss.isfinite()
    inputs = sum(tensor.nbytes for batch in batches for tensor in batch.values())
    assert step_bytes(objective_of(run), run, piece) == pytest.approx(living.most + inputs, rel=0.02)


def fitting(records: Records, piece: Piece, lora: bool) -> dict:
    """A real batch of a piece's size."""
    long = max(range(4), key=lambda n: records.conversations(range(n, n + 1))["input_ids"].shape[1])
    rows = [records.conversations(range(long, long + 1)) for _ in range(piece.B)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return batch | ({"samples": torch.arange(piece.B)} if lora else {})


def test_the_largest_piece_has_the_longest_conversations_that_fit(tmp_path):
    made = write_records(tmp_path, 3)
    for record, words in zip(made, (3, 60, 4000), strict=True):
        record["conversations"] = [made[0]["conversations"][0], {"from": "gpt", "value": "cat " * words}]
    (tmp_path / "my.json").write_text(json.dumps([*made, {"conversations": [
        {"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]}]))  # fmt: skip
    records = Records(tmp_path / "my.json", tmp_path, tiny_world().processor, 2048)
    turns = [record["conversations"] for _, record in records.records]
    (short, _), (long, labels), (too_long, _), _ = (tokenize_conversation(each, records.processor) for each in turns)
    assert len(short) < len(long) < 2048 < len(too_long)
    one, two, four = (largest_piece(longest_conversations(records, 4), B) for B in (1, 2, 4))
    assert one == Piece(1, len(long), sum(label >= 0 for label in labels), 1)
    assert (two.T, two.pictures) == (one.T, 2) and two.labels > one.labels
    assert four.B == 4 and four.pictures == 3  # of three conversations that fit, one is read again


# --- Commands --------------------------------------------------------------------------------------------------------


def run_train(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()


def test_the_plan_is_printed_and_nothing_is_loaded(fast, data, tmp_path, monkeypatch, capsys):
    words = ["--data", data, "--plan", "--batch", "4", "--out", tmp_path / "out", "--device", "cpu"]
    run_train(monkeypatch, *words)
    printed = capsys.readouterr().out
    for row in ("weights", "gradients", "optimizer state", "activations", "together", "--accumulate 4 --recompute"):
        assert row in printed
    run_train(monkeypatch, *words, "--lora", "4", "--recompute", "--accumulate", "4")
    assert "--quantize int4" in (printed := capsys.readouterr().out) and "--recompute" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "free, remedy",
    [(3.5e9, "--accumulate 4 makes"), (0.8e9, "--accumulate 4 --recompute makes"), (1e6, "smaller model")],
)
def test_a_run_that_cannot_fit_is_refused_with_the_flags_that_make_it_fit(
    fast, free, remedy, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(planning, "free_bytes", lambda device: free)
    with pytest.raises(ValueError, match=f"the run needs 4.* GB, .*: .*{remedy}"):
        run_train(monkeypatch, "--data", data, "--batch", "4", "--out", tmp_path / "out", "--device", "cpu")
    assert "together" in capsys.readouterr().out and not (tmp_path / "out").exists()

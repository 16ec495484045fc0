"""A stage: what it changes, resuming an interrupted run, and stopping one that diverges."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tiny_world import logged_losses, tiny_world, untrained
from training import progress, run_stage
from training.losses import NextTokenLoss
from training.run_stage import Place
from training.stage_files import snapshot
from training.stages import STAGES

TOWER, DECODER, ALIGN, TUNE = STAGES
WORLD = tiny_world()


def run(stage, place, model=None, data=None):
    run_stage.run_stage(stage, model or untrained(), data or partial(stage.data, WORLD), place)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_changes_its_own_parts_and_nothing_else(stage, tmp_path):
    model = untrained()
    before = snapshot(model)
    run(replace(stage, steps=2, batch=3), Place(tmp_path), model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(stage.trainable) for name in changed)
    assert {name.partition(".")[0] for name in changed} == set(stage.trainable)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, monkeypatch):
    stage = replace(TUNE, steps=8, batch=3)
    monkeypatch.setattr(progress, "REPORT_EVERY", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    weights = {}
    for folder, stop in ((whole, None), (stopped, 6 * 3), (stopped, None)):
        model = untrained()

        def draw(seeds, stop=stop):
            if seeds.start == stop:
                raise KeyboardInterrupt
            return WORLD.conversations(seeds)

        try:
            run(stage, Place(folder, save_every=4), model, draw)
        except KeyboardInterrupt:
            assert len(logged_losses(folder)) == 6  # two steps more than are saved
        weights[folder] = snapshot(model)
    assert logged_losses(stopped) == logged_losses(whole) and len(logged_losses(whole)) == 8
    assert (stopped / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert all(torch.equal(tensor, weights[whole][name]) for name, tensor in weights[stopped].items())


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    stage = replace(DECODER, steps=1, batch=2)
    run(stage, Place(tmp_path))
    for other, place in ((replace(stage, lr=1.0), Place(tmp_path)), (stage, Place(tmp_path, source="b"))):
        with pytest.raises(ValueError, match="--out"):
            run(other, place)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "another model"])
def test_a_file_that_cannot_be_resumed_is_refused_in_a_sentence(tmp_path, damage):
    stage, file = replace(ALIGN, steps=1, batch=1), tmp_path / "align.pt"
    run(stage, Place(tmp_path))
    saved = file.read_bytes()
    content = {"cut": saved[: len(saved) // 2], "text": b"hello", "empty": b""}.get(damage, saved)
    file.write_bytes(content)
    if damage == "another model":
        state = torch.load(file)
        del state["objective"]["model.lm_head.weight"]
        torch.save(state, file)
    with pytest.raises(ValueError, match=r"align\.pt cannot be resumed.*--out"):
        run(stage, Place(tmp_path))


class Steep(NextTokenLoss):
    """A loss that is a number, but whose gradients are not."""

    def forward(self, batch):
        return super().forward(batch) + (0 * self.model.lm_head.weight).sqrt().sum()


class Lost(NextTokenLoss):
    def forward(self, batch):
        return super().forward(batch) * torch.inf


@pytest.mark.parametrize(
    "how, what",
    [
        ({"lr": 1e5, "steps": 20}, "not finite"),
        ({"loss": Lost, "steps": 1}, "loss"),
        ({"loss": Steep, "steps": 1}, "gradients"),
        ({"lr": 1e39, "steps": 1}, "result"),  # finite numbers lead to a last step out of float32's range
    ],
)
def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tmp_path, how, what):
    stage = replace(TUNE, batch=2, **how)
    with pytest.raises(ValueError, match=f"diverged.*{what}"):
        run(stage, Place(tmp_path, save_every=1))
    saved = tmp_path / "tune.pt"
    assert saved.is_file() == (stage.steps > 1) and not saved.with_suffix(".new").exists()
    if saved.is_file():
        state = torch.load(saved)
        assert all(tensor.isfinite().all() for tensor in state["objective"].values())

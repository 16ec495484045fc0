"""The recipe: what each stage learns from, what it may change, and that a stopped run goes on."""

import csv
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import emoji_world
import train
from clip import ImageProcessor
from command import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TURNS = [
    {"from": "human", "value": "<image>\nWhat is on the left?"},
    {"from": "gpt", "value": "There is a cat on the left."},
    {"from": "human", "value": "Is there a dog?"},
    {"from": "gpt", "value": "No."},
]


@pytest.fixture(scope="module")
def world():
    side = {"height": train.SIDE, "width": train.SIDE}
    image_processor = ImageProcessor({"shortest_edge": train.SIDE}, side)
    processor = LlavaProcessor(image_processor, Tokenizer.from_pretrained(BUNDLED), 64, "v1")
    return train.World(emoji_world.load_sprites(), processor)


def test_a_conversation_is_tokenized_as_its_prompt_will_be(world):
    processor = world.processor
    ids, labels = train.tokenize_conversation(TURNS, processor)
    text = processor.template.render(train.messages(TURNS), add_generation_prompt=False)
    assert ids == processor.tokenizer.encode(text.replace("<image>", "<image>" * 64))
    learnt = [i for i in labels if i != -100]
    assert processor.decode(learnt) == "There is a cat on the left.</s> No.</s>"
    assert all(label in (-100, i) for label, i in zip(labels, ids, strict=True))


def test_a_caption_is_all_that_alignment_learns(world):
    ids, labels = train.tokenize_caption("a cat on a blue background", world.processor)
    assert world.processor.decode(ids).replace("<image>", "") == "<s> \n a cat on a blue background</s>"
    assert world.processor.decode([i for i in labels if i != -100]) == "a cat on a blue background</s>"


@pytest.mark.parametrize("stage", train.STAGES, ids=lambda stage: stage.name)
def test_batches_are_the_same_for_the_same_seeds_and_padding_is_not_learnt(world, stage):
    batch, again = stage.data(world, range(5, 9)), stage.data(world, range(5, 9))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    filling = batch["input_ids"] == world.processor.tokenizer.pad_token_id
    assert filling.any() and (batch["labels"][filling] == -100).all()
    if "pixel_values" in batch:
        images = (batch["input_ids"] == world.processor.tokenizer.image_token_id).sum(1)
        assert (batch["pixel_values"].shape, images.tolist()) == ((4, 3, 112, 112), [64] * 4)
        assert not torch.equal(batch["pixel_values"], stage.data(world, range(6, 10))["pixel_values"])


@pytest.mark.parametrize("stage", train.STAGES, ids=lambda stage: stage.name)
def test_a_stage_changes_its_own_parts_and_nothing_else(world, stage, tmp_path):
    torch.manual_seed(0)
    model = train.new_model(world.processor.tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train.run_stage(replace(stage, steps=2, batch=3), model, world, tmp_path, "cpu")
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(name.startswith(stage.trainable) for name in changed)
    parts = {name.partition(".")[0] for name in changed}
    assert parts == set(stage.trainable)


def test_a_stopped_run_goes_on_with_the_same_losses(world, tmp_path, monkeypatch):
    stage = replace(train.STAGES[1], steps=8, batch=4)
    monkeypatch.setattr(train, "KEEP_EVERY", 4)
    monkeypatch.setattr(train, "REPORT_EVERY", 1)

    def losses(folder: Path) -> list[tuple]:
        torch.manual_seed(0)
        train.run_stage(stage, train.new_model(world.processor.tokenizer), world, folder, "cpu")
        with open(folder / "log.csv") as file:
            return [(int(row[1]), row[2]) for row in csv.reader(file)]

    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = losses(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 9))
    draw, text = [], train.World.text

    def stop_at_the_sixth(world, seeds):
        draw.append(seeds)
        if len(draw) == 6:
            raise KeyboardInterrupt
        return text(world, seeds)

    stage = replace(stage, data=stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        losses(tmp_path / "stopped")
    stage = replace(stage, data=text)
    resumed = losses(tmp_path / "stopped")
    assert resumed[-4:] == whole[-4:]  # from step 5 on, though 5 had been run once already


def test_the_learning_rate_rises_and_falls():
    stage = replace(train.STAGES[0], steps=1000, lr=2.0)
    rates = [train.learning_rate(step, stage) for step in range(1000)]
    assert max(rates) == rates[30] == 2.0
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[0] < 0.1 and rates[-1] < 1e-4


def test_contrast_prefers_the_right_captions(world):
    """At the start the loss is that of guessing; with a batch of one there is nothing to confuse."""
    torch.manual_seed(0)
    contrast = train.ContrastiveLoss(train.new_model(world.processor.tokenizer))
    with torch.no_grad():
        assert contrast(world.captions(range(1))).item() == 0
        assert contrast(world.captions(range(8))).item() == pytest.approx(torch.tensor(8.0).log().item(), abs=0.5)


def test_the_bundled_model_answers_about_unseen_scenes():
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    tally = train.evaluate(model, LlavaProcessor.from_pretrained(BUNDLED), n_scenes=25)
    right, asked = tally["all"]
    assert asked > 150
    assert right / asked > 0.6  # 75 % over 500 scenes, see the README; 25 scenes vary
    assert set(emoji_world.QUESTIONS) <= set(tally)


def test_messages_of_a_llava_json_file():
    said = train.messages(TURNS)
    assert said[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the left?"}]}
    assert [message["role"] for message in said] == ["user", "assistant"] * 2


def test_every_stage_runs_from_the_command(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in train.STAGES:
        assert f"{stage.name} " in done.stdout
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    picture, truth = emoji_world.make_scene(emoji_world.load_sprites(), train.UNSEEN)
    assert emoji_world.questions(truth, random.Random(0))
    assert len(train.answers(model, processor, [picture], ["Describe the picture."])) == 1

"""What the stages learn from: scenes of the emoji world as tensors."""

import pickle
from functools import partial

import pytest
import torch

from tiny_world import tiny_world, untrained
from training import emoji_world
from training.losses import NextTokenLoss, SpeltOutLoss
from training.stages import STAGES
from training.world_data import World

pytestmark = pytest.mark.quick
WORLD = tiny_world()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_batches_are_the_same_for_the_same_seeds_and_padding_is_not_learnt(stage):
    batch, again = stage.data(WORLD, range(5, 9)), stage.data(WORLD, range(5, 9))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    if "labels" in batch:
        padding = batch["input_ids"] == WORLD.processor.tokenizer.pad_token_id
        assert padding.any() and (batch["labels"][padding] == -100).all()
    if "pixel_values" in batch:
        assert batch["pixel_values"].shape == (4, 3, 112, 112)
        assert not torch.equal(batch["pixel_values"], stage.data(WORLD, range(6, 10))["pixel_values"])
    if {"input_ids", "pixel_values"} <= set(batch):
        images = (batch["input_ids"] == WORLD.processor.tokenizer.image_token_id).sum(1)
        assert images.tolist() == [64] * 4


def test_parts_are_where_things_are():
    batch = WORLD.parts(range(40))
    for i in range(40):
        truth = emoji_world.make_scene(WORLD.sprites, i, at_least=4 * (i % 4 > 0))[1]
        assert i % 4 == 0 or len(truth["things"]) == 4
        said = [bytes(row[row > 0].tolist()).decode() for row in batch["words"][i]]
        assert [name for name in said if name][: len(truth["things"])] == [t["name"] for t in truth["things"]]
        assert said[len(truth["things"])] in ("", f"{truth['ground']} background")
        ninths = [divmod(n, 3) for n in batch["ninths"][i].tolist() if n >= 0]
        assert ninths == [emoji_world.ninth(thing) for thing in truth["things"]]
        for j, thing in enumerate(truth["things"]):
            share = batch["where"][i, j].view(8, 8)
            assert share.sum().item() == pytest.approx(1)
            y, x = divmod(share.argmax().item(), 8)
            assert max(abs((x + 0.5) / 8 - thing["x"]), abs((y + 0.5) / 8 - thing["y"])) <= 1 / 16 + 0.001
        assert (batch["where"][i].sum(-1) > 0.99).tolist() == [bool(text) for text in said]


def test_a_picture_in_words_has_its_words_where_its_things_are():
    tokenizer = WORLD.processor.tokenizer
    for seed in range(20):
        truth = emoji_world.make_truth(seed)
        grid = [tokenizer.decode(list(dict.fromkeys(ids))) for ids in WORLD.spelt_out(truth)]
        for thing in truth["things"]:
            column, row = (int(thing[axis] * 8) for axis in "xy")
            assert grid[8 * row + column] == thing["name"] or len(truth["things"]) > 1  # another may overlap it
        assert set(grid) <= {truth["ground"], *emoji_world.names_of(truth)}


def test_a_picture_in_words_takes_the_place_of_the_projected_patches():
    reading = SpeltOutLoss(untrained())
    batch = WORLD.text(range(1, 3))
    words = reading.model.language_model.embed_tokens(batch["spelt"])
    features = words.mean(2) + (reading.rows[:, None] + reading.columns).view(64, -1)
    reading.model.get_image_features = lambda *_: features
    seen = NextTokenLoss(reading.model)
    same = seen({"input_ids": batch["input_ids"], "labels": batch["labels"], "pixel_values": torch.zeros(1)})
    assert reading(batch).item() == pytest.approx(same.item(), rel=1e-5)


def test_a_world_can_be_sent_to_another_process():
    copy = pickle.loads(pickle.dumps(partial(World.captions, WORLD)))  # as a loader's workers get it on macOS, Windows
    batch, same = WORLD.captions(range(3)), copy(range(3))
    assert all(torch.equal(batch[name], same[name]) for name in batch)

"""Pictures from outside the emoji world, and what the model learns to say about them."""

import random

import numpy as np
import pytest

from tiny_world import tiny_world
from training import emoji_world
from training.emoji_world import OUTSIDE, conversation, load_photographs, make_outside, make_truth
from training.outside import OUTSIDE_EVERY, contrast

pytestmark = pytest.mark.quick
LEARNT, JUDGED = load_photographs(), load_photographs(judged=True)


def test_a_quarter_of_the_pictures_is_kept_for_judging():
    assert len(LEARNT) + len(JUDGED) == 56 and len(JUDGED) == 14
    pixels = {picture.tobytes() for picture in LEARNT}
    assert len(pixels) == len(LEARNT) and not any(picture.tobytes() in pixels for picture in JUDGED)


def test_a_seed_always_makes_the_same_crop_and_crops_are_not_plain():
    crops = [make_outside(LEARNT, seed) for seed in range(60)]
    assert all(crop.tobytes() == make_outside(LEARNT, seed).tobytes() for seed, crop in enumerate(crops))
    assert len({crop.tobytes() for crop in crops}) == 60 and {crop.size for crop in crops} == {(112, 112)}
    assert make_outside(LEARNT, 0, size=50).size == (50, 50)
    assert np.median([contrast(crop) for crop in crops]) > 30


def test_every_answer_about_such_a_picture_is_the_same_sentence():
    for seed in range(20):
        said = conversation(make_truth(seed), random.Random(seed), outside=True)
        usual = conversation(make_truth(seed), random.Random(seed))
        assert [turn["value"] for turn in said[::2]] == [turn["value"] for turn in usual[::2][:2]]
        assert {turn["value"] for turn in said[1::2]} == {OUTSIDE}


def test_one_picture_in_twelve_of_the_last_stage_is_from_outside():
    world = tiny_world()
    seeds = range(2 * OUTSIDE_EVERY)
    batch, scenes = world.conversations(seeds), world.pictures(seeds)[0]
    tokenizer = world.processor.tokenizer
    for i, seed in enumerate(seeds):
        outside = seed % OUTSIDE_EVERY == 0
        assert (OUTSIDE in tokenizer.decode(batch["input_ids"][i], skip_special_tokens=True)) == outside
        assert (batch["pixel_values"][i] == scenes[i]).all() != outside


def test_the_sentence_is_no_right_answer_about_a_scene():
    for seed in range(40):
        truth = make_truth(seed)
        for kind, *_ in emoji_world.questions(truth, emoji_world.wording(seed)):
            assert not emoji_world.score(kind, OUTSIDE, truth), (kind, truth)

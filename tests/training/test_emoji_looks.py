"""Looks that only training shows: they change pixels, and neither truths nor scenes without them."""

import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from tiny_world import tiny_world
from training import emoji_looks
from training.emoji_looks import COLOUR_LOOKS, DRAWING_LOOKS, MARGIN, PICTURE_LOOKS, vary
from training.emoji_world import GROUNDS, load_photographs, load_sprites, make_outside, make_scene, make_truth
from training.world_data import World

pytestmark = pytest.mark.quick
SPRITES = load_sprites(training=True)
SEEDS = range(60)
PLAIN = [make_scene(SPRITES, seed) for seed in SEEDS]
VARIED = [make_scene(SPRITES, seed, varied=True) for seed in SEEDS]
CAT = ImageOps.expand(SPRITES["cat"][0], MARGIN)
SUBJECTS = {  # each look, and what it is applied to
    **dict.fromkeys(DRAWING_LOOKS, CAT),
    **dict.fromkeys(COLOUR_LOOKS, CAT.convert("RGB")),
    **dict.fromkeys(PICTURE_LOOKS, PLAIN[0][0]),
}


@pytest.mark.parametrize("look", SUBJECTS, ids=lambda look: look.__name__)
def test_a_look_keeps_size_and_mode_and_is_the_same_for_a_seed(look):
    before = SUBJECTS[look].tobytes()
    made = [look(SUBJECTS[look], random.Random(seed)) for seed in range(9)]
    assert all((picture.size, picture.mode) == (SUBJECTS[look].size, SUBJECTS[look].mode) for picture in made)
    assert all(picture.tobytes() != before for picture in made) and SUBJECTS[look].tobytes() == before
    again = [look(SUBJECTS[look], random.Random(seed)) for seed in range(9)]
    assert [picture.tobytes() for picture in again] == [picture.tobytes() for picture in made]
    assert len({picture.tobytes() for picture in made}) > 1


def test_the_truth_stays_and_the_picture_differs():
    assert [truth for _, truth in VARIED] == [truth for _, truth in PLAIN] == [make_truth(seed) for seed in SEEDS]
    changed = [one.tobytes() != other.tobytes() for (one, _), (other, _) in zip(PLAIN, VARIED, strict=True)]
    assert 0.5 < np.mean(changed) < 1  # some scenes have no look
    for seed, (picture, _) in zip(SEEDS, VARIED, strict=True):
        assert make_scene(SPRITES, seed, varied=True)[0].tobytes() == picture.tobytes()
        assert (picture.size, picture.mode) == ((112, 112), "RGB")


def test_things_and_backgrounds_stay_where_they_are():
    rows, columns = np.mgrid[:112, :112] / 112
    for (plain, _), (picture, truth) in zip(PLAIN, VARIED, strict=True):
        pixels, ground = np.asarray(picture, float), np.ones((112, 112), bool)
        for t in truth["things"]:
            away = np.maximum(abs(columns - t["x"]), abs(rows - t["y"]))
            ground &= away > 0.7 * t["size"]
            assert np.abs(pixels[away < 0.4 * t["size"]] - GROUNDS[truth["ground"]]).max() > 30, (t, truth)
        if ground.mean() > 0.1:
            medians = [np.median(colours[ground], axis=0) for colours in (np.asarray(plain, float), pixels)]
            assert np.abs(np.subtract(*medians)).max() < 50, truth


def test_at_most_one_look_of_a_table_occurs_at_its_chance():
    seen, rng, blank = [], random.Random(0), Image.new("L", (1, 1))
    chances = {lambda picture, _, i=i: seen.append((i, picture.size)) or picture: i / 10 for i in (1, 2, 3)}
    for _ in range(2000):
        vary(blank, chances, rng, margin=2)
    assert {size for _, size in seen} == {(5, 5)}
    assert [sum(i == j for j, _ in seen) / 2000 for i in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3], abs=0.03)
    assert all(sum(table.values()) < 0.6 for table in (DRAWING_LOOKS, COLOUR_LOOKS, PICTURE_LOOKS))


def test_an_outline_is_around_the_drawing_and_a_flat_drawing_has_few_colours():
    inside, alpha = np.asarray(CAT)[..., 3] == 255, np.asarray(CAT)[..., 3]
    for seed in range(9):
        line = np.asarray(emoji_looks.outlined(CAT, random.Random(seed)))
        assert (line[inside] == np.asarray(CAT)[inside]).all() and (line[..., 3] >= alpha).all()
        assert (line[..., 3] > 100).sum() > (alpha > 100).sum() + 50
        flat = np.asarray(emoji_looks.flat(CAT, random.Random(seed)))
        assert 2 <= len(np.unique(flat[inside], axis=0)) <= 5 and (flat[..., 3] == alpha).all()


def test_a_bar_or_frame_hides_little():
    for seed in range(40):
        picture = emoji_looks.framed(Image.new("RGB", (112, 112), "red"), random.Random(seed))
        hidden = (np.asarray(picture) != (255, 0, 0)).any(-1)
        assert 0 < hidden.mean() < 0.12 and not hidden[7:-7, 7:-7].any()


def test_training_alone_asks_for_them():
    world = tiny_world()
    varied = World(world.sprites, world.processor, varied=True)
    (plain, truths), (changed, same) = (w.pictures(range(12), outside=True) for w in (world, varied))
    assert truths == same and (plain != changed).flatten(1).any(1).sum() > 4
    expected = [make_scene(world.sprites, seed, varied=True)[0] for seed in range(1, 12)]
    assert (changed[1:] == world.processor.image_processor(expected)).all()


def test_crops_of_photographs_have_them_too():
    photographs = load_photographs()
    crops = [[make_outside(photographs, seed, varied=varied) for seed in SEEDS] for varied in (False, True)]
    changed = [one.tobytes() != other.tobytes() for one, other in zip(*crops, strict=True)]
    assert 0.3 < np.mean(changed) < 0.8 and {crop.size for crop in crops[1]} == {(112, 112)}

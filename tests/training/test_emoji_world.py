"""The emoji world: scenes as their truths say, texts that are true of them, and the score of answers."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.emoji_scenes import ONLY_TRAINING
from training.emoji_score import NINTHS, placed
from training.emoji_world import (
    CELL,
    GROUNDS,
    KINDS,
    NUMBERS,
    OBJECTS,
    SHORT,
    SIDES,
    a,
    caption,
    conversation,
    kept_apart,
    load_sprites,
    make_scene,
    make_truth,
    names_of,
    on_side,
    plural,
    questions,
    relations,
    score,
    things,
    wording,
)

ROOT = Path(__file__).parent.parent.parent
SPRITES = load_sprites()
SCENES = [make_scene(SPRITES, seed) for seed in range(300)]
TRUTHS = [truth for _, truth in SCENES]
CAT_APPLE = {"ground": "blue", "things": [{"name": "cat", "x": 0.25, "y": 0.5, "size": 0.4},
                                          {"name": "apple", "x": 0.75, "y": 0.6, "size": 0.3}]}
EMPTY = {"ground": "pink", "things": []}


@pytest.mark.quick
def test_there_are_two_hundred_things_in_four_styles_and_more():
    assert len(OBJECTS) >= 200 and len(set(OBJECTS.values())) == len(OBJECTS) == sum(map(len, KINDS.values()))
    assert list(SPRITES) == list(OBJECTS) and all(4 <= len(drawings) <= 7 for drawings in SPRITES.values())
    drawings = [drawing for name in OBJECTS for drawing in SPRITES[name]]
    for drawing in drawings:
        covered = np.asarray(drawing.getchannel("A")) > 128
        assert drawing.mode == "RGBA" and drawing.size == (CELL, CELL) and 0.03 < covered.mean() < 0.99
    assert len({drawing.tobytes() for drawing in drawings}) == len(drawings)


@pytest.mark.quick
def test_training_has_drawings_by_more_artists_and_cells_may_be_empty(tmp_path):
    """Scenes that are judged do not show them. iconify.json says which things such an artist has drawn."""
    folder, more = ROOT / "training" / "sprites", load_sprites(training=True)
    chosen = json.loads((folder / "iconify.json").read_text())
    assert tuple(sorted(chosen)) == ONLY_TRAINING
    for style, picks in chosen.items():
        shutil.copy(folder / f"{style}.webp", tmp_path)
        only = load_sprites(tmp_path, training=True)
        assert [name for name, drawings in only.items() if drawings] == list(picks) and len(picks) < len(OBJECTS)
        assert f"{style}.webp\n    {len(picks)} drawings" in (folder / "NOTICE").read_text()
        for name, (drawing,) in ((name, only[name]) for name in picks):
            assert 0.03 < (np.asarray(drawing.getchannel("A")) > 128).mean() < 0.99
            assert drawing.tobytes() in {other.tobytes() for other in more[name]}
            assert drawing.tobytes() not in {other.tobytes() for other in SPRITES[name]}
        (tmp_path / f"{style}.webp").unlink()
    for name, drawings in SPRITES.items():
        assert len(more[name]) == len(drawings) + sum(name in picks for picks in chosen.values())


@pytest.mark.quick
def test_a_sheet_that_does_not_fit_the_names_is_refused(tmp_path):
    Image.new("RGBA", (CELL, CELL)).save(tmp_path / "noto.webp")
    with pytest.raises(ValueError, match="make_sheet"):
        load_sprites(tmp_path)


@pytest.mark.quick
def test_anybodys_drawings_make_scenes():
    """Drawings of any size, only one per thing."""
    mine = {name: [Image.new("RGBA", (30, 40), (255, 0, 0, 255))] for name in OBJECTS}
    for seed in range(20):
        picture, truth = make_scene(mine, seed)
        assert picture.size == (112, 112) and truth == TRUTHS[seed] == make_truth(seed)


@pytest.mark.quick
def test_some_pairs_are_never_shown_together():
    pairs = [(one, other) for one in OBJECTS for other in OBJECTS if one < other]
    apart = [pair for pair in pairs if kept_apart(*pair)]
    assert 0.04 < len(apart) / len(pairs) < 0.08
    for seed in range(1000):
        names = names_of(make_truth(seed))
        assert not any(kept_apart(one, other) for one in names for other in names)
        names = names_of(make_truth(seed, apart=True))
        assert any(kept_apart(one, other) for one in names for other in names)


@pytest.mark.quick
def test_a_seed_always_makes_the_same_scene_at_any_size():
    for seed in range(20):
        picture, truth = make_scene(SPRITES, seed)
        assert picture.tobytes() == SCENES[seed][0].tobytes() and truth == TRUTHS[seed]
        large, same = make_scene(SPRITES, seed, size=224)
        assert same == truth and picture.size == (112, 112) and large.size == (224, 224)
        difference = np.asarray(large.resize((112, 112)), float) - np.asarray(picture, float)
        assert np.abs(difference).mean() < 6
    assert SCENES[0][0].tobytes() != SCENES[1][0].tobytes()
    assert conversation(CAT_APPLE, random.Random(5)) == conversation(CAT_APPLE, random.Random(5))


def test_conversations_do_not_depend_on_the_process():
    """Python orders sets of words differently in every process."""
    program = (
        "import random; from training import emoji_world as w\n"
        "for i in range(60): print(w.conversation(w.make_truth(i), random.Random(i), 9), w.make_truth(i))"
    )
    said = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT,
                       env=os.environ | {"PYTHONHASHSEED": seed}, check=True).stdout
        for seed in "123"
    }
    assert len(said) == 1 and said.pop()


@pytest.mark.quick
def test_truth_is_in_range_and_things_hardly_overlap():
    assert {len(truth["things"]) for truth in TRUTHS} == {0, 1, 2, 3, 4}
    assert {truth["ground"] for truth in TRUTHS} == set(GROUNDS)
    assert any(len(set(names_of(truth))) < len(truth["things"]) for truth in TRUTHS)
    for truth in TRUTHS:
        placed = truth["things"]
        assert {t["name"] for t in placed} <= set(OBJECTS)
        for i, t in enumerate(placed):
            assert all(t["size"] / 2 - 0.002 <= t[axis] <= 1.002 - t["size"] / 2 for axis in "xy")
            for u in placed[:i]:
                assert max(abs(t["x"] - u["x"]), abs(t["y"] - u["y"])) > 0.44 * (t["size"] + u["size"])


@pytest.mark.quick
def test_the_picture_is_what_the_truth_says():
    for picture, truth in SCENES:
        pixels = np.asarray(picture, float)
        rows, columns = np.mgrid[:112, :112] / 112
        ground = np.ones((112, 112), bool)
        for t in truth["things"]:
            ground &= np.maximum(abs(columns - t["x"]), abs(rows - t["y"])) > 0.7 * t["size"]
            spot = np.maximum(abs(columns - t["x"]), abs(rows - t["y"])) < 0.4 * t["size"]
            assert np.abs(pixels[spot] - GROUNDS[truth["ground"]]).max() > 30, (t, truth)
        if ground.any():
            nearest = min(GROUNDS, key=lambda name: np.abs(pixels[ground].mean(0) - GROUNDS[name]).sum())
            assert nearest == truth["ground"]


@pytest.mark.quick
def test_the_promised_wordings_are_asked():
    asked = {q.removesuffix(SHORT) for i, truth in enumerate(TRUTHS) for _, q, _ in questions(truth, random.Random(i))}
    asked |= {q for seed in range(2000) for _, q, _ in questions(CAT_APPLE, random.Random(seed), short=False)}
    assert asked >= {"Describe the picture.", "What is in the picture?", "How many objects are in the picture?",
                     "What is on the left?", "What is on the right?", "What is at the top?", "What is at the bottom?",
                     "What is in the middle?", "How many cats are in the picture?", "Which animals are in the picture?",
                     "What is to the left of the apple?", "Is the cat to the left of the apple?",
                     "Is there a cat in the picture?", "Is there a dog in the picture?",
                     "Is there an apple in the picture?", "What color is the background?"}
    assert not any("{" in question for question in asked)


@pytest.mark.quick
def test_articles_and_plurals():
    assert [a(name) for name in ("cat", "apple", "owl", "umbrella")] == ["a cat", "an apple", "an owl", "an umbrella"]
    some = ("cat", "strawberry", "key", "fox", "peach", "dress", "tomato", "piano", "sheep", "knife", "hot dog")
    assert [plural(name) for name in some] == [
        "cats", "strawberries", "keys", "foxes", "peaches", "dresses", "tomatoes", "pianos", "sheep", "knives",
        "hot dogs"]
    assert things([]) == "nothing" and things(["cat", "owl", "cat"]) == "two cats and an owl"


def test_the_words_do_not_tell_what_the_picture_shows():
    """Guessing from the number of things and the name in the question must be no better than a coin."""
    counts = defaultdict(Counter)
    asked = [[(len(truth["things"]), kind, answer) for kind, _, answer in questions(truth, wording(seed), True)
              if kind.startswith("exists")] for seed in range(6000) for truth in [make_truth(seed)]]
    for n, kind, answer in (fact for facts in asked[:4000] for fact in facts):
        counts[n, kind][answer] += 1
    judged = [fact for facts in asked[4000:] for fact in facts if counts[fact[:2]]]
    right = sum(counts[n, kind].most_common(1)[0][0] == answer for n, kind, answer in judged)
    assert len(judged) > 2500 and right / len(judged) < 0.55


@pytest.mark.quick
def test_a_thing_in_the_middle_is_on_no_side():
    for truth in TRUTHS:
        if middle := on_side(truth, "middle"):
            assert all(on_side(truth, side) != middle or names_of(truth).count(middle) > 1 for side in SIDES
                       if side != "middle")


@pytest.mark.quick
def test_sentences_and_words():
    said = {kind: answer for kind, _, answer in questions(CAT_APPLE, random.Random(0), short=False)}
    assert said["what"] == "On the left there is a cat and on the right an apple."
    assert said["describe"] == said["what"] + " The background is blue."
    assert said["which:animal"] == "On the left there is a cat."
    assert said["left"] == "There is a cat on the left." and said["right"] == "There is an apple on the right."
    assert said["count"] == "There are two objects in the picture."
    assert "top" not in said and "bottom" not in said
    for kind, question, answer in questions(CAT_APPLE, random.Random(0), short=True):
        assert question.endswith(SHORT) == (kind != "describe")
        assert kind in ("describe", "what") or kind.startswith("which") or len(answer.split()) == 1


@pytest.mark.parametrize("short", [True, False])
def test_own_answers_are_right_and_those_of_another_picture_are_not(short):
    for i, truth in enumerate([EMPTY, CAT_APPLE, *TRUTHS]):
        rng = random.Random(i)
        other = {kind: answer for t in rng.sample(TRUTHS, 20) for kind, _, answer in questions(t, rng, short)}
        for kind, question, answer in questions(truth, rng, short):
            assert score(kind, answer, truth), (kind, question, answer, truth)
            # Other places may be right too: near a border people could say either.
            placed = kind.startswith(("what", "describe", "which"))
            if kind in other and other[kind].lower() != answer.lower() and not placed:
                assert not score(kind, other[kind], truth), (kind, other[kind], truth)
            assert not score(kind, "", truth) and not score(kind, "Hello.", truth)


@pytest.mark.quick
@pytest.mark.parametrize("kind, right, wrong", [
    ("describe", ["An apple next to a cat.", "a cat, an apple on blue"],
     ["The picture shows a cat.", "A cat, an apple and a dog.", "A cat and an apple on a red background."]),
    ("what", ["Cat and apple", "I see an apple and a CAT!", "I saw a cat and an apple."],
     ["Apple", "Caterpillar and apple", "Nothing", "A cat and no apple, but a key"]),
    ("count", ["2", "Two.", "I see two things"], ["3", "one", "12", "some", "two or three"]),
    ("left", ["cat", "It is the cat.", "A cat at the top left.", "The cat is on the left-hand side."],
     ["apple", "a cat and an apple", "There is a cat on the right.", "There is no cat on the left.", "Two cats."]),
    ("right", ["Apple"], ["Cat"]),
    ("exists:cat", ["yes", "Yes, there is a cat.", "There is a cat."],
     ["I cannot see a cat.", "no", "No, there is no cat.", "Yes and no", "There is an apple."]),
    ("exists:dog", ["No", "There is no dog.", "There isn't a dog.", "There isn\u2019t a dog.", "I cannot see a dog."],
     ["Yes", "Yes, there is a dog in the picture.", "There is a dog."]),
    ("ground", ["blue", "It is Blue."], ["red", "blue or red", "bluebell", "Not blue."]),
    ("top", [], ["cat", "apple"]),
    ("how many:cat", ["1", "There is one cat."], ["0", "There are two cats.", "yes", "There is one dog."]),
    ("how many:dog", ["0", "There are no dogs in the picture."], ["1", "a dog"]),
    ("which:animal", ["A cat", "There is a cat in the picture."], ["none", "A dog", "A cat and an apple"]),
    ("which:tool", ["None", "There are no tools in the picture."], ["A hammer", "An apple"]),
    ("beside:left:apple", ["Cat", "There is a cat to the left of the apple."],
     ["dog", "The apple", "There is a cat to the right of the apple."]),
    ("is beside:left:cat:apple", ["yes", "Yes, the cat is to the left of the apple."],
     ["no", "Yes and no", "Yes, the cat is to the right of the apple.", "Yes, the apple is to the left of the cat."]),
    ("is beside:right:cat:apple", ["No", "No, the cat is to the left of the apple.", "No, it is not."],
     ["yes", "No, the cat is to the right of the apple."]),
])
def test_judging(kind, right, wrong):
    assert [answer for answer in right if not score(kind, answer, CAT_APPLE)] == []
    assert [answer for answer in wrong if score(kind, answer, CAT_APPLE)] == []


@pytest.mark.quick
def test_judging_numbers_of_things():
    twice = {"ground": "blue", "things": [*CAT_APPLE["things"], {"name": "cat", "x": 0.2, "y": 0.1, "size": 0.2}]}
    for answer in ("Two cats and an apple", "A cat, an apple and a cat.", "Two cats. The cats are near an apple"):
        assert score("what", answer, twice) and not score("what", answer, CAT_APPLE), answer
    for answer in ("A cat and an apple", "Three cats and an apple", "Two cats and two apples", "Two cats"):
        assert not score("what", answer, twice), answer
    assert score("how many:cat", "2", twice) and score("count", "three", twice)
    assert not score("left", "a cat", twice)


@pytest.mark.quick
def test_a_thing_is_where_the_answer_says():
    for answer in ("On the left there is a cat and on the right an apple.", "on the right an apple, on the left a cat",
                   "A cat on the left and an apple on the right.", "an apple at the bottom right, a cat in the middle"):
        assert score("what", answer, CAT_APPLE) and score("describe", answer, CAT_APPLE), answer
    for answer in ("On the right there is a cat and on the left an apple.", "On the left an apple, at the top a cat.",
                   "A cat on the right and an apple on the left.", "A cat at the top left, and an apple"):
        assert not score("what", answer, CAT_APPLE), answer
    assert not score("which:animal", "At the top there is a cat.", CAT_APPLE)


@pytest.mark.quick
def test_a_verdict_is_right_only_with_right_places():
    kind = "is beside:left:cat:apple"
    for answer in ("The cat is on the left and the apple on the right, so yes.", "Yes, the cat is on the left.", "yes",
                   "Yes, the cat is on the left of the apple.", "Yes, the apple is to the right of the cat."):
        assert score(kind, answer, CAT_APPLE), answer
    for answer in ("The cat is on the left and the apple on the right, so no.", "Yes, the cat is at the top right.",
                   "The cat is on the right and the apple on the left, so yes.",
                   "Yes, the apple is on the left of the cat."):
        assert not score(kind, answer, CAT_APPLE), answer


@pytest.mark.quick
def test_lists_are_in_reading_order():
    for truth in TRUTHS:
        said = {kind: answer for kind, _, answer in questions(truth, random.Random(0), short=False)}
        places = [place for _, place in placed(said["what"].lower())]
        assert len(places) == len(truth["things"]) and [NINTHS[place] for place in places] == sorted(
            NINTHS[place] for place in places)


@pytest.mark.quick
def test_hot_dogs_are_no_dogs():
    truth = {"ground": "red", "things": [{"name": "hot dog", "x": 0.3, "y": 0.5, "size": 0.4}]}
    assert score("what", "A hot dog", truth) and not score("what", "A dog", truth)
    assert score("exists:dog", "No, there is no dog in the picture.", truth)


@pytest.mark.quick
def test_an_empty_picture():
    assert score("count", "There are no objects.", EMPTY) and not score("count", "1", EMPTY)
    assert score("what", "Nothing", EMPTY)
    assert not score("what", "A cat", EMPTY) and not score("what", "A picture", EMPTY)
    assert "nothing" in caption(EMPTY, random.Random(0))
    assert conversation(EMPTY, random.Random(0), turns=99)


@pytest.mark.quick
def test_yes_and_no_are_balanced_and_sides_are_clear():
    rng = random.Random(0)
    asked = [(kind, answer, truth) for truth in TRUTHS for kind, _, answer in questions(truth, rng, short=True)]
    verdicts = [answer for kind, answer, _ in asked if kind.startswith("exists")]
    assert verdicts.count("yes") == verdicts.count("no") > 0
    for kind, answer, truth in asked:
        if kind in SIDES:
            axis, sign = ("x" if kind in ("left", "right") else "y"), (1 if kind in ("left", "top") else -1)
            if kind == "middle":
                continue
            first, *others = sorted(truth["things"], key=lambda t: sign * t[axis])
            assert first["name"].lower() == answer.lower() and sign * (first[axis] - 0.5) < 0
            assert all(abs(t[axis] - first[axis]) > 0.15 for t in others)
    assert {kind for kind, _, _ in asked} >= set(SIDES)


@pytest.mark.quick
def test_relations_are_of_things_that_are_there_once_and_have_one_converse():
    converse = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    seen = 0
    for truth in TRUTHS:
        known, names = relations(truth), names_of(truth)
        seen += len(known)
        for one, side, other in known:
            assert names.count(one) == names.count(other) == 1 and (other, converse[side], one) in known
            assert (one, converse[side], other) not in known
    assert seen > 300
    assert on_side(CAT_APPLE, "left") == "cat" and ("cat", "left", "apple") in relations(CAT_APPLE)


@pytest.mark.quick
def test_conversations_have_llavas_form():
    for i, truth in enumerate(TRUTHS):
        turns = conversation(truth, random.Random(i), turns=4)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and len(turns) in (6, 8)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        assert len({turn["value"] for turn in turns if turn["from"] == "human"}) == len(turns) // 2


@pytest.mark.quick
def test_captions_are_true():
    for i, truth in enumerate(TRUTHS):
        text = caption(truth, random.Random(i))
        assert score("describe", text, truth) and score("ground", text, truth), (text, truth)
    captions = {caption(CAT_APPLE, random.Random(seed)) for seed in range(50)}
    assert "a cat to the left of an apple on a blue background" in captions
    assert "an apple to the right of a cat on a blue background" in captions
    cat, apple = CAT_APPLE["things"]
    above = {"ground": "red", "things": [cat | {"x": 0.6, "y": 0.2}, apple | {"x": 0.5, "y": 0.8}]}
    assert all(" above " in said or " below " in said for said in (caption(above, random.Random(i)) for i in range(9)))


@pytest.mark.quick
def test_a_laptop_is_not_at_the_top_by_its_name():
    truth = {"ground": "blue", "things": [{"name": "laptop", "x": 0.5, "y": 0.2, "size": 0.4}]}
    assert score("top", "There is a laptop at the top.", truth) and score("top", "A laptop.", truth)
    assert not score("top", "There is a laptop at the bottom.", truth)


@pytest.mark.quick
def test_numbers_reach_beyond_the_largest_scene():
    assert len(NUMBERS) > max(len(truth["things"]) for truth in TRUTHS)


@pytest.mark.quick
def test_the_pictures_for_people_are_small_and_say_whose_they_are():
    folder = ROOT / "images"
    files = sorted(folder.glob("*.jpg"))
    notice = (folder / "NOTICE").read_text()
    assert len(files) >= 6
    for file in files:
        assert file.stat().st_size < 80_000 and file.name in notice


@pytest.mark.parametrize("command", [["-m", "training.emoji_world"], [ROOT / "training" / "emoji_world.py"]], ids=str)
def test_the_command_writes_scenes_to_look_at(command, tmp_path):
    cwd = ROOT if command[0] == "-m" else tmp_path
    done = subprocess.run([sys.executable, *command, "--out", tmp_path / "world", "--count", "12"], cwd=cwd)
    written = (tmp_path / "world" / "conversations.json").read_bytes()
    digest = hashlib.sha256(written).hexdigest()  # every seed's words are as they were when the bundled model was made
    assert done.returncode == 0 and digest == "13c64768811c0a1062032f443f9fff8469002c5b62a24a212c664edf04a665bb"
    for i, record in enumerate(json.loads(written)):
        with Image.open(tmp_path / "world" / record["image"]) as picture:
            assert picture.tobytes() == SCENES[i][0].tobytes()
    assert Image.open(tmp_path / "world" / "sheet.png").size == (6 * 112, 2 * 112)


def test_the_command_refuses_no_scenes_in_a_sentence(tmp_path):
    command = [sys.executable, "-m", "training.emoji_world", "--out", tmp_path / "world", "--count", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "error: --count must be at least 1, not 0\n"
    assert not (tmp_path / "world").exists()

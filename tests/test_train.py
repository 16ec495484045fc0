"""The recipe: what each stage learns from, what it may change, that a stopped run goes on, alone or shared."""

import csv
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import emoji_world
import judge
import train
from batches import Records, Steps, World, collate, messages, tokenize_caption, tokenize_conversation
from clip import ImageProcessor
from command import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from save_checkpoint import save

ROOT = Path(__file__).parent.parent
TURNS = [
    {"from": "human", "value": "<image>\nWhat is on the left?"},
    {"from": "gpt", "value": "There is a cat on the left."},
    {"from": "human", "value": "Is there a dog?"},
    {"from": "gpt", "value": "No."},
]
TOWER, DECODER, ALIGN, TUNE = train.STAGES


@pytest.fixture(scope="module")
def world():
    side = {"height": train.SIDE, "width": train.SIDE}
    image_processor = ImageProcessor({"shortest_edge": train.SIDE}, side)
    processor = LlavaProcessor(image_processor, train.train_tokenizer(2000), 64, "v1")
    return World(emoji_world.load_sprites(), processor)


def fresh_model(world: World) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return train.new_model(world.processor.tokenizer)


def losses(folder: Path) -> dict[tuple[str, int], str]:
    with open(folder / "log.csv") as file:
        return {(name, int(step)): loss for name, step, loss, _ in csv.reader(file)}


# --- What is learnt from ---------------------------------------------------------------------------------------------


def test_a_conversation_is_tokenized_as_its_prompt_will_be(world):
    processor = world.processor
    ids, labels = tokenize_conversation(TURNS, processor)
    text = processor.template.render(messages(TURNS), add_generation_prompt=False)
    assert ids == processor.tokenizer.encode(text.replace("<image>", "<image>" * 64))
    learnt = [i for i in labels if i != -100]
    assert processor.decode(learnt) == "There is a cat on the left.</s> No.</s>"
    assert all(label in (-100, i) for label, i in zip(labels, ids, strict=True))


def test_a_caption_is_all_that_alignment_learns(world):
    ids, labels = tokenize_caption("a cat on a blue background", world.processor)
    assert world.processor.decode(ids).replace("<image>", "") == "<s> \n a cat on a blue background</s>"
    assert world.processor.decode([i for i in labels if i != -100]) == "a cat on a blue background</s>"


def test_messages_of_a_llava_json_file():
    said = messages(TURNS)
    assert said[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the left?"}]}
    assert [message["role"] for message in said] == ["user", "assistant"] * 2


@pytest.mark.parametrize("stage", train.STAGES, ids=lambda stage: stage.name)
def test_batches_are_the_same_for_the_same_seeds_and_padding_is_not_learnt(world, stage):
    batch, again = stage.data(world, range(5, 9)), stage.data(world, range(5, 9))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    if "labels" in batch:
        filling = batch["input_ids"] == world.processor.tokenizer.pad_token_id
        assert filling.any() and (batch["labels"][filling] == -100).all()
    if "pixel_values" in batch:
        assert batch["pixel_values"].shape == (4, 3, 112, 112)
        assert not torch.equal(batch["pixel_values"], stage.data(world, range(6, 10))["pixel_values"])
    if {"input_ids", "pixel_values"} <= set(batch):
        images = (batch["input_ids"] == world.processor.tokenizer.image_token_id).sum(1)
        assert images.tolist() == [64] * 4


def test_parts_are_where_things_are(world):
    batch = world.parts(range(40))
    for i in range(40):
        truth = emoji_world.make_scene(world.sprites, i, at_least=4 * (i % 4 > 0))[1]
        assert i % 4 == 0 or len(truth["things"]) == 4
        said = [bytes(row[row > 0].tolist()).decode() for row in batch["words"][i]]
        assert [name for name in said if name][: len(truth["things"])] == [t["name"] for t in truth["things"]]
        assert said[len(truth["things"])] in ("", f"{truth['ground']} background")
        for j, thing in enumerate(truth["things"]):
            share = batch["where"][i, j].view(8, 8)
            assert share.sum().item() == pytest.approx(1)
            y, x = divmod(share.argmax().item(), 8)
            assert max(abs((x + 0.5) / 8 - thing["x"]), abs((y + 0.5) / 8 - thing["y"])) <= 1 / 16 + 0.001
        assert (batch["where"][i].sum(-1) > 0.99).tolist() == [bool(text) for text in said]


def test_a_picture_spelt_out_has_its_words_where_its_things_are(world):
    tokenizer = world.processor.tokenizer
    for seed in range(20):
        truth = emoji_world.make_truth(seed)
        grid = [tokenizer.decode(list(dict.fromkeys(ids))) for ids in world.spelt_out(truth)]
        for thing in truth["things"]:
            column, row = (int(thing[axis] * 8) for axis in "xy")
            assert grid[8 * row + column] == thing["name"] or len(truth["things"]) > 1  # another may lie on it
        assert set(grid) <= {truth["ground"], *emoji_world.left_to_right(truth)}


def test_pictures_spelt_out_stand_where_the_projector_will_put_what_is_seen(world):
    reading = train.SpeltOutLoss(fresh_model(world))
    batch = world.text(range(1, 3))
    words = reading.model.language_model.embed_tokens(batch["spelt"])
    features = (words[:, :, 0] + words[:, :, 1]) / 2 + (reading.rows[:, None] + reading.columns).view(64, -1)
    reading.model.get_image_features = lambda *_: features
    seen = train.NextTokenLoss(reading.model)
    same = seen({"input_ids": batch["input_ids"], "labels": batch["labels"], "pixel_values": torch.zeros(1)})
    assert reading(batch).item() == pytest.approx(same.item(), rel=1e-5)


def test_steps_are_shared_without_gap_or_overlap():
    def seen(**how) -> list[list[int]]:
        return [[n for piece in item for n in piece] for item in Steps(list, batch=12, first=2, end=4, **how)]

    assert seen() == [list(range(24, 36)), list(range(36, 48))]
    assert [len(piece) for piece in Steps(list, 12, 2, 4, pieces=3)[0]] == [4, 4, 4]
    shares = [seen(rank=rank, world_size=3, pieces=2) for rank in range(3)]
    assert [[n for part in parts for n in part] for parts in zip(*shares, strict=True)] == seen()


def test_a_world_can_be_handed_to_a_drawing_process(world):
    copy = pickle.loads(pickle.dumps(partial(World.captions, world)))  # as macOS and Windows do
    batch, same = world.captions(range(3)), copy(range(3))
    assert all(torch.equal(batch[name], same[name]) for name in batch)


# --- Losses ----------------------------------------------------------------------------------------------------------


class KnowsAll(torch.nn.Module):
    """A tower whose patches say what lies on them and where they are, in vectors of its own."""

    def __init__(self, batch: dict, side: int, width: int):
        super().__init__()
        part = batch["where"].argmax(1)  # (B, P)
        _, name = torch.unique(batch["words"].flatten(0, 1), dim=0, return_inverse=True)
        name = name.unflatten(0, part.shape[:1] + (-1,)).gather(1, part)  # (B, P)
        rows, columns = torch.randn(2, side, width)
        patches = torch.randn(int(name.max()) + 1, width)[name] + (rows[:, None] + columns).flatten(0, 1)
        self.states = [torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)]  # a class token first
        self.post_layernorm = torch.nn.Identity()

    def forward(self, pixel_values):
        return self.states


def test_the_contrast_at_the_start_is_that_of_guessing_and_a_tower_that_knows_all_makes_it_small(world):
    contrast = train.ContrastiveLoss(fresh_model(world))
    batch = world.parts(range(16))
    words = batch["words"].flatten(0, 1)
    words = [bytes(row[row > 0].tolist()) for row in words if row[0]]
    n, different = len(words), len(set(words))
    places = 2 * torch.tensor(contrast.side).log()  # a row and a column of every patch
    guessing = (torch.tensor(n).log() + torch.tensor(different).log()) / 2 + places
    scale = contrast.log_scale.item()
    with torch.no_grad():
        contrast.log_scale.fill_(0)  # no preference is made large
        contrast.place.weight.zero_()
        contrast.place.bias.zero_()
        assert contrast(batch).item() == pytest.approx(guessing.item(), abs=0.2)
        contrast.log_scale.fill_(scale)
    contrast.model.vision_tower = KnowsAll(batch, contrast.side, contrast.place.in_features)
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = contrast(batch)
        loss.backward()
        optimizer.step()
    entropy = sum(words.count(w) * torch.tensor(words.count(w)).log() / words.count(w) for w in set(words)) / different
    # No lower than that: things of one name cannot be told apart. And a few patches lie under two things.
    assert entropy / 2 < loss.item() < entropy / 2 + 0.1 * guessing


# --- The loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", train.STAGES, ids=lambda stage: stage.name)
def test_a_stage_changes_its_own_parts_and_nothing_else(world, stage, tmp_path):
    model = fresh_model(world)
    before = judge.snapshot(model)
    train.run_stage(replace(stage, steps=2, batch=3), model, partial(stage.data, world), train.Place(tmp_path))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(stage.trainable) for name in changed)
    assert {name.partition(".")[0] for name in changed} == set(stage.trainable)


def test_a_stopped_run_goes_on_with_the_same_losses(world, tmp_path, monkeypatch):
    stage = replace(TUNE, steps=8, batch=3)
    monkeypatch.setattr(train, "KEEP_EVERY", 4)
    monkeypatch.setattr(train, "REPORT_EVERY", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    weights = {}
    for folder, stop in ((whole, None), (stopped, 6 * 3), (stopped, None)):
        folder.mkdir(exist_ok=True)
        model = fresh_model(world)

        def draw(seeds, stop=stop):
            if seeds.start == stop:
                raise KeyboardInterrupt
            return world.conversations(seeds)

        try:
            train.run_stage(stage, model, draw, train.Place(folder))
        except KeyboardInterrupt:
            assert len(losses(folder)) == 6  # two steps more than are kept
        weights[folder] = judge.snapshot(model)
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 8
    assert (stopped / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert all(torch.equal(tensor, weights[whole][name]) for name, tensor in weights[stopped].items())


class Steep(train.NextTokenLoss):
    """A loss that is a number and whose gradients are not."""

    def forward(self, batch):
        return super().forward(batch) + (0 * self.model.lm_head.weight).sqrt().sum()


class Lost(train.NextTokenLoss):
    def forward(self, batch):
        return super().forward(batch) * torch.inf


@pytest.mark.parametrize(
    "how, trouble",
    [
        ({"lr": 1e5, "steps": 20}, "not finite"),
        ({"loss": Lost, "steps": 1}, "loss"),
        ({"loss": Steep, "steps": 1}, "gradients"),
        ({"lr": 1e39, "steps": 1}, "result"),  # good numbers lead to a last step out of float32's range
    ],
)
def test_a_run_that_diverges_stops_and_keeps_nothing_of_it(world, tmp_path, monkeypatch, how, trouble):
    monkeypatch.setattr(train, "KEEP_EVERY", 1)
    stage = replace(TUNE, batch=2, **how)
    with pytest.raises(ValueError, match=f"diverged.*{trouble}"):
        train.run_stage(stage, fresh_model(world), partial(stage.data, world), train.Place(tmp_path))
    kept = tmp_path / "tune.pt"
    assert kept.is_file() == (stage.steps > 1) and not kept.with_suffix(".new").exists()
    if kept.is_file():
        state = torch.load(kept)
        assert all(tensor.isfinite().all() for tensor in state["objective"].values())


def test_numbers_that_are_not_finite_are_not_saved(world, tmp_path):
    """A number may be finite in float32 only: a checkpoint is in bfloat16."""
    model, processor = fresh_model(world), LlavaProcessor.from_pretrained(BUNDLED)
    good = judge.snapshot(model)
    for number, dtype in ((torch.nan, torch.float32), (torch.inf, torch.float32), (3.4e38, torch.bfloat16)):
        with torch.no_grad():
            model.float().language_model.norm.weight[3] = number
        name = r"language_model\.norm\.weight"
        with pytest.raises(ValueError, match=name):
            save(model.to(dtype), processor, tmp_path / "model")
        with pytest.raises(ValueError, match=name):
            judge.save_stage(model.state_dict(), good, tmp_path / "stage.safetensors")
        assert not (tmp_path / "model").exists() and not (tmp_path / "stage.safetensors").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_umask_decides_who_may_read_what_is_written(world, tmp_path, umask):
    model, processor = fresh_model(world), LlavaProcessor.from_pretrained(BUNDLED)
    before = os.umask(umask)
    try:
        save(model, processor, tmp_path / "whole")
        save(model, processor, tmp_path / "shards", shard_bytes=5e6)
        judge.save_stage(model.state_dict(), {name: -t for name, t in model.state_dict().items()},
                         tmp_path / "stages" / "stage.safetensors")  # fmt: skip
        stage = replace(TUNE, steps=1, batch=1)
        train.run_stage(stage, model, partial(stage.data, world), train.Place(tmp_path / "run"))
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in written}
    assert {"model.safetensors", "model-00001-of-00006.safetensors", "stage.safetensors", "tune.pt"} <= set(modes)
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_that_diverges_says_so_and_writes_no_model(tmp_path, processes):
    (tmp_path / "my.json").write_text(json.dumps(records(tmp_path, 4)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launch if processes > 1 else [sys.executable]), ROOT / "train.py", "--data", tmp_path / "my.json",
               "--out", tmp_path / "out", "--batch", "2", "--steps", "20", "--lr", "1e5"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and all("tune diverged" in line and "--lr" in line for line in errors), done.stderr
    assert done.returncode == (2 if processes == 1 else 1)  # torchrun's own
    assert processes > 1 or done.stderr == errors[0] + "\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


def test_a_step_in_pieces_is_the_same_step(world, tmp_path):
    batches = [[world.conversations(range(6))], [world.conversations(range(2 * i, 2 * i + 2)) for i in range(3)]]
    grads = []
    for pieces in batches:
        objective = train.NextTokenLoss(fresh_model(world))
        loss = train.backward(objective, objective.count, pieces, Float32(tmp_path))
        grads.append((loss, objective.model.lm_head.weight.grad))
    (loss, whole), (same_loss, same) = grads
    assert loss == pytest.approx(same_loss, rel=1e-5) and torch.allclose(whole, same, atol=1e-7)


class Float32(train.Place):
    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def test_two_processes_learn_what_one_does(tmp_path):
    """The same global batch by torchrun: the same losses, and so the same gradients, in every stage."""
    script = tmp_path / "short.py"
    script.write_text(
        "import sys\nfrom dataclasses import replace\nimport torch, train, command\n"
        "train.fast_dtype = lambda device: torch.float32\ntorch.set_num_threads(1)\n"
        "train.REPORT_EVERY = 1\ntrain.STAGES = [replace(s, steps=3, batch=4) for s in train.STAGES]\n"
        "sys.exit(command.run(train.main))\n"
    )
    for n in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        launch = launch if n > 1 else [sys.executable]
        command = [*launch, str(script), "--quick", "--out", str(tmp_path / str(n))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(one) == list(two) and len(one) == 16
    for step, loss in one.items():
        assert float(two[step]) == pytest.approx(float(loss), abs=2e-3), (step, one, two)


def test_the_learning_rate_rises_and_falls():
    stage = replace(TOWER, steps=1000, lr=2.0)
    rates = [train.learning_rate(step, stage) for step in range(1000)]
    assert max(rates) == rates[30] == 2.0
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[0] < 0.1 and rates[-1] < 1e-4


def test_every_stage_runs_from_the_command(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in train.STAGES:
        assert f"{stage.name} " in done.stdout
    assert {name for name, _ in losses(tmp_path)} == {stage.name for stage in train.STAGES}
    assert Image.open(tmp_path / "log.png").width > 400
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    picture, _ = emoji_world.make_scene(emoji_world.load_sprites(), judge.UNSEEN)
    assert len(judge.answers(model, processor, [picture], ["Describe the picture."])) == 1
    command = [sys.executable, ROOT / "train.py", "--evaluate", tmp_path, "--scenes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.stdout.startswith("| question | before alignment | after alignment | after tuning | in int8 | asked |")
    assert "| all, on pairs never shown together |" in done.stdout


def test_published_tables_are_over_scenes_that_no_decision_was_made_on(monkeypatch):
    """By default the scenes for decisions; with --final others, whether their pairs were shown together or not."""

    def judged(*flags: str) -> list[tuple[int, bool]]:
        seen = []
        monkeypatch.setattr(judge.emoji_world, "make_scene", lambda sprites, seed, side, apart: seen.append(
            (seed, apart)) or (None, emoji_world.make_truth(seed, apart)))  # fmt: skip
        monkeypatch.setattr(judge, "answers", lambda model, processor, pictures, asked: [""] * len(asked))
        monkeypatch.setattr(sys, "argv", ["train.py", "--evaluate", "--scenes", "2", "--device", "cpu", *flags])
        train.main()
        return sorted(set(seen))

    assert judge.UNSEEN == 10**9 and judge.FINAL == 2 * 10**9
    for flags, first in (([], judge.UNSEEN), (["--final"], judge.FINAL)):
        assert judged(*flags) == [(first, False), (first, True), (first + 1, False), (first + 1, True)]
    steps = sum(stage.steps * stage.batch for stage in train.STAGES)
    assert steps < judge.UNSEEN


# --- The bundled model -----------------------------------------------------------------------------------------------


def test_the_bundled_model_is_made_by_the_recipe():
    """The log of its run ends every stage at the step that the recipe says, and had the recipe's rates on the way.

    But for the first 300 steps: they were taken in a plan of 6,000, whose rates rise more slowly. README says so.
    """
    rows = list(csv.reader((ROOT / "checkpoints" / "stages" / "log.csv").open()))
    assert list(dict.fromkeys(row[0] for row in rows)) == [stage.name for stage in train.STAGES]
    for stage in train.STAGES:
        of_stage = [row for row in rows if row[0] == stage.name]
        assert int(of_stage[-1][1]) == stage.steps
        for name, step, _, rate in of_stage:
            planned = replace(stage, steps=6000) if name == "tower" and int(step) <= 300 else stage
            assert float(rate) == pytest.approx(train.learning_rate(int(step) - 1, planned), rel=1e-3)


def test_the_bundled_model_sees_as_well_as_the_readme_says():
    """After each stage that is kept, on some of the scenes that its table is over: by chance it may be 7 % off."""
    row = re.compile(r"^\| all \| (.*)% \| (.*)% \| (.*)% \| .*% \| \d+ \|$", re.M)
    told = row.search((ROOT / "README.md").read_text()).groups()
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32)
    processor, final = LlavaProcessor.from_pretrained(BUNDLED), judge.snapshot(model)
    for share, name in zip(told, judge.KEPT.values(), strict=True):
        judge.load_stage(model, final, ROOT / "checkpoints" / "stages", name)
        right, asked = judge.evaluate(model, processor, 30)["all"]
        assert right / asked == pytest.approx(float(share) / 100, abs=0.07), name


# --- Anybody's data --------------------------------------------------------------------------------------------------


def records(folder: Path, n: int = 6) -> list[dict]:
    sprites, made = emoji_world.load_sprites(), []
    for i in range(n):
        picture, truth = emoji_world.make_scene(sprites, i, 100 + i)
        picture.save(folder / f"{i}.png")
        turns = emoji_world.conversation(truth, random.Random(i), 2)
        made.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns})
    return made


def test_a_llava_file_is_trained_on_and_what_is_broken_is_named(tmp_path, world):
    good = records(tmp_path)
    words = [turn | {"value": turn["value"].removeprefix("<image>\n")} for turn in TURNS]
    text_only = {"id": "words", "image": None, "conversations": words}
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:300])  # breaks off: seen when it is its turn
    broken = {
        "no picture": good[0] | {"image": "gone.png"},
        "two for one": good[0] | {"conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]},
        "none spoken of": text_only | {"image": "0.png"},
        "wrong order": good[0] | {"conversations": TURNS[::-1]},
        "half": good[0] | {"conversations": TURNS[:1]},
        "numbers": good[0] | {"conversations": [{"from": "human", "value": 3}, TURNS[1]]},
        "long": good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "word " * 3000}]},
        "list": good[0] | {"image": ["0.png"]},
        "far too long a name": good[0] | {"image": "a" * 5000},
        "no text": good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "\ud800"}]},
        "control": good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "a</s>b"}]},
        3: good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]},
    }
    content = [*good, text_only, *({**record, "id": name} for name, record in broken.items()), "no record", None]
    (tmp_path / "my.json").write_text(json.dumps(content))
    command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "my.json", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--batch", "3"], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    for i, record in enumerate(content[7:], 7):
        name = f" ({record['id']!r})" if isinstance(record, dict) else ""
        assert f"skipped: record {i}{name}: " in done.stdout, (record, done.stdout)
    assert "8 conversations, 3 steps of 3" in done.stdout and "2.png" in done.stdout
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", torch.float32)
    before = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32)
    changed = {name.partition(".")[0] for name, tensor in model.state_dict().items()
               if not torch.equal(tensor, before.state_dict()[name])}  # fmt: skip
    assert changed <= set(TUNE.trainable) and "lm_head" in changed


def test_records_are_what_the_world_says(tmp_path, world):
    (tmp_path / "my.json").write_text(json.dumps(records(tmp_path, 3)))
    found = Records(tmp_path / "my.json", tmp_path, world.processor, 2048)
    batch = found.conversations(range(3))
    said = [emoji_world.conversation(emoji_world.make_truth(i), random.Random(i), 2) for i in range(3)]
    rows = collate([tokenize_conversation(turns, world.processor) for turns in said], 0)
    assert not found.skipped and sorted(batch["labels"].tolist()) == sorted(rows["labels"].tolist())
    assert batch["pixel_values"].shape == (3, 3, 112, 112)
    assert all(torch.equal(tensor, found.conversations(range(3))[name]) for name, tensor in batch.items())
    later = [found.conversations(range(n, n + 3))["labels"].tolist() for n in range(3, 15, 3)]  # from the start
    assert all(sorted(labels) == sorted(batch["labels"].tolist()) for labels in later)
    assert any(labels != batch["labels"].tolist() for labels in later)


def test_two_processes_take_what_has_no_picture(tmp_path):
    """One of them has no picture in its share, and so no gradient for the projector."""
    made = records(tmp_path, 2)
    words = [{"conversations": [{"from": "human", "value": "Hello."}, TURNS[1]]}] * 6
    (tmp_path / "my.json").write_text(json.dumps(made[:1] + words))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "train.py"]
    command = [*launch, "--data", tmp_path / "my.json", "--out", tmp_path / "out", "--batch", "2", "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and "4/4" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--accumulate", "3", "--batch", "4"], ["--device", "moon"],
                                   ["--lr", "nan"], ["--lr", "inf"], ["--lr=-1"], ["--lr", "fast"]])  # fmt: skip
def test_wrong_arguments_are_refused_in_a_sentence(tmp_path, wrong):
    (tmp_path / "my.json").write_text(json.dumps(records(tmp_path, 3)))
    command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "my.json", "--out", tmp_path / "out", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr


VALUES = {"out": "x", "quick": None, "evaluate": "x", "scenes": "2", "final": None, "data": "my.json", "images": "x",
          "model": "x", "steps": "2", "batch": "2", "lr": "0.1", "accumulate": "1", "compile": None, "seed": "1",
          "device": "cpu"}  # fmt: skip
TOGETHER = [
    {"out", "quick", "accumulate", "compile", "seed", "device"},
    {"out", "data", "images", "model", "steps", "batch", "lr", "accumulate", "compile", "device"},
    {"evaluate", "scenes", "final", "device"},
]


def flags(*names: str) -> list[str]:
    return [part for name in names for part in ("--" + name, VALUES[name]) if part is not None]


def test_flags_that_do_not_go_together_are_refused(tmp_path, monkeypatch):
    """All pairs, by themselves and with the flag that one of the two needs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("[]")
    (tmp_path / "x").mkdir()
    refused = 0
    for one, other in itertools.combinations(VALUES, 2):
        for mode in (set(), {"data"}, {"evaluate"}):
            given = {one, other} | mode
            monkeypatch.setattr(sys, "argv", ["train.py", *flags(*sorted(given))])
            fits = any(given <= allowed and required <= given for allowed, required in zip(
                TOGETHER, (set(), {"data"}, {"evaluate"}), strict=True))  # fmt: skip
            if fits:
                train.parse_arguments()
                continue
            refused += 1
            with pytest.raises(ValueError, match="--"):
                train.parse_arguments()
    assert refused > 150


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--steps", "100"], "--steps"),
        (["--model", "x"], "--model"),
        (["--scenes", "9"], "--scenes"),
        (["--final"], "--final"),
        (["--evaluate", "--data", "my.json"], "--data"),
        (["--evaluate", "--accumulate", "1"], "--accumulate"),
        (["--quick", "--data", "my.json"], "--quick"),
        (["--seed", "0", "--data", "my.json"], "--seed"),
        (["--data", "my.json", "--images", "gone", "--model", "nowhere"], "gone"),
        (["--data", "missing.json", "--model", "nowhere"], "missing.json"),
        (["--accumulate", "3"], "pieces"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named_before_anything_begins(tmp_path, wrong, named):
    (tmp_path / "my.json").write_text("[]")
    command = [sys.executable, ROOT / "train.py", "--out", "out", *wrong]
    command = command[:2] + wrong if "--evaluate" in wrong else command
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr and "nowhere" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "{}", "[]", '["a"]', "[1]", "\xff"])
def test_a_file_without_records_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "my.json").write_bytes(content.encode("latin-1"))
    command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "my.json", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "my.json" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_not_gone_on_with(world, tmp_path):
    stage = replace(DECODER, steps=1, batch=2)
    train.run_stage(stage, fresh_model(world), partial(stage.data, world), train.Place(tmp_path))
    for other, place in ((replace(stage, lr=1.0), train.Place(tmp_path)), (stage, train.Place(tmp_path, source="b"))):
        with pytest.raises(ValueError, match="--out"):
            train.run_stage(other, fresh_model(world), partial(stage.data, world), place)

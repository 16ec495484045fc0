"""The command train.py: what it writes, and which flags it refuses."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import train
from evaluation import emoji_judge
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tiny_world import ROOT, TURNS, logged_losses, tiny_world, write_file, write_records
from training import emoji_world
from training.stages import STAGES

TUNE = STAGES[-1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def call(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "train.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, **options)


def test_every_stage_runs_from_the_command(tmp_path):
    done = call("--quick", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert f"{stage.name} " in done.stdout
    assert {name for name, _ in logged_losses(tmp_path)} == {stage.name for stage in STAGES}
    assert Image.open(tmp_path / "log.png").width > 400
    model, processor = LlavaForConditionalGeneration.from_pretrained(tmp_path), LlavaProcessor.from_pretrained(tmp_path)
    picture, _ = emoji_world.make_scene(tiny_world().sprites, emoji_judge.UNSEEN)
    assert len(emoji_judge.answers(model, processor, [picture], ["Describe the picture."])) == 1
    command = [sys.executable, ROOT / "evaluate.py", tmp_path, "--scenes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    columns = "before alignment", "after alignment", "after tuning", "in int8", "in int4"
    assert done.stdout.startswith(f"| question | {' | '.join(columns)} | asked |")
    assert "| all, on pairs never shown together |" in done.stdout


def test_a_llava_file_is_trained_on_and_what_is_broken_is_named(tmp_path):
    good = write_records(tmp_path)
    words = [turn | {"value": turn["value"].removeprefix("<image>\n")} for turn in TURNS]
    text_only = {"id": "words", "image": None, "conversations": words}
    two = good[0] | {"conversations": [{"from": "human", "value": "<image><image>Compare."}, TURNS[1]]}
    late = good[0] | {"conversations": TURNS[3:] + good[0]["conversations"]}
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:300])  # cut short: seen when it is its turn
    broken = {
        "no picture": good[0] | {"image": "gone.png"},
        "two for one": good[0] | {"conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]},
        "not mentioned": text_only | {"image": "0.png"},
        "wrong order": good[0] | {"conversations": TURNS[::-1]},
        "half": good[0] | {"conversations": TURNS[:1]},
        "numbers": good[0] | {"conversations": [{"from": "human", "value": 3}, TURNS[1]]},
        "long": good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "word " * 3000}]},
        "one of two": two | {"image": ["0.png", "gone.png"]},
        "far too long a name": good[0] | {"image": "a" * 5000},
        "no text": good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "\ud800"}]},
        "control": good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "a</s>b"}]},
        3: good[0] | {"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]},
    }
    fine = [*good, text_only, two | {"image": ["0.png", "1.png"]}, late]
    content = [*fine, *({**record, "id": name} for name, record in broken.items()), "no record", None]
    (tmp_path / "my.json").write_text(json.dumps(content))
    done = call("--data", tmp_path / "my.json", "--out", tmp_path / "out", "--batch", "3")
    assert done.returncode == 0, done.stderr
    for i, record in enumerate(content[len(fine) :], len(fine)):
        name = f" ({record['id']!r})" if isinstance(record, dict) else ""
        assert f"skipped: record {i}{name}: " in done.stdout, (record, done.stdout)
    assert "10 conversations, 4 steps of 3" in done.stdout and "2.png" in done.stdout
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", torch.float32)
    before = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32)
    changed = {name.partition(".")[0] for name, tensor in model.state_dict().items()
               if not torch.equal(tensor, before.state_dict()[name])}  # fmt: skip
    assert changed <= set(TUNE.trainable) and "lm_head" in changed


@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_that_diverges_says_so_and_writes_no_model(tmp_path, processes):
    write_file(tmp_path, 4)
    launch = [*TORCHRUN, f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
    command = [*launch, ROOT / "train.py", "--data", tmp_path / "my.json", "--out", tmp_path / "out"]
    command += ["--batch", "2", "--steps", "20", "--lr", "1e5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and all("tune diverged" in line and "--lr" in line for line in errors), done.stderr
    assert done.returncode == (2 if processes == 1 else 1)  # torchrun's own
    assert processes > 1 or done.stderr == errors[0] + "\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.csv"]  # the losses up to there


# --- Flags -----------------------------------------------------------------------------------------------------------


VALUES = {"out": "x", "quick": None, "data": "my.json", "images": "x", "model": "x", "steps": "2", "batch": "2",
          "lr": "0.1", "save-every": "9", "accumulate": "1", "recompute": None, "compile": None, "plan": None,
          "seed": "1", "device": "cpu"}  # fmt: skip
FROM_NOTHING = {"out", "quick", "save-every", "accumulate", "recompute", "compile", "seed", "device"}
WITH_DATA = FROM_NOTHING - {"quick", "seed"} | {"data", "images", "model", "steps", "batch", "lr", "plan"}


@pytest.mark.quick
def test_flags_that_do_not_go_together_are_refused(tmp_path, monkeypatch):
    """All pairs, by themselves and with --data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("[]")
    (tmp_path / "x").mkdir()
    refused = 0
    for one, other in itertools.combinations(VALUES, 2):
        for given in ({one, other}, {one, other, "data"}):
            words = [word for name in sorted(given) for word in ("--" + name, VALUES[name]) if word is not None]
            monkeypatch.setattr(sys, "argv", ["train.py", *words])
            fits = given <= (WITH_DATA if "data" in given else FROM_NOTHING)
            if fits and not given >= {"compile", "recompute"}:
                train.parse_arguments()
                continue
            refused += 1
            with pytest.raises(ValueError, match="--"):
                train.parse_arguments()
    assert refused > 60


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--steps", "100"], "--steps"),
        (["--model", "x"], "--model"),
        (["--quick", "--data", "my.json"], "--quick"),
        (["--seed", "0", "--data", "my.json"], "--seed"),
        (["--data", "my.json", "--images", "gone", "--model", "nowhere"], "gone"),
        (["--data", "missing.json", "--model", "nowhere"], r"missing\.json"),
        (["--accumulate", "3"], "pieces"),
        (["--device", "moon"], "moon"),
        (["--shard", "--data", "my.json"], "torchrun"),
        (["--shard"], "--data"),
        (["--shard", "--data", "my.json", "--compile"], "--compile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named_before_anything_begins(tmp_path, monkeypatch, wrong, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "out", *wrong])
    with pytest.raises(ValueError, match=named) as error:
        train.main()
    assert "nowhere" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, flags, named",
    [("[]", [], "my.json"), (None, ["--accumulate", "3", "--batch", "4"], "pieces"), ("[]", ["--quick"], "--quick")],
)
def test_an_error_is_one_sentence_and_exit_code_2(tmp_path, content, flags, named):
    (tmp_path / "my.json").write_text(content or json.dumps(write_records(tmp_path, 3)))
    done = call("--data", tmp_path / "my.json", "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr


@pytest.mark.quick
@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--lr", "nan"], ["--lr", "inf"], ["--lr=-1"], ["--lr", "fast"]])
def test_values_out_of_range_are_refused(monkeypatch, capsys, wrong):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my.json", *wrong])
    with pytest.raises(SystemExit) as ended:
        train.parse_arguments()
    assert ended.value.code == 2 and "error: argument " + wrong[0][:4] in capsys.readouterr().err

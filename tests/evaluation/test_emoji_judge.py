"""The judge of the emoji world: which scenes it uses, and that the bundled model is as good as its table says."""

import re
import sys

import pytest
import torch

import evaluate
from cli.quantizing import quantize_checkpoint
from evaluation import emoji_judge
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from small import write_adapter
from tiny_world import ROOT
from training import emoji_world
from training.stage_files import STAGE_FILES, load_stage, snapshot
from training.stages import STAGES

README = ROOT / "training" / "README.md"
SCENES = 15


def load(**options) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, kernels="torch", **options)


def test_published_tables_are_over_scenes_that_no_decision_was_made_on(monkeypatch):
    """By default the scenes for decisions; with --final others, whether their pairs were shown together or not."""

    def judged(*flags: str) -> list[tuple[int, bool]]:
        seen = []
        monkeypatch.setattr(emoji_world, "make_scene", lambda sprites, seed, side, apart: seen.append(
            (seed, apart)) or (None, emoji_world.make_truth(seed, apart)))  # fmt: skip
        monkeypatch.setattr(emoji_judge, "answers", lambda model, processor, pictures, asked: [""] * len(asked))
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--scenes", "2", "--device", "cpu", *flags])
        evaluate.main()
        return sorted(set(seen))

    assert emoji_judge.UNSEEN == 10**9 and emoji_judge.FINAL == 2 * 10**9
    for flags, first in (([], emoji_judge.UNSEEN), (["--final"], emoji_judge.FINAL)):
        assert judged(*flags) == [(first, False), (first, True), (first + 1, False), (first + 1, True)]
    assert sum(stage.steps * stage.batch for stage in STAGES) < emoji_judge.UNSEEN


def test_a_model_is_judged_with_an_adapter(monkeypatch, capsys, tmp_path):
    """Here one that makes its head say nothing: the model ends every answer at once."""
    write_adapter(tmp_path, BUNDLED, norm=torch.zeros(load().config.text_config.hidden_size))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--adapter", str(tmp_path), "--scenes", "2", "--device", "cpu"])
    evaluate.main()
    out, err = capsys.readouterr()
    assert out.startswith("| question | with the adapter | in int8 | in int4 | asked |") and not err
    assert "| all | 0.0% | 0.0% | 0.0% |" in out


def test_a_quantized_folder_is_judged_as_it_is(monkeypatch, capsys, tmp_path):
    few = str(tmp_path / "few")
    quantize_checkpoint(LlavaForConditionalGeneration, [str(BUNDLED), "--to", "int4", "--out", few])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", few, "--scenes", "1", "--device", "cpu"])
    evaluate.main()
    assert "\n| question | after tuning | asked |\n" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize("wrong", [["--scenes", "0"], ["--scenes", "-3"], ["--device", "moon"], ["nowhere"],
                                   ["--adapter", "nowhere"]])
def test_what_cannot_be_judged_is_refused(monkeypatch, wrong):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *wrong])
    with pytest.raises((ValueError, OSError), match=wrong[-1]):
        evaluate.main()


@pytest.mark.quick
def test_a_table_has_the_sums_last_and_shares_in_percent():
    before = {"all": (1, 4), "left": (0, 2), "all, in a word": (1, 2)}
    after = {"all": (3, 4), "left": (2, 2), "all, in a word": (1, 2)}
    assert emoji_judge.table({"before": before, "after": after}).splitlines() == [
        "| question | before | after | asked |",
        "|---|---|---|---|",
        "| left | 0.0% | 100.0% | 2 |",
        "| all, in a word | 50.0% | 50.0% | 2 |",
        "| all | 25.0% | 75.0% | 4 |",
    ]


def test_the_bundled_model_sees_as_well_as_its_table_says_and_in_few_bits_too():
    """After each stage that is kept, on some of the table's scenes: by chance it may be 7 % off."""
    row = re.compile(r"^\| all \| (.*)% \| (.*)% \| (.*)% \| (.*)% \| (.*)% \| \d+ \|$", re.M)
    *told, told_int8, told_int4 = (float(share) / 100 for share in row.search(README.read_text()).groups())
    model, processor = load(), LlavaProcessor.from_pretrained(BUNDLED)
    final = snapshot(model)
    for share, name in zip(told, STAGE_FILES.values(), strict=True):
        load_stage(model, final, ROOT / "checkpoints" / "stages", name)
        right, asked = emoji_judge.evaluate(model, processor, SCENES)["all"]
        assert right / asked == pytest.approx(share, abs=0.07), name
    for told, quantize in ((told_int8, "int8"), (told_int4, "int4")):
        in_few_bits, same = emoji_judge.evaluate(load(quantize=quantize), processor, SCENES)["all"]
        assert same == asked > 150 and in_few_bits / asked == pytest.approx(told, abs=0.07), quantize
        assert abs(in_few_bits - right) <= 0.05 * asked, quantize

"""real_weights.py on a small random checkpoint, saved by transformers, that passes for a published one."""

import argparse
from pathlib import Path

import pytest
import transformers

import real_weights
from cli import models
from hub.files import BUNDLED
from hub.writer import write_tokenizer
from reference import TEXT, VISION, reference_model
from tokenizer import Tokenizer

NAME = "llava-hf/llava-1.5-7b-hf"
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Named as the 7B's, with a table in which the 7B has its size."""
    folder, tokenizer = tmp_path / "llava-1.5-7b-hf", Tokenizer.from_pretrained(BUNDLED)
    text = TEXT | {"vocab_size": max(tokenizer.special_names) + 1}
    reference = reference_model(text=text, image_token_index=tokenizer.image_token_id, pad_token_id=0)
    processor = transformers.AutoProcessor.from_pretrained(BUNDLED)
    processor.image_processor.size = {"shortest_edge": 28}
    processor.image_processor.crop_size = {"height": 28, "width": 28}
    processor.patch_size = 7
    reference.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    monkeypatch.setattr(models, "MODELS", [(NAME, "none", 2, VISION, text, {})])
    inputs = processor(images=real_weights.open_image(real_weights.HERE), text=PROMPT, return_tensors="pt")
    ids = reference.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return folder, text, answer.strip()


def report(capsys, *paths) -> tuple[str, str | None]:
    """What is printed, and the error."""
    error = None
    try:
        real_weights.report(argparse.Namespace(model=paths, pictures=None, device="cpu", dtype="float32"))
    except ValueError as caught:
        error = str(caught)
    return capsys.readouterr().out, error


def test_a_checkpoint_that_answers_as_the_reference_is_right(folder, monkeypatch, capsys):
    path, _, answer = folder
    monkeypatch.setattr(real_weights, "QUESTIONS", {NAME: [(real_weights.HERE, PROMPT, 6, ("another", answer))]})
    out, error = report(capsys, str(path))
    assert error is None and "loaded in" in out and ", float32\n" in out and "  right, " in out and repr(answer) in out
    assert f"torch {real_weights.torch.__version__}" in out and "free memory" in out


def test_other_answers_sizes_and_missing_files_are_reported(folder, monkeypatch, capsys):
    path, text, answer = folder
    monkeypatch.setattr(real_weights, "QUESTIONS", {NAME: [(real_weights.HERE, PROMPT, 6, ("Two cats",))]})
    out, error = report(capsys, str(path), str(path.parent / "nothing"))
    assert "  WRONG, " in out and repr(answer) in out and "expected 'Two cats'\n" in out and "FAILED: " in out
    assert error == f"not right: {path}, {path.parent / 'nothing'}"
    monkeypatch.setattr(models, "MODELS", [(NAME, "none", 2, VISION, text | {"num_hidden_layers": 2}, {})])
    assert "--models counts " in report(capsys, str(path))[0]
    (path / "model.safetensors").write_bytes(b"")
    assert "FAILED: " in report(capsys, str(path))[0]


def test_a_checkpoint_without_a_text_must_only_answer(folder, capsys):
    path = folder[0].rename(folder[0].with_name("of-my-own"))
    out, error = report(capsys, str(path))
    assert error is None and "  answered; there is no text to compare with, " in out


def test_questions_are_about_checkpoints_of_the_table():
    assert real_weights.QUESTIONS.keys() <= {name for name, *_ in models.MODELS}
    assert all(real_weights.hub_id(name) == real_weights.hub_id(f"/tmp/{Path(name).name}") == name
               for name, *_ in models.MODELS)  # fmt: skip

"""The flags, their ranges, which combinations are refused; and how a command ends."""

import pytest
import torch

from cli import run
from cli.arguments import parse_arguments
from cli.memory import free_bytes

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image"], "--image"),
        (["--image", "rocket.jpg", "--max-new-tokens", 0], "--max-new-tokens: must be a whole number from 1"),
        (["--image", "rocket.jpg", "--max-new-tokens", 2.5], "--max-new-tokens"),
        (["--image", "rocket.jpg", "--temperature", -1], "--temperature: must be 0 or a number from"),
        (["--temperature", 1e-40], "--temperature: must be 0 or a number from 1e-06"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--temperature", 1, "--top-p", 7], "--top-p"),
        (["--top-p", 0], "--top-p"),
        (["--prompt", "x", "--top-p", 0.9], "--top-p changes nothing without --temperature"),
        (["--prompt", "x", "--top-p", 1], "--top-p changes nothing without --temperature"),
        (["--prompt", "x", "--top-k", 0], "--top-k changes nothing without --temperature"),
        (["--prompt", "x", "--seed", 0], "--seed changes nothing without --temperature"),
        (["--images", "images", "--seed", 1, "--temperature", 0], "--seed changes nothing without --temperature"),
        (["--chat", "--seed", 1], "--seed changes nothing without --temperature"),
        (["--top-k", -1], "--top-k"),
        (["--repetition-penalty", 0], "--repetition-penalty"),
        (["--seed", -1], "--seed"),
        (["--seed", 2**70], "--seed"),
        (["--batch-size", 0], "--batch-size"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--template", "alpaca"], "--template"),
        (["--stop", "x", "--stop", ""], "--stop needs a text"),
        (["--quantize", "int2"], "--quantize"),
        (["--tempature", 1], "--tempature"),
        (["--images", "images", "--image", "rocket.jpg"], "--images asks about many pictures"),
        (["--out", "x.jsonl"], "--out needs --images"),
        (["--chat", "--prompt", "x"], "--chat reads its questions from standard input"),
        (["--chat", "--prompt", ""], "--chat reads its questions from standard input"),
        (["--images", "-", "--prompt", "-"], "standard input cannot be both the list and the prompt"),
        (["--describe", "x", "--json"], "--describe takes no other flag"),
        (["--models", "--json"], "--models takes no other flag"),
        (["--image", "rocket.jpg", "--describe", "x"], "--describe takes no other flag"),
        (["--explain", "x.html", "--prompt", "x"], "--explain is for one answer about one picture"),
        (["--explain", "x.html", "--images", "images"], "--explain is for one answer about one picture"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_a_wrong_flag_is_named(arguments, words):
    with pytest.raises(ValueError) as error:
        parse_arguments(list(map(str, arguments)))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [[], ["--temperature", "1"], ["--json"]])
def test_without_a_question_it_prints_its_usage(capsys, arguments):
    assert run(lambda: parse_arguments(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: python llava.py --image PATH") and "--images" in err and "--chat" in err
    assert "error: there is nothing to answer: give --image, --images, --chat or --prompt" in err.splitlines()[-1]


def test_help_shows_ten_options_first(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    first, rest = capsys.readouterr().out.split("what most people need:")[1].split("the rest:")
    assert (end.value.code, first.count("\n  --")) == (0, 10)
    for flag in ("--temperature", "--top-p", "--top-k", "--repetition-penalty", "--max-new-tokens", "--stop", "--seed"):
        assert flag in first + rest


def test_an_error_of_several_lines_is_printed_in_one(capsys):
    def work():
        raise ValueError("one\n  two")

    assert (run(work), capsys.readouterr().err) == (2, "error: one two\n")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_a_user_error(error, capsys):
    def work():
        raise error

    assert run(work) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory")


def test_free_memory_is_plausible():
    free = free_bytes("cpu")
    assert free is None or 1e8 < free < 1e14

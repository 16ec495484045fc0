"""llava.py in several processes: what is refused before they connect. Two processes at work: test_two_processes.py."""

import json

import pytest

import cli
from cli.arguments import parse_arguments
from cli.loading import load, settle
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, named",
    [
        (["--image", "a.png", "--quantize", "int4"], "--quantize"),
        (["--chat"], "--chat"),
        (["--image", "a.png", "--explain", "page.html"], "--explain"),
        (["--image", "a.png", "--kernels", "triton"], "--kernels"),
        (["--prompt", "-"], "standard input"),
        (["--images", "-"], "standard input"),
    ],
)
def test_flags_of_one_process_are_refused(four, capsys, flags, named):
    assert cli.main(LlavaForConditionalGeneration, LlavaProcessor, flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


@pytest.mark.quick
def test_a_list_is_divided_and_not_the_model(four):
    parse_arguments(["--images", "pictures", "--quantize", "int8"])  # each process has a whole model


@pytest.mark.quick
@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "num_attention_heads 6"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"intermediate_size": 702}, "intermediate_size 702"),
    ],
)
def test_a_model_that_cannot_be_divided_equally_is_refused(four, tmp_path, change, named):
    for file in BUNDLED.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | change}))
    refused(tmp_path, f"4 processes cannot share {named}")


def refused(model, why):
    args = parse_arguments(["--model", str(model), "--prompt", "Hello.", "--device", "cpu"])
    settle(args)
    with pytest.raises(ValueError, match=why):
        load(LlavaForConditionalGeneration, LlavaProcessor, args, 1, 0)


@pytest.mark.quick
def test_the_memory_of_one_process_is_counted(four, monkeypatch):
    """Layers and cache in four parts; tower, projector, embedding and head whole."""
    seen = []
    monkeypatch.setattr("cli.loading.check_memory", lambda model, *_: seen.append(model) or stop())
    refused(BUNDLED, "stopped")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused(BUNDLED, "stopped")
    quarter, whole = ({name: p.numel() for name, p in model.named_parameters()} for model in seen)
    for name, size in whole.items():
        divided = ".layers." in name and "language_model" in name and not name.endswith("norm.weight")
        assert quarter[name] * (4 if divided else 1) == size, name
    heads = [model.config.text_config.num_key_value_heads for model in seen]
    assert heads[0] * 4 == heads[1]


def stop():
    raise ValueError("stopped")

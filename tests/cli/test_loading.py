"""What the command says about a checkpoint: its description, and a line before a large one is loaded."""

import io

import pytest
from safetensors.torch import load_file, save_file

import cli
from cli import loading
from hub.writer import save
from llava import LlavaForConditionalGeneration, LlavaProcessor
from reference import reference_model
from small import small as random_model


def main(*arguments) -> int:
    return cli.main(LlavaForConditionalGeneration, LlavaProcessor, list(map(str, arguments)))


def test_a_checkpoint_is_described_or_refused_in_one_line(tmp_path, capsys):
    folder, reference = tmp_path / "llava", reference_model()
    reference.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    left_out = "language_model.model.norm.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != left_out}, folder / "model.safetensors")
    capsys.readouterr()  # transformers' progress bar
    assert main("--describe", folder) == 0
    out, err = capsys.readouterr()
    for words in ("llama", "4 layers of width 32", "16 tokens per picture", "3 layers of width 48", "6 key/value"):
        assert words in out
    assert f"{len(tensors) - 1} tensors, {reference.num_parameters():,} numbers, float32" in out
    assert "0.000495 GB in fp32" in out and err == ""
    assert f"mismatches  tensor language_model.norm.weight is missing in {folder}" in out
    (folder / "config.json").unlink()
    assert main("--describe", folder) == 2
    assert capsys.readouterr() == ("", f"error: {folder} has no config.json, so it is not a checkpoint\n")


FLAGS = [
    (["--dtype", "float32"], "."),
    (["--dtype", "bfloat16"], " and converting them to bfloat16, which takes a while."),
    (["--dtype", "float32", "--quantize", "int8"], " and converting them to int8, which takes a while."),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS)
def test_a_line_on_a_terminal_announces_a_large_model(tmp_path, monkeypatch, flags, words):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    save(*random_model(), tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    arguments = ["--model", tmp_path / "small", "--prompt", "x", "--max-new-tokens", 1, *flags]
    for large, stream in ((0, Terminal()), (0, io.StringIO()), (2e9, Terminal())):
        monkeypatch.setattr(loading, "LARGE", large)
        monkeypatch.setattr("sys.stderr", stream)
        assert main(*arguments) == 0
        announced = f"Loading {size / 1e9:.3g} GB of weights{words}\n" in stream.getvalue()
        assert announced == (large == 0 and stream.isatty()), stream.getvalue()

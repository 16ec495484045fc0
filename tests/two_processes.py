"""What tests/training/test_two_processes.py runs twice, with the environment that torchrun gives to two processes.

    python tests/two_processes.py FOLDER       FOLDER has what the test's fixture `folder` writes
"""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import cli
import train
from cli import parallel
from clip import CLIPVisionConfig
from hub.files import BUNDLED
from llama import LlamaConfig
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from training import processes, progress, run_stage
from training.lora import Lora
from training.recipes import Recipe
from training.records import Records
from training.run import train_on_records
from training.run_stage import Place
from training.tune_adapter import train_adapter

STEPS, BATCH, STOP = 3, 2, 2
COMMANDS = {
    "one answer": ["--image", "0.png", "--dtype", "float32", "--max-new-tokens", "4"],
    "a list": ["--images", ".", "--batch-size", "1", "--max-new-tokens", "4", "--out", "answers-of-two"],
    "too long": ["--prompt", "word " * 3000],
}
TRAINED = {  # the flags of train.py
    "stages": ["--quick"],
    "few pictures": ["--data", "words.json", "--batch", "2", "--steps", "4"],
    "lora": ["--data", "six/my.json", "--lora", "4", "--lr", "1e-2", "--dropout", ".2", "--quantize", "int8"]
    + ["--batch", "2", "--steps", "2"],
}
PARTS = 3 + len(COMMANDS) + len(TRAINED)  # of main, each of which connects the processes
ENDLESS = 10_000  # steps of the run that Ctrl-C interrupts


def tune(folder: Path, out: str, shard: bool = True, stop: int | None = None, steps: int = STEPS) -> None:
    """Tune on my.json in FOLDER/out, interrupted when step `stop` asks for its samples."""
    place = Place(folder / out, save_every=2, shard=shard)
    with Interrupted(stop):
        train_on_records(place, folder / "my.json", None, BUNDLED, steps, BATCH, 1e-3)


def tune_and_validate(folder: Path, out: str, shard: bool = True) -> None:
    """One step, with the loss on records that are held back before and after it."""
    place, recipe = Place(folder / out, shard=shard, recompute=shard), Recipe(validate=0.4)
    train_on_records(place, folder / "my.json", None, BUNDLED, 1, BATCH, 1e-3, recipe=recipe)


def adapt(folder: Path, out: str, shard: bool = True, stop: int | None = None, steps: int = STEPS) -> None:
    """The same with a LoRA beside matrices in int4."""
    place, lora = Place(folder / out, save_every=2, shard=shard), Lora(4, 8, dropout=0.2)
    with Interrupted(stop):
        train_adapter(place, folder / "my.json", None, BUNDLED, steps, BATCH, 1e-3, 1e-3, lora, "int4")


def train_by_command(name: str, out: str) -> None:
    """Run train.py with the flags TRAINED[name]; all stages in float32."""
    dtype = (lambda device: torch.float32) if name == "stages" else run_stage.fast_dtype
    argv = mock.patch.object(sys, "argv", ["train.py", *TRAINED[name], "--out", out])
    with argv, mock.patch.object(run_stage, "fast_dtype", dtype):
        train.main()


class Interrupted:
    def __init__(self, stop: int | None):
        self.stop, self.real = stop, Records.conversations

    def __enter__(self):
        def conversations(records, samples):
            if self.stop is not None and samples.start >= self.stop * BATCH:
                raise KeyboardInterrupt
            return self.real(records, samples)

        Records.conversations = conversations

    def __exit__(self, kind, *_):
        Records.conversations = self.real
        return kind is KeyboardInterrupt and self.stop is not None


def ask(*arguments: str) -> int:
    return cli.main(LlavaForConditionalGeneration, LlavaProcessor, list(arguments))


def grouped() -> LlavaForConditionalGeneration:
    """A random model whose query heads share key heads, 3 each."""
    torch.manual_seed(0)
    text = LlamaConfig(100, 48, 64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
    vision = CLIPVisionConfig(32, 48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = LlavaForConditionalGeneration(LlavaConfig(vision, text, image_token_index=99)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    return model


def tokens(model: LlavaForConditionalGeneration) -> list:
    """Heads in the cache of one process, and tokens: of the whole model, of the divided one, and sampled from it."""
    prompt = {"input_ids": torch.tensor([[1, 99, 99, 99, 99, 5, 6]]), "pixel_values": torch.ones(1, 3, 28, 28)}
    whole = model.generate(**prompt, max_new_tokens=6)
    parallel.divide(model, "cpu", torch.float32)
    heads = model.language_model.new_cache(1, 8).k[0].shape[1]
    divided = model.generate(**prompt, max_new_tokens=6)
    sampled = model.generate(**prompt, max_new_tokens=6, do_sample=True, temperature=3.0)
    return [heads, *(rows[0].tolist() for rows in (whole, divided, sampled))]


def train_divided(folder: Path) -> None:
    processes.join("cpu")
    tune(folder, "tuned", stop=STOP)
    if processes.rank() == 0:
        shutil.copytree(folder / "tuned", folder / "tuned-then-by-one")
    processes.wait_for_all()
    tune(folder, "tuned")
    adapt(folder, "adapted")
    tune_and_validate(folder, "validated")
    processes.leave()


def train_without_end(folder: Path) -> None:
    processes.join("cpu")
    adapt(folder, "endless", steps=ENDLESS)


def main(folder: Path, ports: list[str]) -> int:
    """Each part connects the two processes anew, at a port of its own."""
    os.chdir(folder)
    progress.REPORT_EVERY = 1
    torch.set_num_threads(1)

    def at_next_port() -> None:
        os.environ["MASTER_PORT"] = ports.pop()

    at_next_port()
    with parallel.connected():
        made = {"grouped": tokens(grouped())}
    for name, arguments in COMMANDS.items():
        at_next_port()
        made[name] = ask(*arguments)
        if dist.is_initialized():  # after an error, with which a process would end
            dist.destroy_process_group()
    (folder / f"made-{os.environ['RANK']}.json").write_text(json.dumps(made))
    for name in TRAINED:
        at_next_port()
        train_by_command(name, f"{name} by two")
    at_next_port()
    train_divided(folder)
    at_next_port()
    return cli.run(lambda: train_without_end(folder))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

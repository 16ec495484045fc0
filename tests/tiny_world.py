"""The emoji world with the bundled vocabulary, an untrained tiny model for it, and a run's log, for several tests."""

import csv
import json
import random
from functools import lru_cache
from pathlib import Path

import torch

from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration
from tokenizer import Tokenizer
from training import emoji_world
from training.tiny_model import new_model, new_processor
from training.world_data import World

ROOT = Path(__file__).parent.parent
TURNS = [
    {"from": "human", "value": "<image>\nWhat is on the left?"},
    {"from": "gpt", "value": "There is a cat on the left."},
    {"from": "human", "value": "Is there a dog?"},
    {"from": "gpt", "value": "No."},
]


@lru_cache
def tiny_world() -> World:
    return World(emoji_world.load_sprites(), new_processor(Tokenizer.from_pretrained(BUNDLED)))


def untrained() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return new_model(tiny_world().processor.tokenizer)


def logged_losses(folder: Path) -> dict[tuple[str, int], str]:
    with open(folder / "log.csv") as file:
        return {(name, int(step)): loss for name, step, loss, _ in csv.reader(file)}


def write_records(folder: Path, n: int = 6) -> list[dict]:
    """Records about n scenes, in LLaVA's format, whose pictures are written to `folder`."""
    made = []
    for i in range(n):
        picture, truth = emoji_world.make_scene(tiny_world().sprites, i, 100 + i)
        picture.save(folder / f"{i}.png")
        turns = emoji_world.conversation(truth, random.Random(i), 2)
        made.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns})
    return made


def write_file(folder: Path, n: int) -> Path:
    """The same as a file, my.json in `folder`."""
    (folder / "my.json").write_text(json.dumps(write_records(folder, n)))
    return folder / "my.json"

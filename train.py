"""Train the tiny LLaVA from nothing, or tune one on your own conversations. The parts are in training/.

    python train.py                         all stages of the recipe; an interrupted run is resumed
    python train.py --quick                 a few steps of each stage, in a minute (the model learns next to nothing)
    python train.py --data my.json --images DIR --out DIR      tune the bundled model on your own conversations
    torchrun --nproc-per-node=2 train.py    the same steps, each shared between two processes
"""

import argparse
import math
import os
import sys
from pathlib import Path

# Every batch has new shapes, and oneDNN caches what it has compiled for 1,024 of them, which took 12 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch

from hub.device import check_device
from hub.files import BUNDLED
from training import processes
from training.run import train_from_nothing, train_on_records
from training.run_stage import Place

ONLY_FROM_NOTHING = ("quick", "seed")
ONLY_WITH_DATA = ("images", "model", "steps", "batch", "lr")
DEFAULTS = {
    **{"out": None, "quick": False, "accumulate": 1, "compile": False, "seed": 0},
    **{"data": None, "images": None, "model": BUNDLED, "steps": None, "batch": 16, "lr": 2e-5},
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def rate(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a learning rate")
    return number


def parse_arguments() -> argparse.Namespace:
    """The flags of one command. Raises ValueError for flags that do not go together and for files that do not exist."""
    about = "Train the tiny LLaVA, or tune one on your own conversations."
    parser = argparse.ArgumentParser(description=about, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--out", type=Path, help="where the model is written (default: a folder under runs/)")
    add("--quick", action="store_true", help="a few steps of each stage")
    add("--data", type=Path, help="tune on this JSON file, in LLaVA's format")
    add("--images", type=Path, help="with --data: the folder of its pictures (default: the file's own)")
    add("--model", type=Path, help="with --data: the checkpoint to start from (default: the bundled one)")
    add("--steps", type=positive, help="with --data (default: once through the file)")
    add("--batch", type=positive, help="with --data: conversations in a step (default: 16)")
    add("--lr", type=rate, help="with --data: the highest learning rate (default: 2e-5)")
    add("--accumulate", type=positive, help="pieces of a step, to save memory (default: 1)")
    add("--compile", action="store_true", help="torch.compile: faster steps after minutes of compiling")
    add("--seed", type=int, help="of the recipe's first weights (default: 0)")
    add("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    given = vars(parser.parse_args())
    check_together(given)
    args = argparse.Namespace(**DEFAULTS | given)
    if args.images and not args.images.is_dir():
        raise ValueError(f"there is no folder {args.images}: --images is the folder of the pictures that --data names")
    if args.data and not args.data.is_file():
        raise ValueError(f"there is no file {args.data}: --data is a JSON file of conversations")
    return args


def check_together(given: dict) -> None:
    """Raise ValueError for flags of the other command."""
    for flag in given:
        if "data" in given and flag in ONLY_FROM_NOTHING:
            raise ValueError(f"--{flag} does not go with --data: it is for training from nothing")
        if "data" not in given and flag in ONLY_WITH_DATA:
            raise ValueError(f"--{flag} needs --data: the recipe's own values are in training/stages.py")


def find_place(args: argparse.Namespace) -> Place:
    """Where and how this process runs. Those that torchrun started connect to each other here."""
    folder = args.out or Path("runs") / ("quick" if args.quick else "my-llava" if args.data else "tiny-llava")
    place = Place(folder, processes.join(args.device), f"the emoji world, seed {args.seed}", args.accumulate)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place.workers = 0 if args.quick else max(1, min(12, (os.cpu_count() or 2) // on_this_machine - 1))
    place.compile = args.compile
    return place


def main() -> None:
    args = parse_arguments()
    check_device(args.device)
    torch.manual_seed(args.seed)
    place = find_place(args)
    if args.data:
        train_on_records(place, args.data, args.images, args.model, args.steps, args.batch, args.lr)
    else:
        train_from_nothing(place, args.quick)
    processes.leave()


if __name__ == "__main__":
    import cli

    sys.exit(cli.run(main))

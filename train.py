"""Train the tiny LLaVA from nothing, or tune one on your own conversations. The parts are in training/.

    python train.py                         all stages of the recipe; an interrupted run is resumed
    python train.py --quick                 a few steps of each stage, in a minute (the model learns next to nothing)
    python train.py --data my.json --images DIR --out DIR      tune the bundled model on your own conversations
    torchrun --nproc-per-node=2 train.py    the same steps, each shared between two processes
"""

import argparse
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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny LLaVA, or tune one on your own conversations.")
    parser.add_argument("--out", type=Path, help="where the model is written (default: a folder under runs/)")
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage")
    parser.add_argument("--data", type=Path, help="tune on this JSON file, in LLaVA's format")
    parser.add_argument("--images", type=Path, help="with --data: the folder of its pictures (default: the file's own)")
    parser.add_argument("--model", type=Path, help="with --data: the checkpoint to start from (default: the bundled)")
    parser.add_argument("--steps", type=positive, help="with --data: default, once through the file")
    parser.add_argument("--batch", type=positive, help="with --data: conversations in a step (default: 16)")
    parser.add_argument("--lr", type=float, help="with --data: the highest learning rate (default: 2e-5)")
    parser.add_argument("--accumulate", type=positive, default=1, help="pieces of a step, to save memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster steps after minutes of compiling")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for flag in ("--images", "--model", "--steps", "--batch", "--lr"):
        if not args.data and getattr(args, flag.strip("-")) is not None:
            raise ValueError(f"{flag} needs --data: the recipe's own values are in training/stages.py")
    return args


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
        lr = 2e-5 if args.lr is None else args.lr
        train_on_records(place, args.data, args.images, args.model or BUNDLED, args.steps, args.batch or 16, lr)
    else:
        train_from_nothing(place, args.quick)
    processes.leave()


if __name__ == "__main__":
    import cli

    sys.exit(cli.run(main))

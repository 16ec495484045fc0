"""Train the tiny LLaVA from scratch, or tune one on your own conversations. The parts are in training/.

    python train.py                         all stages of the recipe; an interrupted run is resumed
    python train.py --quick                 a few steps of each stage, in a minute (the model hardly learns anything)
    python train.py --data my.json --images DIR --out DIR      tune the bundled model on your own conversations
    python train.py --data my.json --lora 16 --out DIR         the same with a LoRA: little memory, a small file
    python train.py --data my.json --recipe finetune-lora      with LLaVA-1.5's own settings (training/recipes.py)
    python train.py --merge --model M --adapter DIR --out DIR  write the model with a LoRA merged into it
    python train.py --data my.json --plan   what memory it needs, computed before anything is loaded
    torchrun --nproc-per-node=2 train.py    the same steps, each shared between two processes; --shard divides the model
"""

import argparse
import math
import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

# Every batch has new shapes, and oneDNN caches what it has compiled for 1,024 of them, which took 12 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch

from hub.adapter import base_of, read_adapter_config, warning_of_another_base
from hub.device import check_device
from hub.files import BUNDLED
from tokenizer import TEMPLATES
from training import processes
from training.lora import Lora
from training.plan import Run, check_memory
from training.recipes import OURS, RECIPES, Recipe
from training.run import train_from_nothing, train_on_records
from training.run_stage import Place
from training.tune_adapter import merge, train_adapter

ONLY_FROM_NOTHING = ("quick", "seed")  # and seed with --lora or --validate
ONLY_WITH_LORA = ("alpha", "dropout", "rslora", "projector_lr", "quantize")
RECIPE_FLAGS = ("recipe", "warm_up", "template", "pad", "group", "max_length", "validate")
ONLY_WITH_DATA = ("images", "model", "steps", "batch", "lr", "lora", "adapter", "shard", "plan", *RECIPE_FLAGS)
FOR_MERGING = ("merge", "model", "adapter", "out")
NO_MEMORY = "try --recompute, a larger --accumulate, a smaller --batch, or with --lora --quantize int4"
DEFAULTS = {
    **{"out": None, "quick": False, "accumulate": 1, "recompute": False, "compile": False, "seed": 0},
    **{"data": None, "images": None, "model": None, "steps": None, "batch": 16, "lr": None},
    **{"lora": None, "alpha": None, "dropout": None, "rslora": False, "projector_lr": 2e-5, "quantize": None},
    **{"adapter": None, "merge": False, "shard": False, "plan": False, "save_every": 100},
    **{"recipe": None, "warm_up": 0.03, "template": None, "pad": None, "group": False, "max_length": None},
    **{"validate": None},
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


def above_zero(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return float(text)


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
    add("--lr", type=rate, help="with --data: the highest learning rate (default: 2e-5; with --lora 2e-4)")
    add("--accumulate", type=positive, help="pieces that each step is cut into, to save memory (default: 1)")
    add("--recompute", action="store_true", help="compute activations twice: less memory, slower steps")
    add("--compile", action="store_true", help="torch.compile: faster steps after minutes of compiling")
    add("--plan", action="store_true", help="with --data: print what memory a run with these flags needs, and stop")
    add("--shard", action="store_true", help="with --data and torchrun: each process holds only a part of the model")
    add("--save-every", type=positive, metavar="N", help="save the run's state every N steps (default: 100)")
    add("--seed", type=int, help="for the first weights, LoRA's A and dropout, and the choice of --validate")
    add("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    add_lora_options(parser)
    add_recipe_options(parser)
    given = vars(parser.parse_args())
    recipe = RECIPES.get(given.get("recipe"), OURS)
    check_together(given, recipe)
    args = argparse.Namespace(**DEFAULTS | recipe.flags() | given)
    if args.images and not args.images.is_dir():
        raise ValueError(f"there is no folder {args.images}: --images is the folder of the pictures that --data names")
    if args.data and not args.data.is_file():
        raise ValueError(f"there is no file {args.data}: --data is a JSON file of conversations")
    if args.model is None:
        args.model = BUNDLED if args.adapter is None else base_of(args.adapter)
    args.lr = args.lr if args.lr is not None else 2e-4 if args.lora else 2e-5
    return args


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA: thin matrices learn beside frozen ones").add_argument
    add("--lora", type=positive, metavar="R", help="with --data: train an adapter of this rank and the projector")
    add("--alpha", type=above_zero, help="the adapter is scaled by alpha / R (default: 2 R, or --adapter's)")
    add("--dropout", type=share, help="share of the adapter's inputs set to zero (default: 0, or --adapter's)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(R)")
    add("--projector-lr", type=rate, help="the projector's highest learning rate (default: 2e-5)")
    add("--quantize", choices=["int8", "int4"], help="the frozen matrices in 8 or 4 bits instead of 16")
    add("--adapter", type=Path, metavar="DIR", help="an adapter to start from, or to merge")
    add("--merge", action="store_true", help="write --model with --adapter merged into it to --out")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LLaVA-1.5's recipes: other flags override theirs").add_argument
    add("--recipe", choices=RECIPES, help="with --data: the settings of one of LLaVA-1.5's scripts")
    add("--warm-up", type=share, metavar="SHARE", help="of the steps in which the learning rate rises (default: .03)")
    add("--template", choices=TEMPLATES, help="how a conversation is written (default: the checkpoint's)")
    on_or_off = argparse.BooleanOptionalAction
    add("--pad", action=on_or_off, help="pad pictures to a square, or crop them (default: as the checkpoint says)")
    add("--group", action=on_or_off, help="only pictures or only texts in a step, sorted by length")
    add("--max-length", type=positive, metavar="N", help="cut conversations after N tokens (default: skip long ones)")
    add("--validate", type=float, metavar="SHARE", help="hold back this share of the records, and log their loss")


def check_together(given: dict, recipe: Recipe) -> None:
    """Raise ValueError for flags of another command."""
    if "merge" in given:
        if wrong := [flag for flag in given if flag not in FOR_MERGING]:
            raise ValueError(f"--{wrong[0]} does not go with --merge")
        if not {"adapter", "out"} <= given.keys():
            raise ValueError("--merge needs --adapter and --out")
        return
    if "adapter" in given and not {"lora", "data"} & given.keys():
        raise ValueError("--adapter needs --merge, or --data to train it further: with --lora R as an adapter")
    if "lora" in given and recipe.name and not recipe.lora:
        raise ValueError(f"--lora does not go with --recipe {recipe.name}: give --recipe finetune-lora")
    has_lora = "lora" in given or recipe.lora
    if "compile" in given and (has_lora or {"shard", "recompute"} & given.keys()):
        wrong = "lora" if has_lora else "shard" if "shard" in given else "recompute"
        raise ValueError(f"--compile does not go with --{wrong}")
    if "shard" in given and "plan" in given:
        raise ValueError("--plan does not go with --shard: it assumes that each process holds the whole model")
    if "shard" in given and "data" in given and "WORLD_SIZE" not in os.environ:
        raise ValueError("--shard divides the model over processes: start it with torchrun --nproc-per-node=N")
    if not 0 < given.get("validate", 0.5) < 1:
        raise ValueError(f"--validate {given['validate']:g} is not a share between 0 and 1, such as 0.02")
    for flag in given:
        if not has_lora and flag in ONLY_WITH_LORA:
            raise ValueError(f"--{flag.replace('_', '-')} needs --lora")
        if "data" in given and flag in ONLY_FROM_NOTHING and not (flag == "seed" and (has_lora or "validate" in given)):
            raise ValueError(f"--{flag} does not go with --data: it is for training from scratch")
        if "data" not in given and flag in ONLY_WITH_DATA:
            raise ValueError(f"--{flag.replace('_', '-')} needs --data: without it training/stages.py sets the values")


def find_place(args: argparse.Namespace) -> Place:
    """Where and how this process runs. Those that torchrun started connect to each other here."""
    folder = args.out or Path("runs") / ("quick" if args.quick else "my-llava" if args.data else "tiny-llava")
    place = Place(folder, processes.join(args.device), f"the emoji world, seed {args.seed}", args.accumulate)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place.workers = 0 if args.quick else max(1, min(12, (os.cpu_count() or 2) // on_this_machine - 1))
    place.compile, place.recompute, place.shard = args.compile, args.recompute, args.shard
    place.save_every = args.save_every
    return place


def warn_of_another_base(args: argparse.Namespace) -> None:
    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if args.adapter is not None and is_first and (warning := warning_of_another_base(args.adapter, args.model)):
        print(warning, file=sys.stderr)


def find_lora(args: argparse.Namespace) -> Lora:
    """The settings of --lora. An adapter that is continued keeps its own alpha and dropout."""
    own = {} if args.adapter is None else read_adapter_config(args.adapter)
    alpha = args.alpha if args.alpha is not None else own.get("lora_alpha", 2 * args.lora)
    rslora = args.rslora or bool(own.get("use_rslora"))
    dropout = args.dropout if args.dropout is not None else own.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"the adapter {args.adapter} has the lora_dropout {str(dropout)[:80]}: give --dropout")
    return Lora(args.lora, int(alpha) if alpha == int(alpha) else alpha, float(dropout), rslora, args.seed)


def find_recipe(args: argparse.Namespace) -> Recipe:
    """--recipe's, with the values of the other flags."""
    recipe = RECIPES.get(args.recipe, OURS)
    return replace(recipe, **{f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)})


def main() -> None:
    args = parse_arguments()
    warn_of_another_base(args)
    if args.merge:
        for name in ("SIGTERM", "SIGHUP"):  # end it like Ctrl-C: nothing half-written is left
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.default_int_handler)
        merge(args.model, args.adapter, args.out)
        return print(f"saved to {args.out}")
    check_device(args.device)
    torch.manual_seed(args.seed)
    place = find_place(args)
    records = args.data, args.images, args.model, args.steps, args.batch, args.lr
    lora = find_lora(args) if args.lora else None
    recipe = find_recipe(args)
    if args.data and not args.shard:
        run = Run(args.model, place, args.batch, lora, args.quantize, recipe)
        check_memory(run, args.data, args.images, args.plan)
    if args.plan:
        return
    if args.lora:
        recipe = replace(recipe, alpha=lora.alpha, dropout=lora.dropout)
        train_adapter(place, *records, args.projector_lr, lora, args.quantize, args.adapter, recipe)
    elif args.data:
        train_on_records(place, *records, args.adapter, recipe)
    else:
        train_from_nothing(place, args.quick)
    processes.leave()


if __name__ == "__main__":
    import cli

    sys.exit(cli.run(main, NO_MEMORY))

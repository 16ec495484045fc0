"""The command `python quantize.py MODEL --to int4 --out DIR`. See quantize.py. The model's class is passed in."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from hub.files import find_checkpoint, read_json
from hub.packed import Scheme, packed_tensors, scheme_json
from hub.processor_settings import read_processor_settings
from hub.settings import read_config
from hub.writer import check_finite, hub_name, write_json, write_shards
from load_weights import load
from quantize import GROUPS, Int4Linear, choose_scheme, matrices_to_quantize, quantize_linear, signed
from tokenizer import Tokenizer

SHARD_BYTES = 5e8  # two copies of a shard are in memory while it is written
COPIED = {".json", ".model", ".jinja", ".txt", ".md"}  # suffixes of the other files that are copied


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    about = "Write a checkpoint whose decoder has quantized weights. This needs little memory."
    parser = argparse.ArgumentParser(prog="quantize.py", description=about)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint: a folder or a hub id")
    parser.add_argument("--to", choices=["int4", "int8"], default="int4", help="bits per weight (default: int4)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    help = "with int4: weights that share a scale (default: the largest that divides the widths of all matrices)"
    parser.add_argument("--group", type=int, choices=GROUPS, help=help)
    args = parser.parse_args(argv)
    if args.group and args.to == "int8":
        parser.error("--group is for int4: in int8 the weights of a row share a scale")
    return args


def quantize_checkpoint(Model: type, argv: list[str] | None = None) -> None:
    """Raises ValueError if MODEL cannot be quantized or DIR exists. DIR is created when all files are written."""
    args = parse_arguments(argv)
    folder, out = find_checkpoint(args.model), Path(os.path.abspath(args.out))
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already: choose another --out")
    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config:
        raise ValueError(f"{folder} is in the layout of LLaVA's authors: quantize the same model from llava-hf")
    settings = read_config(folder)
    if settings.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already")
    read_processor_settings(folder)
    if not (folder / "tokenizer.json").is_file():
        Tokenizer.from_pretrained(folder)  # fails now rather than after minutes if it is missing
    model = Model.without_weights(settings)
    scheme = choose_scheme(model, args.to, args.group)
    load(model, folder)  # maps the files, which takes no memory
    model.tie_weights()
    with new_folder(out) as scratch:
        for file in sorted(folder.iterdir()):
            if file.suffix in COPIED and file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, scratch / file.name)
        ignore = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
        if "lm_head" not in matrices_to_quantize(model):
            ignore.append("lm_head")
        write_json(scratch / "config.json", config | {"quantization_config": scheme_json(scheme, ignore)})
        size = write_shards([whole_tensors(model), quantized_tensors(model, scheme)], scratch, SHARD_BYTES)
    print(f"wrote {size / 1e9:.3g} GB to {args.out}: python llava.py --model {args.out} --image x.jpg")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends, or is deleted if it fails."""
    scratch = folder.with_name(f".unfinished-{os.getpid()}")
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
        yield scratch
        scratch.rename(folder)
    except BaseException:  # Ctrl-C too, which may come as soon as the folder is there
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # one that is not empty stays
            for parent in missing:
                parent.rmdir()
        raise


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are not quantized, by their names in the hub's files."""
    packed = {f"{name}.weight" for name in matrices_to_quantize(model)}
    for name, tensor in model.named_parameters():
        if name not in packed:
            check_finite({name: tensor})
            yield hub_name(name), tensor


@torch.no_grad()
def quantized_tensors(model: nn.Module, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the decoder's matrices, each quantized when it is requested."""
    todo = matrices_to_quantize(model)
    for i, (name, linear) in enumerate(todo.items(), 1):
        check_finite({name: linear.weight})
        quantized = quantize_linear(linear.weight, None, *scheme)
        data = quantized.packed if isinstance(quantized, Int4Linear) else signed(quantized.q.view(torch.uint8))
        data = data.view(torch.uint8)
        scale = quantized.scale.view(len(data), -1)
        stored = hub_name(f"{name}.weight").removesuffix(".weight")
        yield from packed_tensors(stored, data, scale, tuple(linear.weight.shape)).items()
        if sys.stderr.isatty():
            print(f"\rmatrix {i} of {len(todo)}", end="\n" if i == len(todo) else "", file=sys.stderr)

"""Loads the model and the processor that the flags select, if they fit into memory."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch

from cli.memory import check_memory
from cli.parallel import divide, is_divided, keep_share, own_device
from clip import ImageProcessor
from hub.adapter import warning_of_another_base
from hub.device import check_device, fast_dtype
from hub.files import find_checkpoint, weight_files
from hub.packed import read_scheme
from hub.processor_settings import read_processor_settings
from hub.settings import known_fields, read_config
from quantize import expect_packed, unpack
from tokenizer import TEMPLATES

LARGE = 2e9  # bytes: loading a file of this size takes seconds or minutes


def settle(args: Namespace) -> None:
    """Replace "auto" and the checkpoint's defaults by the values in effect: device, dtype, bits and template."""
    if args.device == "auto":
        mps = torch.backends.mps.is_available()
        args.device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    args.device = own_device(args.device)
    check_device(args.device)
    if torch.device(args.device).type == "cuda":
        torch.cuda.set_device(args.device)  # kernels run on the current device only
        torch.backends.cudnn.allow_tf32 = False  # by default it rounds the patch embedding in float32 to 10 bits
    folder = find_checkpoint(args.model)
    # Reads only the adapter's settings: fails before the model is loaded and quantized.
    if args.adapter is not None and (warning := warning_of_another_base(args.adapter, args.model)):
        print(warning, file=sys.stderr)
    config = read_config(folder)
    if args.explain is not None and config["image_grid_pinpoints"]:
        raise ValueError("--explain does not work with LLaVA-1.6: the page shows one picture of patches, not tiles")
    packed = config.get("quantization_config")
    args.bits = args.quantize or (f"int{read_scheme(packed, folder / 'config.json').bits}" if packed else None)
    if args.dtype == "auto":
        # PyTorch's products for quantized weights are fast in bfloat16 on every CPU.
        dtype = torch.bfloat16 if args.bits and args.device == "cpu" else fast_dtype(args.device)
        args.dtype = str(dtype).removeprefix("torch.")
    args.template = args.template or read_processor_settings(own_settings(args) or folder)[1]


def own_settings(args: Namespace) -> Path | None:
    """The adapter's folder, if it says how prompts and pictures were treated in its training (train.py --recipe)."""
    if args.adapter is None or not (Path(args.adapter) / "preprocessor_config.json").is_file():
        return None
    return Path(args.adapter)


def load(Model: type, Processor: type, args: Namespace, rows: int, pictures: int) -> tuple:
    """The model and its processor, if memory is enough for batches of `rows` prompts with `pictures` pictures each."""
    folder, dtype = find_checkpoint(args.model), getattr(torch, args.dtype)
    processor, settings = Processor.from_pretrained(folder), read_config(folder)
    model = Model.without_weights(settings)
    if own := own_settings(args):
        changed = known_fields(ImageProcessor, read_processor_settings(own)[0])
        processor.image_processor = replace(processor.image_processor, **changed)
    if args.template in TEMPLATES:  # else the checkpoint's own, which the processor has
        processor.template = TEMPLATES[args.template]
    if settings.get("quantization_config"):
        unpack(model, expect_packed(model, folder, settings).bits)
    if is_divided(args):
        keep_share(model, settings)
    context = model.config.text_config.max_position_embeddings
    tokens = rows * min(pictures * processor.image_seq_length + args.max_new_tokens, context)
    mapped = args.device == "cpu" and not args.quantize and settings["dtype"] == dtype
    mapped = mapped and (args.adapter is None or "quantization_config" in settings)  # merged matrices are copies
    check_memory(model, dtype, args.device, args.quantize, tokens, mapped)
    size = sum(file.stat().st_size for file in weight_files(folder))
    if size > LARGE and sys.stderr.isatty():
        is_converted = args.quantize or settings["dtype"] != dtype
        how = f" and converting them to {args.quantize or args.dtype}, which takes a while" if is_converted else ""
        print(f"Loading {size / 1e9:.3g} GB of weights{how}.", file=sys.stderr)
        if pictures and model.config.image_grid_pinpoints:
            most, tile = processor.image_seq_length, model.config.image_seq_length
            times = f"reading it takes up to {most / tile:.0f} times as long as with LLaVA-1.5"
            print(f"A picture becomes up to {most} tokens: {times}.", file=sys.stderr)
    if is_divided(args):  # from the mapped file, unless an adapter must be merged first
        whole = Model.from_pretrained(folder, args.adapter and dtype, kernels="torch", adapter=args.adapter)
        return divide(whole, args.device, dtype), processor
    how = {"quantize": args.quantize, "kernels": args.kernels, "adapter": args.adapter}
    return Model.from_pretrained(folder, dtype, args.device, **how), processor

"""The commands: ask about pictures, describe a checkpoint; and `run`, which ends every command of the project.

    python llava.py --image x.jpg
    python llava.py --images holiday/ --out holiday.jsonl
    python llava.py --chat
    python load_weights.py checkpoints/tiny-llava

What a person can mend ends in one sentence on stderr and exit code 2; a closed pipe and Ctrl-C end in 130 and silence.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import answers
import chat
import explain
from arguments import BUNDLED, parse_arguments
from checkpoint import find_checkpoint, read_config, read_processor_settings
from clip import open_image
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from load_weights import survey
from memory import check_memory
from tokenizer import TEMPLATES


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float16 on a CUDA GPU and float32 elsewhere."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if kind == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32


# --- Asking ----------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check_device(name)
    return name


def check_device(name: str) -> None:
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError):  # no such name, or no such hardware
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"there is no device {name!r} here: use --device cpu")


def settle(args: argparse.Namespace) -> None:
    """Fill in the device, dtype and template that the arguments leave to the machine and to the checkpoint."""
    args.folder = find_checkpoint(args.model)
    args.device = choose_device(args.device)
    if args.dtype == "auto":
        args.dtype = str(fast_dtype(args.device)).removeprefix("torch.")
    args.template = args.template or read_processor_settings(args.folder)[1]


def load(args: argparse.Namespace, rows: int, pictures: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and the processor that the arguments ask for, if the memory is enough for a batch of so many rows, each
    with so many pictures and an answer of --max-new-tokens."""
    if args.model == BUNDLED:
        print(
            "The bundled tiny model knows only its small world: emoji on plain grounds. "
            "For photographs use --model llava-hf/llava-1.5-7b-hf (14 GB).",
            file=sys.stderr,
        )
    dtype = getattr(torch, args.dtype)
    processor = LlavaProcessor.from_pretrained(args.folder)
    processor.template = TEMPLATES[args.template]
    settings = read_config(args.folder)
    context = LlavaConfig.from_dict(settings).text_config.max_position_embeddings
    tokens = rows * min(pictures * processor.image_seq_length + args.max_new_tokens, context)
    check_memory(settings, dtype, args.device, args.quantize, tokens)
    options = dtype, args.device, args.quantize, args.kernels
    return LlavaForConditionalGeneration.from_pretrained(args.folder, *options), processor


def answer(args: argparse.Namespace) -> None:
    settle(args)
    if args.images:
        left = answers.unanswered(answers.read_questions(args.images, args.prompt), args)
        if left:
            rows, pictures = min(args.batch_size, len(left)), max(len(paths) for paths, _ in left)
            answers.answer_many(*load(args, rows, pictures), left, args)
        return
    images = [open_image(path) for path in args.image]
    if args.explain is not None:
        explain.check_place(args.explain, images)
    if not args.chat:
        answers.check_places(args.prompt, len(images))
        if not images:
            print("No picture given: the prompt is answered by itself.", file=sys.stderr)
    model, processor = load(args, 1, len(images))
    if args.chat:
        talk = chat.Chat(model, processor, args.system, args.stop, args.seed, **answers.sampling(args))
        talk.pictures = list(zip(args.image, images, strict=True))
        chat.converse(talk)
    elif args.explain is not None:
        watched = explain.Recorder(model)
        answers.answer_one(watched, processor, images, args)
        explain.write(args.explain, watched, processor, images[0], (Path(args.image[0]).name, Path(args.model).name))
    else:
        answers.answer_one(model, processor, images, args)


def run(work: Callable[[], None]) -> int:
    """Do the work of a command; an error that the user can mend becomes one sentence and exit code 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller has closed it: as good as empty
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (it stays open)
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is still to be written has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print(
            "error: the memory is not enough: try --dtype bfloat16, a smaller model or another device", file=sys.stderr
        )
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """`python llava.py ...`"""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # llava.py had switched it off; chat.py needs it
    warnings.simplefilter("ignore")  # Pillow's and PyTorch's, on odd files: they are for programmers
    for stream in (sys.stdin, sys.stdout):
        with suppress(AttributeError):  # what cannot be read or shown as text becomes a mark, not an error
            stream.reconfigure(errors="replace")
    return run(lambda: answer(parse_arguments(argv)))


# --- What is in a checkpoint -----------------------------------------------------------------------------------------


def describe_checkpoint(argv: list[str] | None = None) -> int:
    """`python load_weights.py PATH`"""
    parser = argparse.ArgumentParser(description="Say what a checkpoint is, without reading its weights.")
    parser.add_argument("path", help="a checkpoint folder or hub id")
    path = parser.parse_args(argv).path
    return run(lambda: print(describe(find_checkpoint(path))))


def describe(folder: Path) -> str:
    """What a checkpoint is: family, sizes, dtype, memory, and what does not match."""
    model = LlavaForConditionalGeneration.without_weights(read_config(folder))
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    found, misfits = survey(model, folder)
    n = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # keys and values, two bytes each
    return f"""\
family    LLaVA: {vision.model_type} and {text.model_type}
tower     {vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads, \
{vision.image_size} pixels in patches of {vision.patch_size}: {config.image_seq_length} tokens a picture
decoder   {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads \
on {text.num_key_value_heads} key/value heads, a vocabulary of {text.vocab_size}
weights   {len(found)} tensors, {n:,} numbers, {" ".join(sorted({t.dtype for t in found.values()}))}
memory    {4 * n / 1e9:.3g} GB in fp32, {2 * n / 1e9:.3g} GB in bf16 or fp16, {cache / 1e3:.3g} kB a token of context
misfits   {", ".join(misfits) or "none"}"""

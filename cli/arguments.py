"""The command-line flags of `python llava.py`, and which values and combinations of them are accepted.

Standard input is read only for `--prompt -`, `--images -` and `--chat`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from cli.parallel import check_flags
from hub.files import BUNDLED
from tokenizer import TEMPLATES

PROMPT = "Describe the picture."
USAGE = """python llava.py --image PATH [PATH ...] [--prompt TEXT] [options]
       python llava.py --images PATH [--out FILE] [options]
       python llava.py --chat [--image PATH ...] [options]
       python llava.py --describe PATH
       python llava.py --models"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all flags)")


def number(kind: type, low: float, high: float, or_zero: bool = False) -> Callable:
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low <= value <= high or (or_zero and value == 0)):  # NaN fails every comparison
            what = "0 or " * or_zero + ("a whole number" if kind is int else "a number")
            raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, not {text}")
        return value

    return convert


def unicode(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which is how Python represents bytes that are not UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def add_first_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what most people need").add_argument
    add("--image", nargs="+", action="extend", default=[], metavar="PATH", help="pictures for one answer, in order")
    add("--prompt", metavar="TEXT", help=f"what to ask; - reads it from standard input (default: {PROMPT})")
    add("--chat", action="store_true", help="a conversation about the pictures of --image, or others added during it")
    add("--images", type=Path, metavar="PATH", help="a folder, or a list of pictures in a file (- standard input)")
    add("--out", type=Path, metavar="FILE", help="write the answers of --images to a file, or resume it")
    add("--model", metavar="PATH", help="checkpoint folder or hub id (default: the bundled tiny one)")
    add("--max-new-tokens", type=number(int, 1, 10**9), default=256, metavar="N", help="longest answer (default: 256)")
    how = "0 (default): always the likeliest token; 1: sample from the model's own distribution"
    add("--temperature", type=number(float, 1e-6, 1e4, or_zero=True), default=0.0, metavar="T", help=how)
    add("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="default: the fastest here")
    add("--quantize", choices=["int8", "int4"], help="the decoder's weights in 8 or 4 bits instead of 16 or 32")


def add_other_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the rest").add_argument
    own = "(default: the checkpoint's)"
    add("--adapter", metavar="DIR", help="a LoRA for the model (default --model: the one that the LoRA names)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest here)")
    add("--top-p", type=number(float, 1e-9, 1), metavar="P", help=f"sample among the top tokens that sum to P {own}")
    add("--top-k", type=number(int, 0, 10**9), metavar="K", help=f"sample among the K likeliest, 0 for all {own}")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="the same seed gives the same samples")
    add("--repetition-penalty", type=number(float, 0.01, 100), metavar="R", help=f"above 1: repeat less {own}")
    add("--stop", action="append", metavar="TEXT", help="end the answer after this text; may be repeated")
    add("--template", choices=TEMPLATES, help=f"how the prompt is written {own}")
    add("--system", type=unicode, metavar="TEXT", help="instruction that opens the prompt (default: the template's)")
    add("--json", action="store_true", help="print the answer as a line of JSON with token counts and seconds")
    add("--explain", metavar="FILE", help="also write an HTML page that shows where each word of the answer looked")
    add("--kernels", choices=["auto", "triton", "torch"], default="auto", help="faster modules, or the plain formulas")
    add("--batch-size", type=number(int, 1, 10**4), default=8, metavar="N", help="with --images (default: 8)")
    add("--describe", metavar="PATH", help="print what a checkpoint contains, without reading its weights")
    add("--models", action="store_true", help="print checkpoints for photographs, and which fit into memory here")
    add("-h", "--help", action="help", help="print this and exit")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(usage=USAGE, description="Ask LLaVA about pictures.", add_help=False, allow_abbrev=False)
    add_first_options(parser)
    add_other_options(parser)
    args = parser.parse_args(argv)
    if args.describe is not None:
        if args != parser.parse_args(["--describe", args.describe]):
            parser.error("--describe takes no other flag")
        return args
    if args.models:
        if args != parser.parse_args(["--models"]):
            parser.error("--models takes no other flag")
        return args
    if args.images and (args.image or args.chat):
        parser.error("--images asks about many pictures one by one, without --image and --chat")
    if str(args.images) == "-" and args.prompt == "-":
        parser.error("standard input cannot be both the list and the prompt: give --images or --prompt another way")
    if args.out and not args.images:
        parser.error("--out needs --images")
    if args.chat and (args.prompt is not None or args.json):
        parser.error("--chat reads its questions from standard input, without --prompt and --json")
    if args.explain is not None and (args.chat or args.images or not args.image):
        parser.error("--explain is for one answer about one picture: give --image, without --chat and --images")
    for name in ("top_p", "top_k", "seed"):
        if getattr(args, name) is not None and not args.temperature:
            parser.error(f"--{name.replace('_', '-')} changes nothing without --temperature: set it above 0")
    if "" in (args.stop or ()):
        parser.error("--stop needs a text that is not empty")
    if not (args.image or args.images or args.chat or args.prompt is not None):
        parser.print_usage(sys.stderr)
        parser.error("there is nothing to answer: give --image, --images, --chat or --prompt")
    check_flags(args)
    args.model = default_model(args.adapter) if args.model is None else args.model
    args.prompt = None if args.chat else read_prompt(args.prompt)
    return args


def default_model(adapter: str | None) -> str | Path:
    if adapter is None:
        return BUNDLED
    from hub.adapter import base_of

    return base_of(adapter)


def read_prompt(given: str | None) -> str:
    """The prompt given, standard input for "-", or PROMPT."""
    if given == "-":
        given = sys.stdin.read().strip()
        if not given:
            raise ValueError("standard input has no prompt")
    return PROMPT if given is None else unicode(given)

"""The command `python llava.py ...`. See README.md. The classes of llava.py are passed in: nothing here imports it."""

import signal
import sys
import warnings
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from cli import models
from cli.answer import answer_one, check_places, sampling
from cli.arguments import parse_arguments
from cli.batch import answer_many, read_questions
from cli.chat import Chat, converse
from cli.describe import describe
from cli.errors import run
from cli.loading import load, settle
from cli.parallel import connected
from cli.results import unanswered
from hub.files import find_checkpoint
from hub.pictures import open_image
from playground import explain

__all__ = ["main", "run"]


def main(Model: type, Processor: type, argv: list[str] | None = None) -> int:
    """`python llava.py ...`; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # llava.py set SIG_DFL; chat needs KeyboardInterrupt
    warnings.simplefilter("ignore")  # Pillow's and PyTorch's warnings about files are for programmers
    for stream in (sys.stdin, sys.stdout):
        with suppress(AttributeError):  # invalid bytes become a replacement character, not an error
            stream.reconfigure(errors="replace")
    return run(lambda: connect(Model, Processor, parse_arguments(argv)))


def connect(Model: type, Processor: type, args: Namespace) -> None:
    with connected():
        dispatch(Model, Processor, args)


def dispatch(Model: type, Processor: type, args: Namespace) -> None:
    if args.describe is not None:
        print(describe(Model, find_checkpoint(args.describe)))
    elif args.models:
        print(models.table(Model))
    elif args.images:
        questions = read_questions(args.images, args.prompt)
        settle(args)
        if left := unanswered(questions, args):
            rows, pictures = min(args.batch_size, len(left)), max(len(paths) for paths, _ in left)
            answer_many(*load(Model, Processor, args, rows, pictures), left, args)
    else:
        images = [open_image(path) for path in args.image]
        if args.explain is not None:
            explain.check_place(args.explain, images)
        if not args.chat:
            check_places(args.prompt, len(images))
        settle(args)
        answer(*load(Model, Processor, args, 1, len(images)), images, args)


def answer(model, processor, images: list, args: Namespace) -> None:
    if args.chat:
        chat = Chat(model, processor, args.system, args.stop, args.seed, **sampling(args))
        chat.pictures = list(zip(args.image, images, strict=True))
        converse(chat)
    elif args.explain is not None:
        recorder = explain.Recorder(model)
        answer_one(recorder, processor, images, args)
        explain.write(args.explain, recorder, processor, images[0], (Path(args.image[0]).name, Path(args.model).name))
    else:
        answer_one(model, processor, images, args)

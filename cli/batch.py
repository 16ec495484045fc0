"""Many answers, for --images: the questions of a folder or a list, answered in batches, a line of JSON for each."""

import json
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from cli.answer import ask, check_places, to_json
from cli.arguments import unicode
from cli.parallel import is_first, processes, share_list
from cli.results import Question, answered, question_of
from hub.pictures import open_image


def read_questions(source: Path, prompt: str) -> list[Question]:
    """The questions of a folder, one for each picture in it, or of a list in a file or, for "-", on standard input.

    A line of a list is a path or {"image": path or list of paths, "prompt": "..."}.
    """
    name = "standard input" if str(source) == "-" else str(source)
    if source.is_dir() and str(source) != "-":
        known = Image.registered_extensions().keys() - {".pdf", ".palm"}  # Pillow only writes these two
        files = [file for file in sorted(source.iterdir()) if file.suffix.lower() in known and file.name[0] != "."]
        questions = [((str(file),), prompt) for file in files]
    else:
        content = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
        if b"\0" in content:
            raise ValueError(f"{name} is neither a folder nor a list of pictures with one path per line")
        # Paths may not be UTF-8; and splitlines would also split at U+2028, which JSON may contain.
        lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
        numbered = [(i, text.strip()) for i, text in enumerate(lines, 1)]
        questions = [read_question(f"{name}, line {i}", text, prompt) for i, text in numbered if text]
    if not questions:
        raise ValueError(f"{name} has no pictures")
    return list(dict.fromkeys(questions))


def read_question(where: str, text: str, prompt: str) -> Question:
    if not text.startswith("{"):
        return (text,), prompt
    try:
        paths, prompt = question_of({"prompt": prompt} | json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        example = '{"image": "...", "prompt": "..."}, where "image" may also be a list of paths'
        raise ValueError(f"{where} is neither a path nor {example}") from error
    return paths, unicode(prompt)


def answer_many(model, processor, questions: list[Question], args: Namespace) -> None:
    """Answer batch by batch. Each answer is in the file as soon as its batch is done."""
    failed, start = 0, time.monotonic()
    show = sys.stderr.isatty() and not (args.out is None and sys.stdout.isatty())
    file = args.out if is_first() else os.devnull
    with nullcontext(sys.stdout) if args.out is None else open(file, "a", encoding="utf-8") as out:
        step = args.batch_size * processes()
        for first in range(0, len(questions), step):
            progress(first, len(questions), start, show)
            batch = questions[first : first + step]
            answers = share_list(batch, lambda own: answer_batch(model, processor, own, args))
            for (paths, prompt), answer in zip(batch, answers, strict=True):
                out.write(to_json(args, list(paths), prompt, answer) + "\n")
                failed += "error" in answer
            out.flush()
        progress(len(questions), len(questions), start, show)
    if args.out is not None and is_first():
        answered(args)  # removes errors of questions that now have an answer
    if failed:
        raise ValueError(f'{failed} of {len(questions)} have no answer: their lines say why ("error")')


def answer_batch(model, processor, batch: list[Question], args: Namespace) -> list[dict]:
    """The answers in the order of the questions, or {"error": ...} for a question that has none."""
    try:
        asked = []
        for paths, prompt in batch:
            check_places(prompt, len(paths))
            asked.append(([open_image(path) for path in paths], prompt))
        return ask(model, processor, asked, args)
    except (OSError, ValueError) as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]  # the others are still answered together
        return [answer for half in halves for answer in answer_batch(model, processor, half, args)]


def progress(done: int, total: int, start: float, show: bool) -> None:
    if show:
        bar, left = "#" * (30 * done // total), (time.monotonic() - start) / max(done, 1) * (total - done)
        end = "\n" if done == total else ""
        print(f"\r[{bar:<30}] {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

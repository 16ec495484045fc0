"""The file that --out names: one line of JSON for each question (see answer.py). An interrupted run can be resumed.

A run appends its lines. The next run with the same model and settings skips the questions that have an answer, and
asks the others again. When a run ends, errors of questions that now have an answer are removed.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from cli.answer import settings
from hub.writer import write_whole

Question = tuple[tuple[str, ...], str]  # paths of pictures, prompt


def question_of(record: dict) -> Question:
    """The question in a line of a list, or of a file of answers. Raises TypeError or KeyError if there is none."""
    paths, prompt = record["image"], record["prompt"]
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(text, str) for text in (*paths, prompt)):
        raise TypeError
    return tuple(paths), prompt


def unanswered(questions: list[Question], args: Namespace) -> list[Question]:
    """The questions without an answer in --out, which is checked and cleaned."""
    if args.out is None:
        return questions
    if args.out.exists() and args.images.exists() and args.out.samefile(args.images):
        raise ValueError("--out is the list given with --images: give it another name")
    done = answered(args)
    left = [question for question in questions if question not in done]
    if len(left) < len(questions):
        print(f"{len(questions) - len(left)} of {len(questions)} are answered already.", file=sys.stderr)
    return left


def answered(args: Namespace) -> set[Question]:
    """The questions that --out has answers to. Removes an incomplete last line and superseded errors.

    Raises ValueError, and leaves the file unchanged, if it has other content or answers from another model or settings.
    """
    out = args.out
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"{out} cannot be written: give --out a file in a folder that you may write to")
    if not out.is_file():  # or a pipe, or /dev/null
        return set()
    content = out.read_bytes().decode("utf-8", "surrogateescape")
    *lines, last = content.split("\n")
    lines += [last] * (last != "" and not is_incomplete(last))
    try:
        records = [check_record(json.loads(line)) for line in lines]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{out} exists and is not a file of answers: give --out another name") from error
    for record in records:
        check_settings(out, record, args)
    found: dict[Question, tuple[list, list]] = {}  # lines with errors, lines with answers
    for line, record in zip(lines, records, strict=True):
        found.setdefault(question_of(record), ([], []))["text" in record].append(line)
    cleaned = "".join(f"{line}\n" for errors, answers in found.values() for line in answers or errors[-1:])
    if cleaned != content:
        write_whole(out, cleaned)
    return {question for question, (_, answers) in found.items() if answers}


def is_incomplete(line: str) -> bool:
    """Whether a last line without a line feed is the beginning of one of ours, left by a run that was killed."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith('{"model": ')
    return False


def check_record(record: dict) -> dict:
    record = {"settings": {}} | record
    question_of(record)
    if "model" not in record or not {"text", "error"} & record.keys() or not isinstance(record["settings"], dict):
        raise TypeError
    return record


def check_settings(out: Path, record: dict, args: Namespace) -> None:
    """Raise ValueError, naming the first difference, if a line was made by another model or with other settings."""
    made = {"model": record["model"]} | record["settings"]
    wanted = {"model": Path(args.model).name} | settings(args)
    for name in made | wanted:
        was, now = (json.dumps(each[name]) if name in each else "unknown" for each in (made, wanted))
        if was != now:
            raise ValueError(f"{out} was made with {name} {was}, and this run has {now}: give --out another name")

"""Answers for the command: one to the terminal, or one for each of many pictures, a line of JSON each.

An answer's line, with the names that other programs for language models use:

    {"model": "tiny-llava", "image": "a.jpg", "prompt": "What is it?", "text": "A cat.", "prompt_tokens": 84,
     "completion_tokens": 4, "finish_reason": "stop", "seconds": 0.61, "settings": {"temperature": 0.0, ...}}

`finish_reason` is "length" where --max-new-tokens ended the answer and "context" where the model's context was full.
`seconds` is an answer's share of its batch's. A question that cannot be answered, for example because its picture does
not open, has "error" instead of these. `settings` are the flags that decide an answer: the same in all lines of a file.

A run with --out appends its lines to the file. At its end each answer takes the place of its question's earlier error.
If the run is interrupted, both lines stay in the file, and the next run removes the error.
"""

import json
import os
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from clip import open_image
from generate import GenerationConfig
from text_watcher import TextWatcher


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int  # the end token counted in
    finish_reason: str  # stop, length or context
    seconds: float


def sampling(args: Namespace) -> dict:
    """The command's flags as options of generate; None, for a flag not given, means the checkpoint's own setting."""
    names = ("max_new_tokens", "top_p", "top_k", "repetition_penalty")
    chosen = {name: getattr(args, name) for name in names}
    return chosen | {"do_sample": args.temperature != 0, "temperature": args.temperature or None}


def check_places(prompt: str, pictures: int) -> None:
    if "<image>" in prompt and prompt.count("<image>") != pictures:
        times = prompt.count("<image>")
        raise ValueError(f"the prompt has <image> {times} times, but the number of pictures is {pictures}")


def render(processor, prompt: str, pictures: int, system: str | None) -> str:
    """One question as the checkpoint's prompt; pictures that it does not place itself with <image> come first."""
    content = [{"type": "image"}] * (pictures - prompt.count("<image>")) + [{"type": "text", "text": prompt}]
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def ask(
    model, processor, questions: list[tuple[list[Image.Image], str]], args: Namespace, streamer: Callable | None = None
) -> list[Answer]:
    """Answer some questions, each pictures and a prompt, in one batch."""
    start = time.monotonic()
    prompts = [render(processor, prompt, len(images), args.system) for images, prompt in questions]
    images = [image for images, _ in questions for image in images]
    inputs = processor(text=prompts, images=images or None, padding=True).to(model.device)
    T, context = inputs.input_ids.shape[1], model.config.text_config.max_position_embeddings
    if T >= context:
        raise ValueError(f"the prompt is {T} tokens long, but the context of this model ends at {context}")
    options = sampling(args)
    options["max_new_tokens"] = limit = min(args.max_new_tokens, context - T)
    extra = {"tokenizer": processor.tokenizer, "stop_strings": args.stop, "streamer": streamer}
    ids = model.generate(**inputs, seed=args.seed, **options, **extra)[:, T:]
    seconds = (time.monotonic() - start) / len(questions)

    config = GenerationConfig.merged(model.generation_config, options)
    eos = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
    answers = []
    watcher = TextWatcher(processor.tokenizer, len(ids), None, args.stop)
    for row, (answer, n_prompt) in enumerate(zip(ids.tolist(), inputs.attention_mask.sum(-1).tolist(), strict=True)):
        ends = (i for i, token in enumerate(answer, 1) if watcher.put(row, token, last=token in eos) or token in eos)
        end = next(ends, None)  # what follows is padding
        text = processor.decode(answer[:end], skip_special_tokens=True)
        reason = "stop" if end else "context" if limit == context - T else "length"
        answers.append(Answer(text, n_prompt, end or len(answer), reason, round(seconds, 3)))
    return answers


def settings(args: Namespace) -> dict:
    """The flags that decide an answer, dtype and template as they are in effect (see command.settle)."""
    names = "temperature top_p top_k seed repetition_penalty max_new_tokens stop dtype quantize template system"
    return {name: getattr(args, name) for name in names.split()}


def line(args: Namespace, paths: Sequence[str], prompt: str, said: Answer | Exception) -> str:
    record = {"model": Path(args.model).name, "image": paths[0] if len(paths) == 1 else paths, "prompt": prompt}
    record |= asdict(said) if isinstance(said, Answer) else {"error": str(said)}
    record["settings"] = settings(args)
    # A file name's bytes that are not UTF-8 are lone surrogates in Python: they are written as JSON's \udcff.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def answer_one(model, processor, images: list[Image.Image], args: Namespace) -> None:
    """Print the answer as it is made, or with --json as a line when it is there."""
    streamer = None if args.json else lambda text: print(text, end="", flush=True)
    (answer,) = ask(model, processor, [(images, args.prompt)], args, streamer)
    print(line(args, args.image, args.prompt, answer) if args.json else "")
    if answer.finish_reason == "context":
        context = model.config.text_config.max_position_embeddings
        print(f"The answer stops here: the context of {context} tokens is full.", file=sys.stderr)


# --- Many pictures ---------------------------------------------------------------------------------------------------

Question = tuple[tuple[str, ...], str]  # paths of pictures, prompt


def read_questions(source: Path, prompt: str) -> list[Question]:
    """The questions of a folder, one for each picture in it, or of a list in a file or, for "-", on standard input.

    A line of a list is a path or {"image": path or list of paths, "prompt": "..."}.
    """
    stdin = str(source) == "-"
    name = "standard input" if stdin else str(source)
    if source.is_dir() and not stdin:
        known = Image.registered_extensions().keys() - {".pdf", ".palm"}  # two that Pillow only writes
        files = [file for file in sorted(source.iterdir()) if file.suffix.lower() in known and file.name[0] != "."]
        questions = [((str(file),), prompt) for file in files]
    else:
        content = sys.stdin.buffer.read() if stdin else source.read_bytes()
        if b"\0" in content:
            raise ValueError(f"{name} is neither a folder nor a list of pictures, a path a line")
        # A path need not be UTF-8, and splitlines would also split at U+2028, which JSON may hold.
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
        return question_of({"prompt": prompt} | json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'{where} is not {{"image": a path or a list of paths, "prompt": a text}}') from error


def question_of(record: dict) -> Question:
    """The question in a line of a list or of a file of answers. Raises TypeError or KeyError where there is none."""
    paths, prompt = record["image"], record["prompt"]
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(text, str) for text in (*paths, prompt)):
        raise TypeError
    return tuple(paths), re.sub("[\ud800-\udfff]", "\ufffd", prompt)  # lone surrogates, which no tokenizer takes


def cut_short(text: bytes) -> bool:
    """Whether a last line without a line feed is the beginning of one of ours, which a killed run did not finish."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.startswith(b'{"model": ')
    return False


def read_answers(out: Path) -> list[tuple[bytes, Question, bool, dict]]:
    """For each line of a file of answers: the line, its question, whether that is answered, the model and settings.

    A last line that was cut short is left out. Raises ValueError where the file is not one of ours.
    """
    *lines, last = out.read_bytes().split(b"\n")
    lines += [last] * (last != b"" and not cut_short(last))
    found = []
    try:
        for text in lines:
            record = {"settings": {}} | json.loads(text)
            if not record.keys() & {"text", "error"}:
                raise KeyError("text")
            made = {"model": record["model"]} | record["settings"]
            found.append((text, question_of(record), "text" in record, made))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{out} exists and is not a file of answers: give --out another name") from error
    return found


def check_settings(out: Path, made: dict, args: Namespace) -> None:
    """Raises ValueError, naming the first difference, where an answer was made with settings other than this run's."""
    now = {"model": Path(args.model).name} | settings(args)
    for name in made | now:
        was, will = (json.dumps(by[name]) if name in by else "unknown" for by in (made, now))
        if was != will:
            raise ValueError(f"{out} was made with {name} {was}, and this run has {will}: give --out another name")


def answered(args: Namespace) -> set[Question]:
    """The questions that have an answer in --out. First moves each answer to the place of its question's error.

    Raises ValueError where the file is not one of ours, cannot be written, or has answers made with other settings.
    """
    out, done, kept = args.out, set(), {}
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"{out} cannot be written: give --out a file in a folder that you may write to")
    if not out.is_file():  # not there yet, or a pipe or /dev/null, which hold nothing
        return done
    for text, question, good, made in read_answers(out):
        check_settings(out, made, args)
        lines = kept.setdefault(question, [])
        if question not in done:
            lines.clear()  # an error
        if good or not lines:
            lines.append(text + b"\n")
        if good:
            done.add(question)
    content = b"".join(text for lines in kept.values() for text in lines)
    if content != out.read_bytes():
        replace_file(out.resolve(), content)
    return done


def replace_file(file: Path, content: bytes) -> None:
    """All or nothing: the content is written to another file first."""
    unfinished = file.with_name(f".answers-{os.getpid()}.jsonl")
    try:
        unfinished.write_bytes(content)
        shutil.copymode(file, unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def unanswered(questions: list[Question], args: Namespace) -> list[Question]:
    if args.out is None:
        return questions
    if args.out.exists() and args.images.exists() and args.out.samefile(args.images):
        raise ValueError("--out is the list given with --images: give it another name")
    done = answered(args)
    left = [question for question in questions if question not in done]
    if len(left) < len(questions):
        print(f"{len(questions) - len(left)} of {len(questions)} are answered already.", file=sys.stderr)
    return left


def progress(done: int, total: int, begun: float, show: bool) -> None:
    if show:
        bar, left = "#" * (30 * done // total), (time.monotonic() - begun) / max(done, 1) * (total - done)
        end = "\n" if done == total else ""
        print(f"\r[{bar:<30}] {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)


def lines_of(batch: list[Question], model, processor, args: Namespace) -> Iterator[tuple[str, bool]]:
    """The lines for a batch, in its order, and whether each is an answer."""
    opened, said = {}, {}
    for question in batch:
        try:
            check_places(question[1], len(question[0]))
            opened[question] = ([open_image(path) for path in question[0]], question[1])
        except (OSError, ValueError) as error:
            said[question] = error
    try:
        if opened:
            said |= zip(opened, ask(model, processor, list(opened.values()), args), strict=True)
    except ValueError:  # a prompt too long, say: the others need not suffer for it
        for question, asked in opened.items():
            try:
                (said[question],) = ask(model, processor, [asked], args)
            except ValueError as error:
                said[question] = error
    for question in batch:
        yield line(args, *question, said[question]), isinstance(said[question], Answer)


def answer_many(model, processor, left: list[Question], args: Namespace) -> None:
    """Answer batch by batch; each answer is in the file as soon as its batch is done."""
    failed, begun = 0, time.monotonic()
    show = sys.stderr.isatty() and not (args.out is None and sys.stdout.isatty())
    with nullcontext(sys.stdout) if args.out is None else open(args.out, "a", encoding="utf-8") as out:
        for first in range(0, len(left), args.batch_size):
            progress(first, len(left), begun, show)
            for text, good in lines_of(left[first : first + args.batch_size], model, processor, args):
                out.write(text + "\n")
                failed += not good
            out.flush()
        progress(len(left), len(left), begun, show)
    if args.out is not None:
        answered(args)  # moves them to the places of their errors
    if failed:
        raise ValueError(f'{failed} of {len(left)} have no answer: their lines say why ("error")')

"""One answer, or a batch of them: pictures and prompts in, text out. As a line of JSON, for --json and --images:

    {"model": "tiny-llava", "image": "a.jpg", "prompt": "What is it?", "text": "A cat.", "prompt_tokens": 84,
     "completion_tokens": 4, "finish_reason": "stop", "seconds": 0.61, "settings": {"temperature": 0.0, ...}}

`finish_reason` is "length" if --max-new-tokens ended the answer, and "context" if the model's context was full.
`seconds` is the time of the batch divided by its size. `settings` are the flags that determine the answer. A
question without an answer has "error", the reason, in place of "text" and the numbers.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from cli import models
from generate import GenerationConfig
from hub.text_watcher import TextWatcher

MARK = "\ue000"  # stands for a message's text while a template is rendered


def sampling(args: Namespace) -> dict:
    """The command's flags as options of generate; None, for a flag not given, means the checkpoint's own setting."""
    options = {name: getattr(args, name) for name in ("max_new_tokens", "top_p", "top_k", "repetition_penalty")}
    return options | {"do_sample": args.temperature != 0, "temperature": args.temperature or None}


def check_places(prompt: str, pictures: int) -> None:
    if (times := prompt.count("<image>")) not in (0, pictures):
        raise ValueError(f"the prompt has <image> {times} times, but the number of pictures is {pictures}")


def render(processor, prompt: str, pictures: int, system: str | None) -> str:
    """One question as the checkpoint's prompt. Pictures come first, unless the prompt places them with <image>."""
    content = [{"type": "image"}] * (pictures - prompt.count("<image>")) + [{"type": "text", "text": prompt}]
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    messages.append({"role": "user", "content": content})
    prompt, tokenizer = processor.apply_chat_template(messages, add_generation_prompt=True), processor.tokenizer
    return prompt.removeprefix(tokenizer.special_names.get(tokenizer.bos_token_id, ""))  # the processor adds it


def end_ids(model, processor, options: dict) -> list[int]:
    """The tokens that end an answer: the checkpoint's, and the one that its template writes after an answer.

    Some checkpoints whose decoder was tuned for chat have as their eos token only the one that ends a whole text.
    """
    text = [{"type": "text", "text": MARK}]
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    try:
        rest = processor.apply_chat_template(turns).rpartition(MARK)[2].lstrip()
    except ValueError:  # a template that cannot write such turns
        rest = ""
    written = [i for name, i in processor.tokenizer.special_tokens.items() if rest.startswith(name)]
    return [*GenerationConfig.merged(model.generation_config, options).eos_ids, *written]


def ask(
    model, processor, questions: list[tuple[list[Image.Image], str]], args: Namespace, streamer: Callable | None = None
) -> list[dict]:
    """Answer questions, (pictures, prompt) each, in one batch. Raises ValueError if one does not fit the context."""
    start = time.monotonic()
    prompts = [render(processor, prompt, len(images), args.system) for images, prompt in questions]
    images = [image for images, _ in questions for image in images]
    inputs = processor(text=prompts, images=images or None, padding=True).to(model.device)
    T, context = inputs.input_ids.shape[1], model.config.text_config.max_position_embeddings
    if T >= context:
        raise ValueError(f"the prompt is {T} tokens long, but the context of this model ends at {context}")
    options = sampling(args) | {"max_new_tokens": min(args.max_new_tokens, context - T)}
    options["eos_token_id"] = eos = end_ids(model, processor, options)
    watching = {"tokenizer": processor.tokenizer, "stop_strings": args.stop, "streamer": streamer}
    rows = model.generate(**inputs, **options, **watching, seed=args.seed)[:, T:].tolist()
    seconds = round((time.monotonic() - start) / len(questions), 3)

    cut = "context" if T + options["max_new_tokens"] == context else "length"
    answers = []
    for row, prompt_tokens in zip(rows, inputs.attention_mask.sum(-1).tolist(), strict=True):
        end = find_end(row, eos, processor.tokenizer, args.stop)
        answers.append(
            {
                "text": processor.decode(row[:end], skip_special_tokens=True),
                "prompt_tokens": prompt_tokens,
                "completion_tokens": end or len(row),  # with the eos token
                "finish_reason": "stop" if end else cut,
                "seconds": seconds,
            }
        )
    return answers


def find_end(row: list[int], eos: list[int], tokenizer, stop: list[str] | None) -> int | None:
    """The number of tokens in a row's answer, or None if neither an eos token nor a stop string ended it."""
    watcher = TextWatcher(tokenizer, None, stop)
    for n, token in enumerate(row, 1):
        if watcher.put(token) or token in eos:
            return n
    return None


def settings(args: Namespace) -> dict:
    """The flags that determine an answer, with the dtype and template in effect (see loading.settle)."""
    names = "temperature top_p top_k seed repetition_penalty max_new_tokens stop dtype template system"
    adapter = {} if args.adapter is None else {"adapter": str(args.adapter)}
    return {name: getattr(args, name) for name in names.split()} | {"quantize": args.bits} | adapter


def to_json(args: Namespace, paths: list[str], prompt: str, answer: dict) -> str:
    record = {"model": Path(args.model).name, "image": paths[0] if len(paths) == 1 else paths, "prompt": prompt}
    record |= answer | {"settings": settings(args)}
    # Python represents non-UTF-8 bytes of a file name as lone surrogates; JSON writes one as \udcff, for example.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def answer_one(model, processor, images: list[Image.Image], args: Namespace) -> None:
    """Print the answer while it is generated, or with --json as one line when it is complete."""
    if not images:
        print("No picture given: the prompt is answered without one.", file=sys.stderr)
    streamer = None if args.json else lambda text: print(text, end="", flush=True)
    (answer,) = ask(model, processor, [(images, args.prompt)], args, streamer)
    print(to_json(args, args.image, args.prompt, answer) if args.json else "")
    if answer["text"] == model.generation_config.get("outside"):
        print(models.hint(type(model), model.device.type, model.dtype), file=sys.stderr)
    if answer["finish_reason"] == "context":
        context = model.config.text_config.max_position_embeddings
        print(f"The answer stops here: the context of {context} tokens is full.", file=sys.stderr)

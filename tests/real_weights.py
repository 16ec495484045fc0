"""Check the published checkpoints of `python llava.py --models` on their real weights, for those who have them.

    python tests/real_weights.py MODEL [MODEL ...] [--pictures FOLDER] [--device cuda] [--dtype float16]

A MODEL is a hub id or a folder with the name that the checkpoint has on the hub. Each is loaded, which is strict: every
tensor must be there and have its shape. Then it is asked what transformers' own tests ask it, where they do, and the
answer is compared with theirs. Others are asked one question, and their answer only must not be empty.

The report on stdout is to be pasted into an issue. Exit code 0 if everything is right. The pictures are fetched from
the web unless FOLDER has them.
"""

import argparse
import platform
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import models, run
from cli.answer import end_ids, render
from cli.memory import check_memory, free_bytes
from hub.device import check_device, fast_dtype
from hub.files import find_checkpoint
from hub.pictures import open_image
from hub.settings import read_config
from llava import LlavaForConditionalGeneration, LlavaProcessor

LIBRARIES = ("torch", "pillow", "sentencepiece", "safetensors", "jinja2", "regex", "triton")
HERE = str(Path(__file__).parent.parent / "images" / "cat-and-apple.jpg")
CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
PIER = "https://llava-vl.github.io/static/images/view.jpg"
STOP_SIGN = "https://www.ilankelman.org/stopsigns/australia.jpg"
CAUTIOUS = "What are the things I should be cautious about when I visit this place?"
INTERLEAVE = "<|im_start|>user\n<image>\nWhat are these?<|im_end|>\n<|im_start|>assistant"
# hub id -> (picture, prompt, how many tokens, how the reference's greedy answer may begin: it depends on the device).
# The reference ran the 7B in 4 bits, except for the first question and the stop sign, and the 0.5B in float16.
QUESTIONS = {
    "llava-hf/llava-interleave-qwen-0.5b-hf": [
        (
            CATS, INTERLEAVE, 30,
            (
                "The image shows two cats, one on the left and one on the right. They appear to be resting or sleeping "
                "on a pink blanket. The cat",
                "These are two cats, one with a green collar and the other with a black collar. They are lying on a "
                "pink blanket and appear to be sleeping",
            ),
        ),
    ],
    "llava-hf/llava-1.5-7b-hf": [
        (CATS, "USER: <image>\nWhat are these?\nASSISTANT:", 5, ("These are two cats",)),
        (
            CATS, "USER: <image>\nWhat is this? ASSISTANT:", 25,
            ("The image features two cats lying down on a pink couch. One cat is located on",),
        ),
        (
            STOP_SIGN, "<image>\nUSER: What's the content of the image?\nASSISTANT:", 15,
            ("The image features a busy city street with a stop sign prominently displayed",),
        ),
        (
            PIER, f"USER: <image>\n{CAUTIOUS} What should I bring with me? ASSISTANT:", 20,
            ("When visiting this place, which is a pier or dock extending over a body of water, you",),
        ),
    ],
    "llava-hf/bakLlava-v1-hf": [
        (
            PIER, f"<image>\nUSER: {CAUTIOUS}\nASSISTANT:", 20,
            (
                "When visiting this place, there are a few things one should be cautious about. Firstly,",
                "When visiting this place, there are a few things one should be cautious about. First, the",
            ),
        ),
    ],
    "llava-hf/llava-v1.6-mistral-7b-hf": [
        (
            CATS, "[INST] <image>\nWhat is shown in this image? [/INST]", 20,
            ("The image shows two cats lying on a pink surface, which appears to be a couch or a cush",),
        ),
    ],
}  # fmt: skip
ANY = [(HERE, None, 40, ())]  # None: the checkpoint's own template


def hub_id(path: str) -> str | None:
    """Which of the checkpoints in the table a hub id or a folder is; None for others."""
    names = [name for name, *_ in models.MODELS]
    return next((name for name in names if path == name or Path(path).name == name.rpartition("/")[2]), None)


def picture(address: str, folder: Path | None) -> Image.Image:
    name = address.rpartition("/")[2]
    if address == HERE or folder is not None:
        return open_image(address if address == HERE else folder / name)
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise OSError(f"{address} cannot be fetched ({error}): put {name} into a folder and use --pictures") from error
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(content)
        file.flush()
        return open_image(file.name)


def machine(device: str) -> Iterator[str]:
    """Versions, processor and memory."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    yield f"Python {platform.python_version()}, " + ", ".join(f"{name} {number}" for name, number in found.items())
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    free = free_bytes(device)
    size = "unknown" if free is None else f"{free / 1e9:.1f} GB"
    yield f"{platform.platform()}, {cpu}, {torch.get_num_threads()} threads, free memory {size}, device {device}"
    if torch.device(device).type == "cuda":
        yield f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


def load(path: str, device: str, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    folder = find_checkpoint(path)
    processor, settings = LlavaProcessor.from_pretrained(folder), read_config(folder)
    skeleton = LlavaForConditionalGeneration.without_weights(settings)
    tokens = processor.image_seq_length + models.WORDS
    check_memory(skeleton, dtype, device, None, tokens, device == "cpu" and settings["dtype"] == dtype)
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype, device), processor


def check(path: str, args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What was found, line by line, and whether it is right."""
    name, start = hub_id(path), time.monotonic()
    model, processor = load(path, args.device, args.dtype)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    kind = str(model.dtype).removeprefix("torch.")
    yield True, f"loaded in {time.monotonic() - start:.0f} s, {numbers:,} numbers, {kind}"
    if name is not None and (count := models.count_numbers(type(model), models.config_of(name))) != numbers:
        yield False, f"--models counts {count:,} numbers"
    for address, prompt, tokens, texts in QUESTIONS.get(name, ANY):
        prompt = render(processor, "What is in the picture?", 1, None) if prompt is None else prompt
        inputs, start = processor(picture(address, args.pictures), prompt).to(args.device), time.monotonic()
        ends = end_ids(model, processor, {})
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=ends)
        answer = processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
        right = answer.startswith(texts) if texts else bool(answer)
        verdict = "right" if right and texts else "answered; there is no text to compare with" if right else "WRONG"
        yield right, f"{verdict}, {time.monotonic() - start:.1f} s, {Path(address).name}, {prompt!r}: {answer!r}"
        if not right:
            yield False, "expected " + (" or ".join(map(repr, texts)) or "an answer that is not empty")


def report(args: argparse.Namespace) -> None:
    check_device(args.device)
    args.dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(args.device)
    print(*machine(args.device), sep="\n")
    wrong = []
    for path in args.model:
        print(f"\n{path}")
        try:
            for right, line in check(path, args):
                print(f"  {line}", flush=True)
                wrong += [] if right else [path]
        except (OSError, ValueError) as error:
            print(f"  FAILED: {error}", flush=True)
            wrong.append(path)
    if wrong:
        raise ValueError(f"not right: {', '.join(dict.fromkeys(wrong))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check published checkpoints on their real weights.")
    parser.add_argument("model", nargs="+", help="a hub id, or a folder with the checkpoint's name")
    parser.add_argument("--pictures", type=Path, help="a folder with 000000039769.jpg, view.jpg and australia.jpg")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    sys.exit(run(lambda: report(parser.parse_args())))

"""What the real LLaVA-1.5 7B says about two well-known pictures, for those who have its 14 GB of weights.

    python tests/real_weights.py PATH_OR_HUB_ID [--pictures FOLDER] [--device cuda]

The pictures are fetched from the web unless FOLDER holds them. Exit code 0 if every answer begins as it should.
"""

import argparse
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import run
from hub.device import fast_dtype
from hub.pictures import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
STOP_SIGN = "https://www.ilankelman.org/stopsigns/australia.jpg"
# picture, prompt, how many tokens, how the reference's greedy answer begins
ANSWERS = [
    (CATS, "USER: <image>\nWhat are these?\nASSISTANT:", 5, "These are two cats"),
    (
        CATS,
        "USER: <image>\nWhat is this? ASSISTANT:",
        25,
        "The image features two cats lying down on a pink couch. One cat is located on",
    ),
    (
        STOP_SIGN,
        "<image>\nUSER: What's the content of the image?\nASSISTANT:",
        15,
        "The image features a busy city street with a stop sign prominently displayed",
    ),
]


def picture(address: str, folder: Path | None):
    name = address.rpartition("/")[2]
    if folder is not None:
        return open_image(folder / name)
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise OSError(f"{address} cannot be fetched ({error}): put {name} into a folder and use --pictures") from error
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(content)
        file.flush()
        return open_image(file.name)


def check(args: argparse.Namespace) -> None:
    pictures = {address: picture(address, args.pictures) for address in (CATS, STOP_SIGN)}
    processor = LlavaProcessor.from_pretrained(args.path)
    model = LlavaForConditionalGeneration.from_pretrained(args.path, fast_dtype(args.device), args.device)
    wrong = 0
    for address, prompt, n_tokens, expected in ANSWERS:
        inputs = processor(images=pictures[address], text=prompt).to(args.device)
        ids = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        answer = processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right = answer.startswith(expected)
        wrong += not right
        print(f"{'right' if right else 'WRONG'}  {answer!r}" + ("" if right else f"\n       {expected!r} was expected"))
    if wrong:
        raise ValueError(f"{wrong} of {len(ANSWERS)} answers differ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check the answers of the real LLaVA-1.5 7B.")
    parser.add_argument("path", help="a checkpoint folder or hub id")
    parser.add_argument("--pictures", type=Path, help="a folder with 000000039769.jpg and australia.jpg")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(run(lambda: check(parser.parse_args())))

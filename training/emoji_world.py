"""The emoji world, which the tiny LLaVA learns: emoji on a coloured background, and conversations about them.

A picture shows up to four things, each drawn by one of several artists (sprites/NOTICE), at a random place, size and
tilt, in shifted colours. The program places them, so it knows the truth about each picture, and can write questions
with their answers and decide whether an answer is right:

    seed -> make_scene -> picture, truth -> caption, conversation (training); questions, score (evaluation)

emoji_things.py holds the things and their names, emoji_scenes.py the pictures, emoji_talk.py the texts (in LLaVA's JSON
form), emoji_score.py the scoring. This file re-exports their names, and has a command that writes some scenes:

    python -m training.emoji_world --out FOLDER --count 12
"""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports must start from the root
    sys.path[0] = str(Path(__file__).parent.parent)

import argparse
import json

from PIL import Image

from training.emoji_scenes import (
    CELL,
    COLUMNS,
    draw_thing,
    kept_apart,
    load_sprites,
    make_scene,
    make_truth,
    plain_look,
    plan_ground,
)
from training.emoji_score import A_THING, SINGULAR, score
from training.emoji_talk import (
    SHORT,
    SIDES,
    caption,
    conversation,
    names_of,
    ninth,
    on_side,
    questions,
    relations,
    wording,
)
from training.emoji_things import GROUNDS, KINDS, NUMBERS, OBJECTS, a, plural, things
from training.outside import OUTSIDE, load_photographs, make_outside

__all__ = [
    "A_THING",
    "CELL",
    "COLUMNS",
    "GROUNDS",
    "KINDS",
    "NUMBERS",
    "OBJECTS",
    "OUTSIDE",
    "SHORT",
    "SIDES",
    "SINGULAR",
    "a",
    "caption",
    "conversation",
    "draw_thing",
    "kept_apart",
    "load_photographs",
    "load_sprites",
    "make_outside",
    "make_scene",
    "make_truth",
    "names_of",
    "ninth",
    "on_side",
    "plain_look",
    "plan_ground",
    "plural",
    "questions",
    "relations",
    "score",
    "things",
    "wording",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write pictures of the emoji world and conversations about them.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where they are written")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="how many (default: 12)")
    args = parser.parse_args()
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, not {args.count}")
    args.out.mkdir(parents=True, exist_ok=True)
    sprites, records, sheet = load_sprites(), [], Image.new("RGB", (6 * 112, -(-args.count // 6) * 112))
    for i in range(args.count):
        picture, truth = make_scene(sprites, seed=i)
        picture.save(args.out / f"{i:04}.png")
        sheet.paste(picture, (i % 6 * 112, i // 6 * 112))
        records.append({"id": str(i), "image": f"{i:04}.png", "conversations": conversation(truth, wording(i))})
    sheet.save(args.out / "sheet.png")
    (args.out / "conversations.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    import cli

    sys.exit(cli.run(main))

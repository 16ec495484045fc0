"""The world of the tiny LLaVA: emoji on a coloured background, and conversations about them.

A picture shows none to four things, each in the drawing of one of several artists (sprites/NOTICE), at a random place,
size and tilt, in shifted colours. Because we place them ourselves the truth is known, and with it every answer and
whether an answer is right:

    seed -> make_scene -> picture, truth -> caption (alignment), conversation (instruction), questions and score (judging)

emoji_things.py has the things and their words, emoji_scenes.py the pictures, emoji_talk.py what is said about them (in
LLaVA's JSON form), emoji_score.py the judging. This file has all of their names that others use. To look at some scenes:

    python -m training.emoji_world --out FOLDER --count 12
"""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports begin at the root
    sys.path[0] = str(Path(__file__).parent.parent)

import argparse
import json

from PIL import Image

from training.emoji_scenes import CELL, COLUMNS, draw_thing, kept_apart, load_sprites, make_scene, make_truth, plain_look, plan_ground
from training.emoji_score import A_THING, SINGULAR, score
from training.emoji_talk import SHORT, SIDES, caption, conversation, left_to_right, on_side, questions, relations, wording
from training.emoji_things import GROUNDS, KINDS, NUMBERS, OBJECTS, a, plural, there, things

__all__ = [
    "A_THING",
    "CELL",
    "COLUMNS",
    "GROUNDS",
    "KINDS",
    "NUMBERS",
    "OBJECTS",
    "SHORT",
    "SIDES",
    "SINGULAR",
    "a",
    "caption",
    "conversation",
    "draw_thing",
    "kept_apart",
    "left_to_right",
    "load_sprites",
    "make_scene",
    "make_truth",
    "on_side",
    "plain_look",
    "plan_ground",
    "plural",
    "questions",
    "relations",
    "score",
    "there",
    "things",
    "wording",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a few pictures of the emoji world, with their conversations.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12)
    args = parser.parse_args()
    if args.count < 1:
        raise ValueError("--count must be 1 at least")
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

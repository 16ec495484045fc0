"""Makes ../images: a few scenes for people to look at, from the same drawings as the sheets, at a higher resolution.

    python -m sprites.make_images --noto FONT --fluent FOLDER      # the two inputs of make_sheet.py
"""

import argparse
import random
from pathlib import Path

from emoji_world import OBJECTS, STYLES, draw_scene, plan_ground
from sprites.make_sheet import HERE, fit, styles

NOTO, FLUENT = 0, 1
SCENES = {  # file: (width, height), (ground, its grid), things as (name, style, x, y, size, tilt)
    "cat-and-apple": ((448, 448), ("blue", 2), [
        ("cat", FLUENT, 0.27, 0.48, 0.44, 4), ("apple", FLUENT, 0.75, 0.54, 0.36, -6)]),
    "dog-under-airplane": ((448, 448), ("green", 2), [
        ("airplane", FLUENT, 0.7, 0.25, 0.38, 0), ("dog", FLUENT, 0.3, 0.7, 0.44, 0)]),
    "car-and-tree": ((480, 336), ("yellow", 2), [
        ("car", NOTO, 0.25, 0.65, 0.44, 0), ("tree", NOTO, 0.75, 0.5, 0.45, 0)]),
    "elephant-and-hat": ((448, 448), ("pink", 5), [
        ("elephant", FLUENT, 0.28, 0.6, 0.46, 0), ("hat", FLUENT, 0.75, 0.4, 0.4, -5)]),
    "rocket": ((448, 448), ("black", 5), [("rocket", FLUENT, 0.5, 0.48, 0.45, 0)]),
    "owl-and-key": ((448, 448), ("white", 2), [
        ("owl", NOTO, 0.27, 0.46, 0.44, 0), ("key", FLUENT, 0.75, 0.54, 0.4, 0)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures in images/.")
    parser.add_argument("--noto", type=Path, required=True)
    parser.add_argument("--fluent", type=Path, required=True)
    args = parser.parse_args()
    draw = styles(args.noto, args.fluent)
    for file, (size, (ground, grid), placed) in SCENES.items():
        sprites = {name: [fit(draw[style](OBJECTS[name]), 240) for style in STYLES] for name, *_ in placed}
        things = [dict(zip(("name", "style", "x", "y", "size", "tilt"), thing, strict=True)) for thing in placed]
        things = [thing | {"mirror": False, "tint": (1, 1, 1)} for thing in things]
        picture = draw_scene(sprites, plan_ground(random.Random(file), ground, grid), things, *size)
        picture.save(HERE.parent / "images" / f"{file}.jpg", quality=92, subsampling=0)


if __name__ == "__main__":
    main()

"""Make the scenes in images/, for people to look at: the same drawings as in the sheets, at a higher resolution.

    python -m training.sprites.make_images ...      # with the inputs of make_sheet.py
"""

import random

from PIL import Image

from training.emoji_world import draw_thing, plain_look, plan_ground
from training.sprites.make_sheet import HERE, fit, read_arguments, styles

SCENES = {  # file: (width, height), (ground, its grid), things as (name, style, x, y, size, tilt)
    "cat-and-apple": ((448, 448), ("blue", (2, 2)), [
        ("cat", "fluent-3d", 0.27, 0.48, 0.44, 4), ("apple", "fluent-3d", 0.75, 0.54, 0.36, -6)]),
    "dog-under-airplane": ((448, 448), ("green", (2, 2)), [
        ("airplane", "fluent-3d", 0.7, 0.25, 0.38, 0), ("dog", "fluent-3d", 0.3, 0.7, 0.44, 0)]),
    "car-and-tree": ((480, 336), ("yellow", (2, 1)), [
        ("car", "noto", 0.25, 0.65, 0.44, 0), ("tree", "noto", 0.75, 0.5, 0.45, 0)]),
    "elephant-and-hat": ((448, 448), ("pink", (5, 5)), [
        ("elephant", "fluent-3d", 0.28, 0.6, 0.46, 0), ("hat", "fluent-3d", 0.75, 0.4, 0.4, -5)]),
    "rocket": ((448, 448), ("black", (5, 5)), [("rocket", "fluent-3d", 0.5, 0.48, 0.5, 0)]),
    "owl-and-key": ((448, 448), ("white", (2, 2)), [
        ("owl", "noto", 0.27, 0.46, 0.44, 0), ("key", "fluent-3d", 0.75, 0.54, 0.4, 0)]),
    "orchestra": ((448, 448), ("purple", (1, 2)), [
        ("violin", "fluent-flat", 0.25, 0.26, 0.42, 0), ("trumpet", "noto", 0.74, 0.27, 0.42, 0),
        ("drum", "fluent-3d", 0.27, 0.74, 0.42, 0), ("penguin", "noto", 0.74, 0.74, 0.42, 0)]),
    "two-bees": ((448, 448), ("gray", (5, 5)), [
        ("bee", "noto", 0.25, 0.25, 0.36, 8), ("bee", "fluent-flat", 0.75, 0.3, 0.36, -10),
        ("sunflower", "fluent-3d", 0.5, 0.74, 0.44, 0)]),
}  # fmt: skip


def main() -> None:
    draw = styles(read_arguments("Make the pictures in images/.", required=True))
    for file, (size, (ground, grid), placed) in SCENES.items():
        flat = Image.fromarray(plan_ground(random.Random(file), ground, grid))
        picture = flat.resize(size, Image.Resampling.BICUBIC)
        for name, style, x, y, side, tilt in placed:
            sprites = {name: [fit(draw[style](name), 240)]}
            draw_thing(picture, sprites, {"name": name, "x": x, "y": y, "size": side}, plain_look(tilt=tilt))
        picture.save(HERE.parent.parent / "images" / f"{file}.jpg", quality=92, subsampling=0)


if __name__ == "__main__":
    main()

"""Pictures from outside the emoji world: crops of photographs and abstract art (photographs/NOTICE).

About these the tiny model learns to answer OUTSIDE, whatever it is asked, instead of naming things that are not there.
"""

import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from training.emoji_looks import PICTURE_LOOKS, vary

OUTSIDE = "I only know emoji on plain backgrounds, and this is something else."
CELL, COLUMNS = 256, 8  # photographs/sheet.webp: the side of a picture in pixels, and the pictures in a row
OUTSIDE_EVERY = 12  # one in so many pictures of the last stage is from outside the emoji world
JUDGED = 4  # every fourth picture is never trained on: evaluation shows crops of these


def is_outside(seed: int) -> bool:
    return seed % OUTSIDE_EVERY == 0


@cache
def load_photographs(judged: bool = False) -> list[Image.Image]:
    """The pictures that training uses, or the others, with which the model is judged."""
    sheet = Image.open(Path(__file__).parent / "photographs" / "sheet.webp").convert("RGB")
    places = [(x, y) for y in range(0, sheet.height, CELL) for x in range(0, COLUMNS * CELL, CELL)]
    cells = [sheet.crop((x, y, x + CELL, y + CELL)) for x, y in places]
    pictures = [cell for cell in cells if contrast(cell) > 0]  # the last row may not be full
    return [picture for i, picture in enumerate(pictures) if (i % JUDGED == 0) == judged]


def make_outside(photographs: list[Image.Image], seed: int, size: int = 112, varied: bool = False) -> Image.Image:
    """Crop `seed`: from a third of a picture's side to all of it, perhaps mirrored, lighter, darker or gray.

    With `varied`, some have a look of emoji_looks.py: if only scenes had them, they would tell scenes from others.
    """
    rng = random.Random(f"outside {seed}")
    for _ in range(20):  # plain sky is an empty scene of the emoji world, so a crop must show more
        picture, side = rng.choice(photographs), rng.randint(CELL // 3, CELL)
        x, y = (rng.randint(0, CELL - side) for _ in "xy")
        crop = picture.crop((x, y, x + side, y + side))
        if contrast(crop) > 24:
            break
    crop = crop.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    if rng.random() < 0.15:
        crop = ImageOps.grayscale(crop).convert("RGB")
    bright = rng.uniform(0.7, 1.3)
    crop = crop.point(lambda value: min(255, round(value * bright)))
    return vary(crop, PICTURE_LOOKS, random.Random(f"looks {seed}")) if varied else crop


def contrast(picture: Image.Image) -> float:
    """The standard deviation of the gray values, of 255."""
    return float(np.asarray(picture.convert("L"), np.float32).std())

"""Scenes of the emoji world: which things are where, and the picture that shows them.

    seed -> make_truth -> {"ground": "blue", "things": [{"name": "cat", "x": 0.25, "y": 0.5, "size": 0.4}, ...]}
    seed -> make_scene -> the picture, and the same truth

x and y are the centre of a thing and size its side, as fractions of the picture; y grows downwards. "ground" is the
colour of the background. A seed always gives the same scene.
"""

import itertools
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from training.emoji_looks import COLOUR_LOOKS, DRAWING_LOOKS, MARGIN, PICTURE_LOOKS, more_tilt, vary
from training.emoji_things import GROUNDS, OBJECTS

CELL, COLUMNS = 72, 16  # sprites/*.webp: the side of a cell in pixels, and the cells in a row, one per entry of OBJECTS
ONLY_TRAINING = ("emojione", "fxemoji", "noto-v1")  # sheets that scenes to be judged or shown do not use
GRIDS = ((1, 1), (1, 1), (2, 2), (1, 2), (2, 1), (5, 5), (40, 40), (1, 14), (14, 1), (8, 8))  # of shades, stretched
HOW_MANY = (3, 25, 29, 24, 19)  # percentages of scenes with 0, 1, 2, 3, 4 things
SIZES = ((), (0.36, 0.8), (0.35, 0.52), (0.33, 0.46), (0.31, 0.43))  # the smallest and largest size of a thing in them


def load_sprites(
    folder: str | Path = Path(__file__).parent / "sprites", training: bool = False
) -> dict[str, list[Image.Image]]:
    """Name -> its drawings, at most one from each sheet: not every artist has drawn everything.

    Without `training`, the sheets ONLY_TRAINING are left out, so that scenes that are judged or shown stay the same.
    """
    sprites = {name: [] for name in OBJECTS}
    for file in sorted(Path(folder).glob("*.webp")):
        if file.stem in ONLY_TRAINING and not training:
            continue
        sheet = Image.open(file).convert("RGBA")
        if sheet.size != (COLUMNS * CELL, -(-len(OBJECTS) // COLUMNS) * CELL):
            raise ValueError(f"{file} does not hold {len(OBJECTS)} things: run training.sprites.make_sheet again")
        for i, drawings in enumerate(sprites.values()):
            x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
            drawing = sheet.crop((x, y, x + CELL, y + CELL))
            if drawing.getchannel("A").getbbox():
                drawings.append(drawing)
    return sprites


ORDER = {name: i for i, name in enumerate(OBJECTS)}


def kept_apart(one: str, other: str) -> bool:
    """Whether training never shows these two together, as holds for one pair in 17: evaluation shows them."""
    return one != other and (ORDER[one] + ORDER[other]) % 17 == 0


APART = {one: [other for other in OBJECTS if kept_apart(one, other)] for one in OBJECTS}


def plan_names(rng: random.Random, count: int, apart: bool) -> list[str]:
    """The names of the things in a scene. With `apart`, the first two (of at least two) are a pair kept apart."""
    names = []
    if apart:
        one = rng.choice([name for name in OBJECTS if APART[name]])
        names = [one, rng.choice(APART[one])]
    while len(names) < count:
        again = names and not apart and rng.random() < 0.12
        name = rng.choice(names if again else list(OBJECTS))
        if again or not any(name == other or name in APART[other] for other in names):
            names.append(name)
    return names


def plan_things(rng: random.Random, apart: bool = False, at_least: int = 0) -> list[dict]:
    """Things at random places where they hardly overlap."""
    count, things = rng.choices(range(len(HOW_MANY)), HOW_MANY)[0], []
    count = max(count, at_least, 2 * apart)
    for name in plan_names(rng, count, apart):
        for attempt in itertools.count():  # after every 30 attempts without a free place, a smaller size
            size = round(rng.uniform(*SIZES[count]) * 0.9 ** (attempt // 30), 3)
            x, y = (round(rng.uniform(size / 2, 1 - size / 2), 3) for _ in "xy")
            if all(max(abs(x - t["x"]), abs(y - t["y"])) > 0.45 * (size + t["size"]) for t in things):
                things.append({"name": name, "x": x, "y": y, "size": size})
                break
    return things


def plan_look(rng: random.Random) -> dict:
    """How a thing is drawn. No question is about any of this, and no answer may depend on it."""
    wild = rng.random() < 0.25
    mix = rng.uniform(0.1, 0.5) if wild else rng.uniform(0, 0.08)  # how much of each colour channel goes to the others
    colours = [[rng.uniform(0.75, 1.1) * (row == column) + mix * rng.uniform(-0.5, 1) for column in range(3)]
               for row in range(3)]
    return {
        "style": rng.random(), "mirror": rng.random() < 0.5, "tilt": rng.gauss(0, 35 if rng.random() < 0.15 else 9),
        "squeeze": rng.uniform(0.82, 1), "upright": rng.random() < 0.5, "colours": colours,
        "edge": rng.choice(((0, 0, 0), (255, 255, 255))) if rng.random() < 0.3 else None,  # a dark or a light shadow
        "edge_at": (rng.randint(-2, 3), rng.randint(-1, 3)),
    }


def plain_look(tilt: float) -> dict:
    """The first drawing of a thing, only tilted."""
    one_to_one = [[float(row == column) for column in range(3)] for row in range(3)]
    return {"style": 0, "mirror": False, "tilt": tilt, "squeeze": 1, "upright": True, "colours": one_to_one,
            "edge": None, "edge_at": (0, 0)}


def plan_ground(rng: random.Random, name: str, grid: tuple[int, int]) -> np.ndarray:  # (*grid, 3)
    """Shades of a colour, a small picture that is stretched to the size of the background."""
    shade = np.frombuffer(rng.randbytes(grid[0] * grid[1]), np.uint8).reshape(*grid, 1) / 127.5 - 1
    tint = [rng.uniform(-8, 8) for _ in "rgb"]
    return (np.add(GROUNDS[name], tint) + rng.uniform(4, 18) * shade).clip(0, 255).astype(np.uint8)


def draw_thing(
    picture: Image.Image, sprites: dict, thing: dict, look: dict, looks: random.Random | None = None
) -> None:
    """Draw one thing of a truth, in the way `look` says, onto a picture. `looks` chooses from emoji_looks.py."""
    width, height = picture.size
    side = min(width, height)  # places refer to the central square, which is what the model sees of an oblong picture
    long = max(2, round(thing["size"] * side))
    short = round(long * look["squeeze"])
    drawings = sprites[thing["name"]]
    drawing = drawings[int(look["style"] * len(drawings))]
    drawing = drawing.resize((short, long) if look["upright"] else (long, short), Image.Resampling.BILINEAR)
    if look["mirror"]:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tilt = look["tilt"]
    if looks:
        drawing, tilt = vary(drawing, DRAWING_LOOKS, looks, MARGIN), tilt + more_tilt(looks)
    drawing = drawing.rotate(tilt, Image.Resampling.BILINEAR, expand=True)
    matrix = [value for row in look["colours"] for value in (*row, 0)]
    colours, alpha = drawing.convert("RGB").convert("RGB", matrix), drawing.getchannel("A")
    if looks:
        colours = vary(colours, COLOUR_LOOKS, looks)
    x = round((width - drawing.width) / 2 + (thing["x"] - 0.5) * side)
    y = round((height - drawing.height) / 2 + (thing["y"] - 0.5) * side)
    if look["edge"]:
        dx, dy = look["edge_at"]
        picture.paste(look["edge"], (x + dx, y + dy), alpha.point(lambda value: value // 2))
    picture.paste(colours, (x, y), alpha)


def plan_scene(rng: random.Random, apart: bool = False, at_least: int = 0) -> dict:
    return {"ground": rng.choice(list(GROUNDS)), "things": plan_things(rng, apart, at_least)}


def make_truth(seed: int, apart: bool = False) -> dict:
    """The truth of the scene that make_scene draws."""
    return plan_scene(random.Random(seed), apart)


def make_scene(
    sprites: dict[str, list[Image.Image]],
    seed: int,
    size: int = 112,
    apart: bool = False,
    at_least: int = 0,
    varied: bool = False,
) -> tuple[Image.Image, dict]:
    """Scene `seed` as a square picture with sides of `size` pixels, and its truth.

    `sprites` may be any artist's: name -> one drawing or more, in RGBA. With `apart`, the scene shows a pair of things
    that no scene without it shows. `at_least` is the smallest number of things. With `varied`, some things, and some
    pictures, have looks of emoji_looks.py; the truth is the same.
    """
    rng = random.Random(seed)
    looks = random.Random(f"looks {seed}") if varied else None  # a stream of its own: rng's numbers stay the same
    truth = plan_scene(rng, apart, at_least)
    grid = rng.choice(GRIDS)
    stretch = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))
    picture = Image.fromarray(plan_ground(rng, truth["ground"], grid)).resize((size, size), stretch)
    for thing in truth["things"]:
        draw_thing(picture, sprites, thing, plan_look(rng), looks)
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0) * size / 112))
    return vary(picture, PICTURE_LOOKS, looks) if looks else picture, truth

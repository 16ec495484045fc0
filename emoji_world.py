"""The world the tiny LLaVA lives in: emoji on a coloured ground, and conversations about them.

A picture holds none to four different things, in two drawing styles (see sprites/NOTICE), each with its place, size,
tilt and tint. We put them there ourselves, so the truth is known, and with it every answer and what an answer is worth:

    seed -> make_scene -> picture, truth -> caption (to align), conversation (to instruct), questions, score (to test)
    truth = {"ground": "blue", "things": [{"name": "cat", "x": 0.25, "y": 0.5, "size": 0.4}, ...]}

x and y are a thing's centre and size its side, as fractions of the picture; y grows down. Conversations have LLaVA's
JSON form. A question ending with SHORT, LLaVA-1.5's own line, is answered by a word or phrase, others by a sentence.
To look at some: python emoji_world.py --out FOLDER --count 12
"""

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

OBJECTS = {  # name: emoji, in the order of the sheets
    "dog": "🐶", "cat": "🐱", "pig": "🐷", "frog": "🐸", "fish": "🐟", "butterfly": "🦋", "elephant": "🐘",
    "owl": "🦉", "apple": "🍎", "banana": "🍌", "carrot": "🥕", "pizza": "🍕", "donut": "🍩", "egg": "🥚",
    "car": "🚗", "bicycle": "🚲", "rocket": "🚀", "airplane": "✈", "sailboat": "⛵", "tree": "🌳", "cactus": "🌵",
    "sunflower": "🌻", "hat": "🎩", "dress": "👗", "boot": "👢", "guitar": "🎸", "drum": "🥁", "trumpet": "🎺",
    "umbrella": "☂", "key": "🔑", "clock": "⏰", "chair": "🪑",
}
STYLES, CELL, COLUMNS = ("noto", "fluent"), 96, 8  # the sheets sprites/*.webp: a side of CELL pixels for each drawing
GROUNDS = {
    "red": (208, 48, 48), "blue": (52, 96, 212), "green": (62, 158, 74), "yellow": (246, 212, 62),
    "white": (243, 243, 243), "black": (20, 20, 22), "gray": (134, 134, 136), "pink": (247, 168, 200),
}
HOW_MANY = (3, 29, 33, 22, 13)  # how often a picture has 0, 1, 2, 3, 4 things, in percent
SIZES = ((), (0.32, 0.68), (0.28, 0.48), (0.26, 0.42), (0.25, 0.38))  # and between which sides they are then drawn
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHORT = "\nAnswer the question using a single word or phrase."
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
QUESTIONS = {
    "describe": ("Describe the picture.", "Describe this image.", "Tell me about the picture."),
    "what": ("What is in the picture?", "What can you see?", "What is in this image?", "Which objects do you see?"),
    "count": ("How many objects are in the picture?", "How many objects are there?", "How many things can you see?"),
    "exists": ("Is there {a} in the picture?", "Is there {a} here?", "Do you see {a}?", "Can you see {a}?"),
    "ground": ("What color is the background?", "Which color is the background?", "What is the background color?"),
    **dict.fromkeys(SIDES, ("What is {side}?", "What is {side} of the picture?", "Which object is {side}?")),
}


def load_sprites(folder: str | Path = Path(__file__).parent / "sprites") -> dict[str, list[Image.Image]]:
    sprites = {name: [] for name in OBJECTS}
    for style in STYLES:
        sheet = Image.open(Path(folder) / f"{style}.webp").convert("RGBA")
        if sheet.size != (COLUMNS * CELL, -(-len(OBJECTS) // COLUMNS) * CELL):
            raise ValueError(f"{style}.webp does not hold {len(OBJECTS)} things: run sprites/make_sheet.py again")
        for i, drawings in enumerate(sprites.values()):
            x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
            drawings.append(sheet.crop((x, y, x + CELL, y + CELL)))
    return sprites


def plan_things(rng: random.Random) -> list[dict]:
    count, things = rng.choices(range(len(HOW_MANY)), HOW_MANY)[0], []
    for name in rng.sample(list(OBJECTS), count):
        for _ in range(30):  # a thing that finds no free place in 30 tries is left out
            size = round(rng.uniform(*SIZES[count]), 3)
            x, y = (round(rng.uniform(size / 2, 1 - size / 2), 3) for _ in "xy")
            if all(max(abs(x - t["x"]), abs(y - t["y"])) > 0.48 * (size + t["size"]) for t in things):
                tint = [rng.uniform(0.86, 1.06) for _ in "rgb"]
                things.append({"name": name, "x": x, "y": y, "size": size, "tilt": rng.uniform(-15, 15), "tint": tint,
                               "style": rng.randrange(len(STYLES)), "mirror": rng.random() < 0.5})
                break
    return things


def plan_ground(rng: random.Random, name: str, grid: int) -> np.ndarray:  # (grid, grid, 3), to be stretched
    shade = np.frombuffer(rng.randbytes(grid * grid), np.uint8).reshape(grid, grid, 1) / 127.5 - 1
    return (np.add(GROUNDS[name], [rng.uniform(-5, 5) for _ in "rgb"]) + 14 * shade).clip(0, 255).astype(np.uint8)


def draw_scene(sprites: dict, ground: np.ndarray, things: list[dict], width: int, height: int) -> Image.Image:
    picture = Image.fromarray(ground).resize((width, height), Image.Resampling.BICUBIC)
    side = min(width, height)  # places are in the central square, all that the model sees of an oblong picture
    for t in things:
        pixels = round(t["size"] * side)
        drawing = sprites[t["name"]][t["style"]].resize((pixels, pixels), Image.Resampling.BILINEAR)
        if t["mirror"]:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = drawing.rotate(t["tilt"], Image.Resampling.BILINEAR, expand=True)
        r, g, b = t["tint"]
        colours = drawing.convert("RGB").convert("RGB", (r, 0, 0, 0, 0, g, 0, 0, 0, 0, b, 0))
        x = round((width - drawing.width) / 2 + (t["x"] - 0.5) * side)
        y = round((height - drawing.height) / 2 + (t["y"] - 0.5) * side)
        picture.paste(colours, (x, y), drawing.getchannel("A"))
    return picture


def plan_scene(rng: random.Random) -> tuple[list[dict], dict]:
    ground, things = rng.choice(list(GROUNDS)), plan_things(rng)
    known = [{key: t[key] for key in ("name", "x", "y", "size")} for t in things]
    return things, {"ground": ground, "things": known}


def make_truth(seed: int) -> dict:  # what make_scene would draw, undrawn
    return plan_scene(random.Random(seed))[1]


def make_scene(sprites: dict[str, list[Image.Image]], seed: int, size: int = 112) -> tuple[Image.Image, dict]:
    rng = random.Random(seed)
    things, truth = plan_scene(rng)
    ground = plan_ground(rng, truth["ground"], rng.choice((1, 2, 5, 32)))  # 1 is plain, 32 grainy
    return draw_scene(sprites, ground, things, size, size), truth


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listing(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def on_side(truth: dict, side: str) -> str | None:  # the one thing in that half; None where people could disagree
    axis = "x" if side in ("left", "right") else "y"
    near = sorted((t[axis] if side in ("left", "top") else 1 - t[axis], t["name"]) for t in truth["things"])
    clear = near and near[0][0] < 0.42 and all(distance > max(0.5, near[0][0] + 0.2) for distance, _ in near[1:])
    return near[0][1] if clear else None


def questions(truth: dict, rng: random.Random, short: bool | None = None) -> list[tuple[str, str, str]]:
    """Everything worth asking, as (kind, question, answer); short: words, sentences, or None for either."""
    names = [t["name"] for t in sorted(truth["things"], key=lambda t: t["x"])]
    things, n, ground = listing([a(name) for name in names]) or "nothing", len(names), truth["ground"]
    facts = [("describe", f"The picture shows {things} on {a(ground)} background.", None),
             ("what", f"There is {things} in the picture.", listing(names) or "nothing"),
             ("count", f"There {'is one object' if n == 1 else f'are {NUMBERS[n]} objects'} in the picture.", str(n)),
             ("ground", f"The background is {ground}.", ground)]
    facts += [(s, f"There is {a(name)} {where}.", name) for s, where in SIDES.items() if (name := on_side(truth, s))]
    if n:  # a yes and a no for every picture, so that neither is the better guess
        here, away = rng.choice(names), rng.choice([name for name in OBJECTS if name not in names])
        facts += [(f"exists:{here}", f"Yes, there is {a(here)} in the picture.", "yes"),
                  (f"exists:{away}", f"No, there is no {away} in the picture.", "no")]
    asked = []
    for kind, sentence, word in facts:
        family, _, name = kind.partition(":")
        question = rng.choice(QUESTIONS[family]).format(a=a(name or family), side=SIDES.get(kind))
        brief = word is not None and (rng.random() < 0.5 if short is None else short)
        asked.append((kind, question + SHORT, word.capitalize()) if brief else (kind, question, sentence))
    return asked


def conversation(truth: dict, rng: random.Random, turns: int = 3) -> list[dict[str, str]]:
    asked = questions(truth, rng)
    spoken = [text for turn in rng.sample(asked, min(turns, len(asked))) for text in turn[1:]]
    spoken[0] = "<image>\n" + spoken[0]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(spoken)]


def caption(truth: dict, rng: random.Random) -> str:
    things = sorted(truth["things"], key=lambda t: t["x"])
    what, ground = listing([a(t["name"]) for t in things]) or "nothing", a(f"{truth['ground']} background")
    if len(things) == 2:
        right, down = (things[1][axis] - things[0][axis] for axis in "xy")
        relation = "to the left of" if right > abs(down) else "above" if down > 0 else "below"
        what = what.replace(" and ", f" {relation} ")
    return rng.choice((f"{what} on {ground}", f"a picture of {what} on {ground}", f"{ground} with {what}"))


def mentioned(words: dict | tuple, text: str) -> set[str]:
    return set(re.findall(rf"\b({'|'.join(words)})(?:s|es)?\b", text))


def score(kind: str, answer: str, truth: dict) -> bool:  # lenient about wording, strict about facts
    text = re.sub(r"\b(none|zero|nothing|empty)\b", "no", answer.lower().replace("grey", "gray"))
    named, names = mentioned(OBJECTS, text), {t["name"] for t in truth["things"]}
    colours, numbers = mentioned(GROUNDS, text), mentioned((*NUMBERS, r"\d+"), text)
    family, _, name = kind.partition(":")
    if family == "ground":
        return colours == {truth["ground"]}
    if family == "count":
        return {NUMBERS.index(n) if n in NUMBERS else int(n) for n in numbers} == {len(names)}
    if family == "exists":
        no = bool(re.search(r"\b(no|not)\b|n't\b", text))
        yes = bool(re.search(r"\byes\b", text)) or (name in named and not no)
        return named <= {name} and (yes, no) == (name in names, name not in names)
    if family in SIDES:
        return named == {on_side(truth, family)} and (family in text or not mentioned(SIDES, text))
    return named == names and colours <= {truth["ground"]} and ("no" in numbers) == (not names)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a few pictures of the emoji world, with their conversations.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sprites, records, sheet = load_sprites(), [], Image.new("RGB", (6 * 112, -(-args.count // 6) * 112))
    for i in range(args.count):
        picture, truth = make_scene(sprites, seed=i)
        picture.save(args.out / f"{i:04}.png")
        sheet.paste(picture, (i % 6 * 112, i // 6 * 112))
        records.append({"id": str(i), "image": f"{i:04}.png", "conversations": conversation(truth, random.Random(i))})
    sheet.save(args.out / "sheet.png")
    (args.out / "conversations.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()

"""The world the tiny LLaVA lives in: emoji on a coloured ground, and conversations about them.

A picture holds none to four things, each in one of several artists' drawings (see sprites/NOTICE), at its own place,
size and tilt, in shifted colours. We put them there ourselves, so the truth is known, and with it every answer and
what an answer is worth:

    seed -> make_scene -> picture, truth -> caption (to align), conversation (to instruct), questions, score (to test)
    truth = {"ground": "blue", "things": [{"name": "cat", "x": 0.25, "y": 0.5, "size": 0.4}, ...]}

x and y are a thing's centre and size its side, as fractions of the picture; y grows down. Conversations have LLaVA's
JSON form. A question ending with SHORT, LLaVA-1.5's own line, is answered by a word or phrase, others by a sentence.
To look at some: python emoji_world.py --out FOLDER --count 12
"""

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

KINDS = {  # of things; the word for one of them, and the emoji that shows it
    "animal": "dog 🐶, cat 🐱, mouse 🐭, rabbit 🐰, fox 🦊, bear 🐻, panda 🐼, koala 🐨, tiger 🐯, lion 🦁, "
    "cow 🐮, pig 🐷, frog 🐸, monkey 🐵, horse 🐴, zebra 🦓, deer 🦌, elephant 🐘, hippo 🦛, giraffe 🦒, "
    "kangaroo 🦘, camel 🐪, sheep 🐑, hedgehog 🦔, squirrel 🐿, bat 🦇, chicken 🐔, penguin 🐧, duck 🦆, owl 🦉, "
    "eagle 🦅, parrot 🦜, flamingo 🦩, peacock 🦚, swan 🦢, bee 🐝, butterfly 🦋, snail 🐌, ladybug 🐞, ant 🐜, "
    "spider 🕷, scorpion 🦂, turtle 🐢, snake 🐍, crocodile 🐊, dinosaur 🦕, octopus 🐙, lobster 🦞, crab 🦀, "
    "fish 🐟, dolphin 🐬, whale 🐳, shark 🦈",
    "food": "apple 🍎, pear 🍐, orange 🍊, lemon 🍋, banana 🍌, watermelon 🍉, strawberry 🍓, peach 🍑, "
    "pineapple 🍍, coconut 🥥, kiwi 🥝, tomato 🍅, eggplant 🍆, avocado 🥑, cucumber 🥒, carrot 🥕, peanut 🥜, "
    "croissant 🥐, pretzel 🥨, waffle 🧇, hamburger 🍔, pizza 🍕, hot dog 🌭, sandwich 🥪, taco 🌮, "
    "ice cream 🍦, donut 🍩, cookie 🍪, cake 🎂, cupcake 🧁, pie 🥧, lollipop 🍭, egg 🥚, mushroom 🍄, "
    "pumpkin 🎃",
    "vehicle": "car 🚗, bus 🚌, truck 🚚, tractor 🚜, fire truck 🚒, ambulance 🚑, motorcycle 🏍, bicycle 🚲, "
    "train 🚂, airplane ✈, helicopter 🚁, rocket 🚀, sailboat ⛵, ship 🚢, canoe 🛶",
    "plant": "tree 🌳, palm tree 🌴, cactus 🌵, sunflower 🌻, rose 🌹, tulip 🌷, clover 🍀",
    "piece of clothing": "hat 🎩, cap 🧢, crown 👑, dress 👗, shirt 👕, sock 🧦, boot 👢, shoe 👟, glove 🧤, "
    "scarf 🧣",
    "instrument": "guitar 🎸, violin 🎻, trumpet 🎺, drum 🥁, saxophone 🎷, accordion 🪗, piano 🎹, bell 🔔",
    "tool": "hammer 🔨, wrench 🔧, saw 🪚, axe 🪓, ladder 🪜, knife 🔪, magnet 🧲, pencil ✏, paintbrush 🖌, "
    "broom 🧹, bucket 🪣, anchor ⚓, microscope 🔬, telescope 🔭",
    "thing": "soccer ball ⚽, basketball 🏀, football 🏈, baseball ⚾, volleyball 🏐, ring 💍, backpack 🎒, "
    "handbag 👜, umbrella ☂, key 🔑, lock 🔒, clock ⏰, watch ⌚, chair 🪑, bed 🛏, couch 🛋, light bulb 💡, "
    "candle 🕯, flashlight 🔦, telephone ☎, phone 📱, camera 📷, television 📺, radio 📻, microphone 🎤, "
    "laptop 💻, book 📕, envelope ✉, gift 🎁, balloon 🎈, teddy bear 🧸, kite 🪁, die 🎲, bathtub 🛁, "
    "toilet 🚽, teapot 🫖, basket 🧺, door 🚪, window 🪟, globe 🌍, shopping cart 🛒, diamond 💎, trophy 🏆, "
    "medal 🏅, boxing glove 🥊, skateboard 🛹, house 🏠, castle 🏰, tent ⛺, Ferris wheel 🎡, sun ☀, moon 🌙, "
    "star ⭐, cloud ☁, rainbow 🌈, snowflake ❄, fire 🔥, snowman ⛄, heart ❤, robot 🤖, ghost 👻, skull 💀, "
    "alien 👽, bone 🦴, tooth 🦷, hand ✋",
}
KINDS = {kind: dict(thing.rsplit(" ", 1) for thing in things.split(", ")) for kind, things in KINDS.items()}
OBJECTS = {name: emoji for things in KINDS.values() for name, emoji in things.items()}
CELL, COLUMNS = 72, 16  # the sheets sprites/*.webp: a side of CELL pixels for each drawing, OBJECTS in their order
GROUNDS = {
    "red": (204, 44, 44), "blue": (52, 96, 212), "green": (62, 158, 74), "yellow": (246, 212, 62),
    "white": (240, 240, 240), "black": (22, 22, 24), "gray": (132, 132, 134), "pink": (247, 160, 196),
    "purple": (128, 58, 172), "brown": (122, 76, 44),
}
GRIDS = ((1, 1), (1, 1), (2, 2), (1, 2), (2, 1), (5, 5), (40, 40), (1, 14), (14, 1), (8, 8))  # patterns of a ground
HOW_MANY = (3, 25, 29, 24, 19)  # how often a picture has 0, 1, 2, 3, 4 things, in percent
SIZES = ((), (0.36, 0.8), (0.35, 0.52), (0.33, 0.46), (0.31, 0.43))  # and their smallest and largest side then
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHORT = "\nAnswer the question using a single word or phrase."
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
         "middle": "in the middle"}
BESIDE = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
QUESTIONS = {
    "describe": ("Describe the picture.", "Describe this image.", "Tell me about the picture.", "What do you see?"),
    "what": ("What is in the picture?", "What can you see?", "What is in this image?", "Which objects do you see?"),
    "count": ("How many objects are in the picture?", "How many objects are there?", "How many things can you see?"),
    "how many": ("How many {names} are in the picture?", "How many {names} are there?", "How many {names} do you see?"),
    "exists": ("Is there {a} in the picture?", "Is there {a} here?", "Do you see {a}?", "Can you see {a}?"),
    "ground": ("What color is the background?", "Which color is the background?", "What is the background color?"),
    "which": ("Which {names} are in the picture?", "Which {names} are there?", "What {names} can you see?"),
    "beside": ("What is {side} the {name}?", "Which thing is {side} the {name}?", "What do you see {side} the {name}?"),
    "is beside": ("Is the {name} {side} the {other}?",),
    **dict.fromkeys(SIDES, ("What is {side}?", "What is {side} of the picture?", "Which object is {side}?")),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
IRREGULAR = {"mouse": "mice", "sheep": "sheep", "deer": "deer", "fish": "fish", "knife": "knives", "die": "dice",
             "scarf": "scarves", "snowman": "snowmen",
             "tooth": "teeth", "tomato": "tomatoes", "piece of clothing": "pieces of clothing"}


# --- Pictures --------------------------------------------------------------------------------------------------------


def load_sprites(folder: str | Path = Path(__file__).parent / "sprites") -> dict[str, list[Image.Image]]:
    """Name -> its drawings, at most one from every sheet: an artist need not have drawn everything."""
    sprites = {name: [] for name in OBJECTS}
    for file in sorted(Path(folder).glob("*.webp")):
        sheet = Image.open(file).convert("RGBA")
        if sheet.size != (COLUMNS * CELL, -(-len(OBJECTS) // COLUMNS) * CELL):
            raise ValueError(f"{file.name} does not hold {len(OBJECTS)} things: run sprites/make_sheet.py again")
        for i, drawings in enumerate(sprites.values()):
            x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
            drawing = sheet.crop((x, y, x + CELL, y + CELL))
            if drawing.getchannel("A").getbbox():
                drawings.append(drawing)
    return sprites


ORDER = {name: i for i, name in enumerate(OBJECTS)}


def kept_apart(one: str, other: str) -> bool:
    """Whether training never shows these two together: one pair in 17, so that judging can show something new."""
    return one != other and (ORDER[one] + ORDER[other]) % 17 == 0


APART = {one: [other for other in OBJECTS if kept_apart(one, other)] for one in OBJECTS}


def plan_names(rng: random.Random, count: int, apart: bool) -> list[str]:
    """The things of a picture. With `apart`, two of them (there are two at least) are a pair that is kept apart."""
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
    count, things = rng.choices(range(len(HOW_MANY)), HOW_MANY)[0], []
    count = max(count, at_least, 2 * apart)
    for name in plan_names(rng, count, apart):
        for attempt in itertools.count():  # a thing that finds no place in 30 tries is made smaller
            size = round(rng.uniform(*SIZES[count]) * 0.9 ** (attempt // 30), 3)
            x, y = (round(rng.uniform(size / 2, 1 - size / 2), 3) for _ in "xy")
            if all(max(abs(x - t["x"]), abs(y - t["y"])) > 0.45 * (size + t["size"]) for t in things):
                things.append({"name": name, "x": x, "y": y, "size": size})
                break
    return things


def plan_look(rng: random.Random) -> dict:
    """How a thing is drawn, apart from what it is and where: none of this is asked for, all of it must not matter."""
    wild = rng.random() < 0.25
    mix = rng.uniform(0.1, 0.5) if wild else rng.uniform(0, 0.08)  # of each colour with the two others
    colours = [[rng.uniform(0.75, 1.1) * (row == column) + mix * rng.uniform(-0.5, 1) for column in range(3)]
               for row in range(3)]
    return {
        "style": rng.random(), "mirror": rng.random() < 0.5, "tilt": rng.gauss(0, 35 if rng.random() < 0.15 else 9),
        "squeeze": rng.uniform(0.82, 1), "upright": rng.random() < 0.5, "colours": colours,
        "edge": rng.choice(((0, 0, 0), (255, 255, 255))) if rng.random() < 0.3 else None,  # a shadow, or a glow
        "edge_at": (rng.randint(-2, 3), rng.randint(-1, 3)),
    }


def plain_look(tilt: float) -> dict:
    one_to_one = [[float(row == column) for column in range(3)] for row in range(3)]
    return {"style": 0, "mirror": False, "tilt": tilt, "squeeze": 1, "upright": True, "colours": one_to_one,
            "edge": None, "edge_at": (0, 0)}


def plan_ground(rng: random.Random, name: str, grid: tuple[int, int]) -> np.ndarray:  # (*grid, 3), to be stretched
    shade = np.frombuffer(rng.randbytes(grid[0] * grid[1]), np.uint8).reshape(*grid, 1) / 127.5 - 1
    tint = [rng.uniform(-8, 8) for _ in "rgb"]
    return (np.add(GROUNDS[name], tint) + rng.uniform(4, 18) * shade).clip(0, 255).astype(np.uint8)


def draw_thing(picture: Image.Image, sprites: dict, thing: dict, look: dict) -> None:
    width, height = picture.size
    side = min(width, height)  # places are in the central square, all that the model sees of an oblong picture
    long = max(2, round(thing["size"] * side))
    short = round(long * look["squeeze"])
    drawings = sprites[thing["name"]]
    drawing = drawings[int(look["style"] * len(drawings))]
    drawing = drawing.resize((short, long) if look["upright"] else (long, short), Image.Resampling.BILINEAR)
    if look["mirror"]:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = drawing.rotate(look["tilt"], Image.Resampling.BILINEAR, expand=True)
    matrix = [value for row in look["colours"] for value in (*row, 0)]
    colours, alpha = drawing.convert("RGB").convert("RGB", matrix), drawing.getchannel("A")
    x = round((width - drawing.width) / 2 + (thing["x"] - 0.5) * side)
    y = round((height - drawing.height) / 2 + (thing["y"] - 0.5) * side)
    if look["edge"]:
        dx, dy = look["edge_at"]
        picture.paste(look["edge"], (x + dx, y + dy), alpha.point(lambda value: value // 2))
    picture.paste(colours, (x, y), alpha)


def plan_scene(rng: random.Random, apart: bool = False, at_least: int = 0) -> dict:
    return {"ground": rng.choice(list(GROUNDS)), "things": plan_things(rng, apart, at_least)}


def make_truth(seed: int, apart: bool = False) -> dict:
    """What make_scene would draw, undrawn."""
    return plan_scene(random.Random(seed), apart)


def make_scene(
    sprites: dict[str, list[Image.Image]], seed: int, size: int = 112, apart: bool = False, at_least: int = 0
) -> tuple[Image.Image, dict]:
    """Picture `seed`, (size, size), and its truth. `sprites` may be any artist's: name -> drawings, RGBA, one or more.

    With `apart`, the picture shows two things that are never together in the pictures without it; `at_least` is how
    many things there must be.
    """
    rng = random.Random(seed)
    truth = plan_scene(rng, apart, at_least)
    grid = rng.choice(GRIDS)
    stretch = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))
    picture = Image.fromarray(plan_ground(rng, truth["ground"], grid)).resize((size, size), stretch)
    for thing in truth["things"]:
        draw_thing(picture, sprites, thing, plan_look(rng))
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0) * size / 112))
    return picture, truth


# --- Words -----------------------------------------------------------------------------------------------------------


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def number(count: int, name: str) -> str:
    return a(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def listing(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def things(names: list[str]) -> str:
    """["cat", "dog", "cat"] -> "two cats and a dog"."""
    return listing([number(count, name) for name, count in Counter(names).items()]) or "nothing"


def there(names: list[str]) -> str:
    return f"There {'are' if names and names.count(names[0]) > 1 else 'is'} {things(names)}"


# --- What is true ----------------------------------------------------------------------------------------------------


def left_to_right(truth: dict) -> list[str]:
    return [thing["name"] for thing in sorted(truth["things"], key=lambda thing: thing["x"])]


def of_kind(truth: dict, kind: str) -> list[str]:
    return [name for name in left_to_right(truth) if name in KINDS[kind]]


def on_side(truth: dict, side: str) -> str | None:
    """The one thing there; None where there is none and where people could disagree."""
    def distance(thing: dict) -> float:
        if side == "middle":  # begins where the sides end
            return max(abs(thing["x"] - 0.5), abs(thing["y"] - 0.5)) + 0.22
        at = thing["x" if side in ("left", "right") else "y"]
        return at if side in ("left", "top") else 1 - at

    near = sorted((distance(thing), thing["name"]) for thing in truth["things"])
    clear = near and near[0][0] < 0.36 and all(far > max(0.5, near[0][0] + 0.2) for far, _ in near[1:])
    return near[0][1] if clear else None


def is_beside(thing: dict, side: str, other: dict) -> bool:
    """Whether people would say that `thing` is to that side of `other`."""
    right, down = thing["x"] - other["x"], thing["y"] - other["y"]
    along, across = (right, down) if side in ("left", "right") else (down, right)
    return (-along if side in ("left", "top") else along) > max(0.2, 1.3 * abs(across))


def relations(truth: dict) -> list[tuple[str, str, str]]:
    """(one, side, other): one is to that side of the other. Only things that are there once, so "the cat" is clear."""
    once = [t for t in truth["things"] if left_to_right(truth).count(t["name"]) == 1]
    return [(t["name"], side, other["name"]) for t in once for other in once for side in BESIDE
            if is_beside(t, side, other)]


# --- Questions and answers -------------------------------------------------------------------------------------------

# A fact is (kind, the blanks of its question, the answer as a sentence, the answer as a word or phrase or None).
# A kind is the key in QUESTIONS and, after colons, what it is about: exists:NAME, how many:NAME, which:KIND,
# beside:SIDE:OTHER (what is to the left of the cat?), is beside:SIDE:ONE:OTHER (is the dog to the left of the cat?).
Fact = tuple[str, dict, str, str | None]


def facts(truth: dict, rng: random.Random) -> list[Fact]:
    """What is asked about a picture."""
    names, ground = left_to_right(truth), truth["ground"]
    n = len(names)
    found = [("describe", {}, f"The picture shows {things(names)} on {a(ground)} background.", None),
             ("what", {}, f"{there(names)} in the picture.", things(names)),
             ("count", {}, f"There {'is one object' if n == 1 else f'are {NUMBERS[n]} objects'} in the picture.",
              str(n)),
             ("ground", {}, f"The background is {ground}.", ground)]
    for side, at in SIDES.items():
        if name := on_side(truth, side):
            found.append((side, {"side": at}, f"There is {a(name)} {at}.", name))
    if names:
        found += facts_of_one(names, rng)
    return found + facts_of_kinds(truth, rng) + facts_beside(truth, rng)


def facts_of_one(names: list[str], rng: random.Random) -> list[Fact]:
    """Whether a thing is there: a yes and a no for every picture, so that neither is the better guess. How many."""
    here, away = rng.choice(names), rng.choice([name for name in OBJECTS if name not in names])
    found = [(f"exists:{here}", {"a": a(here)}, f"Yes, there is {a(here)} in the picture.", "yes"),
             (f"exists:{away}", {"a": a(away)}, f"No, there is no {away} in the picture.", "no")]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    for name in [*(repeated or [here]), *([away] if rng.random() < 0.3 else [])]:
        count = names.count(name)
        said = f"is one {name}" if count == 1 else f"are {NUMBERS[count]} {plural(name)}"
        found.append((f"how many:{name}", {"names": plural(name)}, f"There {said} in the picture.", str(count)))
    return found


def facts_of_kinds(truth: dict, rng: random.Random) -> list[Fact]:
    """Which animals, vehicles and so on are there; for one kind, often, that there are none."""
    found, kinds = [], [kind for kind in KINDS if kind != "thing"]
    for kind in dict.fromkeys([rng.choice(kinds), *(kind for kind in kinds if of_kind(truth, kind))]):
        members = of_kind(truth, kind)
        said = there(members) if members else f"There are no {plural(kind)}"
        word = things(members) if members else "none"
        found.append((f"which:{kind}", {"names": plural(kind)}, f"{said} in the picture.", word))
    return found


def facts_beside(truth: dict, rng: random.Random) -> list[Fact]:
    """Up to three facts about where things are relative to each other."""
    known, found = relations(truth), []
    for side, other in sorted({(side, other) for _, side, other in known}):
        names = [one for one, *place in known if place == [side, other]]
        if len(names) == 1:
            said = f"There is {a(names[0])} {BESIDE[side]} the {other}."
            found.append((f"beside:{side}:{other}", {"side": BESIDE[side], "name": other}, said, names[0]))
    if known:
        one, side, other = rng.choice(known)
        said = f"the {one} is {BESIDE[side]} the {other}."
        for asked, yes_or_no in ((side, "yes"), (OPPOSITE[side], "no")):
            filling = {"name": one, "side": BESIDE[asked], "other": other}
            found.append((f"is beside:{asked}:{one}:{other}", filling, f"{yes_or_no.capitalize()}, {said}", yes_or_no))
    rng.shuffle(found)
    return found[:3]


def questions(truth: dict, rng: random.Random, short: bool | None = None) -> list[tuple[str, str, str]]:
    """What is asked, as (kind, question, answer). short: True for words, False for sentences, None for either."""
    asked = []
    for kind, filling, sentence, word in facts(truth, rng):
        question = rng.choice(QUESTIONS[kind.partition(":")[0]]).format(**filling)
        brief = word is not None and (rng.random() < 0.5 if short is None else short)
        asked.append((kind, question + SHORT, word) if brief else (kind, question, sentence))
    return asked


def wording(seed: int) -> random.Random:
    """The chance behind the words about picture `seed`. Were it the one that drew it, the words would tell of it."""
    return random.Random(f"words {seed}")


def conversation(truth: dict, rng: random.Random, turns: int = 3) -> list[dict[str, str]]:
    asked = questions(truth, rng)
    spoken = [text for turn in rng.sample(asked, min(turns, len(asked))) for text in turn[1:]]
    spoken[0] = "<image>\n" + spoken[0]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(spoken)]


def caption(truth: dict, rng: random.Random) -> str:
    what, ground = things(left_to_right(truth)), a(f"{truth['ground']} background")
    if len(truth["things"]) == 2 and (known := relations(truth)):
        one, side, other = rng.choice(known)
        what = f"{a(one)} {BESIDE[side]} {a(other)}"
    return rng.choice((f"{what} on {ground}", f"a picture of {what} on {ground}", f"{ground} with {what}"))


# --- Judging ---------------------------------------------------------------------------------------------------------


def any_of(words: list[str]) -> str:  # the longest first, or "hot dog" would be read as a dog
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


SINGULAR = {form.lower(): name for name in OBJECTS for form in (name, plural(name))}
A_THING = re.compile(rf"(?:\b({any_of(['a', 'an', 'the', *NUMBERS])}|\d+)\s+)?\b({any_of(list(SINGULAR))})\b")
NOT = re.compile(r"\bnot\b|n't\b")
NO = re.compile(r"\bno\b|" + NOT.pattern)


def mentioned(words: list[str] | dict, text: str) -> set[str]:
    return set(re.findall(rf"\b({any_of(list(words))})\b", text))


def to_number(word: str) -> int:
    return NUMBERS.index(word) if word in NUMBERS else int(word)


def named_things(text: str) -> Counter:
    """How many of each thing the text speaks of. "The cat" is the cat spoken of before."""
    counts, known = Counter(), set()
    for how_many, form in A_THING.findall(text):
        name = SINGULAR[form]
        if how_many != "the":
            counts[name] += to_number(how_many) if how_many in NUMBERS or how_many.isdigit() else 1
        known.add(name)
    return Counter({name: counts[name] or 1 for name in known})


def score(kind: str, answer: str, truth: dict) -> bool:
    """Whether an answer is right: lenient about wording, strict about facts. `kind` is what questions() calls it."""
    text = answer.lower().replace("grey", "gray").replace("\u2019", "'").replace("cannot", "can not").rstrip(". ")
    text = re.sub(r"\b(left|right)[- ]hand\b", r"\1", text.replace("i saw", "i see"))
    text = re.sub(r"\b(none|zero|nothing|empty)\b", "no", text)
    family, *about = kind.split(":")
    names, named = left_to_right(truth), named_things(text)
    numbers = {to_number(word) for word in mentioned([*NUMBERS, *map(str, range(11))], text)}
    colours, no = mentioned(GROUNDS, text), bool(NO.search(text))
    if family == "ground":
        return colours == {truth["ground"]} and not NOT.search(text)
    if family in ("count", "how many"):
        right = names.count(about[0]) if about else len(names)
        return numbers == {right} and (not about or set(named) <= {about[0]})
    if family in ("exists", "is beside"):
        return verdict(family, about, text, truth) and not (family == "exists" and set(named) - set(about))
    if family in SIDES:
        said = mentioned(SIDES, text)
        return not no and named == Counter([on_side(truth, family)]) and (family in said or not said)
    if family == "beside":
        side, other = about
        right = Counter(one for one, *place in relations(truth) if place == [side, other])
        return not no and named - Counter([other]) == right and directions(text) <= {side}
    wanted = Counter(of_kind(truth, about[0]) if family == "which" else names)
    return named == wanted and colours <= {truth["ground"]} and no == (not wanted)


def directions(text: str) -> set[str]:
    words = {"above": "top", "over": "top", "below": "bottom", "under": "bottom", "left": "left", "right": "right"}
    return {words[word] for word in mentioned(words, text)}


def verdict(family: str, about: list[str], text: str, truth: dict) -> bool:
    """Whether a yes or a no is right, and what is said besides is true."""
    if family == "exists":
        right = about[0] in left_to_right(truth)
    else:
        side, one, other = about
        right = (one, side, other) in relations(truth)
        order = [SINGULAR[form] for _, form in A_THING.findall(text)]
        if len(order) == 2 and len(directions(text)) == 1:
            (said,) = directions(text)
            if ((order[0], said, order[1]) in relations(truth)) == bool(NOT.search(text)):
                return False
    no = bool(NO.search(text))
    yes = bool(re.search(r"\byes\b", text)) or (bool(A_THING.search(text)) and not no)
    return (yes, no) == (right, not right)


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
    from command import run

    sys.exit(run(main))

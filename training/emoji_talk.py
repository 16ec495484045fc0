"""Texts about a scene of the emoji world: facts, questions with their answers, conversations, captions.

A question that ends with SHORT, the line that LLaVA-1.5 uses, has a word or phrase as its answer; others a sentence.
"""

import random

from training.emoji_things import KINDS, NUMBERS, OBJECTS, a, listing, plural, things
from training.outside import OUTSIDE

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
WEIGHTS = {"describe": 2, "what": 2, "which": 2, "is beside": 2, "count": 0.5, "ground": 0.5}  # hard ones more often
PLACES = (("at the top left", "at the top", "at the top right"), ("on the left", "in the middle", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))  # the ninths of a picture
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


# --- What is true ----------------------------------------------------------------------------------------------------


def ninth(thing: dict) -> tuple[int, int]:  # -> the row and the column of PLACES
    """The ninth of the picture that the centre of a thing is in."""
    return min(int(3 * thing["y"]), 2), min(int(3 * thing["x"]), 2)


def place_of(thing: dict) -> str:
    row, column = ninth(thing)
    return PLACES[row][column]


def in_reading_order(truth: dict) -> list[dict]:
    """The things by the row, then the column of their ninth, and within a ninth from left to right."""
    return sorted(truth["things"], key=lambda thing: (ninth(thing), thing["x"]))


def names_of(truth: dict) -> list[str]:
    return [thing["name"] for thing in in_reading_order(truth)]


def of_kind(truth: dict, kind: str) -> list[dict]:
    return [thing for thing in in_reading_order(truth) if thing["name"] in KINDS[kind]]


def on_side(truth: dict, side: str) -> str | None:
    """The one thing on that side. None if there is none, or if people could disagree about which it is."""
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
    """(one, side, other): one is to that side of the other. Only for things that occur once: "the cat" is clear."""
    once = [t for t in truth["things"] if names_of(truth).count(t["name"]) == 1]
    return [(t["name"], side, other["name"]) for t in once for other in once for side in BESIDE
            if is_beside(t, side, other)]


def with_places(members: list[dict]) -> str:
    """As a phrase: "at the top left a cat, on the right a dog and at the bottom a key".

    The model finds the next thing more easily when it says the place first: the places said so far tell it which things
    are done, and the name is then that of the thing at the place.
    """
    return listing([f"{place_of(thing)} {a(thing['name'])}" for thing in members]) or "nothing"


def there(members: list[dict]) -> str:
    """with_places as a sentence: "At the top left there is a cat, on the right a dog and at the bottom a key."."""
    if not members:
        return "There is nothing in the picture."
    place = place_of(members[0])
    return f"{place.capitalize()} there is{with_places(members).removeprefix(place)}."


# --- Questions and answers -------------------------------------------------------------------------------------------

# A fact is (kind, values for the blanks of its question, the answer as a sentence, the answer as a phrase or None).
# A kind is the key in QUESTIONS and, after colons, what it is about: exists:NAME, how many:NAME, which:KIND,
# beside:SIDE:OTHER (what is to the left of the cat?), is beside:SIDE:ONE:OTHER (is the dog to the left of the cat?).
Fact = tuple[str, dict, str, str | None]


def facts(truth: dict, rng: random.Random) -> list[Fact]:
    """All facts about a scene that questions ask for, in the order of their kinds."""
    names, ground, members = names_of(truth), truth["ground"], in_reading_order(truth)
    n = len(names)
    found = [("describe", {}, f"{there(members)} The background is {ground}.", None),
             ("what", {}, there(members), with_places(members)),
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
    """Whether a thing is there, once with yes and once with no, so that neither is the better guess; and how many."""
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
    """Which animals, vehicles and so on are there: all kinds that are, and one random kind, which often is not."""
    found, kinds = [], [kind for kind in KINDS if kind != "thing"]
    for kind in dict.fromkeys([rng.choice(kinds), *(kind for kind in kinds if of_kind(truth, kind))]):
        members = of_kind(truth, kind)
        said = there(members) if members else f"There are no {plural(kind)} in the picture."
        word = with_places(members) if members else "none"
        found.append((f"which:{kind}", {"names": plural(kind)}, said, word))
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
        places = {thing["name"]: place_of(thing) for thing in truth["things"]}
        said = f"The {one} is {places[one]} and the {other} {places[other]}, so "
        for asked, yes_or_no in ((side, "yes"), (OPPOSITE[side], "no")):
            filling = {"name": one, "side": BESIDE[asked], "other": other}
            found.append((f"is beside:{asked}:{one}:{other}", filling, f"{said}{yes_or_no}.", yes_or_no))
    rng.shuffle(found)
    return found[:3]


def questions(truth: dict, rng: random.Random, short: bool | None = None) -> list[tuple[str, str, str]]:
    """(kind, question, answer) for each fact. `short`: True asks for phrases, False for sentences, None for either."""
    asked = []
    for kind, filling, sentence, word in facts(truth, rng):
        question = rng.choice(QUESTIONS[kind.partition(":")[0]]).format(**filling)
        brief = word is not None and (rng.random() < 0.5 if short is None else short)
        asked.append((kind, question + SHORT, word) if brief else (kind, question, sentence))
    return asked


def wording(seed: int) -> random.Random:
    """Random numbers for the texts about scene `seed`: not those of its picture, so neither affects the other."""
    return random.Random(f"words {seed}")


def conversation(truth: dict, rng: random.Random, turns: int = 3, outside: bool = False) -> list[dict[str, str]]:
    """Up to `turns` questions and answers in LLaVA's JSON form. The first question begins with <image>.

    With `outside` the picture is no scene, and the answer to at most two questions is OUTSIDE.
    """
    asked = questions(truth, rng)
    asked.sort(key=lambda turn: rng.random() ** (1 / WEIGHTS.get(turn[0].partition(":")[0], 1)), reverse=True)
    if outside:
        asked = [(kind, asks, OUTSIDE) for kind, asks, _ in asked[:2]]
    spoken = [text for turn in asked[:turns] for text in turn[1:]]
    spoken[0] = "<image>\n" + spoken[0]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(spoken)]


def caption(truth: dict, rng: random.Random) -> str:
    """A phrase that names everything in the picture, for the alignment stage."""
    what, ground = things(names_of(truth)), a(f"{truth['ground']} background")
    if len(truth["things"]) == 2 and (known := relations(truth)):
        one, side, other = rng.choice(known)
        what = f"{a(one)} {BESIDE[side]} {a(other)}"
    return rng.choice((f"{what} on {ground}", f"a picture of {what} on {ground}", f"{ground} with {what}"))

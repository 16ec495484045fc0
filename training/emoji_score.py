"""Whether an answer about a scene of the emoji world is right: lenient about wording, strict about facts."""

import re
from collections import Counter

from training.emoji_talk import PLACES, SIDES, names_of, of_kind, on_side, relations
from training.emoji_things import GROUNDS, NUMBERS, OBJECTS, plural


def any_of(words: list[str]) -> str:
    """A regular expression for any of the words, the longest first: otherwise "hot dog" would match as "dog"."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


SINGULAR = {form.lower(): name for name in OBJECTS for form in (name, plural(name))}
A_THING = re.compile(rf"(?:\b({any_of(['a', 'an', 'the', *NUMBERS])}|\d+)\s+)?\b({any_of(list(SINGULAR))})\b")
NINTHS = {place: (row, column) for row, places in enumerate(PLACES) for column, place in enumerate(places)}
NOT_OF = r"(?! of (?!the (?:picture|image)))"  # "on the left of the cat" is no ninth of the picture
NAME, PLACE = rf"\b(?P<name>{any_of(list(SINGULAR))})\b", rf"\b(?P<place>{any_of(list(NINTHS))})\b{NOT_OF}"
PLACED = (rf"{PLACE}(?: there (?:is|are))? \w+ {NAME}", f"{NAME} (?:is )?{PLACE}")
NOT = re.compile(r"\bnot\b|n't\b")
NO = re.compile(r"\bno\b|" + NOT.pattern)


def mentioned(words: list[str] | dict, text: str) -> set[str]:
    """Those of the words that occur in a text."""
    return set(re.findall(rf"\b({any_of(list(words))})\b", text))


def to_number(word: str) -> int:
    return NUMBERS.index(word) if word in NUMBERS else int(word)


def named_things(text: str) -> Counter:
    """How many of each thing a text mentions. "The cat" refers to a cat mentioned before, and is not counted again."""
    counts, known = Counter(), set()
    for how_many, form in A_THING.findall(text):
        name = SINGULAR[form]
        if how_many != "the":
            counts[name] += to_number(how_many) if how_many in NUMBERS or how_many.isdigit() else 1
        known.add(name)
    return Counter({name: counts[name] or 1 for name in known})


def score(kind: str, answer: str, truth: dict) -> bool:
    """Whether an answer is right. `kind` is the kind of question, in the form that emoji_talk.questions returns."""
    text = answer.lower().replace("grey", "gray").replace("\u2019", "'").replace("cannot", "can not").rstrip(". ")
    text = re.sub(r"\b(left|right)[- ]hand\b", r"\1", text.replace("i saw", "i see"))
    text = re.sub(r"\b(none|zero|nothing|empty)\b", "no", text)
    family, *about = kind.split(":")
    names, named = names_of(truth), named_things(text)
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
    wanted = Counter(thing["name"] for thing in of_kind(truth, about[0])) if family == "which" else Counter(names)
    return named == wanted and colours <= {truth["ground"]} and no == (not wanted) and well_placed(text, truth)


def well_placed(text: str, truth: dict) -> bool:
    """Whether each thing that a text gives a place has its centre there, or hardly outside (0.1 of the picture)."""
    def is_at(thing: dict, row: int, column: int) -> bool:
        return abs(thing["y"] - (row + 0.5) / 3) < 1 / 6 + 0.1 and abs(thing["x"] - (column + 0.5) / 3) < 1 / 6 + 0.1

    return all(any(thing["name"] == name and is_at(thing, *NINTHS[place]) for thing in truth["things"])
               for name, place in placed(text))


def placed(text: str) -> list[tuple[str, str]]:
    """The things that a text gives a place: (name, place)."""
    return [(SINGULAR[match["name"]], match["place"]) for form in PLACED for match in re.finditer(form, text)]


def directions(text: str) -> set[str]:
    """The sides that a text mentions."""
    words = {"above": "top", "over": "top", "below": "bottom", "under": "bottom", "left": "left", "right": "right"}
    return {words[word] for word in mentioned(words, text)}


def verdict(family: str, about: list[str], text: str, truth: dict) -> bool:
    """Whether a yes or no is right, and the rest of the answer true."""
    if family == "exists":
        right = about[0] in names_of(truth)
    else:
        side, one, other = about
        right = (one, side, other) in relations(truth)
        if not well_placed(text, truth):
            return False
        text = re.sub(PLACE, "", text)  # "on the left" alone says nothing about the other thing
        order = [SINGULAR[form] for _, form in A_THING.findall(text)]
        if len(order) == 2 and len(directions(text)) == 1:
            (said,) = directions(text)
            if ((order[0], said, order[1]) in relations(truth)) == bool(NOT.search(text)):
                return False
    no = bool(NO.search(text))
    yes = bool(re.search(r"\byes\b", text)) or (bool(A_THING.search(text)) and not no)
    return (yes, no) == (right, not right)

"""Reads and checks tokenizer.json, the file of the library `tokenizers`, as far as LLaVA's checkpoints need it.

Its parts are the five steps of encoding and their reverse. Added tokens such as <image> are cut out of the text; the
normalizer rewrites each part between them; the pre_tokenizer splits a part into words; the model merges the letters of
a word into pieces; the post_processor adds tokens around the ids, such as <s>; the decoder turns pieces into text.

Not implemented: models other than BPE, dropout, added tokens that are cut out of the normalized text with the spaces
around them. For these and for damaged files every function raises ValueError. Settings for truncation and padding are
ignored.
"""

from dataclasses import dataclass

from hub.files import SPACE
from hub.settings import require

# The parts of a file that may be a Sequence of steps, and under which name it lists them.
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
SEQUENCES["post_processor"] = "processors"
NAMES = {dict: "a JSON object", list: "a list", str: "a text", bool: "true or false"}


def entry(part: dict, name: str, kind: type, default: object = None):
    """part[name], which must be a `kind`; the default for null and for an entry that is missing."""
    if not isinstance(part, dict):
        raise ValueError(f"there is {str(part)[:40]!r} where a JSON object with {name} should be")
    value = default if part.get(name) is None else part[name]
    if type(value) is not kind:
        raise ValueError(f"{name} must be {NAMES[kind]}, not {str(value)[:40]!r}")
    return value


def check_id(i: object, name: str) -> int:
    if type(i) is not int or not 0 <= i < 2**24:
        raise ValueError(f"the id of {name[:40]!r} must be a whole number below {2**24}, not {str(i)[:40]!r}")
    return i


def read_steps(settings: dict, part: str, implemented: tuple[str, ...]) -> list[dict]:
    """The steps of a part, each with a type that is implemented: those of a Sequence, or the part itself."""
    whole = entry(settings, part, dict, {})
    steps = entry(whole, SEQUENCES[part], list) if whole.get("type") == "Sequence" else [whole] if whole else []
    for step in steps:
        require(f"{part}: type", entry(step, "type", str)[:40], implemented)
    return steps


def read_model(settings: dict) -> tuple[dict[str, int], dict[tuple[str, str], int], bool]:
    """The vocabulary (piece -> id), the merges (pair of pieces -> rank), and whether a word in vocab is one token."""
    model = entry(settings, "model", dict)
    require("model: type", entry(model, "type", str, "BPE")[:40], ("BPE",))
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"model: {name} is not implemented")
    vocab = entry(model, "vocab", dict)
    if len({check_id(i, piece) for piece, i in vocab.items()}) != len(vocab):
        raise ValueError("vocab gives two pieces the same id")
    ranks = {}
    for rank, merge in enumerate(entry(model, "merges", list)):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge if isinstance(merge, list) else [])
        if len(pair) != 2 or not all(isinstance(piece, str) and piece for piece in pair):
            raise ValueError(f"merge {rank} is not a pair of pieces")
        if not vocab.keys() >= {*pair, "".join(pair)}:
            raise ValueError(f"merge {rank} has pieces that are not in vocab")
        ranks[pair] = rank
    return vocab, ranks, entry(model, "ignore_merges", bool, False)


@dataclass
class AddedToken:
    id: int
    special: bool  # decoding may skip it
    normalized: bool  # it is cut out of the normalized text
    lstrip: bool  # it includes the spaces on its left
    rstrip: bool  # and on its right


def read_added_tokens(settings: dict) -> dict[str, AddedToken]:
    tokens = {}
    for token in entry(settings, "added_tokens", list, []):
        name = entry(token, "content", str)
        flags = {flag: entry(token, flag, bool, False) for flag in ("special", "normalized", "lstrip", "rstrip")}
        for flag in ("single_word", *(("lstrip", "rstrip") if flags["normalized"] else ())):
            if entry(token, flag, bool, False):
                raise ValueError(f"{flag} of the added token {name[:40]!r} is not implemented")
        if not name:
            raise ValueError("an added token is empty")
        tokens[name] = AddedToken(check_id(token.get("id"), name), **flags)
    return tokens


def read_normalizer(settings: dict, implemented: tuple[str, ...]) -> list[str]:
    """The types of its steps: NFC, Prepend (a "▁" in front) or Replace (spaces by "▁")."""
    steps = read_steps(settings, "normalizer", implemented)
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") != SPACE:
            raise ValueError(f"normalizer: Prepend is implemented for {SPACE} only")
        if step["type"] == "Replace" and not replaces(step, " ", SPACE):
            raise ValueError(f"normalizer: Replace is implemented for a space by {SPACE} only")
    return [step["type"] for step in steps]


def replaces(step: dict, old: str, new: str) -> bool:
    return step.get("pattern") == {"String": old} and step.get("content") == new


def read_post_processor(settings: dict) -> tuple[list[int], list[int]]:
    """The ids to put before those of a text, and the ids to put after them."""
    first, last = [], []
    for step in read_steps(settings, "post_processor", ("TemplateProcessing", "ByteLevel")):
        if step["type"] == "ByteLevel":
            continue  # changes offsets only
        around = [[]]
        for item in entry(step, "single", list):
            if isinstance(item, dict) and "Sequence" in item:
                around.append([])
            else:
                name = entry(entry(item, "SpecialToken", dict), "id", str)
                ids = entry(entry(entry(step, "special_tokens", dict), name, dict), "ids", list)
                around[-1] += [check_id(i, name) for i in ids]
        if len(around) != 2:
            raise ValueError("post_processor: the template must contain the text once")
        first, last = around[0] + first, last + around[1]
    return first, last

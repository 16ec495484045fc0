"""sentencepiece's BPE read from tokenizer.json, for checkpoints without a tokenizer.model.

The ids are those of tokenizer.py, with the same conventions: a space is the letter "▁", one is put in front of the
text, and a character that is not in the vocabulary is spelled in bytes such as "<0xE7>". The file has them in one of
two forms: as a normalizer (Prepend, Replace), applied to each part between special tokens; or as a pre_tokenizer
(Metaspace), which may put the space only in front of the whole text, and may split the text into words.
"""

import re

from family.bpe import BpeTokenizer
from family.tokenizer_json import entry, read_steps, replaces
from hub.files import SPACE
from hub.settings import require

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class SentencePieceJsonTokenizer(BpeTokenizer):
    normalizers = ("Prepend", "Replace")

    def __init__(self, settings: dict, config: dict, file):
        super().__init__(settings, config, file)
        if not entry(settings["model"], "byte_fallback", bool, False) or not self.vocab.keys() >= set(BYTES):
            raise ValueError("vocab does not have all 256 bytes, or byte_fallback is false")
        self.byte_tokens = {self.vocab[name]: bytes([byte]) for byte, name in enumerate(BYTES)}
        self.space_in_front, self.splits = read_metaspace(settings)
        self.first_space = read_first_space(settings)

    def words(self, text: str, is_first: bool) -> list[str]:
        if self.space_in_front is None:
            return [text]
        text = text.replace(" ", SPACE)
        has_space = self.space_in_front == "always" or (self.space_in_front == "first" and is_first)
        if has_space and text[0] != SPACE:
            text = SPACE + text
        return [word for word in re.split(f"(?={SPACE})", text) if word] if self.splits else [text]

    def letters(self, word: str) -> list[str]:
        in_bytes = ([char] if char in self.vocab else map(BYTES.__getitem__, char.encode()) for char in word)
        return [letter for letters in in_bytes for letter in letters]

    def piece(self, i: int, skip_special_tokens: bool) -> str | bytes:
        if skip_special_tokens and i in self.special_names:
            return ""
        return self.byte_tokens.get(i) or self.pieces.get(i, "").replace(SPACE, " ")


def read_metaspace(settings: dict) -> tuple[str | None, bool]:
    """When Metaspace puts a space in front ("always", "first", "never"; None without it), and whether it splits."""
    steps = read_steps(settings, "pre_tokenizer", ("Metaspace",))
    if not steps:
        return None, False
    scheme = steps[0].get("prepend_scheme", "always")
    require("pre_tokenizer: prepend_scheme", scheme, ("always", "first", "never"))
    if len(steps) > 1 or steps[0].get("replacement") != SPACE:
        raise ValueError(f"pre_tokenizer must be one Metaspace with {SPACE}")
    if steps[0].get("add_prefix_space") is False:  # the older name of "never"
        scheme = "never"
    return scheme, entry(steps[0], "split", bool, True)


def read_first_space(settings: dict) -> str:
    """The space that decoding removes, or "". Raises ValueError for decoders other than sentencepiece's."""
    steps = read_steps(settings, "decoder", ("Replace", "ByteFallback", "Fuse", "Strip"))
    strips = [step for step in steps if step["type"] == "Strip"]
    types = [step["type"] for step in steps if step["type"] != "Strip"]
    if types != ["Replace", "ByteFallback", "Fuse"] or strips != steps[3:4]:
        raise ValueError("decoder must be Replace, ByteFallback, Fuse and perhaps Strip")
    if not replaces(steps[0], SPACE, " "):
        raise ValueError(f"decoder: Replace is implemented for {SPACE} by a space only")
    if any((step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0) for step in strips):
        raise ValueError("decoder: Strip is implemented for one space in front only")
    return " " if strips else ""

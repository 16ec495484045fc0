"""Byte-level BPE, the tokenizer of GPT-2 (Radford et al. 2019), Llama-3 and Qwen2, read from tokenizer.json.

The letters are the 256 bytes, so every text can be encoded and <unk> is not needed. A regular expression first
splits the text into words, so that no piece contains the end of one word and the beginning of the next; the space
belongs to the word that follows. The file writes each byte as a printable character: "!" is itself, a space is "Ġ".

    " don't"  ->  [" don", "'t"]  ->  Ġ d o n, ' t  ->  Ġdon, 't

Decoding joins the bytes of all tokens before it reads them as UTF-8, because a character may be in several tokens.
"""

from itertools import pairwise

import regex

from family.bpe import BpeTokenizer
from family.tokenizer_json import entry, read_steps

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SECONDS = 5  # for one part of a text: a regular expression that backtracks may never end
MOST_PATTERNS = 8

# Byte -> letter: a printable byte of Latin-1 is its own letter; the others, in order, are U+0100, U+0101, ...
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class ByteLevelTokenizer(BpeTokenizer):
    normalizers = ("NFC",)

    def __init__(self, settings: dict, config: dict, file):
        super().__init__(settings, config, file)
        self.patterns = read_patterns(settings)
        if [step["type"] for step in read_steps(settings, "decoder", ("ByteLevel",))] != ["ByteLevel"]:
            raise ValueError("decoder must be ByteLevel")
        if not self.vocab.keys() >= set(LETTERS.values()):
            raise ValueError("vocab does not have all 256 bytes")

    def words(self, text: str, is_first: bool) -> list[str]:
        parts = [text]
        for pattern in self.patterns:
            parts = [piece for part in parts for piece in self.split(pattern, part)]
        return [part.encode().decode("latin-1").translate(LETTERS) for part in parts]

    def split(self, pattern: regex.Pattern, text: str) -> list[str]:
        """The matches and the text between them."""
        cuts = [0]
        try:
            for match in pattern.finditer(text, timeout=SECONDS):
                cuts += match.span()
        except (TimeoutError, MemoryError) as error:
            raise ValueError(f"{self.file}: its regular expression takes more than {SECONDS} seconds") from error
        cuts.append(len(text))
        if cuts != sorted(cuts):
            raise ValueError(f"{self.file}: the regular expression searches backwards")
        return [text[i:j] for i, j in pairwise(cuts) if i < j]

    def letters(self, word: str) -> list[str]:
        return list(word)

    def join(self, ids, skip_special_tokens: bool) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(i, skip_special_tokens) for i in map(int, ids)).decode(errors="replace")

    def piece(self, i: int, skip_special_tokens: bool) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary."""
        piece = "" if skip_special_tokens and i in self.special_names else self.pieces.get(i, "")
        return bytes(map(BYTES.get, piece)) if BYTES.keys() >= set(piece) else piece.encode()


def read_patterns(settings: dict) -> list[regex.Pattern]:
    """The regular expressions that split a text; each splits the parts that the one before it made."""
    patterns, steps = [], read_steps(settings, "pre_tokenizer", ("Split", "ByteLevel"))
    if [step["type"] == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise ValueError("pre_tokenizer must end with its only ByteLevel")
    for step in steps:
        if step["type"] == "ByteLevel":
            if entry(step, "add_prefix_space", bool, True):
                raise ValueError("pre_tokenizer: add_prefix_space is not implemented")
            patterns += [GPT2] if entry(step, "use_regex", bool, True) else []
        else:
            if step.get("behavior") != "Isolated" or step.get("invert"):
                raise ValueError("pre_tokenizer: Split is implemented for the behavior Isolated only")
            patterns.append(entry(entry(step, "pattern", dict), "Regex", str))
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"pre_tokenizer: more than {MOST_PATTERNS} regular expressions")
    return [compile_pattern(pattern) for pattern in patterns]


def compile_pattern(pattern: str) -> regex.Pattern:
    try:
        return regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"pre_tokenizer: its regular expression is not valid ({error})") from error

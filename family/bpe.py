"""Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909): letters merge into longer pieces.

Training counts adjacent pairs of pieces, makes the most frequent pair a new piece, and repeats. The pairs in that order
are the merges, and the position of a pair among them is its rank. Encoding a word repeats the merges: of all adjacent
pairs the one of lowest rank merges first, and of equal pairs the leftmost.

    merges  l o, lo w, e r        word  l o w e r  ->  lo w e r  ->  low e r  ->  low er

BpeTokenizer is what the two kinds of tokenizer.json have in common: byte_level_bpe.py, sentencepiece_json.py.
"""

import re
import unicodedata
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

from family.tokenizer_json import AddedToken, read_added_tokens, read_model, read_normalizer, read_post_processor
from hub.files import SPACE, read_json
from tokenizer import Tokenizer


def merge(letters: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge the letters of a word into pieces. `ranks`: pair of pieces -> rank; no piece in it is empty.

    Looking at every pair before each merge takes quadratic time, too long where a whole text is one word. A priority
    queue of pairs and a linked list of pieces make it O(n log n).
    """
    end = len(letters)
    pieces = [*letters, ""]  # "" is in no pair and marks both ends: pieces[-1] is pieces[end]
    before, after = list(range(-1, end)), [*range(1, end + 1), end]  # the neighbours of each piece
    queue = [(ranks[pair], left) for left, pair in enumerate(pairwise(letters)) if pair in ranks]
    heapify(queue)
    while queue:
        rank, left = heappop(queue)
        right = after[left]
        if ranks.get((pieces[left], pieces[right])) != rank:
            continue  # one of the two has merged with its other neighbour
        pieces[left] += pieces[right]
        pieces[right] = ""
        after[left] = after[right]
        before[after[right]] = left
        for i in (before[left], left):
            pair = pieces[i], pieces[after[i]]
            if pair in ranks:
                heappush(queue, (ranks[pair], i))
    return [piece for piece in pieces if piece]


# The characters that an added token with lstrip or rstrip includes: Unicode's White_Space.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
SPACES += "\u2028\u2029\u202f\u205f\u3000"


class BpeTokenizer(Tokenizer):
    """A tokenizer.json. `settings`: its content. `config`: tokenizer_config.json, which names bos, eos and pad.

    Each kind defines words(text, is_first), which splits a normalized text into the words in which letters merge;
    letters(word), the pieces that merging starts with, all in the vocabulary; and piece(i, skip_special_tokens).
    """

    normalizers: tuple[str, ...]  # the types that this kind may have
    first_space = ""  # what encoding adds in front of a text and decoding removes

    def __init__(self, settings: dict, config: dict, file: Path):
        self.file, self.padding_side = file, "left"
        self.vocab, self.ranks, self.ignore_merges = read_model(settings)
        self.vocab_size = max(self.vocab.values(), default=-1) + 1
        self.normalizer = read_normalizer(settings, self.normalizers)
        self.first_ids, self.last_ids = read_post_processor(settings)
        self.set_added_tokens(read_added_tokens(settings))
        names = ("bos_token", "eos_token", "pad_token")
        self.bos_token_id, self.eos_token_id, pad = (self.find_token(config, name) for name in names)
        if self.eos_token_id is None:
            raise ValueError("tokenizer_config.json next to it names no eos_token")
        self.pad_token_id = self.eos_token_id if pad is None else pad

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "BpeTokenizer":
        """Raises FileNotFoundError if there is no tokenizer.json, ValueError if it is damaged or not implemented."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        return cls.from_settings(read_json(file), read_json(Path(folder) / "tokenizer_config.json"), file)

    @classmethod
    def from_settings(cls, settings: dict, config: dict, file: Path) -> "BpeTokenizer":
        try:
            return cls(settings, config, file)
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from error

    def set_added_tokens(self, tokens: dict[str, AddedToken]) -> None:
        self.pieces = {i: piece for piece, i in self.vocab.items()}
        for name, token in tokens.items():
            if self.pieces.setdefault(token.id, name) != name or self.vocab.get(name, token.id) != token.id:
                raise ValueError(f"the added token {name[:40]!r} has two ids, or the id of another")
        if re.search("[\ud800-\udfff]", "".join(self.pieces.values())):
            raise ValueError("a piece contains half a surrogate pair")
        self.ids = {piece: i for i, piece in self.pieces.items()}
        self.special_tokens = {name: token.id for name, token in tokens.items() if token.special}
        self.special_names = {i: name for name, i in self.special_tokens.items()}
        self.image_token_id = tokens["<image>"].id if "<image>" in tokens else None
        self.exact = {name: token.id for name, token in tokens.items() if not token.normalized}
        self.normalized = {self.normalize(name): token.id for name, token in tokens.items() if token.normalized}
        self.left = {name for name, token in tokens.items() if token.lstrip}
        self.right = {name for name, token in tokens.items() if token.rstrip}
        self.special_pattern, self.normalized_pattern = one_of(self.exact), one_of(self.normalized)
        self.pieces |= {i: name for name, i in self.normalized.items()}  # the name that the library decodes to

    def set_image_token(self, i: int) -> None:
        """Let <image> in a prompt stand for special token i, which has another name in the file (JoyCaption's)."""
        if i in self.special_names:
            self.image_token_id = self.exact["<image>"] = i
            self.special_pattern = one_of(self.exact)

    def find_token(self, config: dict, key: str) -> int | None:
        name = config.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and (not isinstance(name, str) or name not in self.ids):
            raise ValueError(f"tokenizer_config.json next to it has the {key} {str(name)[:40]!r}, which has no id here")
        return self.ids.get(name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Cut out the added tokens, including any that the user typed, and encode each part between them separately."""
        ids, parts = [], self.special_pattern.split(text)
        for i, part in enumerate(parts):
            if i % 2:  # an added token
                ids.append(self.exact[part])
                continue
            if i > 0 and parts[i - 1] in self.right:
                part = part.lstrip(SPACES)
            if i + 1 < len(parts) and parts[i + 1] in self.left:
                part = part.rstrip(SPACES)
            ids += self.encode_text(part, is_first=not ids)
        return self.first_ids + ids + self.last_ids if add_special_tokens else ids

    def encode_text(self, text: str, is_first: bool = True) -> list[int]:
        """The ids of a text between special tokens. `is_first`: nothing comes before it."""
        ids = []
        for part in self.normalized_pattern.split(self.normalize(text)):
            if part in self.normalized:
                ids.append(self.normalized[part])
            elif part:
                for word in self.words(part, is_first and not ids):
                    whole = self.ignore_merges and word in self.vocab
                    ids += [self.vocab[p] for p in ([word] if whole else merge(self.letters(word), self.ranks))]
        return ids

    def normalize(self, text: str) -> str:
        for step in self.normalizer if text else []:
            if step == "NFC":
                text = unicodedata.normalize("NFC", text)
            else:
                text = SPACE + text if step == "Prepend" else text.replace(" ", SPACE)
        return text


def one_of(names: Iterable[str]) -> re.Pattern:
    """Matches the longest of the names; a group, so that split keeps the matches."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)") + ")")

"""Every available tokenizer, each with the reference's: the bundled one, a real one, and $LLAVA_CHECKPOINT's."""

import os
import random
import tempfile
from functools import cache
from pathlib import Path

import mistral_common
from transformers import AutoTokenizer

from hub.files import BUNDLED
from hub.writer import write_tokenizer
from tokenizer import Tokenizer

NAMES = ["bundled", "mistral"] + (["checkpoint"] if "LLAVA_CHECKPOINT" in os.environ else [])


@cache
def tokenizers(name: str):
    """(ours, the reference's). Mistral's package has only the sentencepiece model: we write its tokenizer.json."""
    if name == "mistral":
        (model,) = Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1")
        scratch = Path(tempfile.mkdtemp())
        write_tokenizer(Tokenizer(model.read_bytes()), scratch)
        return Tokenizer.from_pretrained(scratch), AutoTokenizer.from_pretrained(scratch)
    folder = os.environ["LLAVA_CHECKPOINT"] if name == "checkpoint" else BUNDLED
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def long_text(kind: str) -> str:
    """100,000 characters: words of several scripts, one word of random letters, or one letter again and again."""
    rng, pieces = random.Random(0), [" the", " cat's", "12", "\n\n", "生活", "🤗", ", ", "é"]
    if kind == "letter":
        return "a" * 100_000
    return "".join(rng.choices(pieces if kind == "mixed" else "etaoinshrdlu", k=100_000))[:100_000]

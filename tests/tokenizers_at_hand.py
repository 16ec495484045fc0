"""Every available tokenizer, each with the reference's: the bundled one, a real one, and $LLAVA_CHECKPOINT's."""

import os
import random
import tempfile
from functools import cache
from pathlib import Path

import mistral_common
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN2 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]


def byte_level_tokenizer(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """A small one as Qwen2's, for whole checkpoints."""
    tokenizer = Library(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(special_tokens=special, **options)
    tokenizer.train_from_iterator(["Which colours does the cat show? Both show a cat and an apple."] * 20, trainer)
    if bos := names.get("bos_token"):
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)

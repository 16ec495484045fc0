"""tokenizer.json alone gives the ids that the library `tokenizers` gives, and that sentencepiece gives."""

import json
import random
import time

import pytest
import sentencepiece
from test_byte_level_bpe import COMBINING, KNOWN
from tokenizers import Tokenizer as Library

from family.sentencepiece_json import SentencePieceJsonTokenizer
from folders import edit_json
from hub.files import BUNDLED
from hub.text_watcher import TextWatcher
from hub.writer import write_tokenizer
from tokenizer import Tokenizer
from tokenizers_at_hand import NAMES, long_text, tokenizers

ODD = ["  ", "\n", "\t", "\0", "\x7f", "\r\n", "\u00a0", "\u2581", "\u2581\u2581", "e\u0301", "ﬁ", "🤗"]
ODD += ["한국", "生活", "<0x41>", "\x1c", "\x85", "\u200b", "\u2003", "\u3000"]
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "<image", "<new>"]
PROMPT = ["USER: ", " ASSISTANT:", "the cat", " is on", " a red mat.", " ", "picture"]


def random_text(rng):
    pools = (SPECIAL, ODD, PROMPT, PROMPT, KNOWN, COMBINING)
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(16)))


def metaspace(scheme, split=False):
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": step}


def new_token(settings, **flags):
    token = {"id": 1 + max(token["id"] for token in settings["added_tokens"]), "content": "<new>", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | flags
    return settings["added_tokens"] + [token | flags]


def with_spaces(settings):
    """Added tokens that include the spaces around them, as in Phi-3's file."""
    flags = {"</s>": {"rstrip": True}, "<image>": {"lstrip": True}, "<pad>": {"lstrip": True, "rstrip": True}}
    return [token | flags.get(token["content"], {}) for token in new_token(settings, rstrip=True)]


def strip_nothing(settings):
    return {"decoder": {"type": "Sequence", "decoders": settings["decoder"]["decoders"][:3]}}


FORMS = {  # of the same tokenizer.json
    "as written": lambda s: {},
    "metaspace always": lambda s: metaspace("always"),
    "metaspace first": lambda s: metaspace("first"),
    "metaspace never": lambda s: metaspace("never") | strip_nothing(s),
    "metaspace split": lambda s: metaspace("first", split=True),
    "no prefix": lambda s: {"normalizer": s["normalizer"]["normalizers"][1]} | strip_nothing(s),
    "no post_processor": lambda s: {"post_processor": None},
    "ordinary token": lambda s: {"added_tokens": new_token(s)},
    "normalized token": lambda s: {"added_tokens": new_token(s, normalized=True)},
    "normalized token, metaspace": lambda s: metaspace("first") | {"added_tokens": new_token(s, normalized=True)},
    "tokens with spaces": lambda s: {"added_tokens": with_spaces(s)},
    "tokens with spaces, metaspace": lambda s: metaspace("first") | {"added_tokens": with_spaces(s)},
    "ignore merges": lambda s: metaspace("first", split=True) | {"model": s["model"] | {"ignore_merges": True}},
    "merges as texts": lambda s: {"model": s["model"] | {"merges": [" ".join(pair) for pair in s["model"]["merges"]]}},
}


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(Tokenizer.from_pretrained(BUNDLED), tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_text_are_the_librarys(folder, form):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | FORMS[form](content)))
    ours, theirs = SentencePieceJsonTokenizer.from_pretrained(folder), Library.from_file(str(file))
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, ascii(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids
        ids += [rng.choice([rng.randrange(3, 259), rng.randrange(theirs.get_vocab_size() + 9)]) for _ in range(5)]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_are_those_of_the_tokenizer_model(name, tmp_path):
    whole, _ = tokenizers(name)
    write_tokenizer(whole, tmp_path)
    ours = SentencePieceJsonTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(1000):
        text = random_text(rng)
        ids = whole.encode(text)
        assert ours.encode(text) == ids, ascii(text)
        assert ours.decode(ids) == whole.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == whole.decode(ids, skip_special_tokens=True)
        assert [ours.piece(i, True) for i in ids] == [whole.piece(i, True) for i in ids]


def test_a_trained_model_is_the_same_in_both_forms(tokenizer_model, tmp_path):
    write_tokenizer(Tokenizer(tokenizer_model), tmp_path)
    ours = SentencePieceJsonTokenizer.from_pretrained(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choices("the catdogmrix  ?\n", k=40))
        assert ours.encode_text(text) == sp.encode(text)


def test_attributes(folder):
    ours, whole = SentencePieceJsonTokenizer.from_pretrained(folder), Tokenizer.from_pretrained(BUNDLED)
    for name in ("bos", "eos", "pad", "image"):
        assert getattr(ours, f"{name}_token_id") == getattr(whole, f"{name}_token_id")
    for name in ("special_tokens", "special_names", "vocab_size", "padding_side"):
        assert getattr(ours, name) == getattr(whole, name)
    batch = [whole.encode("a cat"), whole.encode("<image>\na red mat")]
    assert [part.tolist() for part in ours.pad(batch)] == [part.tolist() for part in whole.pad(batch)]
    assert ours.batch_decode(batch, skip_special_tokens=True) == whole.batch_decode(batch, skip_special_tokens=True)


def test_without_an_image_token(folder):
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit_json(folder / "tokenizer.json", added_tokens=tokens[:3])
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    ours = SentencePieceJsonTokenizer.from_pretrained(folder)
    assert (ours.image_token_id, ours.pad_token_id) == (None, ours.eos_token_id)
    assert ours.decode(ours.encode("a <image>"), skip_special_tokens=True) == "a <image>"


def test_a_stream_shows_what_decoding_gives(folder):
    ours = SentencePieceJsonTokenizer.from_pretrained(folder)
    ids = ours.encode("A cat 🤗 on\na 生活 mat</s>")
    shown = []
    watcher = TextWatcher(ours, shown.append)
    for i in ids:
        watcher.put(i)
    assert "".join(shown) == ours.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["mixed", "word", "letter"])
def test_long_texts_take_little_time(folder, text):
    ours, theirs = SentencePieceJsonTokenizer.from_pretrained(folder), Library.from_file(str(folder / "tokenizer.json"))
    long = long_text(text)
    start = time.perf_counter()
    ids = ours.encode(long)
    assert time.perf_counter() - start < 5
    assert ids == theirs.encode(long).ids


# --- Damaged files ---------------------------------------------------------------------------------------------------


def bytes_missing(settings):
    vocab = {piece: i for piece, i in settings["model"]["vocab"].items() if piece != "<0x0A>"}
    return {"model": settings["model"] | {"vocab": vocab}}


DAMAGES = [
    (lambda s: {"model": None}, "model must be a JSON object"),
    (lambda s: {"model": s["model"] | {"type": "Unigram"}}, "model: type must be BPE, not 'Unigram'"),
    (lambda s: {"model": s["model"] | {"byte_fallback": False}}, "byte_fallback is false"),
    (bytes_missing, "vocab does not have all 256 bytes"),
    (lambda s: {"normalizer": {"type": "Lowercase"}}, "type must be Prepend or Replace, not 'Lowercase'"),
    (lambda s: {"normalizer": {"type": "Prepend", "prepend": "x"}}, "Prepend is implemented for"),
    (lambda s: {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}}}, "Replace is implemented for"),
    (lambda s: {"pre_tokenizer": {"type": "ByteLevel"}}, "type must be Metaspace, not 'ByteLevel'"),
    (lambda s: {"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "pre_tokenizer must be one Metaspace"),
    (lambda s: metaspace([]), "prepend_scheme must be always or first or never"),
    (lambda s: {"decoder": None}, "decoder must be Replace, ByteFallback, Fuse"),
    (lambda s: {"decoder": {"type": "Metaspace"}}, "decoder: type must be Replace or"),
    (lambda s: {"decoder": s["decoder"] | {"decoders": s["decoder"]["decoders"][1:]}}, "decoder must be Replace"),
    (lambda s: {"added_tokens": new_token(s, rstrip=True, normalized=True)}, "rstrip of the added token '<new>'"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_damaged_files_are_plain_errors(folder, change, words):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | change(content)))
    with pytest.raises(ValueError) as caught:
        SentencePieceJsonTokenizer.from_pretrained(folder)
    message = str(caught.value)
    assert str(file) in message and words in message and "\n" not in message


def test_a_missing_file_is_a_plain_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        SentencePieceJsonTokenizer.from_pretrained(tmp_path)

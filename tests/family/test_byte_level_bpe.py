"""Ids and text as the library `tokenizers` has them, with the expressions of Qwen2, Llama-3 and Mistral's Tekken."""

import base64
import json
import random
import time
import unicodedata
from functools import cache
from pathlib import Path
from unicodedata import ucd_3_2_0

import mistral_common
import pytest
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from family.byte_level_bpe import LETTERS, ByteLevelTokenizer
from folders import edit_json
from hub.text_watcher import TextWatcher
from tokenizers_at_hand import long_text

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
SPECIAL = ["<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|im_", "<pad>"]
ORDINARY = ["<tool_call>", " two  spaces "]  # cut out too, but never skipped
TEXT = [Path(__file__).parent.parent.parent.joinpath("README.md").read_text()] * 2 + [
    "I don't know what it's worth, they'll say. 1234 56 7890\n\n\n    def f(x):\n\treturn x  ",
    "Hỏi Đáp à é 生活的真谛是 한국어 Привет мир שלום नमस्ते 🤗👩‍👧",
] * 20
# Unicode 3.2: the tables of the library's NFC are older than Python's, and treat newer combining characters otherwise.
KNOWN = [chr(i) for i in range(0x110000) if ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
COMBINING = [c for c in KNOWN if unicodedata.combining(c)]
COMPOSED = [c for c in KNOWN if unicodedata.decomposition(c)]
ODD = ["  ", "    ", "\n", "\n\n", "\r\n", "\t", "\0", "\x1c", "\x1f", "\x7f", "\x85", "\u00a0", "\u200b", "\u2028"]
ODD += ["\u3000", "'s", "'LL", "'ſ", "don't", "1234567", "½", "٣", "<|", "<image", "Ġ", "Ċ", "▁"]
ODD += ["🤗", "👩\u200d👧", "🇫🇷", "한", "각"]


def random_text(rng, special=(*SPECIAL, *ORDINARY)):
    pools = (special, ODD, KNOWN, COMBINING, COMPOSED, "abcdefghi EIOST", ["the", " cat", " don't"])
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(24)))


def train(pattern, **options):
    """A small tokenizer of the library. `pattern`: None for GPT-2's own."""
    tokenizer = Library(models.BPE(**options))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(ORDINARY[0], normalized=False), AddedToken(ORDINARY[1], normalized=True)])
    return tokenizer


def qwen2():
    tokenizer = train(QWEN2)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def llama3():
    tokenizer = train(LLAMA3, ignore_merges=True)
    bos = "<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


@cache
def tekken_pieces():
    """The expression and the first 20,000 pieces of a real vocabulary."""
    file = json.loads(next(Path(mistral_common.__file__).parent.rglob("tekken_240911.json")).read_text())
    return file["config"]["pattern"], [base64.b64decode(entry["token_bytes"]) for entry in file["vocab"][:20_000]]


def tekken():
    """Two pieces that make a third are a merge, as in the hub's conversions."""
    pattern, pieces = tekken_pieces()
    vocab = {"".join(LETTERS[byte] for byte in piece): i for i, piece in enumerate(pieces)}
    merges = []
    for piece in vocab:
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = train(pattern)
    added = tokenizer.get_added_tokens_decoder().values()
    tokenizer.model = models.BPE(vocab, merges, ignore_merges=True)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = []
    tokenizer = Library.from_str(json.dumps(settings))
    tokenizer.add_tokens(list(added))
    return tokenizer


KINDS = {"qwen2": qwen2, "llama3": llama3, "gpt2": lambda: train(None), "tekken": tekken}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(ours, the library's)"""
    return open_both(KINDS[request.param](), tmp_path_factory.mktemp(request.param))


def open_both(theirs, folder):
    theirs.save(str(folder / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": {"content": "<pad>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return ByteLevelTokenizer.from_pretrained(folder), theirs


def test_ids_and_text_are_the_librarys(pair):
    ours, theirs = pair
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, ascii(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_text_of_random_ids_is_the_librarys(pair):
    """Among them halves of characters, and ids beyond the vocabulary."""
    ours, theirs = pair
    rng = random.Random(0)
    size = theirs.get_vocab_size()
    for _ in range(2000):
        ids = [rng.randrange(*rng.choice([(300,), (size,), (size - 9, size + 9)])) for _ in range(12)]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_text_comes_back(pair):
    ours, _ = pair
    for text in ("", " ", " two", "it's\r\n\r\n  fine  ", "".join(KNOWN[:3000])):
        text = unicodedata.normalize("NFC", text)
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_attributes(pair):
    ours, theirs = pair
    assert (ours.bos_token_id, ours.padding_side) == (None, "left")
    assert ours.eos_token_id == theirs.token_to_id("<|im_end|>")
    assert ours.pad_token_id == theirs.token_to_id("<pad>")
    assert ours.image_token_id == theirs.token_to_id("<image>")
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=False)
    assert set(ours.special_tokens) == set(SPECIAL)
    assert ours.special_names[ours.image_token_id] == "<image>"
    rows, mask = ours.pad([[5, 6, 7], [8]])
    assert (rows[1].tolist(), mask[1].tolist()) == ([ours.pad_token_id] * 2 + [8], [0, 0, 1])
    assert ours.batch_decode(rows, skip_special_tokens=True) == theirs.decode_batch(rows.tolist())


def test_a_stream_shows_what_decoding_gives(pair):
    ours, _ = pair
    ids = ours.encode("<|im_start|>The 🤗 of 生活, don't\n<|im_end|>", add_special_tokens=False)
    shown = []
    watcher = TextWatcher(ours, shown.append)
    for i in ids:
        watcher.put(i)
    assert not any("\ufffd" in part for part in shown)
    assert "".join(shown) == ours.decode(ids, skip_special_tokens=True)


def test_tekken_has_the_ids_of_mistrals_own_reader(tmp_path):
    ours, _ = open_both(tekken(), tmp_path)
    pattern, pieces = tekken_pieces()
    ranks = {piece: i for i, piece in enumerate(pieces)}
    theirs = tiktoken.Encoding("tekken", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
    rng = random.Random(1)
    words = [b"".join(rng.sample(pieces, 100)).decode(errors="ignore") for _ in range(500)]
    for text in words + [random_text(rng, special="{}") for _ in range(500)]:
        assert ours.encode(text) == theirs.encode(text), ascii(text)


# --- Other vocabularies and settings ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A very small one, to change or to break."""
    theirs = Library(models.BPE({letter: i for i, letter in enumerate(LETTERS.values())} | {"aa": 256}, [("a", "a")]))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(["</s>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return tmp_path


def test_without_an_image_token(folder):
    ours = ByteLevelTokenizer.from_pretrained(folder)
    assert (ours.image_token_id, ours.bos_token_id, ours.pad_token_id) == (None, None, ours.eos_token_id)
    assert len(ours.encode("<image>")) == 7


def test_without_added_tokens(folder):
    edit_json(folder / "tokenizer.json", added_tokens=[])
    edit_json(folder / "tokenizer_config.json", eos_token="!")
    ours = ByteLevelTokenizer.from_pretrained(folder)
    assert ours.decode(ours.encode("aaa</s>")) == "aaa</s>"


def test_merges_as_texts_and_as_lists(folder):
    ours = ByteLevelTokenizer.from_pretrained(folder)
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    for merges in (["a a"], [["a", "a"]]):
        edit_json(file, model=model | {"merges": merges})
        assert ByteLevelTokenizer.from_pretrained(folder).encode("aaa") == ours.encode("aaa") == [256, ours.vocab["a"]]


@pytest.mark.parametrize("text", ["mixed", "word", "letter"])
def test_long_texts_take_little_time(pair, text):
    ours, theirs = pair
    long = long_text(text)
    start = time.perf_counter()
    ids = ours.encode(long)
    assert time.perf_counter() - start < 5
    assert ids == theirs.encode(long).ids


# --- Damaged files ---------------------------------------------------------------------------------------------------


def refused(folder, *words):
    with pytest.raises(ValueError) as caught:
        ByteLevelTokenizer.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and "tokenizer.json" in message
    assert all(word in message for word in words), message


def split_by(pattern, behavior="Isolated"):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


TOKEN = {"id": 257, "content": "</s>"}


def model(vocab, merges=(), **others):
    return {"model": {"type": "BPE", "vocab": vocab, "merges": list(merges)} | others}


def normalizer(*steps):
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def template(*single):
    return {"post_processor": {"type": "TemplateProcessing", "single": list(single), "special_tokens": {}}}


DAMAGES = [
    ({"model": None}, "model must be a JSON object, not 'None'"),
    ({"model": []}, "model must be a JSON object"),
    ({"model": {"type": "Unigram", "vocab": []}}, "model: type must be BPE, not 'Unigram'"),
    ({"model": {"type": "WordPiece"}}, "model: type must be BPE, not 'WordPiece'"),
    (model(None), "vocab must be a JSON object"),
    (model({"a": 0}), "vocab does not have all 256 bytes"),
    (model({"a": "0"}), "the id of 'a' must be a whole number"),
    (model({"a": 2**40}), "the id of 'a' must be a whole number"),
    (model({"a": -1}), "the id of 'a' must be a whole number"),
    (model({"a": 0, "b": 0}), "two pieces the same id"),
    (model({"\ud800": 0}), "half a surrogate pair"),
    (model({"a": 0, "b": 1}, [["a", "b"]]), "merge 0 has pieces that are not in vocab"),
    (model({"a": 0}, ["a b c"]), "merge 0 is not a pair"),
    (model({"a": 0, "": 1}, [["", "a"]]), "merge 0 is not a pair"),
    (model({"a": 0}, [7]), "merge 0 is not a pair"),
    (model({"a": 0}, [[[], {}]]), "merge 0 is not a pair"),
    (model({}, dropout=0.1), "dropout is not implemented"),
    ({"normalizer": {"type": "NFKC"}}, "normalizer: type must be NFC, not 'NFKC'"),
    ({"normalizer": "NFC"}, "normalizer must be a JSON object"),
    ({"normalizer": {"type": "Sequence"}}, "normalizers must be a list"),
    (normalizer(None), "a JSON object with type should be"),
    (normalizer({"type": "Sequence"}), "normalizer: type must be NFC, not 'Sequence'"),
    ({"pre_tokenizer": None}, "pre_tokenizer must end with its only ByteLevel"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: type must be Split or ByteLevel, not 'Whitespace'"),
    ({"pre_tokenizer": {"type": "ByteLevel"}}, "add_prefix_space is not implemented"),
    ({"pre_tokenizer": split_by("(")}, "regular expression is not valid"),
    ({"pre_tokenizer": split_by(r"\p{Klingon}")}, "regular expression is not valid"),
    ({"pre_tokenizer": split_by("(" * 5000 + ")" * 5000)}, "regular expression is not valid"),
    ({"pre_tokenizer": split_by(7)}, "Regex must be a text"),
    ({"pre_tokenizer": split_by("a", behavior="Removed")}, "for the behavior Isolated only"),
    ({"decoder": None}, "decoder must be ByteLevel"),
    ({"decoder": {"type": "WordPiece"}}, "decoder: type must be ByteLevel, not 'WordPiece'"),
    ({"post_processor": {"type": "BertProcessing"}}, "post_processor: type must be TemplateProcessing or ByteLevel"),
    (template(), "must contain the text once"),
    (template("<s> $A"), "JSON object with SpecialToken"),
    (template({"SpecialToken": {"id": "<s>"}}), "<s> must be a JSON object"),
    ({"added_tokens": {}}, "added_tokens must be a list"),
    ({"added_tokens": [TOKEN | {"id": True}]}, "the id of '</s>' must be a whole number"),
    ({"added_tokens": [TOKEN | {"id": 3}]}, "has two ids, or the id of another"),
    ({"added_tokens": [TOKEN | {"lstrip": True, "normalized": True}]}, "lstrip of the added token '</s>'"),
    ({"added_tokens": [TOKEN | {"content": ""}]}, "an added token is empty"),
    ({"added_tokens": []}, "has the eos_token '</s>', which has no id here"),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_damaged_files_are_plain_errors(folder, changes, words):
    content = json.loads((folder / "tokenizer.json").read_text()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(folder, words)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"model": ' * 100_000, '"\\ud800"'])
def test_what_is_not_json_is_a_plain_error(folder, content):
    (folder / "tokenizer.json").write_text(content)
    refused(folder)


def test_a_missing_file_is_a_plain_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        ByteLevelTokenizer.from_pretrained(tmp_path)


def test_names_without_ids_are_plain_errors(folder):
    for name in (7, ["a"], "<none>", {"content": {}}):
        edit_json(folder / "tokenizer_config.json", eos_token=name)
        refused(folder, "eos_token", "has no id here")
    (folder / "tokenizer_config.json").unlink()
    refused(folder, "names no eos_token")


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(?:a?){60}a{60}b", r"(.*)*\1b", "(?R)?a"])
def test_an_expression_that_backtracks_ends(folder, pattern, monkeypatch):
    monkeypatch.setattr("family.byte_level_bpe.SECONDS", 0.2)
    edit_json(folder / "tokenizer.json", pre_tokenizer=split_by(pattern))
    ours = ByteLevelTokenizer.from_pretrained(folder)
    start = time.perf_counter()
    try:
        assert ours.decode(ours.encode("a" * 60 + "!")) == "a" * 60 + "!"
    except ValueError as error:
        assert "tokenizer.json: its regular expression takes more than" in str(error)
    assert time.perf_counter() - start < 5


ODD_VALUES = [None, True, -1, 1.5, 10**30, "", "x", "\ud800", [], {}, [None], [[]], {"type": 1}, {"a": "b"}]


def test_wrong_values_anywhere_never_end_in_another_error(folder):
    rng = random.Random(0)
    whole = (folder / "tokenizer.json").read_text()
    for _ in range(400):
        content = part = json.loads(whole)
        while True:
            key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.3:
                break
            part = part[key]
        part[key] = rng.choice(ODD_VALUES)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        try:
            ByteLevelTokenizer.from_pretrained(folder).encode("a text</s>")
        except ValueError as error:
            assert "tokenizer.json" in str(error)

"""Token ids and text as the reference has them, and prompts as its templates write them."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hub.text_watcher import TextWatcher
from hub.writer import jinja, write_tokenizer
from tokenizer import TEMPLATES, Tokenizer
from tokenizers_at_hand import NAMES, tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
ODD = ["  ", "\n", "\t", "\0", "\x7f", "\r\n", "\u00a0", "\u200b", "\ufeff", "\u2581", "e\u0301", "ﬁ", "𝔘", "🤗"]
ODD += [
    "👩\u200d👧",
    "한국",
    "生活的真谛是",
    "<0x41>",
    "<image",
    "USER:",
    " ASSISTANT:",
    " the",
    "shows a cat.",
    "1234",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SPECIAL + ODD), st.text(max_size=6)), max_size=10).map("".join)


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return tokenizers(request.param)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_ids_are_the_references(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), skip=st.booleans())
def test_text_of_random_ids_is_the_references(pair, seed, skip):
    ours, theirs = pair
    rng = random.Random(seed)
    top = max(ours.special_names) + 62  # beyond the vocabulary too: checkpoints have spare rows
    # bytes, special tokens and the rest in equal shares: most of the vocabulary is plain words
    special = list(ours.special_names)
    ids = [rng.choice([rng.randrange(3, 259), rng.choice(special), rng.randrange(top)]) for _ in range(12)]
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_stream_shows_what_decoding_gives_and_never_half_a_character(pair, text):
    tokenizer, _ = pair
    ids = tokenizer.encode(text.replace("\ufffd", ""))
    shown = []
    watcher = TextWatcher(tokenizer, shown.append)
    for i in ids[:-1]:
        watcher.put(i)
    assert not any("\ufffd" in part for part in shown)
    watcher.put(ids[-1])
    watcher.flush()
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stream_that_ends_in_half_a_character_says_so(pair):
    tokenizer, _ = pair
    half = tokenizer.sp.piece_to_id("<0xF0>")
    shown = []
    watcher = TextWatcher(tokenizer, shown.append)
    watcher.put(half)
    watcher.put(half)
    assert shown == []
    watcher.flush()
    assert shown == ["\ufffd\ufffd"]


def test_what_is_odd_about_sentencepiece():
    """As in the reference's own tokenizer for LLaVA-1.5, from which this one differs only in its vocabulary."""
    ours, _ = tokenizers("bundled")
    space = ours.sp.piece_to_id("\u2581")
    assert ours.encode("") == [1]
    assert ours.encode(" ")[1:] in ([space, space], [ours.sp.piece_to_id("\u2581\u2581")])
    assert ours.encode("<s>") == [1, 1]
    newline = ours.sp.piece_to_id("<0x0A>")
    assert ours.encode("<image>\n", add_special_tokens=False) == [ours.image_token_id, space, newline]


def test_padding_goes_to_the_side_asked_for(pair):
    tokenizer = Tokenizer(pair[0].sp.serialized_model_proto())
    ids, mask = tokenizer.pad([[5, 6, 7], [8]])
    pad = tokenizer.pad_token_id
    assert ids.tolist() == [[5, 6, 7], [pad, pad, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    tokenizer.padding_side = "right"
    ids, mask = tokenizer.pad([[5, 6, 7], [8]])
    assert (ids[1].tolist(), mask[1].tolist()) == ([8, pad, pad], [1, 0, 0])


def test_batches_and_tensors_decode_too(pair):
    ours, theirs = pair
    ids = torch.tensor([ours.encode("a cat"), ours.encode("a dog")[: len(ours.encode("a cat"))]])
    assert ours.batch_decode(ids, skip_special_tokens=True) == theirs.batch_decode(ids, skip_special_tokens=True)


def test_misspelt_options_of_decoding_are_errors(pair):
    for decode, ids in ((pair[0].decode, [5]), (pair[0].batch_decode, [[5]]), (pair[0].batch_decode, [])):
        with pytest.raises(TypeError, match="unexpected keyword argument 'skip_special_token'"):
            decode(ids, skip_special_token=True)


@pytest.mark.parametrize("clean_up", [None, False, True])  # for WordPiece; changes nothing in the reference
def test_the_clean_up_that_the_page_names_changes_nothing(pair, clean_up):
    ids = pair[0].encode("do n't . a cat , yes !")
    said = {p.decode(ids, clean_up_tokenization_spaces=clean_up) for p in pair}
    said |= {p.batch_decode([ids], clean_up_tokenization_spaces=clean_up)[0] for p in pair}
    assert said == {pair[0].decode(ids)}


def test_special_tokens_are_found_in_every_layout(pair, tmp_path):
    ours, _ = pair
    write_tokenizer(ours, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {token["content"]: int(i) for i, token in config.pop("added_tokens_decoder").items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).special_tokens == ours.special_tokens  # from tokenizer.json
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({k: added[k] for k in ("<image>", "<pad>")}))
    assert Tokenizer.from_pretrained(tmp_path).special_tokens == ours.special_tokens
    (tmp_path / "added_tokens.json").unlink()
    assert "<image>" in Tokenizer.from_pretrained(tmp_path).special_tokens  # after the last piece


def test_plain_errors(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)
    write_tokenizer(pair[0], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


if "checkpoint" in NAMES:

    def test_known_ids_of_llava_1_5():
        ours, _ = tokenizers("checkpoint")
        question = "USER: <image>\nWhat are these?\nASSISTANT:"
        ids = "1 3148 1001 29901 29871 32000 29871 13 5618 526 1438 29973 13 22933 9047 13566 29901"
        assert ours.encode(question) == list(map(int, ids.split()))
        assert ours.encode("生活的真谛是") == [1, 29871, 30486, 31704, 30210, 30848, 235, 179, 158, 30392]
        assert [ours.encode(text) for text in ("", " ", " Hello", "<s>")] == [[1], [1, 259], [1, 29871, 15043], [1, 1]]


# --- Prompts ---------------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "Q1"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A1"}]},
    {"role": "user", "content": "Q2"},
]


def test_the_prompts_are_those_of_the_papers_and_the_hub():
    assert TEMPLATES["hub"].render(CONVERSATION) == "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 "
    assert TEMPLATES["hub"].render(CONVERSATION, True) == "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:"
    assert TEMPLATES["v1"].render(CONVERSATION, True) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    )
    caption = [CONVERSATION[0] | {"content": [{"type": "image"}]}, {"role": "assistant", "content": "a cat"}]
    assert TEMPLATES["plain"].render(caption) == "<image>\na cat"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages must be a list of at least one"),
        (CONVERSATION[0], "messages must be a list of at least one"),
        ([CONVERSATION], "messages must be a list of at least one"),
        ([{"role": "tool", "content": "5"}], "a message's role must be system or user or assistant, not 'tool'"),
        ([*CONVERSATION, {"content": "5"}], "a message's role must be system or user or assistant, not None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must be image or text, not 'image_url'"),
        ([{"role": "user", "content": [{"text": "Q"}]}], "must be image or text, not None"),
        ([{"role": "user", "content": ["Q"]}], "must be image or text, not 'Q'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part of type text must have a text"),
        ([{"role": "user", "content": None}], "a message's content must be a text or a list of parts, not None"),
        ([{"role": "user"}], "a message's content must be a text or a list of parts, not None"),
    ],
    ids=str,
)
def test_messages_that_cannot_be_written_are_plain_errors(messages, words):
    for template in TEMPLATES.values():
        with pytest.raises(ValueError, match=words):
            template.render(messages)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_jinja_we_save_renders_the_same(name, system, add_generation_prompt):
    _, theirs = tokenizers("bundled")
    messages = [{"role": "system", "content": "Be brief."}] * system + CONVERSATION
    template = jinja(TEMPLATES[name])
    rendered = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert TEMPLATES[name].render(messages, add_generation_prompt) == rendered


def test_our_tokenizer_json_is_read_by_the_plain_library_too(pair, tmp_path):
    write_tokenizer(pair[0], tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("a <image> b") == pair[0].encode("a <image> b")
    assert (theirs.pad_token, theirs.padding_side) == ("<pad>", "left")

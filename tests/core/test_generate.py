"""Choosing tokens: the reference's choices for every setting, and what only ours has (seed, streamer, stop strings)."""

import pytest
import torch

import generate
from llama import Llama, LlamaConfig
from llava import LlavaForConditionalGeneration
from reference import prompts, reference_and_ours, reference_model
from tokenizers_at_hand import tokenizers


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return reference_and_ours(tmp_path_factory.mktemp("checkpoint"))


def inputs(lengths=(9, 5), pictures=(1, 2)) -> dict:
    ids, mask = prompts(list(lengths), list(pictures), patches=16)
    pixels = torch.randn(sum(pictures), 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 1},
        {"max_new_tokens": 9},
        {"max_length": 60},
        {"repetition_penalty": 1.7, "max_new_tokens": 15},
        {"repetition_penalty": 0.6, "max_new_tokens": 15},
        {"do_sample": True, "max_new_tokens": 15},
        {"do_sample": True, "temperature": 0.4, "top_k": 0},
        {"do_sample": True, "temperature": 2.0, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "top_p": 0.3, "repetition_penalty": 1.3},
        {"do_sample": True, "top_p": 1e-6},
        {"eos_token_id": list(range(3, 150)), "max_new_tokens": 15},
        {"eos_token_id": list(range(3, 150)), "pad_token_id": 7, "max_new_tokens": 15},
    ],
    ids=str,
)
def test_tokens_are_the_references(pair, options):
    reference, model = pair
    torch.manual_seed(5)
    theirs = reference.generate(**inputs(), **options)
    seed = 5 if "do_sample" in options else None
    assert torch.equal(model.generate(**inputs(), seed=seed, **options), theirs)


def test_the_checkpoints_generation_config_is_honoured(tmp_path):
    reference = reference_model()
    reference.generation_config.update(do_sample=True, top_k=7, max_length=50, eos_token_id=[2, 40, 41, 42])
    reference.save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.manual_seed(3)
    theirs = reference.generate(**inputs(), pad_token_id=0)
    assert torch.equal(model.generate(**inputs(), pad_token_id=0, seed=3), theirs)


def test_a_mask_with_holes(pair):
    reference, model = pair
    given = inputs((9,), (1,))
    given["attention_mask"][0, 4:7] = 0
    theirs = reference.generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**given, max_new_tokens=8), theirs)


def test_the_tower_runs_once_per_picture(pair, monkeypatch):
    _, model = pair
    seen = []
    forward = model.vision_tower.forward
    monkeypatch.setattr(
        model.vision_tower, "forward", lambda pixels, depth: seen.append(len(pixels)) or forward(pixels, depth)
    )
    model.generate(**inputs(), max_new_tokens=6, eos_token_id=None)
    assert seen == [3]


def test_a_decoded_token_costs_one_token(pair, monkeypatch):
    _, model = pair
    lengths = []
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model, "forward", lambda x, *rest: lengths.append(x.shape[1]) or forward(x, *rest)
    )
    model.generate(**inputs((9,), (1,)), max_new_tokens=4, eos_token_id=None)
    assert lengths == [26, 1, 1, 1]


def test_the_smallest_temperature_draws_the_likeliest_token(pair):
    _, model = pair
    coldest = model.generate(**inputs(), do_sample=True, temperature=1e-6, max_new_tokens=9, seed=0)
    assert torch.equal(coldest, model.generate(**inputs(), max_new_tokens=9))


def test_the_same_seed_draws_the_same_tokens(pair):
    _, model = pair
    draw = lambda seed: model.generate(**inputs(), do_sample=True, seed=seed, top_k=0).tolist()  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 5.0, "top_p": 0.5, "seed": 1}, "seed, temperature, top_p"),
        ({"top_k": 3, "do_sample": False}, "top_k"),
    ],
    ids=str,
)
def test_options_of_sampling_are_not_ignored_in_silence(pair, options, named):
    with pytest.warns(UserWarning, match=f"without do_sample=True these have no effect: {named}$") as warned:
        pair[1].generate(**inputs(), max_new_tokens=1, **options)
    assert warned[0].filename == __file__  # it points at the caller


def test_only_what_the_caller_gave_is_warned_about(pair, monkeypatch, recwarn):
    model = pair[1]
    monkeypatch.setattr(model, "generation_config", {"temperature": 0.7, "top_p": 0.9, "top_k": 3})
    model.generate(**inputs(), max_new_tokens=1)
    model.generate(**inputs(), max_new_tokens=1, temperature=None, seed=None)
    model.generate(**inputs(), max_new_tokens=1, do_sample=True, temperature=0.5, seed=1)
    monkeypatch.setattr(model, "generation_config", {"do_sample": True})
    model.generate(**inputs(), max_new_tokens=1, temperature=0.5, top_p=0.9, top_k=3, seed=1)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_length": 38}, "after 38 tokens"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "temperature": 1e-40}, "temperature must be at least 1e-6, not 1e-40, when sampling"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be at least 1e-6, not nan"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"num_beams": 4}, "num_beams"),
        ({"attention_mask": torch.ones(2, 3)}, "shape of input_ids"),
        ({"attention_mask": torch.ones(2, 38, dtype=torch.long).index_fill(1, torch.tensor([37]), 0)}, "on the left"),
        ({"streamer": print}, "tokenizer"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"streamer": print, "tokenizer": tokenizers("bundled")[0]}, "one answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_options_out_of_range_are_plain_errors(pair, options, words):
    with pytest.raises(ValueError, match=words):
        pair[1].generate(**inputs() | options)


# --- Text: streaming and stop strings --------------------------------------------------------------------------------


class Parrot:
    """A stand-in for a model that generates the given ids, one row each, for any input."""

    def __init__(self, *rows: list[int]):
        self.rows, self.count, self.generation_config = rows, -1, {"eos_token_id": 2}
        self.language_model = Llama(LlamaConfig(8, 8, 8, 1, 1))  # for its cache

    def step(self, *_):
        self.count += 1
        logits = torch.zeros(len(self.rows), 40000)
        for row, ids in enumerate(self.rows):
            logits[row, ids[min(self.count, len(ids) - 1)]] = 1
        return logits

    def __call__(self, *_, **__):
        return type("Out", (), {"logits": self.step()[:, None]})


@pytest.mark.parametrize("text", ["A cat.", "生活 🤗 of é\n", "👩‍👩‍👧"])
def test_streaming_gives_the_text_and_never_half_a_character(text):
    tokenizer, _ = tokenizers("mistral")
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = []
    out = generate.generate(
        Parrot([*ids, 2]), torch.tensor([[1]]), tokenizer=tokenizer, streamer=shown.append, max_new_tokens=50
    )
    assert out.tolist() == [[1, *ids, 2]]
    assert "".join(shown) == text
    assert len(shown) > 1 and not any("\ufffd" in part for part in shown)


def test_a_stream_cut_off_in_the_middle_of_a_character_ends_with_a_mark():
    tokenizer, _ = tokenizers("mistral")
    ids = tokenizer.encode("a𝔘", add_special_tokens=False)
    shown = []
    generate.generate(
        Parrot(ids), torch.tensor([[1]]), tokenizer=tokenizer, streamer=shown.append, max_new_tokens=len(ids) - 1
    )
    assert "".join(shown) == "a\ufffd\ufffd\ufffd"


def test_stop_strings_end_their_own_row():
    tokenizer, _ = tokenizers("mistral")
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in ("one two three four", "five six two seven")]
    ids = torch.ones(2, 1, dtype=torch.long)
    out = generate.generate(Parrot(*rows), ids, tokenizer=tokenizer, stop_strings=["two", "nine"], max_new_tokens=9)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert texts == ["one two", "five six two"]
    out = generate.generate(Parrot(rows[0]), ids[:1], tokenizer=tokenizer, stop_strings="three", max_new_tokens=9)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == "one two three"


def test_a_finished_row_is_filled_with_padding():
    out = generate.generate(
        Parrot([5, 2], [6, 7, 8, 2]), torch.ones(2, 1, dtype=torch.long), pad_token_id=9, max_new_tokens=9
    )
    assert out.tolist() == [[1, 5, 2, 9, 9], [1, 6, 7, 8, 2]]


def test_image_tokens_beyond_the_vocabulary_bear_a_repetition_penalty():
    out = generate.generate(Parrot([5, 2]), torch.tensor([[1, 50000]]), repetition_penalty=2.0, pad_token_id=50001)
    assert out.tolist() == [[1, 50000, 5, 2]]

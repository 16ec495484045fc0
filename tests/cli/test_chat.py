"""The chat: which tokens a turn runs, the same answers as without a cache, interrupts, and what the user can type."""

import json
import signal
from pathlib import Path

import pytest
import torch

import cli
from cli import chat
from cli.chat import Chat
from hub.pictures import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor
from small import small
from tokenizer import TEMPLATES

ROOT = Path(__file__).parent.parent.parent
PICTURES = [str(ROOT / "images" / f"{name}.jpg") for name in ("rocket", "owl-and-key")]


@pytest.fixture(scope="module")
def model():
    return small(context=400)[0]


@pytest.fixture(params=["hub", "v1", "plain"])
def talk(model, request):
    return begin(model, request.param)


def begin(model, template="hub", **options):
    return Chat(model, small(template=template)[1], **{"max_new_tokens": 8} | options)


def show(talk, path):
    talk.pictures.append((path, open_image(path)))


def say(talk, text):
    pieces = []
    why = talk.say(text, pieces.append)
    return why, "".join(pieces)


@pytest.fixture
def runs(model, monkeypatch):
    """The number of tokens in each run of the decoder."""
    lengths, forward = [], model.language_model.forward
    monkeypatch.setattr(
        model.language_model, "forward", lambda x, *rest: lengths.append(x.shape[1]) or forward(x, *rest)
    )
    return lengths


# --- Turns and answers -----------------------------------------------------------------------------------------------


def test_a_turn_runs_its_own_words_only(talk, runs):
    show(talk, PICTURES[0])
    for text in ("what is this?", "and where?", "why"):
        before, own = len(talk.ids), len(talk.turn_ids(text))
        assert say(talk, text)[0] == "length"
        unrun = 1 if before else 0  # the last token of the previous answer, which was cut short
        assert runs == [own + unrun] + [1] * 7
        runs.clear()
        assert len(talk.ids) == before + own + 8 == talk.cache.length + 1
        assert talk.processor.tokenizer.image_token_id not in talk.ids[before + own :]


@torch.no_grad()
def test_the_answers_are_those_without_a_cache(talk, model):
    """Pictures in two turns, and a cache that had to grow."""
    for i, text in enumerate(["a cat", "and?", "what is that", "no"]):
        pixels = talk.processor.image_processor([open_image(path) for path in PICTURES[: 1 + i // 2]])
        if i in (0, 2):
            show(talk, PICTURES[i // 2])
        prompt = talk.ids + talk.turn_ids(text)
        _, said = say(talk, text)
        afresh = model.generate(input_ids=torch.tensor([prompt]), pixel_values=pixels, max_new_tokens=8)[0]
        assert talk.ids == afresh.tolist()
        assert said == talk.processor.tokenizer.decode(afresh[len(prompt) :])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_ids_are_those_of_the_template(model, template, system):
    """Three turns whose answers end by themselves: the same ids as for the whole conversation encoded as one text."""
    if template == "plain":
        return  # a template without text between turns
    talk, messages = begin(model, template, system=system), []
    tokenizer = talk.processor.tokenizer
    show(talk, PICTURES[0])
    for text, answer in (("what is it?", "a cat"), ("and this", "It is red."), ("why", "no")):
        content = [{"type": "image"}] * len(talk.pictures) + [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        talk.ids += talk.turn_ids(text)
        talk.pictures = []
        opening = [{"role": "system", "content": system}] if system else []
        whole = talk.processor.template.render(opening + messages, add_generation_prompt=True)
        whole = whole.replace("<image>", "<image>" * talk.processor.image_seq_length)
        assert talk.ids == tokenizer.encode(whole)
        messages.append({"role": "assistant", "content": answer})
        talk.ids += tokenizer.encode(answer, add_special_tokens=False)


def test_an_end_token_ends_the_answer_and_the_template_writes_it(model):
    talk = begin(model, "v1")
    say(talk, "hello")
    end = talk.ids[-3]
    talk = begin(model, "v1", eos_token_id=[end])
    assert say(talk, "hello")[0] == "stop"
    assert end not in talk.ids[len(begin(model, "v1").turn_ids("hello")) :]
    assert talk.cache.length == len(talk.ids)  # the end token is not among them
    assert talk.turn_ids("again")[0] == talk.processor.tokenizer.eos_token_id  # but the template writes one


def test_a_stop_string_ends_an_answer(model):
    said = say(begin(model), "hello")[1]
    words = said.split()
    why, shorter = say(begin(model, stop_strings=[f" {words[2]}"]), "hello")
    assert (why, shorter.split()) == ("stop", words[: words.index(words[2], 1) + 1])


def test_the_same_seed_gives_the_same_conversation(model):
    one, again, other = (begin(model, do_sample=True, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    texts = [[say(talk, text)[1] for text in ("hello", "and")] for talk in (one, again, other)]
    assert texts[0] == texts[1] != texts[2]


# --- Interrupts and the end of the context ---------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt here, as in the command; a shell starts a job in the background ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(model, monkeypatch, after: int) -> None:
    """One Ctrl-C in the middle of the decoder's run number `after`."""
    count, norm = iter(range(1000)), model.language_model.norm.forward

    def interrupt(x):
        if next(count) == after:
            signal.raise_signal(signal.SIGINT)
        return norm(x)

    monkeypatch.setattr(model.language_model.norm, "forward", interrupt)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("after", [0, 1, 4])
def test_ctrl_c_stops_the_answer_not_the_conversation(model, monkeypatch, capsys, after):
    talk = begin(model)
    show(talk, PICTURES[0])
    question = len(talk.turn_ids("what is it?"))
    with monkeypatch.context() as patch:
        interrupted(model, patch, after)
        chat.respond(talk, "what is it?")
    if after == 0:  # the prefill was not complete: the question is discarded, and the picture belongs to the next one
        assert (talk.ids, talk.turns, talk.cache.length, len(talk.pictures)) == ([], [], 0, 1)
    else:  # run 1 is of the first token, which was already shown; not all its keys are in the cache
        assert (len(talk.ids), talk.cache.length) == (question + after, question + after - 1)
        assert talk.turns[1]["value"] == capsys.readouterr().out.strip("\n")
    prompt = talk.ids + talk.turn_ids("go on")
    say(talk, "go on")
    pixels = talk.processor.image_processor([open_image(PICTURES[0])])
    afresh = model.generate(input_ids=torch.tensor([prompt]), pixel_values=pixels, max_new_tokens=8)[0]
    assert talk.ids == afresh.tolist()


class Interrupted:
    """A tensor whose writing is interrupted by Ctrl-C."""

    def __setitem__(self, *_):
        raise KeyboardInterrupt


def test_ctrl_c_while_the_cache_grows_leaves_the_old_one(model, monkeypatch):
    talk, new_cache = begin(model), model.language_model.new_cache
    say(talk, "hello")

    def interrupted_cache(*sizes):
        cache = new_cache(*sizes)
        cache.v[-1] = Interrupted()
        return cache

    with monkeypatch.context() as patch:
        old = talk.cache
        patch.setattr(model.language_model, "new_cache", interrupted_cache)
        chat.respond(talk, "and?")
        assert talk.cache is old and len(talk.turns) == 2
    prompt = talk.ids + talk.turn_ids("and?")
    say(talk, "and?")
    assert talk.cache is not old
    assert talk.ids == model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8)[0].tolist()


def test_the_contexts_end_stops_an_answer_and_the_next_turn(model, capsys):
    talk = begin(model, max_new_tokens=1000)
    chat.respond(talk, "hello")
    assert len(talk.ids) == 400  # max_position_embeddings
    assert "the context of 400 tokens is full" in capsys.readouterr().err
    before = list(talk.ids), talk.cache.length, list(talk.turns)
    with pytest.raises(ValueError, match="the context ends at 400"):
        say(talk, "more")
    assert before == (talk.ids, talk.cache.length, talk.turns)
    talk.clear()
    assert say(talk, "hello")[0] == "context"


# --- Lines and commands ----------------------------------------------------------------------------------------------


def converse(talk, monkeypatch, capsys, *lines):
    """Standard output and standard error of a chat in which the user types these lines."""
    lines = iter(lines)

    def read(prompt=""):
        line = next(lines, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    chat.converse(talk)
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("last", ["", "   ", "/quit", EOFError])
def test_ways_to_leave(model, monkeypatch, capsys, last):
    out, _ = converse(begin(model), monkeypatch, capsys, "hello", last, "never read")
    assert out.count("\n") == 1


def test_an_input_that_cannot_be_read_ends_it(model, monkeypatch, capsys):
    with pytest.raises(OSError, match="Bad file descriptor"):
        converse(begin(model), monkeypatch, capsys, "hello", OSError("Bad file descriptor"), "never read")


def test_commands(model, monkeypatch, capsys, tmp_path):
    talk, file = begin(model), tmp_path / "said.json"
    lines = [f"/image {PICTURES[0]}", f'/image "{PICTURES[1]}"', "what are they?", "and?", f"/save {file}", "/help"]
    _, err = converse(talk, monkeypatch, capsys, *lines)
    for word in ("/image", "/clear", "/save", "/help", "/quit", "Ctrl-C", f"{PICTURES[1]} is added"):
        assert word in err
    (record,) = json.loads(file.read_text())
    assert record["image"] == PICTURES
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
    assert record["conversations"][0]["value"] == "<image>\n<image>\nwhat are they?"
    assert [path.name for path in tmp_path.iterdir()] == ["said.json"]
    converse(talk, monkeypatch, capsys, "/clear")
    assert (talk.ids, talk.cache.length, talk.turns, talk.pictures) == ([], 0, [], [])


def test_saving_leaves_other_files_alone(model, tmp_path):
    (tmp_path / "said.json.unfinished").write_text("mine")
    begin(model).save(str(tmp_path / "said.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said.json", "said.json.unfinished"]
    assert (tmp_path / "said.json.unfinished").read_text() == "mine"


def test_what_is_saved_can_be_trained_on_whatever_was_typed(model, tmp_path):
    from training.records import Records

    talk, file = begin(model), tmp_path / "said.json"
    show(talk, PICTURES[0])
    say(talk, "what does <image> mean, or </s>?")
    talk.save(file)
    records = Records(file, ROOT / "images", talk.processor, longest=400)
    assert talk.turns == records.records[0][1]["conversations"] and not records.skipped
    assert talk.turns[0]["value"] == "<image>\nwhat does < image> mean, or < /s>?"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image absent.jpg", "absent.jpg is not a file"),
        (f"/image {ROOT}", "is not a file"),
        ("/image", "/image needs a path"),
        ("/save", "/save needs a path"),
        ("/save no/such/folder/x.json", "no/such/folder"),
        ("/dance", "/dance is not a command"),
        ("long " * 1000, "the context ends at 400"),
        (KeyboardInterrupt, "An empty line or Ctrl-D leaves."),
    ],
    ids=str,
)
def test_a_user_error_is_one_sentence_and_the_conversation_continues(model, monkeypatch, capsys, line, words):
    out, err = converse(begin(model), monkeypatch, capsys, "hello", line, "hello")
    assert out.count("\n") == 2
    assert words in err.strip("\n").splitlines()[-1]


def test_too_little_memory_is_one_sentence(model, monkeypatch, capsys):
    def full(*_):
        raise MemoryError

    talk = begin(model)
    monkeypatch.setattr(model.language_model, "new_cache", full)
    assert "not enough memory: /clear starts a new conversation" in converse(talk, monkeypatch, capsys, "hello")[1]


def test_a_closed_pipe_is_not_swallowed(model, monkeypatch, capsys):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(Chat, "say", closed)
    with pytest.raises(BrokenPipeError):
        converse(begin(model), monkeypatch, capsys, "hello")


def test_typed_special_tokens_are_text(model):
    for typed in ("</s>", "<image>", "<s>", "<pad> <unk>", "USER: <image> ASSISTANT:</s>"):
        talk = begin(model, "v1")
        ids = talk.turn_ids(f"say {typed} twice")
        special = set(talk.processor.tokenizer.special_names) - {talk.processor.tokenizer.sp.unk_id()}
        assert [i for i in ids if i in special] == [1], typed  # the template's <s>
        assert typed in talk.processor.tokenizer.decode(ids, skip_special_tokens=True)
        say(talk, typed)


def test_special_tokens_that_the_tokenizer_cannot_avoid_are_refused(model, monkeypatch):
    """The sentencepiece models of some checkpoints encode the text </s> as the control token."""
    talk = begin(model)

    class Eager:
        def encode(self, text):
            return [5, 2, 6]

        def unk_id(self):
            return 0

    monkeypatch.setattr(talk.processor.tokenizer, "sp", Eager())
    with pytest.raises(ValueError, match="</s> is a control token"):
        talk.turn_ids("</s>")


def test_the_command_chats(monkeypatch, capsys):
    lines = iter(["What is this?", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    options = ["--template", "hub", "--system", "Be brief.", "--max-new-tokens", "3", "--dtype", "float32"]
    assert cli.main(LlavaForConditionalGeneration, LlavaProcessor, ["--chat", "--image", PICTURES[0], *options]) == 0
    assert capsys.readouterr().out.count("\n") == 1

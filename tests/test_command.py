"""The commands as a newcomer runs them: in a process of their own, from another folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from reference import reference_model

import emoji_world
from command import BUNDLED, run
from llava import LlavaForConditionalGeneration, LlavaProcessor
from save_checkpoint import write_tokenizer
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
# What is in the pictures, as their makers placed it: name -> (ground, things from left to right)
PICTURES = {
    "cat-and-apple": ("blue", ["cat", "apple"]),
    "car-and-tree": ("yellow", ["car", "tree"]),
    "dog-under-airplane": ("green", ["dog", "airplane"]),
    "elephant-and-hat": ("pink", ["elephant", "hat"]),
    "owl-and-key": ("white", ["owl", "key"]),
    "rocket": ("black", ["rocket"]),
}


def llava(*arguments, script: str = "llava.py", **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("name", PICTURES)
def test_it_says_what_is_in_the_picture(name, tmp_path):
    ground, things = PICTURES[name]
    truth = {"ground": ground, "things": [{"name": thing, "x": i / 4} for i, thing in enumerate(things)]}
    done = llava("--image", ROOT / "images" / f"{name}.jpg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert emoji_world.score("describe", done.stdout, truth), done.stdout
    assert done.stderr.count("knows only its small world") == 1
    assert "llava-hf/llava-1.5-7b-hf" in done.stderr
    assert done.stdout.count("\n") == 1


def test_it_answers_a_question_in_one_word():
    prompt = "What is on the left?\nAnswer the question using a single word or phrase."
    done = llava("--image", ROOT / "images" / "cat-and-apple.jpg", "--prompt", prompt)
    assert done.stdout == "Cat\n"


def test_it_answers_in_int8_too():
    done = llava("--image", ROOT / "images" / "cat-and-apple.jpg", "--quantize", "int8")
    assert done.stdout == llava("--image", ROOT / "images" / "cat-and-apple.jpg").stdout


def test_the_answer_is_shown_as_it_is_made():
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / "images" / "owl-and-key.jpg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        parts = []
        while part := os.read(process.stdout.fileno(), 1000):
            parts.append(part)
    assert len(parts) > 5


def test_the_first_word_comes_before_transformers_is_even_imported():
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / "images" / "cat-and-apple.jpg"]
    theirs = [sys.executable, "-c", "from transformers import AutoProcessor, LlavaForConditionalGeneration"]
    ratios = []
    for _ in range(3):
        start = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.read(1)
            ours = time.monotonic() - start
        start = time.monotonic()
        subprocess.run(theirs, check=True)
        ratios.append(ours / (time.monotonic() - start))
    assert sorted(ratios)[1] < 1, ratios


def test_sampling_with_a_seed_repeats():
    arguments = ["--image", ROOT / "images" / "rocket.jpg", "--temperature", 3, "--seed"]
    first, again, other = (llava(*arguments, seed).stdout for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "absent.jpg"], "absent.jpg is not a file"),
        (["--image", ROOT / "README.md"], "cannot be read as a picture"),
        (["--model", "nowhere/at/all"], "neither a folder nor a hub id"),
        (["--model", ROOT / "tests"], "has no config.json"),
        (["--image", ROOT / "images" / "rocket.jpg", "--max-new-tokens", 0], "max_new_tokens"),
        (["--image", ROOT / "images" / "rocket.jpg", "--temperature", -1], "temperature"),
        (["--temperature", 1, "--top-p", 7], "top_p"),
        (["--device", "abacus"], "abacus"),
        (["--prompt", "<image> where?"], "<image>"),
    ],
    ids=str,
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    done = llava(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_one_sentence_too(error, capsys):
    def work():
        raise error

    assert run(work) == 2
    assert capsys.readouterr().err.startswith("error: the memory is not enough")


@torch.no_grad()
def test_the_bundled_checkpoint_is_the_references_too():
    """transformers opens the folder as it is, and says the same words in the same tokens."""
    ours, theirs = LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration
    ours = ours.from_pretrained(BUNDLED, dtype=torch.float32)
    theirs = theirs.from_pretrained(BUNDLED, dtype=torch.float32)
    our_processor = LlavaProcessor.from_pretrained(BUNDLED)
    their_processor = transformers.AutoProcessor.from_pretrained(BUNDLED, use_fast=False)
    pictures = [Image.open(ROOT / "images" / f"{name}.jpg") for name in PICTURES]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    ids = []
    for model, processor in ((ours, our_processor), (theirs, their_processor)):
        prompt = processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = processor(images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt")
        ids.append(model.generate(**inputs, max_new_tokens=40))
    assert torch.equal(*ids)


PAGE = """
model = LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
processor = AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")

prompt = "<image>\\nUSER: What's the content of the image?\\nASSISTANT:"
image = Image.open(PICTURE)

inputs = processor(text=prompt, images=image, return_tensors="pt")

# Generate
generate_ids = model.generate(**inputs, max_length=60)
answer = processor.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
"""


def test_the_code_of_the_references_page_runs_with_its_import_line_changed(tmp_path, monkeypatch):
    """Its pictures apart, which the page loads from the web; a picture is one token here, to fit into max_length."""
    snapshot = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "0123"
    tokenizer = Tokenizer.from_pretrained(BUNDLED)
    size = {"vocab_size": max(tokenizer.special_names) + 1}
    reference = reference_model(
        {"image_size": 14, "patch_size": 14}, size, image_token_index=tokenizer.image_token_id, pad_token_id=0
    )
    reference.save_pretrained(snapshot)
    processor = transformers.AutoProcessor.from_pretrained(BUNDLED, use_fast=False)
    processor.image_processor.size = {"shortest_edge": 14}
    processor.image_processor.crop_size = {"height": 14, "width": 14}
    processor.save_pretrained(snapshot)
    write_tokenizer(tokenizer, snapshot)
    (tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "refs").mkdir()
    (tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "refs" / "main").write_text("0123")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    answers = {}
    for library in ("llava", "transformers"):
        names = {"PICTURE": ROOT / "images" / "rocket.jpg"}
        page = PAGE if library == "llava" else PAGE.replace('"llava-hf/llava-1.5-7b-hf"', repr(str(snapshot)))
        page = f"from PIL import Image\nfrom {library} import AutoProcessor, LlavaForConditionalGeneration\n{page}"
        exec(page, names)
        answers[library] = names["answer"]
    assert answers["llava"] == answers["transformers"]
    assert answers["llava"].startswith("\nUSER: What's the content of the image?\nASSISTANT:")

"""The page of --explain: its numbers are the reference's, and no text in it becomes HTML."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from clip import ImageProcessor
from hub.files import BUNDLED
from kernels import HAS_TRITON, accelerate
from llava import LlavaForConditionalGeneration, LlavaProcessor
from playground import explain
from playground.explain import MEAN, Recorder, maps_to_keep
from reference import reference_and_ours
from small import small
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
PICTURE = ROOT / "images" / "cat-and-apple.jpg"
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>${alert`3`}\u2028\\u003c"
TOKENIZER = Tokenizer.from_pretrained(BUNDLED)
FAMILIES = {  # how the tower's and the decoder's settings differ from tests/reference.py's
    "grouped heads": ({}, {"num_key_value_heads": 2}, {}),
    "a sliding window": ({}, {"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": 9}, {}),
    "the class token kept": ({}, {}, {"vision_feature_select_strategy": "full"}),
    "pixels beyond the last patch": ({"image_size": 30}, {}, {}),
}


def main(arguments: list[str]) -> int:
    return cli.main(LlavaForConditionalGeneration, LlavaProcessor, arguments)


def data_of(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(text)


def weights_of(data: dict) -> tuple[np.ndarray, np.ndarray]:
    """Attention (M, N, P + W) and its scales (M, N, 4), decoded as the page's script does it."""
    M, N, P = len(data["maps"]), len(data["likeliest"]), data["side"] ** 2
    scales = np.frombuffer(base64.b64decode(data["scales"]), "<f4").reshape(M, N, 4)
    steps = np.frombuffer(base64.b64decode(data["attention"]), np.uint8).reshape(M, N, P + len(data["words"]))
    tops = np.repeat(scales[..., :2], [P, len(data["words"])], -1)
    return steps / 255 * tops, scales


def check_sums(data: dict, off: float) -> None:
    """Each row sums to 1: exactly by its scales, and by its bytes up to their rounding to 255 steps."""
    weights, scales = weights_of(data)
    P, W = data["side"] ** 2, len(data["words"])
    assert np.abs(scales[..., 2:].sum(-1) - 1).max() < off
    assert np.abs(weights[..., :P].sum(-1) - scales[..., 2]).max() <= (scales[..., 0] * P / 510).max()
    assert np.abs(weights[..., P:].sum(-1) - scales[..., 3]).max() <= (scales[..., 1] * W / 510).max()
    for n in range(weights.shape[1]):  # the token itself and those after it did not exist yet
        assert not weights[:, n, P + data["answer_at"] + n :].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_page_is_about_the_answer_that_was_printed(dtype, tmp_path, capsys):
    arguments = ["--image", str(PICTURE), "--dtype", dtype]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert main([*arguments, "--explain", str(tmp_path / "answer.html")]) == 0
    assert capsys.readouterr().out == plain
    assert [file.name for file in tmp_path.iterdir()] == ["answer.html"]
    assert (tmp_path / "answer.html").stat().st_size < 3_000_000
    data = data_of(tmp_path / "answer.html")
    answer = data["words"][data["answer_at"] :]
    assert TOKENIZER.decode(answer, skip_special_tokens=True) == data["answer"] == plain.rstrip("\n")
    assert len(answer) == len(data["likeliest"]) == len(data["seconds"])
    assert data["names"] == ["cat-and-apple.jpg", BUNDLED.name]
    check_sums(data, off=2e-5 if dtype == "float32" else 0.02)


def test_the_answer_is_that_of_generate_when_sampling_too():
    model, processor = LlavaForConditionalGeneration.from_pretrained(BUNDLED), LlavaProcessor.from_pretrained(BUNDLED)
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=Image.open(PICTURE))
    options = {"do_sample": True, "temperature": 2.0, "seed": 7, "max_new_tokens": 30}
    watch = Recorder(model)
    assert torch.equal(watch.generate(**inputs, **options), model.generate(**inputs, **options))
    assert len(watch.seconds) == 2 + watch.ids.shape[1] - inputs.input_ids.shape[1]


def test_each_step_is_the_plain_one(monkeypatch):
    """On a GPU a CUDA graph takes the place of the model's step, and waiting while it is recorded is an error."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(BUNDLED), LlavaProcessor.from_pretrained(BUNDLED)
    monkeypatch.setattr(model, "step", lambda *_: pytest.fail("not the plain step"))
    watch = Recorder(model)
    watch.generate(**processor(text="<image>", images=Image.open(PICTURE)), max_new_tokens=5, eos_token_id=[])
    assert len(watch.seconds) == 2 + 5


@pytest.mark.parametrize("kernels", ["auto", "triton"] if HAS_TRITON else ["auto"])
def test_an_accelerated_model_is_explained_too(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    image, found = Image.open(PICTURE), {}
    for how in ("torch", kernels):
        model, processor = small()
        watch = Recorder(accelerate(model, how))
        watch.generate(**processor(text="USER: <image> ASSISTANT:", images=image), max_new_tokens=2)
        found[how] = explain.study(watch)
        explain.page_data(watch, processor, image, ("picture", "model"))
    plain, fast = found["torch"], found[kernels]
    assert torch.allclose(plain.attentions, fast.attentions, atol=1e-4)
    assert torch.allclose(torch.stack(plain.streams), torch.stack(fast.streams), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_the_references(family, tmp_path):
    """On random checkpoints: attention of each head, probabilities, the logit lens, the nearest words."""
    vision, text, top = FAMILIES[family]
    text = text | {"vocab_size": max(TOKENIZER.special_names) + 1}
    theirs, ours = reference_and_ours(tmp_path, vision, text, image_token_index=TOKENIZER.image_token_id, **top)
    side = ours.config.vision_config.image_size
    processor = LlavaProcessor(ImageProcessor(side, side), TOKENIZER, ours.config.image_seq_length)
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=Image.open(PICTURE))
    watch, T = Recorder(ours), inputs.input_ids.shape[1]
    ids = watch.generate(**inputs, max_new_tokens=9, eos_token_id=[])
    explain.write(str(tmp_path / "page.html"), watch, processor, Image.open(PICTURE), ("picture", "model"))
    data = data_of(tmp_path / "page.html")
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=inputs.pixel_values, output_attentions=True, output_hidden_states=True)

    assert data["words"][data["answer_at"] :] == ids[0, T:].tolist()
    L, H = ours.config.text_config.num_hidden_layers, ours.config.text_config.num_attention_heads
    assert len(data["maps"]) == 1 + L + L * H
    check_sums(data, off=2e-5)
    weights, scales = weights_of(data)
    is_patch = ids[0] == TOKENIZER.image_token_id
    is_patch[: is_patch.nonzero()[-(data["side"] ** 2)]] = False
    order = torch.cat([is_patch.nonzero(), (~is_patch).nonzero()]).flatten()
    right = torch.stack(out.attentions)[:, 0, :, T - 1 : -1, order].numpy()  # (L, H, N, P + W)
    for (layer, head), row, scale in zip(data["maps"], weights, scales, strict=True):
        part = right if layer == MEAN else right[layer : layer + 1]
        part = part if head == MEAN else part[:, head : head + 1]
        assert np.abs(part.mean((0, 1)) - row).max() <= scale[..., :2].max() / 510 + 1e-5

    probabilities = out.logits[0, T - 1 : -1].softmax(-1)
    for n, row in enumerate(data["likeliest"]):
        assert np.allclose([p for _, p in row], probabilities[n].topk(5).values, atol=1e-3)
        assert row[0][0] == ids[0, T + n]  # greedy
    *streams, last = (hidden[0, T - 1 : -1] for hidden in out.hidden_states)
    streams = [theirs.model.language_model.norm(stream) for stream in streams] + [last]
    for stream, layer in zip(streams, data["lens"], strict=True):
        guess = theirs.lm_head(stream).softmax(-1)
        numbers = torch.stack([guess.amax(-1), guess[range(9), ids[0, T:]]], -1)
        assert np.allclose([row[1:] for row in layer], numbers.detach(), atol=1e-3)
        assert [i for i, *_ in layer] == guess.argmax(-1).tolist()
    features = watch.features[0, -(data["side"] ** 2) :]
    assert np.allclose(data["norms"], features.norm(dim=-1), atol=1e-3)
    hidden = torch.ones_like(ids).masked_fill(ids == TOKENIZER.image_token_id, 0)
    with torch.no_grad():
        blind = theirs(input_ids=ids, attention_mask=hidden, pixel_values=inputs.pixel_values).logits[0].softmax(-1)
    assert np.allclose(data["without_picture"], blind[range(T - 1, T + 8), ids[0, T:]], atol=1e-3)
    near, word = data["near"][3][0]
    patch, words = features[3], ours.language_model.embed_tokens.weight
    cosines = torch.cosine_similarity(patch[None], words[: TOKENIZER.sp.vocab_size()])
    assert int(cosines.argmax()) == near and abs(cosines.max().item() - word) < 1e-4


def test_a_large_model_keeps_its_means_and_the_heads_that_look_at_the_picture():
    on_picture = torch.rand(32, 32)
    on_picture[7, 3] = 2
    size = 256 * 875  # the 7B, with the command's default for the longest answer
    kept = maps_to_keep(on_picture, size)
    assert len(kept) == 1 + 32 + explain.FEWEST_HEADS and (7, 3) in kept
    assert kept == sorted(kept) and len(kept) * size <= explain.MOST_BYTES
    longer = maps_to_keep(on_picture, 1000 * 1600)
    assert (MEAN, MEAN) in longer and len(longer) * 1000 * 1600 <= explain.MOST_BYTES
    assert len(maps_to_keep(torch.rand(4, 4), 100 * 220)) == 1 + 4 + 16


def test_no_text_becomes_html(tmp_path, capsys):
    picture = tmp_path / HOSTILE.replace("/", "")
    shutil.copy(PICTURE, picture)
    arguments = ["--image", str(picture), "--prompt", HOSTILE, "--max-new-tokens", "3"]
    assert main([*arguments, "--explain", str(tmp_path / "page.html")]) == 0
    page, data = (tmp_path / "page.html").read_text("utf-8"), data_of(tmp_path / "page.html")
    before, after = explain.TEMPLATE.read_text("utf-8").split("DATA")
    assert page.startswith(before) and page.endswith(after)
    assert not set(page[len(before) : -len(after)]) & {"<", "\u2028"}
    assert data["names"][0] == picture.name
    assert TOKENIZER.decode(data["words"]).count("<script>alert(1)") == 1


def test_the_page_needs_nothing_but_itself():
    template = explain.TEMPLATE.read_text("utf-8")
    assert template.count("DATA") == 1
    assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\bfetch\b", template)
    assert "default-src 'none'" in template


@pytest.mark.parametrize(
    ("page", "picture", "words"),
    [
        ("page.html", None, "--image"),
        ("nowhere/page.html", PICTURE, "there is no folder"),
        ("folder.html", PICTURE, "cannot be written"),
        ("picture.jpg", PICTURE, "must end in .html"),
        ("", PICTURE, "must end in .html"),
    ],
)
def test_a_user_error_is_one_sentence_before_the_model_runs(page, picture, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    assert main([*(["--image", str(picture)] if picture else []), "--explain", page]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    page = tmp_path / "page.html"
    page.write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    assert main(["--image", str(PICTURE), "--max-new-tokens", "1", "--explain", str(page)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "old"


def test_scores_that_are_not_finite_are_an_error(tmp_path):
    model, processor = LlavaForConditionalGeneration.from_pretrained(BUNDLED), LlavaProcessor.from_pretrained(BUNDLED)
    watch = Recorder(model)
    watch.generate(**processor(text="<image>", images=Image.open(PICTURE)), max_new_tokens=2)
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        explain.write(str(tmp_path / "page.html"), watch, processor, Image.open(PICTURE), ("picture", "model"))
    assert not list(tmp_path.iterdir())

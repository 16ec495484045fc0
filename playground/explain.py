"""Explain one answer on an HTML page that needs no network: `python llava.py --image x.jpg --explain x.html`.

    Recorder runs and times the answer -> study runs prompt and answer again, in one forward -> write fills explain.html

A token is predicted by the position before it, so the page shows that position's attention as what the model looked at
when it chose the token. Beside it are the five likeliest tokens, and the prediction after each layer: the final norm
and the head applied to the hidden state there (the logit lens, nostalgebraist 2020,
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens). A second forward, with the picture
hidden, shows which words needed the picture: their probability falls.

    T tokens of prompt and answer    N tokens of the answer    P patches    W = T - P words: all tokens but patches
    L layers    H heads    V vocabulary    M maps: means over heads or layers, and single heads

Attention says where a position read, not what it read nor why: earlier layers may have moved what a patch contains to
another token. Not implemented: several pictures, batches, the attention of the vision tower.
"""

import base64
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from generate import generate
from hub.files import SPACE
from hub.writer import write_whole
from playground.interventions import blind
from tokenizer import Tokenizer

USUAL_BYTES = 1_500_000  # attention in a page, before base64 adds a third: as many heads are kept as fit
FEWEST_HEADS = 8  # kept even where they do not fit into USUAL_BYTES
MOST_BYTES = 12_000_000  # never exceeded: room for the means of all layers for a 7B's answer of 256 tokens
MEAN = -1  # the index for the mean over all layers or all heads
TEMPLATE = Path(__file__).with_suffix(".html")


class Recorder:
    """Wraps a model during generation: records the seconds of each step and the projector's output."""

    def __init__(self, model):
        self.model, self.seconds = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def timed(self, step, *args, **options):
        start = time.perf_counter()
        result = step(*args, **options)
        if self.model.device.type == "cuda":  # the call returns before the work is done
            torch.cuda.synchronize(self.model.device)
        self.seconds.append(time.perf_counter() - start)
        return result

    def __call__(self, input_ids: Tensor, pixel_values: Tensor | None = None, *rest, **options):
        """The model's forward, with tower and projector timed separately if there is a picture."""
        if pixel_values is None:
            return self.timed(self.model, input_ids, None, *rest, **options)
        self.features = self.timed(self.model.get_image_features, pixel_values)  # (1, P, D)
        projector = self.model.multi_modal_projector  # already run after the tower; run again alone, to time it
        self.timed(projector, self.features.new_zeros(*self.features.shape[:2], projector.linear_1.in_features))
        x = self.model.merge(input_ids, self.features.flatten(0, 1))
        return self.timed(self.model, None, None, *rest, inputs_embeds=x, **options)

    def step(self, *inputs) -> Tensor:
        """The model's plain step: a CUDA graph, which may take its place in the instance, cannot be timed inside."""
        return self.timed(type(self.model).step, self.model, *inputs)

    def generate(self, input_ids: Tensor, pixel_values: Tensor, **options) -> Tensor:
        self.prompt_length, self.pixels = input_ids.shape[1], pixel_values
        self.ids = generate(self, input_ids, pixel_values, **options)
        return self.ids


@dataclass
class Study:
    """The results of one forward over prompt and answer, at the N positions that predict the answer's tokens."""

    attentions: Tensor  # (L, H, N, T), row n at the position before answer token n; each row sums to 1
    streams: list[Tensor]  # L + 1 of (N, D): each layer's input and the last layer's output, after the final norm
    patches: Tensor  # (P,), positions of the patches among the T tokens
    words: Tensor  # (W,), positions of all other tokens


@torch.no_grad()
def study(run: Recorder) -> Study:
    model, ids = run.model, run.ids
    prompt, answer = ids[:, : run.prompt_length], ids[:, run.prompt_length :]
    x = [model.merge(prompt, run.features.flatten(0, 1)), model.embed(answer)]
    wanted = {"output_attentions": True, "output_hidden_states": True, "logits_to_keep": 1}
    out = model(inputs_embeds=torch.cat(x, 1), use_cache=False, **wanted)
    places = (prompt[0] == model.config.image_token_index).nonzero().flatten()
    patches = places[-model.config.vision_config.num_patches :]  # without the class token, which is first
    others = torch.ones_like(ids[0], dtype=torch.bool)
    others[patches] = False
    rows = slice(run.prompt_length - 1, ids.shape[1] - 1)
    *inputs, last = (hidden[0, rows] for hidden in out.hidden_states)  # the last one is normed already
    return Study(
        attentions=torch.stack([layer[0, :, rows] for layer in out.attentions]),
        streams=[model.language_model.norm(hidden) for hidden in inputs] + [last],
        patches=patches,
        words=others.nonzero().flatten(),
    )


def maps_to_keep(on_picture: Tensor, size: int) -> list[tuple[int, int]]:
    """The (layer, head) of each map of `size` bytes that fits into the page; MEAN is the mean over all layers or heads.

    Means come before single heads, and heads with more attention `on_picture` (L, H) before others.
    """
    L, H = on_picture.shape
    heads = [divmod(i, H) for i in on_picture.flatten().argsort(descending=True).tolist()]
    maps = [(MEAN, MEAN), *((layer, MEAN) for layer in range(L))]
    maps += heads[: max(FEWEST_HEADS, USUAL_BYTES // size - len(maps))]
    return sorted(maps[: max(1, MOST_BYTES // size)])


def attention_map(attentions: Tensor, layer: int, head: int) -> Tensor:  # (L, H, N, T) -> (N, T), float32
    attentions = attentions if layer == MEAN else attentions[layer : layer + 1]
    attentions = attentions if head == MEAN else attentions[:, head : head + 1]
    return attentions.mean((0, 1), dtype=torch.float32)


def pack(found: Study, maps: list[tuple[int, int]]) -> dict[str, str]:
    """Attention as bytes (M, N, P + W), and as floats (M, N, 4) the largest value and the sum of patches and of words.

    In each row, patches and words have scales of their own, because the first token often takes nearly all attention:
    with one scale the patches would be rounded to 0 of 255 steps.
    """
    weights = torch.stack([attention_map(found.attentions, *each) for each in maps])
    parts = [weights[..., places].cpu() for places in (found.patches, found.words)]
    tops = [part.amax(-1, keepdim=True) for part in parts]
    steps = [(part / top.clamp(min=1e-12) * 255).round() for part, top in zip(parts, tops, strict=True)]
    numbers = torch.cat([*tops, *(part.sum(-1, keepdim=True) for part in parts)], -1)
    return {
        "attention": in_base64(torch.cat(steps, -1).to(torch.uint8).numpy().tobytes()),
        "scales": in_base64(numbers.numpy().astype("<f4").tobytes()),
    }


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def guesses(model, found: Study, chosen: Tensor) -> tuple[list, list]:
    """The five likeliest tokens, N x 5 (id, probability), and the logit lens, (L + 1) x N (id, probability, chosen).

    The lens has the likeliest id before the first and after each layer, its probability, and that of the `chosen` (N,)
    token. Raises ValueError if a score is not finite.
    """
    lens = []
    for stream in found.streams:
        probabilities = model.lm_head(stream).float().softmax(-1)  # (N, V)
        if not probabilities.isfinite().all():
            raise ValueError("the model's scores are not finite numbers, so there is no page: try another --dtype")
        best, ids = probabilities.max(-1)
        lens.append(rounded(ids, best, probabilities.gather(1, chosen[:, None])[:, 0]))
    top = probabilities.topk(5)
    return [rounded(*pair) for pair in zip(top.indices, top.values, strict=True)], lens


def without_picture(run: Recorder) -> list[float]:
    """The probability of each token of the answer if no word can attend to the picture."""
    answer = run.ids[0, run.prompt_length :]
    probabilities = blind(run.model, {"input_ids": run.ids})[0, run.prompt_length - 1 : -1]  # (N, V)
    return [round(x, 4) for x in probabilities.gather(1, answer[:, None])[:, 0].tolist()]


def nearest_words(model, features: Tensor, V: int) -> list:
    """For each patch, as the decoder reads it, the five tokens with the nearest embeddings: P x 5 (id, cosine)."""
    words = F.normalize(model.language_model.embed_tokens.weight[:V].float(), dim=-1)
    top = (F.normalize(features.float(), dim=-1) @ words.T).topk(5)
    return [rounded(*pair) for pair in zip(top.indices, top.values, strict=True)]


def rounded(ids: Tensor, *numbers: Tensor) -> list:
    return [[i, *(round(x, 4) for x in row)] for i, *row in zip(*(t.tolist() for t in (ids, *numbers)), strict=True)]


def piece(tokenizer: Tokenizer, i: int) -> str:
    """A token's text, with ▁ for a space, and with bytes that are not text as <0x0A>."""
    text = tokenizer.piece(i, skip_special_tokens=False) or f"[{i}]"
    if isinstance(text, bytes):
        letters = text.decode(errors="replace")
        text = letters if letters.isprintable() and "\ufffd" not in letters else "".join(f"<0x{b:02X}>" for b in text)
    return text.replace(" ", SPACE)


def stages(run: Recorder) -> list[tuple[str, list[int], float | None]]:
    """The stages of the run in order: (name, shape of the output, seconds)."""
    vision, text = run.model.config.vision_config, run.model.config.text_config
    (_, P, D), (see, project, prefill, *_) = run.features.shape, run.seconds
    return [
        ("picture", list(run.pixels.shape[1:]), None),
        ("tower", [vision.num_positions, vision.hidden_size], max(0.0, see - project)),
        ("projector", [P, D], project),
        ("prompt with picture", [run.prompt_length, D], None),
        ("decoder, prefill", [run.prompt_length, D], prefill),
        ("head", [text.vocab_size], None),
    ]


@torch.no_grad()
def page_data(run: Recorder, processor, image: Image.Image, names: tuple[str, str]) -> dict:
    """Everything the page shows. `names` are the names of the picture and the model."""
    found, tokenizer, ids = study(run), processor.tokenizer, run.ids[0]
    on_picture = found.attentions[..., found.patches].sum(-1, dtype=torch.float32).mean(-1)
    maps = maps_to_keep(on_picture, found.attentions[0, 0].numel())
    likeliest, lens = guesses(run.model, found, ids[run.prompt_length :])
    features = run.features[0, -len(found.patches) :]  # without the class token
    near = nearest_words(run.model, features, tokenizer.vocab_size)
    words = ids[found.words].tolist()
    shown = {i for table in (likeliest, lens, near) for row in table for i, *_ in row}.union(words)
    patch = run.model.config.vision_config.patch_size
    side = run.model.config.vision_config.image_size // patch  # pixels after the last whole patch are not used
    png = io.BytesIO()
    processor.image_processor.fit(image.convert("RGB")).crop((0, 0, side * patch, side * patch)).save(png, "PNG")
    return {
        "names": names,
        "picture": in_base64(png.getvalue()),
        "side": side,
        "pieces": {i: piece(tokenizer, i) for i in sorted(shown)},
        "words": words,
        "picture_at": int((found.words < found.patches[0]).sum()),
        "answer_at": int((found.words < run.prompt_length).sum()),
        "answer": tokenizer.decode(ids[run.prompt_length :], skip_special_tokens=True),
        "maps": maps,
        **pack(found, maps),
        "likeliest": likeliest,
        "lens": lens,
        "without_picture": without_picture(run),
        "near": near,
        "norms": [round(x, 4) for x in features.float().norm(dim=-1).tolist()],  # how long each patch's vector is
        "stages": stages(run),
        "seconds": run.seconds[2:],  # the first two are the tower's and the projector's
    }


def check_place(path: str, images: list[Image.Image]) -> None:
    """Raise ValueError if the page could not be made or written, before the model runs."""
    place = Path(path)
    if len(images) != 1:
        raise ValueError("--explain shows where each word looked in a picture: give exactly one with --image")
    if place.suffix.lower() not in (".html", ".htm"):  # so that no picture is overwritten by mistake
        raise ValueError(f"--explain writes a page for a browser: {path} must end in .html")
    if not place.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {place.parent}")
    if (place.exists() and not place.is_file()) or not os.access(place.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: give --explain a file in a folder that you may write to")


def write(path: str, run: Recorder, processor, image: Image.Image, names: tuple[str, str]) -> None:
    """Write the page about the answer that `run` generated, whole or not at all. Raises OSError or ValueError."""
    data = json.dumps(page_data(run, processor, image, names), separators=(",", ":"), allow_nan=False)
    page = TEMPLATE.read_text("utf-8").replace("DATA", data.replace("<", "\\u003c"), 1)  # no text can close the script
    write_whole(path, page)

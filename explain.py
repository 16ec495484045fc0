"""How an answer came about, as one HTML page that needs no network: `python llava.py --image x.jpg --explain x.html`.

    Recorder watches the answer -> study runs prompt and answer once more -> write fills explain.html

For each token of the answer the page shows the attention of the position before it, whose output became the token:
there the model looked when it chose it. Beside it stand the likeliest tokens of that moment, and the same guess read
off after every layer, the final norm and the head put on the stream as it then was (the logit lens, nostalgebraist
2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).

    T tokens of prompt and answer    N tokens of the answer    P patches    W = T - P words: all that are not patches
    L layers    H heads    V vocabulary    M maps: means over heads or layers, and single heads

Attention tells where numbers were read from, not why: of a place without heat another token may have told.
Left out: more than one picture, batches, the tower's own attention.
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
from tokenizer import Tokenizer

USUAL_BYTES = 1_500_000  # of attention in a page, to which base64 adds a third: as many heads are kept as fit
FEWEST_HEADS = 8  # but so many at least
MOST_BYTES = 12_000_000  # and never more than this: a 7B's answer of 256 tokens still has all its layers
MEAN = -1  # in the place of a layer or a head
TEMPLATE = Path(__file__).with_suffix(".html")


class Recorder:
    """Stands in for a model while generation drives it: notes the seconds of each step and what the projector made."""

    times_each_step = True  # so no step may come from a CUDA graph: see decode_graph.py

    def __init__(self, model):
        self.model, self.seconds = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def timed(self, step, *args, **options):
        start = time.perf_counter()
        result = step(*args, **options)
        if self.model.device.type == "cuda":  # which returns before it has done the work
            torch.cuda.synchronize(self.model.device)
        self.seconds.append(time.perf_counter() - start)
        return result

    def __call__(self, input_ids: Tensor, pixel_values: Tensor | None = None, *rest, **options):
        """The model's forward; where there is a picture, it first goes through tower and projector by themselves."""
        if pixel_values is None:
            return self.timed(self.model, input_ids, None, *rest, **options)
        self.features = self.timed(self.model.get_image_features, pixel_values)  # (1, P, D)
        projector = self.model.multi_modal_projector  # it ran behind the tower; once more, by itself, to time it
        self.timed(projector, self.features.new_zeros(*self.features.shape[:2], projector.linear_1.in_features))
        x = self.model.merge(input_ids, None, self.features.flatten(0, 1))
        return self.timed(self.model, None, None, *rest, inputs_embeds=x, **options)

    def generate(self, input_ids: Tensor, pixel_values: Tensor, **options) -> Tensor:
        self.prompt_length, self.pixels = input_ids.shape[1], pixel_values
        self.ids = generate(self, input_ids, pixel_values, **options)
        return self.ids


@dataclass
class Study:
    """What one forward over prompt and answer tells."""

    attentions: Tensor  # (L, H, N, T), row n of the position before answer token n; each sums to 1
    streams: list[Tensor]  # L + 1 of (N, D), there too: each layer's input and the last one's output, normed
    patches: Tensor  # (P,), where among the T tokens the patches stand
    words: Tensor  # (W,), where the others do


@torch.no_grad()
def study(run: Recorder) -> Study:
    model, ids = run.model, run.ids
    prompt, answer = ids[:, : run.prompt_length], ids[:, run.prompt_length :]
    x = [model.merge(prompt, None, run.features.flatten(0, 1)), model.merge(answer, None, None)]
    wanted = {"output_attentions": True, "output_hidden_states": True, "logits_to_keep": 1}
    out = model(inputs_embeds=torch.cat(x, 1), use_cache=False, **wanted)
    places = (prompt[0] == model.config.image_token_index).nonzero().flatten()
    patches = places[-model.config.vision_config.num_patches :]  # a class token would come before them
    others = torch.ones_like(ids[0], dtype=torch.bool)
    others[patches] = False
    rows = slice(run.prompt_length - 1, ids.shape[1] - 1)
    *inputs, last = (hidden[0, rows] for hidden in out.hidden_states)  # the last one has been through the norm
    return Study(
        attentions=torch.stack([layer[0, :, rows] for layer in out.attentions]),
        streams=[model.language_model.norm(hidden) for hidden in inputs] + [last],
        patches=patches,
        words=others.nonzero().flatten(),
    )


def maps_to_keep(on_picture: Tensor, size: int) -> list[tuple[int, int]]:
    """(layer, head) of each map of `size` bytes that a page has room for, MEAN standing for all layers or heads.

    Means go before single heads, and among these come first those that give most to the picture, (L, H).
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
    """(M, N, P + W) as bytes, patches and words each scaled by their own largest value in a row, and (M, N, 4) numbers.

    The numbers are the two largest values and the two sums. A word that takes nearly all of a row (often the first
    one) would leave nothing of the patches in 255 steps, therefore two scales.
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
    """For each token of the answer the likeliest, N x 5 (id, probability); and the lens, from the embeddings to the
    last layer, L + 1 x N (the likeliest id, its probability, that of the `chosen` (N,) token).

    Raises ValueError where a score is not a finite number.
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


def nearest_words(model, features: Tensor, V: int) -> list:
    """P x 5 (id, cosine): the words whose embeddings lie nearest to each patch as the decoder reads it."""
    words = F.normalize(model.language_model.embed_tokens.weight[:V].float(), dim=-1)
    top = (F.normalize(features.float(), dim=-1) @ words.T).topk(5)
    return [rounded(*pair) for pair in zip(top.indices, top.values, strict=True)]


def rounded(ids: Tensor, *numbers: Tensor) -> list:
    return [[i, *(round(x, 4) for x in row)] for i, *row in zip(*(t.tolist() for t in (ids, *numbers)), strict=True)]


def piece(tokenizer: Tokenizer, i: int) -> str:
    """A token as the vocabulary spells it."""
    known = 0 <= i < tokenizer.sp.vocab_size()
    return tokenizer.special_names.get(i) or (tokenizer.sp.id_to_piece(i) if known else f"[{i}]")


def stages(run: Recorder) -> list[tuple[str, list[int], float | None]]:
    """(name, shape behind it, seconds) in the order of the data."""
    vision, text = run.model.config.vision_config, run.model.config.text_config
    (_, P, D), (see, project, prefill, *_) = run.features.shape, run.seconds
    return [
        ("picture", list(run.pixels.shape[1:]), None),
        ("tower", [vision.num_patches + 1, vision.hidden_size], max(0.0, see - project)),
        ("projector", [P, D], project),
        ("prompt with picture", [run.prompt_length, D], None),
        ("decoder, prefill", [run.prompt_length, D], prefill),
        ("head", [text.vocab_size], None),
    ]


@torch.no_grad()
def page_data(run: Recorder, processor, image: Image.Image, names: tuple[str, str]) -> dict:
    """Everything the page shows. `names` are those of the picture and of the model."""
    found, tokenizer, ids = study(run), processor.tokenizer, run.ids[0]
    on_picture = found.attentions[..., found.patches].sum(-1, dtype=torch.float32).mean(-1)
    maps = maps_to_keep(on_picture, found.attentions[0, 0].numel())
    likeliest, lens = guesses(run.model, found, ids[run.prompt_length :])
    near = nearest_words(run.model, run.features[0, -len(found.patches) :], tokenizer.sp.vocab_size())
    words = ids[found.words].tolist()
    shown = {i for table in (likeliest, lens, near) for row in table for i, *_ in row}.union(words)
    patch = run.model.config.vision_config.patch_size
    side = run.model.config.vision_config.image_size // patch  # pixels beyond the last whole patch are never seen
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
        "near": near,
        "stages": stages(run),
        "seconds": run.seconds[2:],  # the first two are of the picture
    }


def check_place(path: str, images: list[Image.Image]) -> None:
    """Before the work and not after it: can there be a page? Raises ValueError where not."""
    place = Path(path)
    if len(images) != 1:
        raise ValueError("--explain shows where the words looked in a picture: give one by --image")
    if place.suffix.lower() not in (".html", ".htm"):  # and so no picture is overwritten by mistake
        raise ValueError(f"--explain writes a page for a browser: {path} must end in .html")
    if not place.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {place.parent}")
    if (place.exists() and not place.is_file()) or not os.access(place.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: give --explain a file in a folder that you may write to")


def write(path: str, run: Recorder, processor, image: Image.Image, names: tuple[str, str]) -> None:
    """Make the page of the answer that `run` has generated. Names: see page_data. Raises OSError, ValueError."""
    data = json.dumps(page_data(run, processor, image, names), separators=(",", ":"), allow_nan=False)
    page = TEMPLATE.read_text("utf-8").replace("DATA", data.replace("<", "\\u003c"), 1)  # no text closes the script
    scratch = Path(path).with_name(f".explain-{os.getpid()}.html")
    try:
        scratch.write_text(page, "utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)

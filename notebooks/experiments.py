"""Experiments inside a model, on many scenes of the emoji world at once, for notebooks 1 and 11 and claims.py.

An experiment is a function (model, processor, scenes) -> {what was done: rate}. A rate is (successes, trials): of
scenes, of the things in them where it counts names, or of tokens. Features are the vectors of patches, (scenes, P, D).
"""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from random import Random

import torch
import walk  # noqa: F401  (it puts the root of the repository on sys.path)
from torch import Tensor

from benchmarks.heat import covered
from evaluation.emoji_judge import answers
from playground.interventions import (
    blind,
    erase_patches,
    keep_patches,
    knockout,
    logit_lens,
    mute_heads,
    swap_features,
)
from training import emoji_world
from training.conversations import IGNORED, collate, tokenize_conversation
from training.emoji_score import mentioned, named_things

DESCRIBE, GROUND = "Describe the picture.", "What color is the background?"
Rate = tuple[int, int]
Rates = dict[str, Rate]


@dataclass
class Scenes:
    pictures: list
    truths: list[dict]
    features: Tensor
    described: list[str]  # the model's answers to DESCRIBE


def draw(model, processor, first: int, n: int) -> Scenes:
    """n scenes with two to four things, from seed `first` on."""
    sprites = emoji_world.load_sprites()
    pairs = [emoji_world.make_scene(sprites, seed, at_least=2) for seed in range(first, first + n)]
    pictures, truths = map(list, zip(*pairs, strict=True))
    with torch.no_grad():
        scenes = Scenes(pictures, truths, model.get_image_features(processor.image_processor(pictures)), [])
    scenes.described = ask(model, processor, scenes)
    return scenes


def ask(model, processor, scenes: Scenes, question: str = DESCRIBE, features: Tensor | None = None) -> list[str]:
    """The answers to one question about each scene, or about `features` in their place."""
    features, processor = scenes.features if features is None else features, copy.copy(processor)
    processor.image_seq_length = features.shape[1]  # <image> tokens in a prompt
    with swap_features(model, features):
        return answers(model, processor, scenes.pictures[: len(features)], [question] * len(features))


@dataclass
class Run:
    """A forward over prompts and their answers."""

    ids: Tensor  # (scenes, T)
    answer: Tensor  # (scenes, T), True at the answer's tokens, </s> included
    patches: list[int]  # positions among the T, the same in all scenes
    start: int  # position of the answer's first token
    out: object  # the model's output, with attentions and hidden states


def run(model, processor, scenes: Scenes, said: list[str], question: str = DESCRIBE) -> Run:
    """The model's forward over a question about each scene and what was said."""
    turns = [({"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": text}) for text in said]
    batch = collate([tokenize_conversation(turn, processor) for turn in turns], processor.tokenizer.pad_token_id)
    ids, answer = batch["input_ids"], batch["labels"] != IGNORED
    with torch.no_grad(), swap_features(model, scenes.features):
        out = model(ids, scenes.features, use_cache=False, output_attentions=True, output_hidden_states=True)
    patches = (ids[0] == model.config.image_token_index).nonzero()[:, 0].tolist()
    return Run(ids, answer, patches, int(answer[0].nonzero()[0]), out)


# --- Rates -----------------------------------------------------------------------------------------------------------


def named(text: str) -> Counter:
    """How many of each thing a text names."""
    return named_things(text.lower())


def names(said: list[str], truths: list[dict]) -> Rate:
    """Things that are named, of all things."""
    wanted = [Counter(emoji_world.names_of(truth)) for truth in truths]
    found = [named(text) & those for text, those in zip(said, wanted, strict=True)]
    return sum(each.total() for each in found), sum(each.total() for each in wanted)


def right(kind: str, said: list[str], truths: list[dict]) -> Rate:
    """Right answers to questions of a kind, as emoji_world.score sees it."""
    return sum(emoji_world.score(kind, text, truth) for text, truth in zip(said, truths, strict=True)), len(said)


def colours(said: list[str], truths: list[dict]) -> Rate:
    """Texts that mention the colour of the background and no other."""
    pairs = zip(said, truths, strict=True)
    return sum(mentioned(emoji_world.GROUNDS, text) == {truth["ground"]} for text, truth in pairs), len(said)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    z2, p = 1.96**2 / trials, successes / trials
    middle, half = p + z2 / 2, (z2 * p * (1 - p) + z2**2 / 4) ** 0.5
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def above(high: Rate, low: Rate) -> bool:
    """Whether one rate is above another, with intervals that do not overlap."""
    return wilson(*high)[0] > wilson(*low)[1]


# --- Experiments -----------------------------------------------------------------------------------------------------


def erased(model, processor, scenes) -> Rates:
    """The name of one thing per scene, which occurs once and was named: is it lost?"""
    own, others, chosen, rng = scenes.features.clone(), scenes.features.clone(), {}, Random(0)
    for i, (truth, said) in enumerate(zip(scenes.truths, map(named, scenes.described), strict=True)):
        there = emoji_world.names_of(truth)
        once = [thing for thing in truth["things"] if there.count(thing["name"]) == said[thing["name"]] == 1]
        for thing in once[:1]:
            on = covered(thing, 8)
            off = rng.sample((~on).nonzero()[:, 0].tolist(), int(on.sum()))
            own[i : i + 1] = erase_patches(own[i : i + 1], on.nonzero()[:, 0].tolist())
            others[i : i + 1] = erase_patches(others[i : i + 1], off)
            chosen[i] = thing["name"]
    rates = {}
    for label, features in (("its patches", own), ("as many others", others)):
        said = [named(text) for text in ask(model, processor, scenes, features=features)]
        rates[label] = sum(not said[i][name] for i, name in chosen.items()), len(chosen)
    return rates


def swapped(model, processor, scenes) -> Rates:
    """What is said of the next scene when its features replace those of some patches."""
    on = [torch.stack([covered(thing, 8) for thing in truth["things"]]).any(0) for truth in scenes.truths]
    on = (torch.stack(on) | torch.stack(on).roll(-1, 0))[..., None]  # where this scene or the next has a thing
    mine, other, truths = scenes.features, scenes.features.roll(-1, 0), scenes.truths[1:] + scenes.truths[:1]
    differ = [i for i, truth in enumerate(truths) if truth["ground"] != scenes.truths[i]["ground"]]
    things, rest, rates = torch.where(on, other, mine), torch.where(on, mine, other), {}
    for kind, features in {"everywhere": other, "where things are": things, "elsewhere": rest}.items():
        ground = ask(model, processor, scenes, GROUND, features)
        rates[f"{kind}: names"] = names(ask(model, processor, scenes, features=features), truths)
        rates[f"{kind}: colour"] = colours([ground[i] for i in differ], [truths[i] for i in differ])
    return rates


def without_others(features: Tensor, kept: Tensor) -> Tensor:
    """Patches that are not among `kept` (scenes, n) are replaced by the picture's mean patch."""
    on = torch.zeros(features.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    return torch.where(on[..., None], features, features.mean(1, keepdim=True))


def kept(model, processor, scenes) -> Rates:
    """Names right with 32 of 64 patches. The others are not left out, so that these keep their positions."""
    seen = run(model, processor, scenes, scenes.described)
    maps = torch.stack(seen.out.attentions).mean(2)[..., seen.patches]  # (L, scenes, T, P)
    asking = seen.answer.roll(-1, 1)  # the positions that predict the answer's tokens
    ways = {"longest vectors": ("norm", None), "at random": ("random", None)}
    ways |= {f"prompt's last token, layer {i}": ("attention", layer[:, seen.start - 1]) for i, layer in enumerate(maps)}
    ways["answer's tokens, all layers"] = "attention", (maps.mean(0) * asking[..., None]).sum(1)
    rates = {"all 64": names(scenes.described, scenes.truths)}
    for label, (by, attention) in ways.items():
        features = without_others(scenes.features, keep_patches(scenes.features, 32, by, attention)[1])
        rates[label] = names(ask(model, processor, scenes, features=features), scenes.truths)
    return rates


def layers(model, processor, scenes) -> Rates:
    """Names right where question and answer see the picture in some layers only.

    The prompt's last token predicts the answer's first one, so it counts as part of the answer.
    """
    seen = run(model, processor, scenes, scenes.described)
    every = set(range(len(model.language_model.layers)))
    question, answer = range(seen.patches[-1] + 1, seen.start - 1), range(seen.start - 1, seen.start + 100)
    both = [*question, *answer]
    cuts = {"all layers": (set(), both)} | {f"all but layer {i}": ({i}, both) for i in every}
    cuts |= {f"only layer {i}": (every - {i}, both) for i in every} | {"no layer": (every, both)}
    cuts |= {"no layer, for the question": (every, question), "no layer, for the answer": (every, answer)}
    rates = {}
    for label, (cut, readers) in cuts.items():
        with knockout(model, cut, readers, seen.patches):
            rates[label] = names(ask(model, processor, scenes), scenes.truths)
    return rates


def heads(model, processor, scenes) -> Rates:
    """Right answers with one head muted; then with one weight of the worst head cut, in all heads of its layer."""
    L, H = len(model.language_model.layers), model.config.text_config.num_attention_heads
    rates = {}
    for i, j in [(0, None), *((i, j) for i in range(L) for j in range(H))]:
        label = "no head" if j is None else f"layer {i}, head {j}"
        with mute_heads(model, {i: [] if j is None else [j]}):
            said, ground = ask(model, processor, scenes), ask(model, processor, scenes, GROUND)
        rates[f"{label}: description"] = right("describe", said, scenes.truths)
        rates[f"{label}: colour, described"] = colours(said, scenes.truths)
        rates[f"{label}: colour, asked"] = colours(ground, scenes.truths)
    layer, head = map(int, re.findall(r"\d+", worst_head(rates)))
    seen = run(model, processor, scenes, ask(model, processor, scenes, GROUND), GROUND)
    before, most = one_weight(seen, layer, head)
    for label, keys in (("one token", [most]), ("another token", [seen.start]), ("the picture", seen.patches)):
        with knockout(model, [layer], [before], keys):
            ground = ask(model, processor, scenes, GROUND)
        rates[f'in that layer, "is" does not see {label}'] = colours(ground, scenes.truths)
    return rates


def worst_head(rates: Rates) -> str:
    """The head without which fewest colours are right when they are asked for."""
    asked = [label for label in rates if label.startswith("layer") and label.endswith("asked")]
    return min(asked, key=lambda label: rates[label][0]).partition(":")[0]


def one_weight(seen: Run, layer: int, head: int) -> tuple[int, int]:
    """The position of "is" in answers "The background is ...", and that to which the head attends most from there."""
    before = seen.start + 2
    return before, int(seen.out.attentions[layer][:, head, before].mean(0).argmax())


def lens(model, processor, scenes) -> Rates:
    """The likeliest token at the patch in the middle of each thing is its name."""
    seen, rates = run(model, processor, scenes, scenes.described), {}
    tops = logit_lens(model, [x[:, seen.patches] for x in seen.out.hidden_states]).argmax(-1)  # (L + 1, scenes, P)
    things = [(i, thing) for i, truth in enumerate(scenes.truths) for thing in truth["things"]]
    for depth, top in enumerate(tops):
        said = [(top[i, int(t["y"] * 8) * 8 + int(t["x"] * 8)], word(processor, t["name"])) for i, t in things]
        label = f"after layer {depth - 1}" if depth else "before layer 0"
        rates[label] = sum(int(token) == wanted for token, wanted in said), len(things)
    return rates


def blinded(model, processor, scenes) -> Rates:
    """Tokens of the descriptions that are the likeliest without the picture, too."""
    seen = run(model, processor, scenes, scenes.described)
    hit = blind(model, {"input_ids": seen.ids}).argmax(-1).roll(1, 1) == seen.ids
    colour, place = (torch.isin(seen.ids, torch.tensor([word(processor, name) for name in those]))
                     for those in (emoji_world.GROUNDS, emoji_world.SIDES))  # fmt: skip
    name = torch.zeros_like(hit)
    for row, text in zip(name, scenes.described, strict=True):
        for found in emoji_world.A_THING.finditer(text.lower()):
            before = processor.tokenizer.encode(text[: found.start(2)].rstrip(), add_special_tokens=False)
            row[seen.start + len(before)] = True
    kinds = {"names": name, "places": place, "colours": colour, "other tokens": ~name & ~place & ~colour}
    return {kind: (int((hit & at & seen.answer).sum()), int((at & seen.answer).sum())) for kind, at in kinds.items()}


@torch.no_grad()
def nearby(model, processor, scenes) -> Rates:
    """In the tower's layers: the patches attended to are at least a quarter nearer than with equal weights."""
    tower, side = model.vision_tower, round(processor.image_seq_length**0.5)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    distances, rates = torch.cdist(grid, grid), {}  # (P, P), in patches
    states = tower(processor.image_processor(scenes.pictures))
    for number, (state, layer) in enumerate(zip(states, tower.encoder.layers, strict=False)):
        heads, y = layer.self_attn, layer.layer_norm1(state)
        q, k = (proj(y).unflatten(-1, (heads.n_heads, -1)).transpose(1, 2) for proj in (heads.q_proj, heads.k_proj))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 1:, 1:]  # (scenes, P, P)
        mean = ((weights * distances).sum(-1) / weights.sum(-1)).mean(-1)  # (scenes,)
        rates[f"layer {number} of the tower"] = int((mean < 0.75 * distances.mean()).sum()), len(mean)
    return rates


def word(processor, name: str) -> int:
    """The first token of a name after another word."""
    return processor.tokenizer.encode(f"a {name}", add_special_tokens=False)[1]

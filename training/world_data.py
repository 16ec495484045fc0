"""The emoji world as tensors: what each stage of training learns from.

`World` is asked for the samples of a range of numbers and always returns the same ones for it. A resumed run, or one
that is shared between processes, therefore sees exactly the samples of an uninterrupted run in one process.

    B batch    T tokens    P patches
"""

from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from llava import LlavaProcessor
from training import emoji_world
from training.conversations import collate, tokenize_caption, tokenize_conversation
from training.emoji_world import wording
from training.outside import is_outside

TURNS = 3  # questions and answers in a conversation about a scene
NAME_TOKENS = 4  # per patch of a picture in words: a shorter name is repeated, a longer one is cut
PARTS, PART_BYTES = 5, 24  # of a scene: up to four things and the background, and the longest name of one in bytes


@dataclass
class World:
    """Sample n is the scene with seed n. The tower's scenes have more things (see `parts`).

    `varied`: some pictures have looks of emoji_looks.py. Only training asks for them.
    """

    sprites: dict
    processor: LlavaProcessor
    photographs: list[Image.Image] = field(default_factory=emoji_world.load_photographs)
    varied: bool = False

    @property
    def side(self) -> int:
        return self.processor.image_processor.crop_size["height"]

    @property
    def columns(self) -> int:  # patches in a row of a picture
        return round(self.processor.image_seq_length**0.5)

    @property
    def pad(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def pictures(
        self, seeds: range, full: bool = False, outside: bool = False
    ) -> tuple[Tensor, list[dict]]:  # -> (B, 3, side, side), truths
        """With `full`, three pictures in four have four things. With `outside`, some are no scenes: `is_outside`."""
        fewest = {n: 4 if full and n % 4 else 0 for n in seeds}
        how = {"size": self.side, "varied": self.varied}
        drawn = [emoji_world.make_scene(self.sprites, n, at_least=fewest[n], **how) for n in seeds]
        pictures = [
            emoji_world.make_outside(self.photographs, n, **how) if outside and is_outside(n) else picture
            for n, (picture, _) in zip(seeds, drawn, strict=True)
        ]
        return self.processor.image_processor(pictures), [truth for _, truth in drawn]

    def parts(self, seeds: range) -> dict[str, Tensor]:
        """Pictures, and for each of up to PARTS parts the weight of each patch in it, its name in bytes and its place.

        pixel_values (B, 3, side, side), where (B, PARTS, P), words (B, PARTS, PART_BYTES), ninths (B, PARTS): 0 to 8
        for things, -1 for the background. Unused parts are zeros, their ninths -1. Most pictures are full: they cost
        as much as others and contain more to learn.
        """
        pixel_values, truths = self.pictures(seeds, full=True)
        where = torch.zeros(len(truths), PARTS, self.columns**2)
        words = torch.zeros(len(truths), PARTS, PART_BYTES, dtype=torch.long)
        ninths = torch.full((len(truths), PARTS), -1)
        for i, truth in enumerate(truths):
            for j, (name, weights) in enumerate(self.parts_of(truth)):
                where[i, j] = weights
                words[i, j, : len(name)] = torch.tensor(list(name.encode()))
            for j, (row, column) in enumerate(map(emoji_world.ninth, truth["things"])):
                ninths[i, j] = 3 * row + column
        where /= where.sum(-1, keepdim=True).clamp(min=1e-6)
        return {"pixel_values": pixel_values, "where": where, "words": words, "ninths": ninths}

    def parts_of(self, truth: dict) -> list[tuple[str, Tensor]]:
        """The name of each part of a scene, and weights (P,) of the patches in it: things, then the background."""
        centres = (torch.arange(self.columns) + 0.5) / self.columns
        y, x = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))
        parts, free = [], torch.ones_like(x)
        for thing in truth["things"]:
            away = torch.maximum((x - thing["x"]).abs(), (y - thing["y"]).abs()) / thing["size"]  # 0.5 at its edge
            parts.append((thing["name"], (0.6 - away).clamp(min=0)))  # patches near its centre weigh most
            free *= away > 0.55
        if free.any():
            parts.append((f"{truth['ground']} background", free))
        return parts

    def caption(self, truth: dict, seed: int) -> tuple[list[int], list[int]]:
        return tokenize_caption(emoji_world.caption(truth, wording(seed)), self.processor)

    def conversation(self, truth: dict, seed: int, outside: bool = False) -> tuple[list[int], list[int]]:
        return tokenize_conversation(emoji_world.conversation(truth, wording(seed), TURNS, outside), self.processor)

    def captions(self, seeds: range) -> dict[str, Tensor]:
        """Pictures with one caption each."""
        pixel_values, truths = self.pictures(seeds)
        return {"pixel_values": pixel_values, **collate(map(self.caption, truths, seeds), self.pad)}

    def conversations(self, seeds: range) -> dict[str, Tensor]:
        """Pictures with several questions and answers each."""
        pixel_values, truths = self.pictures(seeds, outside=True)
        rows = map(self.conversation, truths, seeds, map(is_outside, seeds))
        return {"pixel_values": pixel_values, **collate(rows, self.pad)}

    def spelt_out(self, truth: dict) -> list[list[int]]:  # -> P of NAME_TOKENS ids
        """A picture in words: for each patch the name of the thing there, or the colour of the background."""
        tokenizer, said = self.processor.tokenizer, []
        for patch in range(self.columns**2):
            y, x = ((place + 0.5) / self.columns for place in divmod(patch, self.columns))
            here = [t for t in truth["things"] if max(abs(x - t["x"]), abs(y - t["y"])) < t["size"] / 2]
            ids = tokenizer.encode(here[-1]["name"] if here else truth["ground"], add_special_tokens=False)
            said.append((ids * NAME_TOKENS)[:NAME_TOKENS])
        return said

    def text(self, seeds: range) -> dict[str, Tensor]:
        """Captions (one in four) and conversations, with pictures in words: `spelt` (B, P, NAME_TOKENS)."""
        truths = [emoji_world.make_truth(seed) for seed in seeds]
        pairs = zip(truths, seeds, strict=True)
        rows = [(self.conversation if seed % 4 else self.caption)(truth, seed) for truth, seed in pairs]
        return {"spelt": torch.tensor([self.spelt_out(truth) for truth in truths]), **collate(rows, self.pad)}

"""The recipe: a tiny LLaVA from scratch in four stages, on pictures and conversations of the emoji world.

    stage     what learns             from                              in LLaVA-1.5
    tower     the vision tower        the parts of pictures             CLIP, pretrained on pictures with captions
    decoder   decoder and head        texts, with pictures in words     Vicuna, pretrained on text and conversations
    align     only the projector      pictures with captions            558,000 captions, learning rate 1e-3
    tune      projector and decoder   conversations about pictures      665,000 conversations, learning rate 2e-5

The last two are LLaVA's own stages (Liu et al. 2023, https://arxiv.org/abs/2304.08485, section 4.2). The first two take
the place of the pretrained parts that LLaVA starts from, and differ from how those were trained: see losses.py.

Pictures are drawn when they are needed. Sample n is the scene with seed n, so that no scene occurs twice in a stage,
and a resumed run sees what an uninterrupted one would see. Seeds from 10^9 upwards belong to evaluation/.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from llava import LlavaForConditionalGeneration
from training.losses import ContrastiveLoss, NextTokenLoss, SpeltOutLoss
from training.world_data import World


@dataclass(frozen=True)
class Stage:
    name: str
    trainable: tuple[str, ...]  # the parts of the model that change; all others are frozen
    data: Callable[[World, range], dict[str, Tensor]]
    loss: Callable[[LlavaForConditionalGeneration], nn.Module]
    steps: int
    batch: int  # samples in a step
    lr: float  # the highest learning rate, after the warm-up
    projector_lr: float | None = None  # that of the projector, if it has another
    saves_frozen: bool = True  # whether NAME.pt holds the frozen parts too
    warm_up: float = 0.03  # share of the steps in which the learning rate rises
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW's


STAGES = [
    Stage("tower", ("vision_tower",), World.parts, ContrastiveLoss, steps=4500, batch=256, lr=1.5e-3),
    Stage("decoder", ("language_model", "lm_head"), World.text, SpeltOutLoss, steps=10000, batch=16, lr=5e-4),
    Stage("align", ("multi_modal_projector",), World.captions, NextTokenLoss, steps=3000, batch=16, lr=1e-3),
    Stage(
        "tune",
        ("multi_modal_projector", "language_model", "lm_head"),
        World.conversations,
        NextTokenLoss,
        steps=8000,
        batch=16,
        lr=3e-4,
    ),
]


def learning_rate(step: int, stage: Stage, highest: float | None = None) -> float:
    """Rises linearly during the warm-up, then falls to zero along half a cosine. `highest`: stage.lr."""
    highest = stage.lr if highest is None else highest
    warm_up = max(1, round(stage.warm_up * stage.steps))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, stage.steps - warm_up)))

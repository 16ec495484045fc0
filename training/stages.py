"""The recipe: a tiny LLaVA from nothing in five stages, on pictures and conversations of the emoji world.

    stage     what learns             from                              in LLaVA-1.5
    tower     the vision tower        the parts of pictures             CLIP, pretrained on pictures with captions
    decoder   decoder and head        texts, with pictures in words     Vicuna, pretrained on text and conversations
    align     only the projector      pictures with captions            558,000 captions, learning rate 1e-3
    tune      projector and decoder   conversations about pictures      665,000 conversations, learning rate 2e-5
    finish    the same                more conversations, with Muon     -

Align and tune are LLaVA's stages (Liu et al. 2023, https://arxiv.org/abs/2304.08485, section 4.2). The two before them
take the place of the pretrained parts that LLaVA starts from, and are trained in another way: see losses.py.

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
    muon: bool = False  # whether muon.py updates the matrices of the layers


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
    Stage(
        "finish",
        ("multi_modal_projector", "language_model", "lm_head"),
        World.more_conversations,
        NextTokenLoss,
        steps=2800,
        batch=16,
        lr=1e-3,
        muon=True,
    ),
]
TUNE = STAGES[3]  # LLaVA's second stage, which tunes any model on anybody's conversations


def learning_rate(step: int, stage: Stage) -> float:
    """Rises linearly over the first 3 % of the steps, then falls to zero along half a cosine."""
    warm_up = max(1, round(0.03 * stage.steps))
    if step < warm_up:
        return stage.lr * (step + 1) / warm_up
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, stage.steps - warm_up)))

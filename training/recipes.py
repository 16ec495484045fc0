"""LLaVA-1.5's own settings: what its scripts set (scripts/v1_5 in its repository), as flags of train.py.

    pretrain        the first stage: only the projector learns, from pictures with captions
    finetune        the second stage: projector and decoder learn, from conversations
    finetune-lora   the second stage with a LoRA

All three: one epoch, AdamW without weight decay, 3 % of warm-up, then half a cosine. In the scripts the first step
has a learning rate of 0; here it has the first part of the warm-up.
"""

from copy import copy
from dataclasses import dataclass, fields, replace

from llava import LlavaProcessor
from tokenizer import TEMPLATES


@dataclass(frozen=True)
class Recipe:
    """How a run on a file of records reads them and learns. The defaults are those of train.py without --recipe."""

    name: str | None = None  # in RECIPES
    stage: str = "tune"  # of stages.py: align trains only the projector, tune the decoder too
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW's
    # The others are flags of train.py.
    warm_up: float = 0.03  # share of the steps
    template: str | None = None  # a key of tokenizer.TEMPLATES; None: the checkpoint's
    pad: bool | None = None  # pad pictures to a square, or crop them; None: what the checkpoint does
    group: bool = False  # by modality and length (grouping.py)
    max_length: int | None = None  # tokens at which a conversation is cut; None: one beyond the context is skipped
    validate: float | None = None  # share of the records that is held back
    seed: int = 0  # chooses them
    batch: int | None = None
    lr: float | None = None
    projector_lr: float | None = None
    lora: int | None = None  # the rank; alpha is twice the rank
    alpha: float | None = None
    dropout: float | None = None

    def processor(self, own: LlavaProcessor) -> LlavaProcessor:
        """The checkpoint's processor with this recipe's template and padding."""
        processor = copy(own)
        if self.template is not None:
            processor.template = TEMPLATES[self.template]
        if self.pad is not None:
            processor.image_processor = replace(own.image_processor, do_pad=self.pad)
        return processor

    def flags(self) -> dict:
        """The flags of train.py that it sets, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)[3:]}
        return {name: value for name, value in values.items() if value is not None}

    def source(self) -> str:
        """What changes the samples, their order or how they are learnt, besides a run's other settings."""
        apart = dict.fromkeys(("name", "batch", "lr", "projector_lr", "lora", "alpha", "dropout"))
        only = replace(self, **apart, seed=0 if self.validate is None else self.seed)
        return "" if only == OURS else f", {only}"


OURS = Recipe()  # without --recipe
LLAVA = Recipe(betas=(0.9, 0.999), batch=128, template="v1", pad=True, group=True, max_length=2048)
RECIPES = {
    "pretrain": replace(LLAVA, stage="align", lr=1e-3, batch=256, template="plain", pad=False, group=False),
    "finetune": replace(LLAVA, lr=2e-5),
    "finetune-lora": replace(LLAVA, lr=2e-4, projector_lr=2e-5, lora=128, dropout=0.05),  # and alpha 256
}
RECIPES = {name: replace(recipe, name=name) for name, recipe in RECIPES.items()}


def in_force(recipe: Recipe, processor: LlavaProcessor, longest: int) -> str:
    """One line with the flags in force. Where one differs from the recipe's, the recipe's is in brackets."""
    original = RECIPES[recipe.name].flags() if recipe.name else {}
    template = next((name for name, template in TEMPLATES.items() if template == processor.template), "own")
    skips = "" if recipe.max_length else f", conversations of more than {longest} tokens are skipped"
    length = {"max_length": longest} if recipe.max_length else {}
    words = [f"--recipe {recipe.name}"] if recipe.name else []
    settled = replace(recipe, template=template, pad=processor.image_processor.do_pad, **length)
    for flag, value in settled.flags().items():
        name = flag.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}")
        if original.get(flag, value) != value:
            words[-1] += f" (the recipe: {original[flag]})"
    return f"in force: {' '.join(words)}; AdamW with betas {recipe.betas}, no weight decay{skips}"

"""The losses of training's stages. Each is a module that holds the model and what else the loss needs.

`forward` returns a sum over `count(batch)` things, and steps.backward divides it by the count of the whole step, so
that a step is the same however its samples are shared. ContrastiveLoss returns a mean, and counts as one.

    B batch    T tokens    N pictures of all processes    P patches    D width    V vocabulary
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama import Llama, LlamaConfig
from llava import LlavaForConditionalGeneration
from training.processes import gather

ROWS = 1024  # positions whose scores are computed at a time: 131 MB in float32 for 32,000 words


def init_weights(model: nn.Module) -> None:
    """Small random matrices; biases are zero, and norms keep their ones."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class NextTokenLoss(nn.Module):
    """The loss of LLaVA's two stages: cross-entropy of each next token that has a label, summed over a batch.

    It is the model's own loss times `count`, but only positions that predict a label get scores: patches and questions
    have none, and the scores of all positions, (B, T, V) in float32, would be the largest tensor of a step.
    """

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        model, ids = self.model, batch["input_ids"]
        if "pixel_values" in batch:
            x = model.merge(ids, model.get_image_features(batch["pixel_values"]).flatten(0, 1))
            return self.of_labels(x, batch["labels"])
        loss = self.of_labels(model.embed(ids), batch["labels"])
        # a gradient of zero for the projector: the other processes wait for one
        return loss + 0 * sum(part.sum() for part in model.multi_modal_projector.parameters())

    def of_labels(self, x: Tensor, labels: Tensor) -> Tensor:  # the decoder's input (B, T, D), (B, T) -> one number
        x, labels = self.model.language_model(x)[:, :-1], labels[:, 1:]  # position t predicts the label at t + 1
        return self.of_rows(x[labels >= 0], labels[labels >= 0])

    def of_rows(self, x: Tensor, labels: Tensor) -> Tensor:  # (n, D), (n,) -> one number
        """The summed cross-entropy of n positions. The scores of ROWS of them exist at a time, in float32."""
        pieces = zip(x.split(ROWS), labels.split(ROWS), strict=True)
        # Scores are not kept for the backward pass, which computes them again. There is no randomness to restore.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return sum(again(self.of_scores, *piece) for piece in pieces)

    def of_scores(self, x: Tensor, labels: Tensor) -> Tensor:  # (n, D), (n,) -> one number
        return F.cross_entropy(self.model.lm_head(x).float(), labels, reduction="sum")

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] >= 0).sum()  # nothing predicts the first token


class SpeltOutLoss(NextTokenLoss):
    """NextTokenLoss on pictures in words: a patch is the word for what is there, plus a vector for row and column.

    The decoder so learns to read pictures before it sees any, and the alignment only has to map patches to words. The
    vectors for rows and columns are discarded afterwards: the tower's features contain the position of a patch.
    """

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__(model)
        side, table = round(model.config.image_seq_length**0.5), model.language_model.embed_tokens.weight
        size = table.std().item()  # of a word
        self.rows, self.columns = (nn.Parameter(torch.randn(side, table.shape[1]) * size) for _ in range(2))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        words = self.model.language_model.embed_tokens(batch["spelt"]).mean(2)  # (B, P, D)
        places = (self.rows[:, None] + self.columns).flatten(0, 1)  # (P, D)
        x = self.model.merge(batch["input_ids"], (words + places).flatten(0, 1))
        return self.of_labels(x, batch["labels"])


class ContrastiveLoss(nn.Module):
    """A contrast of regions with their names, and a classification of each patch's position and its thing's place.

    CLIP's loss (Radford et al. 2021, figure 3) compares one vector per picture with one per caption, and its only label
    is which of them belong together. Here the regions are labelled: patches under a thing belong to its name, and all
    others to the colour of the background. Each patch must find its name by itself; equal names are one class. A name
    is the same everywhere in a picture, so the contrast alone would make the tower lose the positions of its patches; a
    linear layer that must tell row and column prevents that. Another one tells the ninth of the picture that the centre
    of a patch's thing is in, which answers mention: so all patches of a thing agree on it. The text side is a small
    Llama over bytes. Text side and layers are discarded after training, as LLaVA discards CLIP's text side.
    """

    def __init__(self, model: LlavaForConditionalGeneration, width: int = 128):
        super().__init__()
        self.model = model
        self.text = Llama(LlamaConfig(256, width, 2 * width, num_hidden_layers=2, num_attention_heads=2))
        self.from_text = nn.Linear(width, width, bias=False)
        self.from_picture = nn.Linear(model.config.vision_config.hidden_size, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.side = round(model.config.image_seq_length**0.5)
        self.place = nn.Linear(model.config.vision_config.hidden_size, 2 * self.side)  # scores for row and column
        self.ninth = nn.Linear(model.config.vision_config.hidden_size, 9)
        init_weights(self.text)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tower = self.model.vision_tower
        patches = tower.post_layernorm(tower(batch["pixel_values"])[-1][:, 1:])  # (B, P, D), without the class token
        row_loss, column_loss = self.position(patches)
        places = row_loss + column_loss + self.of_things(patches, batch["where"], batch["ninths"])
        return self.contrast(patches, gather(batch["where"]), gather(batch["words"])) + places

    def contrast(self, patches: Tensor, where: Tensor, words: Tensor) -> Tensor:
        """Patches (B, P, D), weights of patches in parts (N, parts, P) and the parts' names in bytes -> one number."""
        seen = gather(F.normalize(self.from_picture(patches).float(), dim=-1))  # (N, P, width)
        words = words.flatten(0, 1)
        used = words[:, 0] > 0
        names, own = torch.unique(words[used], dim=0, return_inverse=True)  # a name that occurs twice is one column
        last = (names > 0).sum(-1) - 1  # the last byte attends to all others
        read = self.from_text(self.text(self.text.embed_tokens(names))[torch.arange(len(names)), last])
        scores = self.log_scale.exp().clamp(max=100) * seen @ F.normalize(read.float(), dim=-1).T  # (N, P, names)
        # Each patch of a part must find the part's name by itself, because the decoder reads patch by patch. In the
        # other direction a name must find its parts, each represented by the mean score of its patches.
        by_patch, by_part = ((where @ x).flatten(0, 1)[used] for x in (scores.log_softmax(-1), scores))  # (used, names)
        theirs = F.one_hot(own, len(names)).float()
        return (F.nll_loss(by_patch, own) + F.cross_entropy(by_part.T, (theirs / theirs.sum(0)).T)) / 2

    def position(self, patches: Tensor) -> tuple[Tensor, Tensor]:  # (B, P, D) -> two numbers
        """Cross-entropy of each patch's row, and of its column."""
        rows, columns = self.place(patches).flatten(0, 1).chunk(2, dim=-1)  # (B * P, side) each
        at = torch.arange(self.side, device=rows.device)
        row, column = at.repeat_interleave(self.side).repeat(len(patches)), at.repeat(self.side * len(patches))
        return F.cross_entropy(rows, row), F.cross_entropy(columns, column)

    def of_things(self, patches: Tensor, where: Tensor, ninths: Tensor) -> Tensor:
        """Cross-entropy of each thing's ninth (B, parts) by the patches (B, P, D) in it, as where (B, parts, P) says.

        A sum over the things of a picture, divided by the number of parts, so that shares of a batch add up.
        """
        scores = where @ self.ninth(patches).log_softmax(-1)  # (B, parts, 9)
        return F.nll_loss(scores.flatten(0, 1), ninths.flatten(), ignore_index=-1, reduction="sum") / ninths.numel()

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return torch.ones((), device=batch["words"].device)  # it is a mean already

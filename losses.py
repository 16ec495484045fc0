"""What the stages of train.py want: a loss for each, as a module that holds the model and what it needs besides.

`forward` gives a sum over `count(batch)` things; train.backward divides it by the count of all processes, so a step is
the same however its samples are shared. The contrast is a mean over everything already, and counts as one.

    B batch    N pictures of all processes    P patches    D width
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama, LlamaConfig
from llava import LlavaForConditionalGeneration


def init_weights(model: nn.Module) -> None:
    """Small random matrices; norms start as they are, biases at zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class NextTokenLoss(nn.Module):
    """The loss of LLaVA's own stages: the next word, where the labels want one. Summed over a batch's words."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.model(**batch).loss * self.count(batch)
        if "pixel_values" not in batch:  # the projector gets no gradient, for which the other processes would wait
            loss = loss + 0 * sum(part.sum() for part in self.model.multi_modal_projector.parameters())
        return loss

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] >= 0).sum()  # the first token is foretold by nothing


class SpeltOutLoss(NextTokenLoss):
    """The same with pictures spelt out: a patch is the word for what is there, and a vector each for row and column.

    So the decoder learns to read pictures before it sees one, and alignment has only to make patches look like words.
    Rows and columns are thrown away afterwards: a patch that the tower has seen knows where it is.
    """

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__(model)
        side, table = round(model.config.image_seq_length**0.5), model.language_model.embed_tokens.weight
        size = table.std().item()  # of a word
        self.rows, self.columns = (nn.Parameter(torch.randn(side, table.shape[1]) * size) for _ in range(2))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        words = self.model.language_model.embed_tokens(batch["spelt"]).mean(2)  # (B, P, D)
        places = (self.rows[:, None] + self.columns).flatten(0, 1)  # (P, D)
        x = self.model.merge(batch["input_ids"], None, (words + places).flatten(0, 1))
        return self.model(inputs_embeds=x, labels=batch["labels"]).loss * self.count(batch)


class ContrastiveLoss(nn.Module):
    """A contrast of regions with their words, and a classification of each patch's row and column. Needs labels.

    CLIP's loss (Radford et al. 2021, figure 3) has one vector per picture and one per caption; the only label is which
    of a batch belong together. Three things differ here. The regions are given: patches under a thing belong to its
    name, the others to the colour of the background. Every patch must choose its region's words by itself, and words
    their region by the mean of its patches; equal words in a batch are one class. And a linear layer must tell a
    patch's row and column: names are the same everywhere, so the contrast alone would make the tower forget the place.
    The text side is a small Llama over bytes. It is dropped after training, as LLaVA drops CLIP's.
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
        init_weights(self.text)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tower = self.model.vision_tower
        patches = tower.post_layernorm(tower(batch["pixel_values"])[-1][:, 1:])  # (B, P, D), without the class token
        seen = everywhere(F.normalize(self.from_picture(patches).float(), dim=-1))  # (N, P, width), of all processes
        where, words = everywhere(batch["where"]), everywhere(batch["words"]).flatten(0, 1)  # (N, parts, P); bytes
        used = words[:, 0] > 0
        names, own = torch.unique(words[used], dim=0, return_inverse=True)  # a name said twice is one column
        last = (names > 0).sum(-1) - 1  # the last byte has read all others
        read = self.from_text(self.text(self.text.embed_tokens(names))[torch.arange(len(names)), last])
        scores = self.log_scale.exp().clamp(max=100) * seen @ F.normalize(read.float(), dim=-1).T  # (N, P, names)
        # Every patch of a part is to know the part's name by itself: a decoder reads patch by patch. The other way, a
        # name is to find the parts it names, each by the mean of its patches.
        by_patch, by_part = ((where @ x).flatten(0, 1)[used] for x in (scores.log_softmax(-1), scores))  # (used, names)
        theirs = F.one_hot(own, len(names)).float()
        contrast = (F.nll_loss(by_patch, own) + F.cross_entropy(by_part.T, (theirs / theirs.sum(0)).T)) / 2
        rows, columns = self.place(patches).flatten(0, 1).chunk(2, dim=-1)  # (B * P, side) each
        at = torch.arange(self.side, device=rows.device)
        row, column = at.repeat_interleave(self.side).repeat(len(patches)), at.repeat(self.side * len(patches))
        return contrast + F.cross_entropy(rows, row) + F.cross_entropy(columns, column)

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return torch.ones((), device=batch["words"].device)  # a mean already


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Everywhere(torch.autograd.Function):
    """The rows of all processes, in order. Gradients go back to where the rows came from."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)  # every process has a loss, and all of them want something of these rows
        return grad.chunk(world_size())[dist.get_rank()]


def everywhere(x: Tensor) -> Tensor:
    return Everywhere.apply(x) if dist.is_initialized() else x

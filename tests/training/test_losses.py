"""The contrastive loss at its two extremes: an untrained tower and a perfect one."""

import pytest
import torch

from tiny_world import tiny_world, untrained
from training.attention import use_training_attention
from training.losses import ContrastiveLoss


class KnowsAll(torch.nn.Module):
    """A tower whose patches say what is there and where they are, in vectors of its own."""

    def __init__(self, batch: dict, side: int, width: int):
        super().__init__()
        part = batch["where"].argmax(1)  # (B, P)
        _, name = torch.unique(batch["words"].flatten(0, 1), dim=0, return_inverse=True)
        name = name.unflatten(0, part.shape[:1] + (-1,)).gather(1, part)  # (B, P)
        rows, columns = torch.randn(2, side, width)
        patches = torch.randn(int(name.max()) + 1, width)[name] + (rows[:, None] + columns).flatten(0, 1)
        self.states = [torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)]  # a class token first
        self.post_layernorm = torch.nn.Identity()

    def forward(self, pixel_values):
        return self.states


def test_the_contrast_of_an_untrained_tower_is_that_of_guessing_and_of_a_perfect_one_small():
    contrast = ContrastiveLoss(untrained())
    use_training_attention(contrast)
    batch = tiny_world().parts(range(16))
    words = batch["words"].flatten(0, 1)
    words = [bytes(row[row > 0].tolist()) for row in words if row[0]]
    n, different = len(words), len(set(words))
    places = 2 * torch.tensor(contrast.side).log()  # a row and a column of every patch
    guessing = (torch.tensor(n).log() + torch.tensor(different).log()) / 2 + places
    scale = contrast.log_scale.item()
    with torch.no_grad():
        contrast.log_scale.fill_(0)  # no preference is amplified
        contrast.place.weight.zero_()
        contrast.place.bias.zero_()
        assert contrast(batch).item() == pytest.approx(guessing.item(), abs=0.2)
        contrast.log_scale.fill_(scale)
    contrast.model.vision_tower = KnowsAll(batch, contrast.side, contrast.place.in_features)
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = contrast(batch)
        loss.backward()
        optimizer.step()
    entropy = sum(words.count(w) * torch.tensor(words.count(w)).log() / words.count(w) for w in set(words)) / different
    # It cannot be lower: things with the same name cannot be told apart. And a few patches lie under two things.
    assert entropy / 2 < loss.item() < entropy / 2 + 0.1 * guessing

"""The contrastive loss between its two ends: a tower that knows nothing, and one that knows all. And the loss of next
tokens, which scores only the positions that have a label, against the model's own loss.
"""

import pytest
import torch
from torch.testing import assert_close

from tiny_world import tiny_world, untrained
from training import losses
from training.attention import use_training_attention
from training.losses import ContrastiveLoss, NextTokenLoss


class KnowsAll(torch.nn.Module):
    """A tower whose patches say what is there and where they are, in vectors of its own."""

    def __init__(self, batch: dict, side: int, width: int):
        super().__init__()
        part = batch["where"].argmax(1)  # (B, P)
        _, name = torch.unique(batch["words"].flatten(0, 1), dim=0, return_inverse=True)
        name = name.unflatten(0, part.shape[:1] + (-1,)).gather(1, part)  # (B, P)
        rows, columns = torch.randn(2, side, width)
        patches = torch.randn(int(name.max()) + 1, width)[name] + (rows[:, None] + columns).flatten(0, 1)
        patches += torch.randn(10, width)[batch["ninths"].gather(1, part)]  # the last one for the background
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
    ninths = batch["ninths"].flatten()
    of_things = (ninths >= 0).float().mean() * torch.tensor(9.0).log()
    places = 2 * torch.tensor(contrast.side).log() + of_things  # a row and a column of every patch, a ninth of things
    guessing = (torch.tensor(n).log() + torch.tensor(different).log()) / 2 + places
    scale = contrast.log_scale.item()
    with torch.no_grad():
        contrast.log_scale.fill_(0)  # no preference is amplified
        for layer in (contrast.place, contrast.ninth):
            layer.weight.zero_()
            layer.bias.zero_()
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


# --- Next tokens -----------------------------------------------------------------------------------------------------


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("rows", [1024, 7])
def test_scores_of_labelled_positions_only_give_the_models_own_loss_and_gradients(pictures, rows, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", rows)
    model, batch = untrained().train(), tiny_world().conversations(range(3))
    if not pictures:
        del batch["pixel_values"]
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_index, 5)
    objective = NextTokenLoss(model)
    n = objective.count(batch)
    assert 2 * 7 < n < batch["labels"].numel() / 2
    shapes = []
    head = model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape[0]))
    ours, gradients = loss_and_gradients(model, objective(batch))
    head.remove()
    assert sum(shapes) == 2 * n and max(shapes) <= rows  # once forward, and once more in the backward pass
    exact, wanted = loss_and_gradients(model, model(**batch).loss * n)
    assert_close(ours, exact)
    assert {name for name in gradients if "projector" not in name} == {n for n in wanted if "projector" not in n}
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_a_batch_without_labels_has_no_loss():
    model, batch = untrained(), tiny_world().conversations(range(2))
    batch["labels"].fill_(-100)
    loss, gradients = loss_and_gradients(model, NextTokenLoss(model)(batch))
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())

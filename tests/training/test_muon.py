"""Muon: what it does to a matrix, and what AdamW still does."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tiny_world import untrained
from training.losses import NextTokenLoss
from training.muon import Muon, orthogonalize
from training.run_stage import choose_parameters, make_optimizer
from training.stages import STAGES

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 16, 1)])
def test_singular_vectors_stay_and_values_become_about_one(shape):
    """The polynomial of the iteration, applied to each singular value of the normalised matrix."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    s = S / S.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert_close(orthogonalize(x), U * s[:, None] @ V, atol=1e-5, rtol=1e-5)
    assert (s[S > 0.2 * S.amax(-1, keepdim=True)] > 0.6).all() and s.max() < 1.25


def test_a_step_has_the_size_of_adamws_and_leaves_other_parameters_to_adamw():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(9))
    twin = nn.Parameter(vector.detach().clone())
    muon = Muon([vector], [matrix], lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
    adamw = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(3):
        before = matrix.detach().clone()
        matrix.grad, vector.grad = torch.randn(32, 64), torch.randn(9)
        twin.grad = vector.grad.clone()
        muon.step(), adamw.step()
        size = (matrix.detach() - before).square().mean().sqrt() / 0.1  # AdamW's is 0.2 to 0.4 (Liu et al. 2025)
        assert 0.1 < size < 0.4
        assert_close(vector, twin, atol=0, rtol=0)


def test_a_saved_optimizer_continues_exactly():
    def three_steps(stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(2)
        matrix, vector = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4))
        optimizer = Muon([vector], [matrix], lr=0.05)
        for step in range(3):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = Muon([vector], [matrix], lr=0.05)
                optimizer.load_state_dict(saved)
            matrix.grad, vector.grad = torch.randn(8, 8), torch.randn(4)
            optimizer.step()
        return torch.cat([matrix.detach().flatten(), vector.detach()])

    assert torch.equal(three_steps(), three_steps(stop=2))


def test_it_updates_the_matrices_of_the_layers_and_nothing_else():
    stage = STAGES[-1]
    objective = NextTokenLoss(untrained())
    choose_parameters(objective, stage.trainable)
    optimizer = make_optimizer(objective, stage)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    others, matrices = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert len(matrices) == 7 * len(objective.model.language_model.layers)
    assert all(".layers." in name and name.endswith("proj.weight") for name in matrices)
    assert any("embed_tokens" in name for name in others) and any("multi_modal" in name for name in others)
    assert not any("vision_tower" in name for name in others + matrices)

"""A step's samples, shared between processes and cut into pieces."""

from contextlib import nullcontext

import pytest
import torch

from tiny_world import tiny_world, untrained
from training.losses import NextTokenLoss
from training.steps import Steps, backward


@pytest.mark.quick
def test_steps_are_shared_without_gap_or_overlap():
    def seen(**how) -> list[list[int]]:
        return [[n for piece in item for n in piece] for item in Steps(list, batch=12, first=2, end=4, **how)]

    assert seen() == [list(range(24, 36)), list(range(36, 48))]
    assert [len(piece) for piece in Steps(list, 12, 2, 4, pieces=3)[0]] == [4, 4, 4]
    shares = [seen(rank=rank, world_size=3, pieces=2) for rank in range(3)]
    assert [sorted(n for part in parts for n in part) for parts in zip(*shares, strict=True)] == seen()
    assert shares[1][0] == list(range(25, 36, 3))  # what is sorted by length is dealt out evenly


@pytest.mark.quick
def test_samples_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="12 samples cannot be divided among 2 processes, in 4 pieces each"):
        Steps(list, 12, 0, 1, world_size=2, pieces=4)


def test_a_step_in_pieces_is_the_same_step():
    world, results = tiny_world(), []
    for pieces in [[range(6)], [range(2 * i, 2 * i + 2) for i in range(3)]]:
        objective = NextTokenLoss(untrained())
        batches = [world.conversations(seeds) for seeds in pieces]
        loss = backward(objective, objective.count, batches, "cpu", nullcontext)
        results.append((loss.item(), objective.model.lm_head.weight.grad))
    (loss, whole), (same_loss, same) = results
    assert loss == pytest.approx(same_loss, rel=1e-5) and torch.allclose(whole, same, atol=1e-7)

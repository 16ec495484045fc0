"""The recipe: its learning rates, and that the bundled model was made by it."""

import csv
from dataclasses import replace

import pytest

from tiny_world import ROOT
from training.stages import STAGES, learning_rate

pytestmark = pytest.mark.quick


def test_the_learning_rate_rises_and_falls():
    stage = replace(STAGES[0], steps=1000, lr=2.0)
    rates = [learning_rate(step, stage) for step in range(1000)]
    assert max(rates) == rates[30] == 2.0
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[0] < 0.1 and rates[-1] < 1e-4


def test_the_bundled_model_is_made_by_the_recipe():
    """The log of its run ends each stage at the recipe's last step, and has the recipe's learning rates on the way.

    Except, as training/README.md says, for the tower's first 300 steps, which were part of a plan of 6,000, and for a
    second run of the last stage.
    """
    rows = list(csv.reader((ROOT / "checkpoints" / "stages" / "log.csv").open()))
    stages = [*STAGES, replace(STAGES[-1], name="tune 2", steps=4000, lr=4e-4)]
    assert list(dict.fromkeys(row[0] for row in rows)) == [stage.name for stage in stages]
    for stage in stages:
        of_stage = [row for row in rows if row[0] == stage.name]
        assert int(of_stage[-1][1]) == stage.steps
        for name, step, _, rate in of_stage:
            planned = replace(stage, steps=6000) if name == "tower" and int(step) <= 300 else stage
            assert float(rate) == pytest.approx(learning_rate(int(step) - 1, planned), rel=1e-3)

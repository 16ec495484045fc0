"""The recipe: its learning rates, and that the bundled model was made by it."""

import csv
from dataclasses import replace

import pytest

from tiny_world import ROOT
from training.stages import STAGES, learning_rate

pytestmark = pytest.mark.quick
LONGER_PLANS = {"tower": {300: 6000}, "finish": {1300: 4000, 2100: 3500}}  # up to this step: the steps planned then


def test_the_learning_rate_rises_and_falls():
    stage = replace(STAGES[0], steps=1000, lr=2.0)
    rates = [learning_rate(step, stage) for step in range(1000)]
    assert max(rates) == rates[30] == 2.0
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[0] < 0.1 and rates[-1] < 1e-4


def test_the_bundled_model_is_made_by_the_recipe():
    """The log of its run ends each stage at the recipe's last step, and has the recipe's learning rates on the way.

    Except for the first steps of two stages, which were part of longer plans, as training/README.md says.
    """
    rows = list(csv.reader((ROOT / "checkpoints" / "stages" / "log.csv").open()))
    assert list(dict.fromkeys(row[0] for row in rows)) == [stage.name for stage in STAGES]
    for stage in STAGES:
        of_stage = [row for row in rows if row[0] == stage.name]
        assert int(of_stage[-1][1]) == stage.steps
        for name, step, _, rate in of_stage:
            plans = [plan for until, plan in LONGER_PLANS.get(name, {}).items() if int(step) <= until]
            planned = replace(stage, steps=plans[0]) if plans else stage
            assert float(rate) == pytest.approx(learning_rate(int(step) - 1, planned), rel=1e-3)

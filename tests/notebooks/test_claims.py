"""What notebooks 1 and 11 claim, measured again on twelve scenes; and claims.md is what claims.py writes."""

import sys
from functools import cache

import pytest
import torch

from tiny_world import ROOT

sys.path.append(str(ROOT / "notebooks"))  # where a notebook runs
import claims
import experiments
import walk
from experiments import wilson

COMMITTED = claims.committed()


@cache
def world() -> tuple:
    model, processor = walk.tiny_llava()
    return model, processor, experiments.draw(model, processor, claims.SEEDS[0], 12)


@cache
def measured(name: str) -> dict[str, tuple[int, int]]:
    return getattr(experiments, name)(*world())


def shares(name: str, part: str = "") -> dict[str, float]:
    """The shares whose labels contain a text, labelled by the rest, on twelve scenes."""
    return {label: k / n for label, (k, n) in claims.having(measured(name), part).items()}


# --- The committed file ----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_file_is_what_its_rates_make_of_it():
    assert claims.table(COMMITTED) == claims.FILE.read_text("utf-8")
    assert list(COMMITTED) == list(claims.EXPERIMENTS)
    assert {claim.experiment for claim in claims.CLAIMS} == set(claims.EXPERIMENTS)


@pytest.mark.quick
def test_every_rate_is_over_fifty_trials_or_more_on_both_ranges():
    for first, second in COMMITTED.values():
        assert first.keys() == second.keys()
        assert all(k <= n and n >= 50 for k, n in (*first.values(), *second.values()))
    one, other = (range(first, first + claims.SCENES) for first in claims.SEEDS)
    assert claims.SCENES >= 50 and not set(one) & set(other)


@pytest.mark.quick
def test_a_claim_that_the_second_scenes_do_not_repeat_is_not_confirmed():
    first, _ = COMMITTED["erased"]
    worse = {label: (n - k, n) for label, (k, n) in first.items()}
    assert not any("Not confirmed" in line for line in claims.verdicts("erased", (first, first)))
    for both in ((first, worse), (worse, first), (worse, worse)):
        assert all("Not confirmed" in line for line in claims.verdicts("erased", both))


@pytest.mark.quick
@pytest.mark.parametrize(("k", "n"), [(0, 12), (5, 12), (12, 12), (178, 200)])
def test_an_interval_holds_the_true_rates_that_agree_with_the_observation(k, n):
    p = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    believable = p[(k / n - p).abs() <= 1.96 * (p * (1 - p) / n).sqrt() + 1e-9]
    assert wilson(k, n) == pytest.approx((believable[0].item(), believable[-1].item()), abs=2e-5)


@pytest.mark.quick
def test_a_place_is_named_only_if_its_interval_is_apart_from_the_next():
    assert claims.highest({"a": (50, 60), "b": (10, 60), "c": (9, 60)}) == "a"
    assert claims.lowest({"a": (50, 60), "b": (10, 60), "c": (51, 60)}) == "b"
    assert claims.highest({"a": (50, 60), "b": (47, 60)}) == claims.lowest({"a": (9, 60), "b": (10, 60)}) == "no"


@pytest.mark.parametrize("name", claims.EXPERIMENTS)
def test_twelve_scenes_agree_with_the_file(name):
    """Within chance, 3.5 standard errors of so few trials: another model's file would be far off in some rate."""
    first, _ = COMMITTED[name]
    assert measured(name).keys() == first.keys()
    for label, (k, n) in measured(name).items():
        share = (first[label][0] + 2) / (first[label][1] + 4)  # not 0 or 1, where a standard error would be 0
        assert k / n == pytest.approx(share, abs=3.5 * (share * (1 - share) / n) ** 0.5 + 1 / n), label


# --- The sentences ---------------------------------------------------------------------------------------------------


def test_a_name_is_lost_with_the_patches_of_its_thing_and_not_with_as_many_others():
    lost = shares("erased")
    assert lost["its patches"] > 0.6 and lost["as many others"] < 0.2


def test_names_come_with_the_patches_of_things_and_the_colour_with_the_others():
    names, colour = shares("swapped", ": names"), shares("swapped", ": colour")
    assert names["where things are"] > 0.6 and names["elsewhere"] < 0.2
    assert colour["elsewhere"] > 0.7 and colour["where things are"] < 0.3
    model, processor, scenes = world()
    others = experiments.ask(model, processor, scenes, features=scenes.features.roll(-1, 0))
    assert others == scenes.described[1:] + scenes.described[:1]  # the instrument: all patches make all of an answer


def test_half_of_the_patches_chosen_by_attention_can_be_worse_than_a_random_half():
    assert min(shares("kept", "prompt's last token").values()) < shares("kept")["at random"] - 0.1
    assert shares("kept")["answer's tokens, all layers"] > shares("kept")["at random"] - 0.1


def test_one_layers_view_is_nearly_enough_and_only_the_answers_own_is_needed():
    names, alone = shares("layers"), shares("layers", "only ")
    first, _ = COMMITTED["layers"]
    assert max(alone, key=alone.get) == claims.highest(claims.having(first, "only "))
    assert names["no layer"] < 0.1 and names["no layer, for the answer"] < 0.2
    assert names["no layer, for the question"] > 0.5


def test_the_colour_asked_for_needs_one_head_which_only_reads_a_word():
    first, _ = COMMITTED["heads"]
    worst, asked = experiments.worst_head(measured("heads")), shares("heads", ": colour, asked")
    assert worst == claims.lowest(claims.having(first, ": colour, asked"))
    assert asked[worst] < 0.2 and all(share > 0.8 for head, share in asked.items() if head != worst)
    assert worst == claims.lowest(claims.having(first, ": colour, described"))
    assert shares("heads")[f"{worst}: colour, described"] < 0.2
    one, *others = shares("heads", "does not see").values()
    assert one < 0.4 and min(others) > 0.8


def test_names_can_be_read_at_things_before_the_first_layer():
    assert shares("lens")["before layer 0"] > 0.7


def test_without_the_picture_the_language_is_right_and_names_are_not():
    right = shares("blinded")
    assert right["names"] < 0.15 and right["colours"] < 0.5 and right["other tokens"] > 0.6


def test_the_towers_first_layer_attends_everywhere_and_its_last_to_near_patches():
    near = list(shares("nearby").values())
    assert near[0] < 0.2 and near[-1] > 0.8

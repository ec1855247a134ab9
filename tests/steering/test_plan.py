from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from saeffect.config import SteeringConfig
from saeffect.errors import ConfigError, EmptySelection, IncompatibleSae, ShapeMismatch, UnknownName
from saeffect.steering import SteeringPlan, check_names
from saeffect.steering.plan import check_features
from steering.tiny_model import D_MODEL, site


def test_lists_become_tuples_and_conditions_follow():
    plan = SteeringPlan(prompts=["a"], doses=[0.3], placebos=["random"])
    assert plan.prompts == ("a",)
    assert hash(plan) == hash(SteeringPlan(prompts=("a",), doses=(0.3,)))
    assert plan.conditions == ("steered", "random")
    assert SteeringPlan(prompts=("a",), doses=(0.3,), placebos=()).conditions == ("steered",)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"prompts": ()}, ConfigError, "prompts"),
        ({"prompts": ("a", "a")}, ConfigError, "there twice"),
        ({"doses": (math.inf,)}, ConfigError, "finite"),
        ({"samples": 0}, ConfigError, "samples"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"positions": "al"}, UnknownName, "did you mean 'all'"),
        ({"placebos": ("rando",)}, UnknownName, "did you mean 'random'"),
        ({"top_p": 2.0}, ConfigError, "top_p"),
        ({"operator": "clampp"}, UnknownName, "did you mean 'clamp'"),
        ({"unit": "coefficent"}, UnknownName, "did you mean 'coefficient'"),
        ({"operator": "clamp", "doses": (-1.0,)}, ConfigError, "below 0"),
        ({"operator": "ablate"}, ConfigError, "no doses"),
    ],
)
def test_bad_plans(change, error, said):
    with pytest.raises(error, match=said):
        SteeringPlan(**{"prompts": ("a",), "doses": (0.3,), **change})


def test_a_plan_of_a_study_files_section():
    section = SteeringConfig.read({"coefficient": 50, "top_p": 0.5, "prompts": ["a", "b"]}, at="s")
    made = SteeringPlan.from_section(section, seed=3, prompts=("c",))
    assert (made.doses, made.unit, made.top_p, made.seed, made.prompts) == ((50.0,), "coefficient", 0.5, 3, ("c",))
    assert made.placebos == section.placebos == ("random", "matched")
    assert made.placebo_columns == ("matched",)
    with pytest.raises(ConfigError, match="finite"):
        SteeringPlan.from_section(section, seed=3, doses=(math.nan,))


@pytest.mark.parametrize("key", ["placebos", "baselines", "outcomes"])
def test_names_that_are_not_registered(key):
    with pytest.raises(UnknownName, match=f"no {key.removesuffix('s')}|unknown {key.removesuffix('s')}"):
        check_names(SteeringConfig.read({key: ["nothing"]}, at="s"))


def test_a_site_of_another_width(lm):
    with pytest.raises(IncompatibleSae, match="32 wide"):
        site(lm, torch.ones(4, 5))


def test_check_features(lm):
    W_dec = torch.ones(4, D_MODEL)
    table = pd.DataFrame({"feature": [3, 1], "top_tokens": [["a"], ["b"]]})
    assert check_features(site(lm, W_dec), table, ("top_tokens",))["feature"].tolist() == [1, 3]
    with pytest.raises(ShapeMismatch, match="top_token_ids"):
        check_features(site(lm, W_dec), table, ("top_token_ids",))
    with pytest.raises(EmptySelection):
        check_features(site(lm, W_dec), table[:0], ("top_tokens",))
    with pytest.raises(ShapeMismatch, match="decoder has 3 rows"):
        check_features(site(lm, W_dec[:3]), table, ())
    with pytest.raises(ShapeMismatch, match="twice"):
        check_features(site(lm, W_dec), pd.concat([table, table]), ())

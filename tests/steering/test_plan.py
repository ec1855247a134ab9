from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from saeffect.errors import ConfigError, EmptySelection, IncompatibleSae, ShapeMismatch, UnknownName
from saeffect.lm.hooks import capture
from saeffect.steering import Site, SteeringPlan, mean_residual_norm
from saeffect.steering.plan import check_features
from steering.tiny_model import D_MODEL, HOOK, site


def test_lists_become_tuples_and_conditions_follow():
    plan = SteeringPlan(prompts=["a"], doses=[0.3], placebos=["random"])
    assert plan.prompts == ("a",)
    assert hash(plan) == hash(SteeringPlan(("a",), (0.3,)))
    assert plan.conditions == ("steered", "random")
    assert SteeringPlan(("a",), (0.3,), placebos=()).conditions == ("steered",)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"prompts": ()}, ConfigError, "prompts"),
        ({"prompts": ("a", "a")}, ConfigError, "all different"),
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
        ({"operator": "ablate"}, ConfigError, "one dose 1"),
    ],
)
def test_bad_plans(change, error, said):
    with pytest.raises(error, match=said):
        SteeringPlan(**{"prompts": ("a",), "doses": (0.3,), **change})


def test_mean_norm_leaves_the_first_position_out(lm):
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    norms = capture(lm, HOOK, ids).norm(dim=-1)
    assert mean_residual_norm(lm, HOOK, ids) == pytest.approx(norms[:, 1:].mean().item())
    with pytest.raises(ShapeMismatch):
        mean_residual_norm(lm, HOOK, ids[:, :1])
    with pytest.raises(ConfigError, match="above 0"):
        Site(lm, HOOK, 0.0)


def test_check_features(lm):
    W_dec = torch.ones(4, D_MODEL)
    table = pd.DataFrame({"feature": [3, 1], "top_tokens": [["a"], ["b"]]})
    assert check_features(site(lm), W_dec, table, ("top_tokens",))["feature"].tolist() == [1, 3]
    with pytest.raises(ShapeMismatch, match="top_token_ids"):
        check_features(site(lm), W_dec, table, ("top_token_ids",))
    with pytest.raises(EmptySelection):
        check_features(site(lm), W_dec, table[:0], ("top_tokens",))
    with pytest.raises(IncompatibleSae, match="32 wide"):
        check_features(site(lm), torch.ones(4, 5), table, ())
    with pytest.raises(ShapeMismatch, match="decoder has 3 rows"):
        check_features(site(lm), W_dec[:3], table, ())
    with pytest.raises(ShapeMismatch, match="twice"):
        check_features(site(lm), W_dec, pd.concat([table, table]), ())

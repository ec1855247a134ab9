"""Means over features, by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saeffect.report import SteeringResults
from saeffect.report.context import baseline_summary, dose_summary, outcome_summary, primary_effects


def _effects(**columns: object) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "feature": [1, 2, 3, 4],
            "outcome": "similarity",
            "placebo": "matched",
            "effect": [0.1, 0.2, 0.6, math.nan],
            "q": [0.01, 0.2, 0.05, math.nan],
            "reversed_share": [0.0, 0.5, 0.25, math.nan],
            "alternative": "greater",
            "unit": "cosine",
            "primary": True,
            "reason": ["", "", "", "fewer than two pairs"],
        }
    )
    return table.assign(**columns)


def test_mean_is_over_features_with_an_effect() -> None:
    row = outcome_summary(SteeringResults(outcome_effects={"a": _effects()}), ["a"], alpha=0.05).iloc[0]
    half = stats.t.ppf(0.975, 2) * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert (row["n_features"], row["n_defined"], row["n_tested"], row["n_passed"]) == (4, 3, 3, 2)
    assert row["reversed_share"] == pytest.approx(0.25)
    assert (row["declared"], row["decides"], row["reason"]) == (True, True, "")


def test_declared_outcomes_come_first_and_all_others_are_exploratory() -> None:
    frames = [_effects(outcome=name, primary=False) for name in ("similarity", "kl", "off_list")]
    results = SteeringResults(outcomes=("off_list", "similarity"), outcome_effects={"a": pd.concat(frames)})
    table = outcome_summary(results, ["a"], alpha=0.05)
    assert table["outcome"].tolist() == ["off_list", "similarity", "kl"]
    assert table["declared"].tolist() == [True, True, False]


def test_what_is_undefined_everywhere_has_the_reason() -> None:
    nothing = _effects(effect=math.nan, q=math.nan, reason="no matched placebo", reversed_share=math.nan)
    row = outcome_summary(SteeringResults(outcome_effects={"a": nothing}), ["a"], alpha=0.05).iloc[0]
    assert math.isnan(row["mean"])
    assert math.isnan(row["reversed_share"])
    assert (row["n_defined"], row["n_passed"], row["reason"]) == (0, 0, "no matched placebo")


def test_one_feature_has_a_mean_and_no_interval() -> None:
    found = primary_effects(pd.DataFrame({"effect": [0.2], "reason": [""]}))
    assert (found["mean"], found["reason"]) == (0.2, "")
    assert math.isnan(found["low"])
    assert primary_effects(None)["reason"] == "no feature was tested"


def test_baselines_count_both_sides_and_what_is_clear() -> None:
    table = _effects().drop(columns=["placebo", "primary"])
    table = table.assign(
        baseline="prompt",
        effect=[0.1, -0.1, -0.2, math.nan],
        low=[-0.1, -0.2, -0.4, math.nan],
        high=[0.3, -0.05, 0.1, math.nan],
    )
    row = baseline_summary(SteeringResults(baseline_effects={"a": table}), ["a", "b"]).iloc[0]
    assert (row["n_above"], row["n_clearly_above"], row["n_below"], row["n_clearly_below"]) == (1, 0, 2, 1)
    assert (row["n_features"], row["n_defined"]) == (4, 3)


def test_dose_summary_uses_a_geometric_mean_of_perplexity() -> None:
    response = pd.DataFrame(
        {
            "arm": "a",
            "feature": [1, 2, 1, 2, 1],
            "condition": ["steered"] * 4 + ["matched"],
            "dose": [0.2, 0.2, 0.4, 0.4, 0.2],
            "gain": [0.1, 0.3, math.nan, 0.5, -9.0],
            "perplexity": [10.0, 1000.0, 1.0, 1.0, 7.0],
            "distinct2": 1.0,
            "score": 0.1,
            "direct_effect": 1.0,
            "kl": 0.1,
            "best": [True, False, False, True, False],
        }
    )
    table = dose_summary(response, ["b", "a"])
    assert table["condition"].tolist() == ["steered", "steered", "matched"]
    assert table.iloc[2][["dose", "n_features", "gain", "n_best"]].tolist() == [0.2, 1, -9.0, 0]
    table = table[:2].set_index("dose")
    assert table.loc[0.2, "gain"] == pytest.approx(0.2)
    assert table.loc[0.4, "gain"] == 0.5
    assert math.isnan(table.loc[0.4, "gain_low"])
    assert table.loc[0.2, "perplexity"] == pytest.approx(100.0)
    assert table["n_best"].tolist() == [1, 1]
    assert dose_summary(None, ["a"]).empty

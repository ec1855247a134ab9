"""What is undefined is no finding: NaN goes into everything that judges, and nothing comes out as found."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison.judgement import ALL_SEEDS, add_noise_p, exceeds_noise, judge, noise_p
from saeffect.diffing.cross_activity import activity_changes, most_changed
from saeffect.diffing.matched_null import conformal_p, exchangeable_p
from saeffect.stats.estimate import Estimate
from saeffect.stats.multiplicity import benjamini_hochberg, holm
from saeffect.stats.permutation import permutation_test, sign_flip_many
from saeffect.stats.student import cautious_difference
from saeffect.steering import best_dose, effects

NAN = math.nan
FOUND = {"estimate": 0.5, "low": 0.4, "high": 0.6, "p": 0.001}
QUIET = {"estimate": 0.001, "low": -0.1, "high": 0.1, "p": 0.9}


def contrasts(**seeds: float) -> pd.DataFrame:
    """One quantity that is found beyond noise, with or without a row over all SAEs."""
    rows = [
        {"quantity": "share", "comparison": name, "a": "c", "b": "t", "saes_a": 1, "saes_b": 1, **numbers}
        for name, numbers in zip(("fine-tuning", "retraining", "beyond retraining"), (FOUND, QUIET, FOUND), strict=True)
    ]
    if seeds:
        over = {"quantity": "share_seeds", "comparison": ALL_SEEDS, "a": "c", "b": "t", "saes_a": 3, "saes_b": 3}
        rows.append({**over, **FOUND, **seeds})
    return pd.DataFrame(rows).assign(unit="share", reason="", declared=True)


@pytest.mark.parametrize("seeds", [{}, {"p": 0.001}], ids=["one SAE each", "several SAEs"])
def test_no_undefined_number_credits_fine_tuning(seeds: dict[str, float]) -> None:
    table = contrasts(**seeds)
    assert judge(add_noise_p(table), "share").status == judge(table, "share").status == "beyond"
    # With several SAEs the row over all of them decides; else the three comparisons do.
    rows = [3] if seeds else [0, 1, 2]
    for row in rows:
        columns = ["p"] if seeds else ["estimate", "low", "high"] if row < 2 else ["low", "high"]
        for column in columns:
            broken = table.copy()
            broken.loc[row, column] = NAN
            for variant in (broken, add_noise_p(broken)):
                assert judge(variant, "share").status != "beyond", (row, column)


def test_noise_that_is_not_known_is_exceeded_by_nothing() -> None:
    change, same = Estimate(0.5, 0.4, 0.6), Estimate(0.0, -0.1, 0.1)
    assert exceeds_noise(change, [change], 0.05)
    assert not exceeds_noise(change, [change], 0.0501)
    assert not exceeds_noise(change, [change], NAN)
    assert math.isnan(noise_p(change, [same]))  # a placebo that equals the control
    assert math.isnan(noise_p(change, []))
    assert math.isnan(noise_p(Estimate(NAN, NAN, NAN), [change]))


def test_tests_of_undefined_values_have_no_p() -> None:
    values = [1.0, NAN, 3.0]
    assert np.isnan(sign_flip_many([values])).all()
    assert math.isnan(permutation_test(values, [9.0, 8.0]))
    assert math.isnan(cautious_difference(values, [9.0, 8.0]).p)
    assert math.isnan(cautious_difference(values, [9.0, 8.0]).low)
    for adjust in (benjamini_hochberg, holm):
        assert np.isnan(adjust([NAN, 0.01])).tolist() == [True, False]
    groups = np.zeros(2, dtype=np.int64)
    assert np.isnan(exchangeable_p([[NAN, 0.1], [0.9, 0.9]], groups)[0]).tolist() == [True, False]
    assert np.isnan(conformal_p([NAN, 0.1], groups, [0.5, 0.9], groups)).tolist() == [True, False]


def test_features_with_undefined_numbers_are_not_found() -> None:
    cross = pd.DataFrame({"feature": [0, 1], "mean_control": 1.0, "mean_treatment": 3.0, "difference": [2.0, 2.0]})
    cross["q"] = [NAN, 0.01]
    changes = activity_changes(cross, alpha=0.05)
    assert changes.more.index.tolist() == [1]
    assert most_changed(cross, alpha=0.05)["feature"].tolist() == [1]
    assert most_changed(cross.assign(mean_control=NAN), alpha=0.05).empty


def test_texts_without_a_similarity_pass_no_rule() -> None:
    keys = [(0, prompt, sample, condition) for prompt in range(3) for sample in range(2)
            for condition in ("unsteered", "steered", "random")]  # fmt: skip
    trials = pd.DataFrame(keys, columns=["feature", "prompt", "sample", "condition"])
    trials["dose"] = np.where(trials["condition"] == "unsteered", 0.0, 0.4)
    (row,) = effects(trials.assign(similarity=NAN)).to_dict("records")
    assert not row["passed"]
    assert not row["paper_pass"]
    assert math.isnan(row["p"])
    assert row["reason"]
    assert best_dose(pd.DataFrame({"condition": "steered", "dose": [0.2, 0.4], "score": NAN})) is None

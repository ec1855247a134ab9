from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import Resampling
from saeffect.comparison.arms import roles_of
from saeffect.comparison.contrasts import contrasts, pair_contrasts
from saeffect.comparison.quantities import QUANTITIES

RESAMPLING = Resampling(n_boot=200, n_permutations=200)


def compared(arms, resampling=RESAMPLING):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    return contrasts(arms, roles, min_matches=2, resampling=resampling)


def of(table, quantity, comparison="fine-tuning"):
    (row,) = table[(table["quantity"] == quantity) & (table["comparison"] == comparison)].itertuples()
    return row


def with_domain(arm, n_domain, n_features):
    """The arm with other features: so many, so many of them of the domain, and nothing steered."""
    ids = np.arange(n_features)
    is_domain = ids < n_domain
    matches = np.where(is_domain, 3, 0)
    return replace(
        arm,
        features=pd.DataFrame(
            {
                "feature": ids,
                "top_tokens": [[" x", " y"]] * n_features,
                "top_weights": [[2.0, 1.0]] * n_features,
                "density": 0.01,
                "mean_activation": 1.0,
                "max_activation": 2.0,
            }
        ),
        coherence=pd.DataFrame({"feature": ids, "coherence": ids / n_features, "n_known": 2, "reason": ""}),
        selection=pd.DataFrame(
            {
                "feature": ids,
                "matches": matches,
                "matches_dot": 0,
                "matches_cosine": matches,
                "in_vocabulary": is_domain,
                "is_domain": is_domain,
            }
        ),
        interventions=None,
        direct_effects=None,
        effects=None,
    )


def test_shares_by_hand(tiny_arm):
    table = compared(
        {
            "base": with_domain(tiny_arm(), 10, 100),
            "tuned": with_domain(tiny_arm("tuned", "treatment"), 20, 100),
        }
    )
    row = of(table, "domain_share")
    assert (row.a, row.b, row.value_a, row.value_b) == ("base", "tuned", 0.1, 0.2)
    assert row.estimate == pytest.approx(0.1)
    # Wilson ends 0.0552, 0.1744 and 0.1334, 0.2888, combined as Newcombe does
    assert (row.low, row.high) == (pytest.approx(0.0001, abs=2e-4), pytest.approx(0.1995, abs=2e-4))
    assert row.p == pytest.approx(0.0734, abs=5e-4)  # Fisher, two-sided
    ratio = of(table, "domain_share_ratio")
    error = np.sqrt(1 / 10 - 1 / 100 + 1 / 20 - 1 / 100)
    assert (ratio.estimate, ratio.low) == (
        pytest.approx(2.0),
        pytest.approx(2 * np.exp(-1.96 * error), rel=1e-3),
    )
    assert of(table, "share_dot").estimate == 0.0
    assert of(table, "share_dot_ratio").reason == "base has none, so there is no ratio to it"
    assert of(table, "matches_mean").estimate == pytest.approx(0.3)
    assert np.isnan(of(table, "pass_rate").estimate)
    assert of(table, "pass_rate").reason == "no feature of base was steered"


def test_coherence_by_hand(tiny_arm):
    control, treatment = tiny_arm(), tiny_arm("tuned", "treatment")
    treatment = replace(treatment, coherence=treatment.coherence.assign(coherence=[0.9, 0.3, 0.9, 0.5, 0.7]))
    table = compared({"base": control, "tuned": treatment})
    mean = of(table, "coherence_mean")
    assert (mean.value_a, mean.value_b, mean.estimate) == (
        pytest.approx(0.3),
        pytest.approx(0.5),
        pytest.approx(0.2),
    )
    assert of(table, "coherence_median").estimate == pytest.approx(0.2)
    normalised = of(table, "coherence_normalised")
    assert normalised.estimate == pytest.approx(0.2 / 0.3)  # ranges 0.2 and 0.4
    assert normalised.low == pytest.approx(mean.low / 0.3)
    assert of(table, "coherence_delta").estimate == pytest.approx(4 / 6)  # five pairs up, one down


def test_weights_activity_and_steering_by_hand(tiny_arm):
    control, treatment = tiny_arm(), tiny_arm("tuned", "treatment")
    treatment = replace(
        treatment,
        features=treatment.features.assign(
            top_weights=[[2 * w for w in weights] for weights in treatment.features["top_weights"]]
        ),
        effects=treatment.effects.assign(effect=[0.3, 0.5, 0.4]),
    )
    table = compared({"base": control, "tuned": treatment})
    assert of(table, "weight_mean").estimate == pytest.approx(3.0)  # the mean of 3 1 4 2 5 3 is 3
    assert of(table, "weight_mean_change").estimate == pytest.approx(100.0)
    assert of(table, "weight_variance").value_a == pytest.approx(2.0)
    assert of(table, "weight_variance_change").estimate == pytest.approx(300.0)
    assert of(table, "density").value_a == pytest.approx(0.04 / 3)
    assert of(table, "mean_activation").value_a == pytest.approx(3.0)
    assert of(table, "effect").estimate == pytest.approx(0.2)
    assert of(table, "direct_effect").value_a == pytest.approx(1.5)
    assert of(table, "pass_rate").value_a == 0.5


def test_each_placebo_gives_retraining_and_beyond(tiny_arm):
    arms = {
        "base": tiny_arm(),
        "tuned": tiny_arm("tuned", "treatment", 0.3),
        "p1": tiny_arm("p1", "placebo", 0.1),
        "p2": tiny_arm("p2", "placebo", -0.1),
    }
    table = compared(arms)
    rows = table[table["quantity"] == "coherence_mean"]
    assert list(zip(rows["comparison"], rows["a"], rows["b"], rows["estimate"].round(9), strict=True)) == [
        ("fine-tuning", "base", "tuned", 0.3),
        ("retraining", "base", "p1", 0.1),
        ("beyond retraining", "p1", "tuned", 0.2),
        ("retraining", "base", "p2", -0.1),
        ("beyond retraining", "p2", "tuned", 0.4),
    ]
    assert not table.duplicated(["quantity", "comparison", "a", "b"]).any()


def test_a_missing_interval_always_has_a_reason(tiny_arm):
    control, treatment = tiny_arm(), tiny_arm("tuned", "treatment")
    nothing = replace(treatment, selection=treatment.selection.assign(is_domain=False), effects=None)
    for arms in ({"base": control, "tuned": nothing}, {"base": control, "tuned": treatment}):
        table = compared(arms)
        missing = table["low"].isna() | table["high"].isna() | table["estimate"].isna()
        assert (table["reason"] != "").equals(missing)


def test_a_pass_rate_without_tests_says_why(tiny_arm):
    arms = [tiny_arm(name="control", role="control"), tiny_arm(name="treatment", role="treatment")]

    def reason(**changes):
        changed = replace(arms[0], **changes)
        rows = pair_contrasts(
            "fine-tuning", changed, arms[1], QUANTITIES.values(), min_matches=2, resampling=Resampling(n_boot=40)
        )
        return next(row.reason for row in rows if row.quantity == "pass_rate")

    broken = arms[0].effects.assign(p=float("nan"), reason="no generated word is known")
    assert reason(effects=broken) == (
        "none of the 3 features steered in control has an effect that is defined: no generated word is known"
    )
    assert reason(effects=None, unsteered="no dose gained anything") == "no dose gained anything"
    assert reason(effects=None) == "no feature of control was steered"
    none = arms[0].selection.assign(is_domain=False)
    assert reason(effects=None, selection=none) == "control has no domain feature"

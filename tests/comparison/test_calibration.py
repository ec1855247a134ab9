from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import PRIMARY, MatchTables, Resampling, check_tests, compare
from saeffect.comparison.arms import roles_of
from saeffect.comparison.calibration import calibration_table
from saeffect.comparison.contrasts import contrasts
from saeffect.comparison.judgement import judgement_table
from saeffect.errors import UnknownName
from saeffect.stats.proportions import wilson
from synthetic_study import compared, synthetic_arms

SMALL = Resampling(0, 60, 60)


@pytest.fixture(scope="module")
def arms():
    """400 features an arm, few of them steered."""
    return synthetic_arms(max_tested=4)


def calibrated(arms, evidence=None, tests=PRIMARY):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    table = contrasts(arms, roles, min_matches=2, resampling=SMALL)
    tables = {"contrasts": table, "judgements": judgement_table(table), **(evidence or {})}
    found = calibration_table(arms, roles, tables, tests=tests, alpha=0.05, min_matches=2, resampling=SMALL)
    return found.set_index(["test", "rule"])


def as_placebo(arm, name):
    return replace(arm, name=name, role="placebo", facts=replace(arm.facts, role="placebo"))


INTERVAL, BEYOND = "the interval excludes zero", "more than SAE noise"


def test_saes_that_differ_raise_alarms(arms):
    """Two of three SAEs of the control's model are as different as the treatment: the instrument is no good."""
    arms = {**arms, "p2": as_placebo(arms["treatment"], "p2"), "p3": as_placebo(arms["treatment"], "p3")}
    row = calibrated(arms).loc["domain_share", INTERVAL]
    # control and placebo are alike, p2 and p3 are the treatment: 4 of 6 pairs differ
    assert (row["tests"], row["findings"]) == (6, 4)
    interval = wilson(4, 6)
    assert (row["rate"], row["low"], row["high"]) == pytest.approx((4 / 6, interval.low, interval.high))
    assert row["verdict"] == "more alarms than nominal"
    assert (row["treatment_tests"], row["treatment_findings"]) == (1, 1)
    answer = compared(arms).answer
    assert answer["caveats"][0].startswith("Where there is nothing to find")
    assert any(line.startswith("Not to be believed") for line in answer["sentences"])


def test_alike_saes_raise_none(arms):
    arms = {**arms, "p2": as_placebo(arms["control"], "p2")}
    table = calibrated(arms)
    # each of the three SAEs takes the treatment's place once
    assert (table.loc[("domain_share", BEYOND), "tests"], table.loc[("domain_share", BEYOND), "findings"]) == (3, 0)
    together = table.loc[("any declared quantity", "more than SAE noise, after Holm")]
    assert (together["tests"], together["findings"], together["declared"]) == (3, 0, True)
    assert (table["verdict"] == "within nominal").all()
    assert table.loc[("domain_share", INTERVAL), "declared"]
    assert not table.loc[("effect", INTERVAL), "declared"]


def test_headline_rule_needs_two_placebos(arms):
    row = calibrated(arms).loc["domain_share", BEYOND]
    assert (row["tests"], row["verdict"]) == (0, "cannot be judged")
    assert "needs three SAEs" in row["reason"]


def test_no_placebo_is_said(arms):
    table = calibrated({name: arm for name, arm in arms.items() if name != "placebo"})
    assert (table["verdict"] == "cannot be judged").all()
    assert "one SAE of the control's model" in table.loc[("domain_share", INTERVAL), "reason"]


def test_fates_and_cross_activity_are_counted(arms):
    null = pd.DataFrame(
        {
            "measure": "decoder cosine",
            "side": ["control", "control", "control"],
            "reference": ["a", "b", "a"],
            "stand_in": ["b", "a", "t"],
            "is_null": [True, True, False],
            "tested": [100, 100, 90],
            "low_p": [4, 2, 30],
            "called": [0, 1, 20],
            "drift": 0.0,
            "reason": "",
        }
    )
    cross = pd.DataFrame({"q": [0.01, 0.5, np.nan], "difference": [1.0, 0.1, 0.0], "reason": ["", "", "silent"]})
    table = calibrated(arms, {"fates_null": null, "cross_activity": cross}, (*PRIMARY, "fates"))
    any_call = table.loc["lost or moved features, decoder cosine", "a feature is called at q at most alpha"]
    assert (any_call["tests"], any_call["findings"], any_call["treatment_findings"]) == (2, 1, 1)
    each = table.loc["lost or moved features, decoder cosine", "p at most alpha"]
    assert (each["tests"], each["findings"], each["treatment_tests"], each["treatment_findings"]) == (200, 6, 90, 30)
    assert each["declared"]
    shared = table.loc["cross-activity", "q at most alpha"]
    assert (shared["tests"], shared["treatment_tests"], shared["treatment_findings"]) == (0, 2, 1)
    assert shared["verdict"] == "cannot be judged"
    assert "equal activations" in shared["reason"]
    assert not shared["declared"]


def test_only_tests_that_exist_can_be_declared():
    with pytest.raises(UnknownName, match="domain_share_ratio"):
        check_tests(["domain_share_ratio"])
    check_tests(["coherence_delta", "fates", "cross_activity"])
    with pytest.raises(UnknownName):
        compare(synthetic_arms(n_features=40), min_matches=2, alpha=0.05, seed=0, tests=["nothing"])


def test_the_headline_speaks_of_what_was_declared(arms):
    found = compared(arms, tests=("matches_mean",), matches=MatchTables())
    assert "matches mean" in found.answer["headline"]
    assert "domain features" not in found.answer["headline"]
    assert set(found.contrasts.loc[found.contrasts["declared"], "quantity"]) == {"matches_mean", "matches_mean_seeds"}
    assert any("one quantity fixed in advance (matches mean)" in line for line in found.answer["caveats"])


def test_default_tests_are_the_primary_quantities():
    from saeffect.config import ComparisonConfig

    assert ComparisonConfig().tests == PRIMARY


def test_the_arm_terms_of_the_regression_are_counted(arms):
    terms = pd.DataFrame(
        {
            "term": ["intercept", "coherence", "arm treatment", "arm placebo"],
            "low": [0.1, 0.1, 0.2, -0.1],
            "high": [0.2, 0.2, 0.4, 0.1],
        }
    )
    row = calibrated(arms, {"regression": terms}).loc["arm term of the regression", INTERVAL]
    assert (row["tests"], row["findings"], row["treatment_tests"], row["treatment_findings"]) == (1, 0, 1, 1)
    assert not row["declared"]
    bare = calibrated(arms, {"regression": terms.head(3)}).loc["arm term of the regression", INTERVAL]
    assert bare["reason"] == "no placebo arm has an interval in the regression"
    whole = compare(arms, min_matches=2, alpha=0.05, seed=0, n_boot=60, n_permutations=20).calibration
    assert "arm term of the regression" in set(whole["test"])

from __future__ import annotations

from dataclasses import replace

import pytest

from saeffect.comparison import Resampling
from saeffect.comparison.compare import activity, match_counts, table1, table2, weights

RESAMPLING = Resampling(n_boot=200)


def test_table1_by_hand(tiny_arm):
    row = table1({"base": tiny_arm()}, min_matches=2, resampling=RESAMPLING).iloc[0]
    expected = {
        "arm": "base",
        "role": "control",
        "n_features": 5,
        "in_vocabulary": 4,
        "domain_features": 3,
        "matches_dot": 1,
        "matches_cosine": 4,
        "tested": 2,
        "passed": 1,
        "pass_rate": 0.5,
        "paper_passed": 2,
        "paper_rate": 1.0,
    }
    assert {key: row[key] for key in expected} == expected
    # Wilson for 1 of 2: 0.5 -+ 1.96 sqrt(0.25/2 + 1.96^2/16) / (1 + 1.96^2/2)
    assert (row["pass_low"], row["pass_high"]) == (
        pytest.approx(0.0945, abs=1e-4),
        pytest.approx(0.9055, abs=1e-4),
    )
    assert row["steered_mean"] == pytest.approx(0.5)
    assert row["unsteered_mean"] == pytest.approx(0.3)
    assert row["placebo_mean"] == pytest.approx(0.3)
    assert row["effect_mean"] == pytest.approx(0.2)
    # two features: their means are the ends of the interval
    assert (row["steered_low"], row["steered_high"]) == (pytest.approx(0.3), pytest.approx(0.7))


def test_table1_of_an_arm_that_was_not_steered(tiny_arm):
    arm = replace(tiny_arm(), interventions=None, effects=None, direct_effects=None)
    row = table1({"base": arm}, min_matches=2, resampling=RESAMPLING).iloc[0]
    assert row["tested"] == 0
    undefined = [
        "pass_rate",
        "pass_low",
        "paper_rate",
        "steered_mean",
        "steered_low",
        "placebo_mean",
        "effect_mean",
    ]
    assert row[undefined].isna().all()


def test_table2_by_hand(tiny_arm):
    row = table2({"base": tiny_arm()}, resampling=RESAMPLING).iloc[0]
    assert (row["n_defined"], row["n_undefined"]) == (2, 1)
    assert row["mean"] == pytest.approx(0.3)
    assert row["median"] == pytest.approx(0.3)
    assert (row["minimum"], row["maximum"], row["range"]) == (0.2, 0.4, pytest.approx(0.2))
    assert row["coverage_unique"] == 0.75
    assert row["coverage_total"] == pytest.approx(5 / 6)


def test_match_counts_cover_every_number_of_tokens(tiny_arm):
    table = match_counts({"base": tiny_arm()})
    assert list(table["matches"]) == [0, 1, 2]
    assert list(table["n"]) == [1, 0, 4]
    assert list(table["share"]) == [0.2, 0.0, 0.8]


def test_long_tables_hold_domain_features_of_every_arm(tiny_arm):
    arms = {"base": tiny_arm(), "tuned": tiny_arm("tuned", "treatment")}
    long = weights(arms)
    assert list(long.columns) == ["arm", "feature", "rank", "weight"]
    assert list(long.loc[long["arm"] == "tuned", "weight"]) == [3, 1, 4, 2, 5, 3]
    fired = activity(arms)
    assert list(fired.columns) == ["arm", "feature", "density", "mean_activation", "max_activation"]
    assert list(fired["feature"]) == [1, 3, 4, 1, 3, 4]
    assert list(fired["arm"]) == ["base"] * 3 + ["tuned"] * 3


def test_long_tables_without_domain_features_are_empty(tiny_arm):
    arm = tiny_arm()
    arms = {"base": replace(arm, selection=arm.selection.assign(is_domain=False))}
    assert weights(arms).empty and activity(arms).empty
    assert table2(arms, resampling=RESAMPLING)["mean"].isna().all()

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, t

from saeffect.comparison import MatchTables
from saeffect.comparison.arms import roles_of
from saeffect.comparison.calibration import chance_table
from synthetic_matches import synthetic_matches
from synthetic_study import synthetic_arms


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms(n_features=120, max_tested=10)


def found(arms, matches=None):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    table = chance_table(arms, roles, matches or MatchTables(), alpha=0.05)
    return table.set_index("finding")


def test_domain_features_are_predicted_from_the_other_saes(arms):
    row = found(arms).loc["domain features"]
    shares = np.array([len(arms[name].domain) / 120 for name in ("control", "placebo")])
    half = t.ppf(0.975, 1) * shares.std(ddof=1) * math.sqrt(1.5)
    assert row["found"] == len(arms["treatment"].domain)
    assert row["expected"] == pytest.approx(120 * shares.mean())
    assert row["low"] == pytest.approx(120 * max(0, shares.mean() - half))
    assert row["high"] == pytest.approx(120 * min(1, shares.mean() + half))


def test_one_sae_predicts_no_range(arms):
    row = found({name: arm for name, arm in arms.items() if name != "placebo"}).loc["domain features"]
    assert math.isnan(row["low"])
    assert "one SAE" in row["reason"]
    assert row["expected"] == len(arms["control"].domain)


def test_steering_that_does_nothing(arms):
    table = found(arms)
    tested = int(arms["treatment"].effects["p"].notna().sum())
    by_p = table.loc["steered features with p ≤ 0.05"]
    assert by_p["found"] == int((arms["treatment"].effects["p"] <= 0.05).sum())
    assert by_p["expected"] == pytest.approx(0.05 * tested)
    paper = table.loc["steered features that pass by the paper's rule"]
    assert paper["expected"] == tested / 2
    assert (paper["low"], paper["high"]) == (binom.ppf(0.025, tested, 0.5), binom.ppf(0.975, tested, 0.5))
    passing = table.loc["steered features that pass (q ≤ 0.05)"]
    assert passing["bound"]
    assert passing["expected"] == pytest.approx(0.05 * passing["found"])


def test_nothing_steered_leaves_those_rows_out(arms):
    unsteered = {
        name: replace(arm, interventions=None, effects=None, direct_effects=None) for name, arm in arms.items()
    }
    assert list(found(unsteered).index) == ["domain features"]


def test_chance_of_fates_is_a_seed_and_of_the_domain_the_rest(arms):
    table = found(arms, synthetic_matches())
    gone = table.loc["control's features without a counterpart, decoder cosine"]
    # 60 found, an excess of 14 [8, 20]: so 46 [40, 52] by chance
    assert (gone["found"], gone["expected"], gone["low"], gone["high"]) == (60, 46, 40, 52)
    more = table.loc["domain features that fire more (q ≤ 0.05)"]
    # of the 109 others that fire, three fire more
    assert (more["found"], more["among"]) == (5, 10)
    assert more["expected"] == pytest.approx(10 * 3 / 109)
    assert more["high"] == binom.ppf(0.975, 10, 3 / 109)
    changed = table.loc["features that fire differently (q ≤ 0.05)"]
    assert (changed["found"], changed["among"], changed["expected"]) == (10, 119, pytest.approx(0.5))


def test_without_other_seeds_no_fate_is_expected(arms):
    assert not any("counterpart" in name for name in found(arms, synthetic_matches(placebo=False)).index)

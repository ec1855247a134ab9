from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.power import NormalIndPower, TTestIndPower, TTestPower
from statsmodels.stats.proportion import proportion_effectsize

from saeffect.comparison import PRIMARY, Resampling, compare
from saeffect.comparison.arms import coherence_of, roles_of
from saeffect.comparison.contrasts import contrasts
from saeffect.comparison.power import power_table
from saeffect.stats.power import detectable_few_means
from synthetic_study import synthetic_arms


def made(arms, tests=PRIMARY):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    table = contrasts(arms, roles, min_matches=2, resampling=Resampling(0, 50, 50))
    return power_table(arms, roles, table, tests=tests, alpha=0.05, min_matches=2).set_index("test")


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms()


def test_shares_and_means_agree_with_statsmodels(arms):
    table = made(arms)
    share = table.loc["domain_share"]
    p = len(arms["control"].domain) / 400
    peer = NormalIndPower().solve_power(nobs1=400, ratio=1.0, alpha=0.05, power=0.8)
    assert proportion_effectsize(p + share["detectable"], p) == pytest.approx(peer, rel=1e-4)
    values = [coherence_of(arms[name]) for name in ("control", "treatment")]
    mean = table.loc["coherence_mean"]
    n = [len(one) for one in values]
    pooled = math.sqrt(sum((len(v) - 1) * v.var(ddof=1) for v in values) / (sum(n) - 2))
    peer = TTestIndPower().solve_power(nobs1=n[0], ratio=n[1] / n[0], alpha=0.05, power=0.8)
    assert mean["detectable"] == pytest.approx(peer * pooled, rel=1e-4)
    assert (mean["n_a"], mean["n_b"]) == tuple(n)
    assert mean["spread"] == pytest.approx(pooled)


def test_a_single_feature_has_its_smallest_effect(arms):
    table = made(arms)
    row = table.loc["feature in control"]
    trials = arms["control"].interventions
    wide = trials.pivot(index=["feature", "prompt", "sample"], columns="condition", values="similarity")
    spread = np.sqrt((wide["steered"] - wide["random"]).groupby("feature").var(ddof=1).mean())
    assert (row["n_a"], row["spread"]) == (6, pytest.approx(spread))
    assert TTestPower().power(row["detectable"] / spread, 6, 0.05, alternative="larger") == pytest.approx(0.8, abs=1e-4)
    only = table.loc["only feature of 24 in control"]
    assert only["alpha"] == pytest.approx(0.05 / 24)
    # 6 pairs have 64 sign patterns: the smallest p is 1/64, far above
    assert math.isnan(only["detectable"])
    assert "smallest p is 0.016" in only["reason"]


def test_what_has_no_power_has_a_reason(arms):
    bare = {name: replace(arm, interventions=None, direct_effects=None, effects=None) for name, arm in arms.items()}
    table = made(bare, (*PRIMARY, "coherence_delta", "effect"))
    assert not any(name.startswith("feature in") for name in table.index)
    assert table.loc["pass_rate", "reason"] == "nothing to count in a group"
    assert "neither a share nor a mean" in table.loc["coherence_delta", "reason"]
    assert "fewer than two units" in table.loc["effect", "reason"]
    flat = {name: replace(arm, coherence=arm.coherence.assign(coherence=0.5)) for name, arm in arms.items()}
    assert made(flat).loc["coherence_mean", "reason"] == "no spread to judge by"


def test_no_domain_feature(arms):
    none = {name: replace(arm, selection=arm.selection.assign(is_domain=False)) for name, arm in arms.items()}
    table = made(none)
    assert table.loc["domain_share", "detectable"] > 0
    assert "fewer than two units" in table.loc["coherence_mean", "reason"]
    assert isinstance(table, pd.DataFrame)


def test_saes_as_units_ask_for_what_holm_asks(arms):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    table = compare(arms, min_matches=2, alpha=0.05, seed=0, n_boot=50, n_permutations=50).power.set_index("test")
    row = table.loc["coherence_mean_seeds"]
    values = [coherence_of(arms[name]).mean() for name in (roles.control, *roles.placebos)]
    assert (row["n_a"], row["n_b"], row["alpha"]) == (2, 1, pytest.approx(0.05 / 3))
    assert row["spread"] == pytest.approx(np.std(values, ddof=1))
    peer = detectable_few_means(row["spread"], 2, 1, alpha=0.05 / 3)
    assert row["detectable"] == peer.difference
    share = table.loc["pass_rate_seeds"]
    assert np.isnan(share["detectable"])
    assert "even a difference of 100 percentage points" in share["reason"]

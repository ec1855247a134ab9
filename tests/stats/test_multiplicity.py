from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from saeffect.errors import ShapeMismatch, Undefined
from saeffect.stats.multiplicity import benjamini_hochberg, holm, simes


def test_by_hand() -> None:
    # Sorted 0.005, 0.011, 0.02, 0.04, 0.13 times 5/1 .. 5/5: 0.025, 0.0275, 0.0333, 0.05, 0.13.
    q = benjamini_hochberg([0.02, 0.005, 0.13, 0.011, 0.04])
    assert q == pytest.approx([0.1 / 3, 0.025, 0.13, 0.0275, 0.05])


def test_a_smaller_p_never_gets_a_larger_q() -> None:
    # 0.03 * 3/1 = 0.09 is brought down to 0.04 by the later ones.
    assert benjamini_hochberg([0.03, 0.035, 0.04]) == pytest.approx([0.04, 0.04, 0.04])


@pytest.mark.parametrize("n", [1, 2, 17, 300])
def test_agrees_with_statsmodels(n: int) -> None:
    p = np.round(np.random.default_rng(n).beta(0.5, 1.0, size=n), 2)  # rounded: with ties
    assert benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1])


def test_nan_stays_and_does_not_count() -> None:
    q = benjamini_hochberg([math.nan, 0.01, math.nan, 0.04])
    assert np.isnan(q[[0, 2]]).all()
    assert q[[1, 3]] == pytest.approx([0.02, 0.04])


def test_degenerate_input() -> None:
    assert benjamini_hochberg([]).shape == (0,)
    assert np.isnan(benjamini_hochberg([math.nan, math.nan])).all()
    assert benjamini_hochberg([0.0, 1.0, 1.0]).tolist() == [0.0, 1.0, 1.0]


def test_what_is_no_p_value_is_refused() -> None:
    with pytest.raises(Undefined, match="2 of 3 p-values"):
        benjamini_hochberg([0.5, 1.2, -0.1])
    with pytest.raises(ShapeMismatch):
        benjamini_hochberg([[0.5]])


@pytest.mark.simulation
def test_the_share_of_false_findings_stays_under_alpha() -> None:
    rng = np.random.default_rng(4)
    n_studies, n_null, n_real, alpha = 400, 80, 20, 0.1
    false_share, n_found = np.zeros(n_studies), 0
    for study in range(n_studies):
        p = np.concatenate([rng.uniform(size=n_null), rng.beta(0.05, 10, size=n_real)])
        found = benjamini_hochberg(p) <= alpha
        false_share[study] = found[:n_null].sum() / max(1, found.sum())
        n_found += int(found[n_null:].sum())
    # The expectation is alpha times the share of nulls, 0.08.
    error = false_share.std() / math.sqrt(n_studies)
    assert false_share.mean() == pytest.approx(0.08, abs=4 * error)
    assert n_found > 0.8 * n_studies * n_real


@pytest.mark.parametrize("n", [1, 2, 17, 300])
def test_holm_agrees_with_statsmodels(n: int) -> None:
    p = np.round(np.random.default_rng(n).beta(0.5, 1.0, size=n), 2)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_by_hand_and_degenerate() -> None:
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1; NaN does not count.
    assert holm([0.04, math.nan, 0.01, 0.02])[[0, 2, 3]] == pytest.approx([0.04, 0.03, 0.04])
    assert holm([]).shape == (0,)
    assert np.isnan(holm([math.nan])).all()
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    with pytest.raises(Undefined):
        holm([1.5])


@pytest.mark.simulation
def test_holm_keeps_the_family_wise_error_rate() -> None:
    p = np.random.default_rng(7).uniform(size=(4000, 3))
    alarms = np.mean([bool((holm(row) <= 0.05).any()) for row in p])
    assert alarms == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


def test_simes_by_hand() -> None:
    # 3 · 0.01 = 0.03, 3 / 2 · 0.018 = 0.027, 3 / 3 · 0.04 = 0.04.
    assert simes([0.018, 0.04, 0.01]) == pytest.approx(0.027)
    assert simes([0.2, math.nan, 1.0]) == pytest.approx(0.4)
    assert simes([0.3]) == 0.3
    assert math.isnan(simes([math.nan]))


@pytest.mark.simulation
@pytest.mark.parametrize("correlation", [-0.9, -0.5, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [2, 4])
def test_simes_is_wrong_as_rarely_as_it_says(n: int, correlation: float) -> None:
    """Two-sided p of correlated normals with nothing to find."""
    rng, alpha, n_studies = np.random.default_rng(n), 0.05, 20_000
    r = max(correlation, -0.999 / (n - 1))
    covariance = np.full((n, n), r) + (1 - r) * np.eye(n)
    p = 2 * norm.sf(np.abs(rng.multivariate_normal(np.zeros(n), covariance, size=n_studies)))
    wrong = np.mean([simes(one) <= alpha for one in p])
    assert wrong <= alpha + 2.5 * math.sqrt(alpha * (1 - alpha) / n_studies)

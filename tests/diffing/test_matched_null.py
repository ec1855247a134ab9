"""Strata, ranks and their error rates."""

from __future__ import annotations

import numpy as np
import pytest

from saeffect.diffing.matched_null import NO_STRATUM, conformal_p, exchangeable_p, strata
from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.multiplicity import benjamini_hochberg


def test_strata_are_large_enough_and_hold_like_with_like() -> None:
    rng = np.random.default_rng(0)
    traits = np.exp(rng.normal(size=(1000, 2)))
    groups = strata(traits, 100)
    sizes = np.bincount(groups)
    assert sizes.min() >= 100
    assert len(sizes) == 8
    np.testing.assert_array_equal(groups, strata(np.log(traits), 100))
    within = np.mean([np.log(traits[groups == group]).std(axis=0) for group in range(8)])
    assert within < 0.8


def test_equal_traits_stay_together_and_unknown_ones_have_no_stratum() -> None:
    assert set(strata(np.ones((50, 2)), 5)) == {0}
    mostly = np.array([[0.0]] * 30 + [[1.0]] * 10 + [[np.nan]])
    groups = strata(mostly, 10)
    assert groups[:30].tolist() == [groups[0]] * 30
    assert groups[30] != groups[0]
    assert groups[40] == NO_STRATUM
    assert strata(np.empty((0, 2)), 5).tolist() == []
    with pytest.raises(ConfigError):
        strata(np.ones((3, 1)), 0)
    with pytest.raises(ShapeMismatch):
        strata(np.ones(3), 1)


def test_with_two_placebos_by_hand() -> None:
    # Scores of the first SAE: -0.6, 0; of the placebos: 0.3 twice, 0 twice. All in units of one deviation.
    values = np.array([[0.3, 0.5], [0.9, 0.5], [0.9, 0.5]])
    p, drop = exchangeable_p(values, np.zeros(2, dtype=int))
    np.testing.assert_allclose(drop, [0.6, 0.0], atol=1e-12)
    np.testing.assert_allclose(p, [1 / 5, 3 / 5])


def test_a_margin_forgives_small_drops() -> None:
    rng = np.random.default_rng(0)
    placebo = rng.uniform(0.5, 1, 500)
    shifted = placebo - 0.01
    groups = np.zeros(500, dtype=int)
    assert benjamini_hochberg(exchangeable_p([shifted, placebo], groups)[0]).min() < 0.05
    assert benjamini_hochberg(exchangeable_p([shifted, placebo], groups, margin=0.02)[0]).min() > 0.05


def test_undefined_values_are_not_ranked() -> None:
    p, drop = exchangeable_p([[0.1, np.nan, 0.4], [0.9, 0.5, 0.4]], np.array([0, 0, NO_STRATUM]))
    assert np.isnan(p).tolist() == [False, True, True]
    assert np.isnan(drop).tolist() == [False, True, False]
    with pytest.raises(ShapeMismatch):
        exchangeable_p([[0.1]], np.zeros(1, dtype=int))
    nothing = conformal_p([0.1, np.nan], np.array([1, 0]), [0.5], np.array([0]))
    assert np.isnan(nothing).all()


@pytest.mark.parametrize("n_placebos", [1, 2, 4])
def test_false_discoveries_keep_to_their_rate_when_some_features_are_gone(n_placebos: int) -> None:
    """FDR over simulations with skewed, bimodal and feature-dependent similarities: at most 0.05, and power."""
    rates, found = [], []
    n, n_gone = 600, 60
    for seed in range(120):
        rng = np.random.default_rng([seed, n_placebos])
        rare = rng.random(n) < 0.4
        own = np.where(rare, 0.5, 0.9) + rng.normal(0, 0.03, n)
        values = own - rng.gamma(1.0, np.where(rare, 0.1, 0.01), size=(n_placebos + 1, n))
        values[(rng.random(values.shape) < 0.4) & rare] = 0.3
        gone = rng.permutation(np.flatnonzero(~rare))[:n_gone]
        values[0, gone] = 0.3
        q = benjamini_hochberg(exchangeable_p(values, rare.astype(int))[0])
        called = np.flatnonzero(q <= 0.05)
        rates.append(len(np.setdiff1d(called, gone)) / max(1, len(called)))
        found.append(len(np.intersect1d(called, gone)) / n_gone)
    assert np.mean(rates) <= 0.05 + 2 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(found) > 0.9


@pytest.mark.parametrize("n_placebos", [1, 3])
def test_alarms_when_nothing_happened_keep_to_their_rate(n_placebos: int) -> None:
    alarms = 0
    for seed in range(400):
        rng = np.random.default_rng([seed, 9, n_placebos])
        values = rng.beta(5, 1, size=200) - rng.gamma(0.5, 0.1, size=(n_placebos + 1, 200))
        p, _ = exchangeable_p(values, np.repeat([0, 1], 100))
        alarms += bool((benjamini_hochberg(p) <= 0.05).any())
    # Without any effect a false discovery rate of 0.05 is an alarm in one study of twenty.
    assert alarms / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_conformal_ranks_are_uniform_and_alarms_keep_to_their_rate() -> None:
    alarms, ranks = 0, []
    for seed in range(400):
        rng = np.random.default_rng([seed, 4])
        groups, null_groups = rng.integers(0, 2, 150), rng.integers(0, 2, 300)
        scale = np.array([1.0, 10.0])
        p = conformal_p(
            scale[groups] * rng.gamma(1, size=150), groups, scale[null_groups] * rng.gamma(1, size=300), null_groups
        )
        ranks.append(p.mean())
        alarms += bool((benjamini_hochberg(p) <= 0.05).any())
    assert np.mean(ranks) == pytest.approx(0.5, abs=0.01)
    assert alarms / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_more_features_of_a_ragged_stratum_than_the_null_has_make_no_finding() -> None:
    # Stratum 1 has a few very low values. 90 % of the values are from there, but 10 % of the null.
    ranks = []
    for seed in range(200):
        rng = np.random.default_rng([seed, 6])

        def draw(groups: np.ndarray) -> np.ndarray:
            return rng.uniform(size=len(groups)) - 9.0 * ((groups == 1) & (rng.random(len(groups)) < 0.1))

        groups, null_groups = np.repeat([0, 1], [30, 270]), np.repeat([0, 1], [2700, 300])
        ranks.append((conformal_p(draw(groups), groups, draw(null_groups), null_groups) <= 0.05).mean())
    assert np.mean(ranks) == pytest.approx(0.05, abs=0.01)

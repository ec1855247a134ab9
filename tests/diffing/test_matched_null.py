"""Strata, ranks, excess counts, and how often they err."""

from __future__ import annotations

import numpy as np
import pytest

from saeffect.diffing.matched_null import (
    NO_STRATUM,
    ONE_PLACEBO,
    conformal_p,
    excess_paired,
    excess_unpaired,
    exchangeable_p,
    strata,
)
from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import Resampling
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


def test_strata_of_equal_and_unknown_traits() -> None:
    assert set(strata(np.ones((50, 2)), 5)) == {0}
    mostly = np.array([[0.0]] * 30 + [[1.0]] * 10 + [[np.nan]])
    groups = strata(mostly, 10)
    assert groups[:30].tolist() == [groups[0]] * 30
    assert groups[30] != groups[0]
    assert groups[40] == NO_STRATUM
    assert strata(np.empty((0, 2)), 5).tolist() == []


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


@pytest.mark.simulation
@pytest.mark.parametrize("n_placebos", [1, 2, 4])
def test_false_discovery_rate_with_real_losses(n_placebos: int) -> None:
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


@pytest.mark.simulation
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


@pytest.mark.simulation
def test_conformal_p_is_uniform_under_the_null() -> None:
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


@pytest.mark.simulation
def test_unequal_stratum_sizes_give_no_findings() -> None:
    # Stratum 1 has a few very low values. 90 % of the values are from there, but 10 % of the null.
    ranks = []
    for seed in range(200):
        rng = np.random.default_rng([seed, 6])

        def draw(groups: np.ndarray) -> np.ndarray:
            return rng.uniform(size=len(groups)) - 9.0 * ((groups == 1) & (rng.random(len(groups)) < 0.1))

        groups, null_groups = np.repeat([0, 1], [30, 270]), np.repeat([0, 1], [2700, 300])
        ranks.append((conformal_p(draw(groups), groups, draw(null_groups), null_groups) <= 0.05).mean())
    assert np.mean(ranks) == pytest.approx(0.05, abs=0.01)


def test_planted_drops_are_found_and_few_others() -> None:
    """A quick version of the simulations: one draw, with wide limits."""
    rng = np.random.default_rng(0)
    values = 0.9 - rng.gamma(1.0, 0.01, size=(3, 600))
    values[0, :60] = 0.3
    q = benjamini_hochberg(exchangeable_p(values, np.zeros(600, dtype=int))[0])
    assert (q[:60] <= 0.05).all()
    assert (q[60:] <= 0.05).sum() <= 8
    low = conformal_p(values[0], np.zeros(600, dtype=int), values[1], np.zeros(600, dtype=int))
    assert (low[:60] <= 1 / 300).all()
    assert low[60:].mean() == pytest.approx(0.5, abs=0.05)


def test_excess_by_hand() -> None:
    own = np.array([True, True, False, False])
    placebos = np.array([[True, False, False, False], [False, False, False, False]])
    found = excess_paired(own, placebos, Resampling(), "gone")
    assert found.value == 2 - 0.5
    assert found.low < 1.5 < found.high
    apart = excess_unpaired(own, [placebos[0], np.array([True, False])], Resampling(), "new")
    assert apart.value == 2 - 4 * (0.25 + 0.5) / 2


def test_pairing_takes_out_what_both_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.random(2000) < 0.5
    own = shared ^ (rng.random(2000) < 0.01)
    paired = excess_paired(own, shared[None], Resampling(), "x")
    apart = excess_unpaired(own, [shared], Resampling(), "x")
    assert paired.high - paired.low < 0.3 * (apart.high - apart.low)


def test_excess_without_spread_or_features() -> None:
    same = excess_paired(np.ones(5, bool), np.ones((2, 5), bool), Resampling(), "x")
    assert same.value == 0
    assert np.isnan([same.low, same.high]).all()
    assert "no spread" in same.reason
    assert "too few" in excess_paired(np.ones(1, bool), np.zeros((1, 1), bool), Resampling(), "x").reason
    assert "too few" in excess_unpaired(np.empty(0, bool), [np.ones(5, bool)], Resampling(), "x").reason
    assert "no spread" in excess_unpaired(np.ones(5, bool), [np.zeros(5, bool)], Resampling(), "x").reason


@pytest.mark.simulation
@pytest.mark.parametrize(("n_placebos", "seed_noise"), [(1, 0.0), (2, 0.0), (2, 0.3), (3, 0.0), (4, 0.3)])
def test_excess_intervals_hold_the_truth(n_placebos: int, seed_noise: float) -> None:
    """Features of unlike odds; with several placebos also whole SAEs that are better or worse."""
    hits, n, extra = 0, 500, 0.05
    for seed in range(300):
        rng = np.random.default_rng([seed, n_placebos])
        odds = rng.normal(-1, 1.5, n)
        chance = 1 / (1 + np.exp(-(odds + rng.normal(0, seed_noise, (n_placebos + 1, 1)))))
        absent = rng.random(chance.shape) < chance
        lost = rng.random(n) < extra
        absent[0] |= lost
        # What is expected beyond the placebos, over features and seeds: features lost that seeds would find.
        truth = extra * n * np.mean(1 - 1 / (1 + np.exp(-np.random.default_rng(0).normal(-1, 1.5, 10**5))))
        found = excess_paired(absent[0], absent[1:], Resampling(seed, 400), "gone")
        hits += found.low <= truth <= found.high
    # Resampling features as well as seeds counts some noise twice, so several placebos give wider intervals.
    assert hits / 300 >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / 300)
    if n_placebos == 1:
        assert hits / 300 <= 0.985


def test_one_placebo_says_what_its_interval_does_not_hold() -> None:
    rng = np.random.default_rng(0)
    own, other, third = rng.random((3, 200)) < 0.3
    assert excess_paired(own, other[None], Resampling(), "x").reason == ONE_PLACEBO
    assert excess_unpaired(own, [other], Resampling(), "x").reason == ONE_PLACEBO
    assert excess_paired(own, np.array([other, third]), Resampling(), "x").reason == ""


def test_unlike_placebos_widen_the_interval() -> None:
    """Counts 100 and 140: t with one degree of freedom, 12.7 times the root of 3 / 2 times 28.3."""
    own = np.arange(1000) < 120
    placebos = np.array([np.arange(1000) < 100, np.arange(1000) < 140])
    found = excess_paired(own, placebos, Resampling(), "x")
    assert found.value == 0
    assert found.high == pytest.approx(12.7062 * np.sqrt(1.5 * 800), rel=0.06)

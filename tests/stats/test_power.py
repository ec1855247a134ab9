from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind
from statsmodels.stats.power import NormalIndPower, TTestIndPower, TTestPower
from statsmodels.stats.proportion import proportion_effectsize

from saeffect.errors import ConfigError
from saeffect.stats.power import (
    detectable_few_means,
    detectable_mean_difference,
    detectable_paired_mean,
    detectable_proportion_difference,
)
from saeffect.stats.student import cautious_difference


@pytest.mark.parametrize(("n_a", "n_b"), [(5, 5), (20, 60), (300, 40)])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_two_means_agree_with_statsmodels(n_a, n_b, power):
    found = detectable_mean_difference(2.0, n_a, n_b, alpha=0.05, power=power)
    peer = TTestIndPower().solve_power(nobs1=n_a, ratio=n_b / n_a, alpha=0.05, power=power, alternative="two-sided")
    assert found.difference == pytest.approx(2.0 * peer, rel=1e-5)
    assert (found.n, found.reason) == (min(n_a, n_b), "")


@pytest.mark.parametrize("n", [3, 8, 100])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_paired_means_agree_with_statsmodels(n, alpha):
    found = detectable_paired_mean(0.3, n, alpha=alpha)
    # statsmodels' own search starts too near to find the far ones, but its power is right everywhere.
    peer = TTestPower().power(found.difference / 0.3, n, alpha, alternative="larger")
    assert peer == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("p", "n_a", "n_b"), [(0.1, 400, 400), (0.5, 30, 90), (0.02, 24_576, 24_576)])
def test_two_proportions_agree_with_statsmodels(p, n_a, n_b):
    found = detectable_proportion_difference(p, n_a, n_b)
    peer = NormalIndPower().solve_power(nobs1=n_a, ratio=n_b / n_a, alpha=0.05, power=0.8)
    assert proportion_effectsize(p + found.difference, p) == pytest.approx(peer, rel=1e-4)
    assert proportion_effectsize(p, p - found.low_side) == pytest.approx(peer, rel=1e-4)


@pytest.mark.parametrize(("n_a", "n_b", "alpha"), [(2, 2, 0.05 / 3), (2, 3, 0.001), (3, 3, 0.001)])
def test_solves_for_few_values_at_small_alpha(n_a, n_b, alpha):
    """statsmodels' search stops before here without a word."""
    found, rng = detectable_mean_difference(1.0, n_a, n_b, alpha=alpha).difference, np.random.default_rng(0)
    a, b = rng.normal(size=(20_000, n_a)), rng.normal(found, size=(20_000, n_b))
    share = (ttest_ind(a, b, axis=1).pvalue <= alpha).mean()
    assert share == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 20_000))


@pytest.mark.simulation
def test_a_simulated_test_finds_it_as_often_as_said():
    rng = np.random.default_rng(0)
    found = detectable_paired_mean(1.0, 12).difference
    draws = rng.normal(found, 1.0, size=(4000, 12))
    share = (ttest_1samp(draws, 0.0, axis=1, alternative="greater").pvalue <= 0.05).mean()
    assert share == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 4000))


def test_what_cannot_be_found_has_a_reason():
    assert math.isnan(detectable_mean_difference(1.0, 1, 9).difference)
    assert "fewer than two" in detectable_mean_difference(1.0, 1, 9).reason
    assert detectable_mean_difference(0.0, 5, 5).reason == "no spread to judge by"
    assert detectable_paired_mean(float("nan"), 5).reason == "no spread to judge by"
    assert detectable_paired_mean(1.0, 1).reason == "1 differences show no spread"
    assert detectable_proportion_difference(0.5, 0, 5).reason == "nothing to count in a group"
    far = detectable_proportion_difference(0.9, 3, 3)
    assert math.isnan(far.difference)
    assert "even a share of 1" in far.reason
    assert math.isnan(detectable_proportion_difference(0.0, 50, 50).low_side)


@pytest.mark.parametrize(("alpha", "power"), [(0.0, 0.8), (0.05, 1.0), (0.5, 0.4)])
def test_impossible_rates_are_refused(alpha, power):
    with pytest.raises(ConfigError, match="alpha and power"):
        detectable_paired_mean(1.0, 5, alpha=alpha, power=power)
    with pytest.raises(ConfigError, match="p_a"):
        detectable_proportion_difference(1.5, 5, 5)


@pytest.mark.simulation
@pytest.mark.parametrize(("n_a", "n_b", "alpha"), [(3, 3, 0.05), (3, 1, 0.05), (6, 2, 0.05), (4, 3, 0.017)])
def test_few_means_are_found_as_often_as_said(n_a, n_b, alpha):
    found = detectable_few_means(2.0, n_a, n_b, alpha=alpha).difference
    rng = np.random.default_rng(5)
    draws = [(rng.normal(0, 2, n_a), rng.normal(found, 2, n_b)) for _ in range(3000)]
    share = np.mean([cautious_difference(a, b).p <= alpha for a, b in draws])
    assert share == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 3000))


def test_few_means_without_an_answer():
    assert "fewer than three" in detectable_few_means(1.0, 1, 1).reason
    assert detectable_few_means(0.0, 3, 3).reason == "no spread to judge by"
    assert math.isnan(detectable_few_means(math.nan, 3, 3).difference)

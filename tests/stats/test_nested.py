from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.nested import nested_mean, nested_mean_difference


def frame(*columns: list) -> pd.DataFrame:
    return pd.DataFrame(dict(zip(("seed", "feature", "prompt"), columns, strict=False)))


def simulated(rng, n_seeds, n_features, n_prompts, spreads=(1.0, 1.0, 1.0), draw=None):
    """Values with a spread of its own at each level, of mean 0."""
    draw = draw or (lambda *shape: rng.standard_normal(shape))
    a = spreads[0] * draw(n_seeds, 1, 1)
    b = spreads[1] * draw(n_seeds, n_features, 1)
    c = spreads[2] * draw(n_seeds, n_features, n_prompts)
    values = np.broadcast_to(a + b + c, (n_seeds, n_features, n_prompts))
    index = pd.MultiIndex.from_product([range(n_seeds), range(n_features), range(n_prompts)])
    return values.ravel(), index.to_frame(index=False, name=["seed", "feature", "prompt"])


def test_groups_count_alike_however_many_values_they_have():
    # seed 0: feature 0 has mean 2, feature 1 has mean 10; seed 1: mean 0
    levels = frame([0, 0, 0, 1], [0, 0, 1, 0])
    assert nested_mean([1, 3, 10, 0], levels).value == pytest.approx(((2 + 10) / 2 + 0) / 2)


def test_labels_need_only_be_unique_within_the_group_above():
    values = [1.0, 2.0, 5.0, 9.0]
    same = nested_mean(values, frame([0, 0, 1, 1], [0, 1, 0, 1]), seed=3)
    other = nested_mean(values, frame(["x", "x", "y", "y"], [4, 7, 9, 2]), seed=3)
    np.testing.assert_array_equal(same.replicates, other.replicates)


def ordinary(values, seed=0, n_boot=2000):
    """One level: every value a group."""
    return nested_mean(values, pd.DataFrame({"value": range(len(values))}), n_boot=n_boot, seed=seed)


def test_many_groups_get_expanded_percentiles():
    rng = np.random.default_rng(0)
    a, b = ordinary(rng.normal(size=40)), ordinary(rng.normal(size=40), seed=1)
    assert a.replicates.std() == pytest.approx(a.group_means.std() / math.sqrt(40), rel=0.06)
    freedom = (a.error**2 + b.error**2) ** 2 / (a.error**4 / 39 + b.error**4 / 39)
    upper = scipy_stats.norm.cdf(scipy_stats.t.ppf(0.975, freedom) * math.sqrt(40 / 39))
    low, high = np.quantile(b.replicates - a.replicates, [1 - upper, upper])
    found = nested_mean_difference(a, b)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("n", [7, 19])
def test_few_groups_get_welchs_t_interval(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n), rng.normal(0.5, 2.0, size=n)
    found = nested_mean_difference(ordinary(a), ordinary(b))
    peer = scipy_stats.ttest_ind(b, a, equal_var=False)
    ends = peer.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((ends.low, ends.high, peer.pvalue))
    assert found.n == n
    exactly_twenty = nested_mean_difference(ordinary(np.r_[a, a, a][:20]), ordinary(np.r_[b, b, b][:20]))
    assert exactly_twenty.high - exactly_twenty.value != pytest.approx(
        exactly_twenty.value - exactly_twenty.low, rel=1e-9
    )


def test_the_error_is_that_of_the_outermost_means():
    values, levels = simulated(np.random.default_rng(1), 6, 4, 3)
    found = nested_mean(values, levels, n_boot=8_000)
    means = values.reshape(6, 12).mean(1)
    np.testing.assert_allclose(found.group_means, means)
    assert found.error == pytest.approx(scipy_stats.sem(means))
    assert found.replicates.var() == pytest.approx(means.var() / 6, rel=0.06)


def test_a_difference_has_welchs_degrees_of_freedom():
    rng = np.random.default_rng(4)
    a, b = (nested_mean(*simulated(rng, n, 6, 3)) for n in (3, 4))
    found = nested_mean_difference(a, b)
    freedom = (a.error**2 + b.error**2) ** 2 / (a.error**4 / 2 + b.error**4 / 3)
    reach = scipy_stats.t.ppf(0.975, freedom) * math.hypot(a.error, b.error)
    assert found.value == pytest.approx(b.value - a.value)
    assert found.low == pytest.approx(found.value - reach)


def covered(n_sim, sizes, seed, **options):
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(n_sim):
        sides = [nested_mean(*simulated(rng, *sizes, **options), n_boot=200, seed=rng) for _ in "ab"]
        estimate = nested_mean_difference(*sides)
        hits += estimate.low <= 0 <= estimate.high
    return hits / n_sim


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("sizes", "spreads"),
    [((3, 8, 4), (1, 1, 1)), ((3, 8, 4), (0, 1, 1)), ((6, 6, 2), (1, 0.3, 3)), ((25, 3, 2), (1, 1, 1))],
)
def test_intervals_cover_what_they_promise(sizes, spreads):
    # 95 %, give or take three standard errors of 1,000 simulations.
    assert 0.929 <= covered(1000, sizes, 5, spreads=spreads) <= 0.971


@pytest.mark.simulation
def test_resampling_within_groups_too_would_count_their_noise_twice():
    """The reason for resampling whole groups: the other way the interval is too wide where groups are alike."""
    rng, hits, n_sim = np.random.default_rng(9), 0, 300
    for _ in range(n_sim):
        values, _ = simulated(rng, 6, 6, 1, spreads=(0, 1, 0))
        cube = values.reshape(6, 6)
        seeds = rng.integers(6, size=(200, 6))
        within = rng.integers(6, size=(200, 6, 6))
        error = cube[seeds[:, :, None], within].mean((1, 2)).std() * math.sqrt(6 / 5)
        hits += abs(cube.mean()) <= scipy_stats.t.ppf(0.975, 5) * error
    assert hits / n_sim > 0.98


@pytest.mark.simulation
def test_a_plain_bootstrap_of_the_values_would_not_cover():
    """What the hierarchy is for: without it, 95 % intervals hold the truth far too seldom."""
    rng, hits = np.random.default_rng(6), 0
    for _ in range(200):
        sides = [ordinary(simulated(rng, 3, 8, 4)[0], seed=rng, n_boot=200) for _ in "ab"]
        flat = nested_mean_difference(*sides)
        hits += flat.low <= 0 <= flat.high
    assert hits / 200 < 0.6


def test_one_seed_is_said_and_features_carry_the_interval():
    values, levels = simulated(np.random.default_rng(7), 1, 30, 3)
    found = nested_mean(values, levels)
    assert found.n == 30
    assert found.reason == "one seed: the interval does not hold that noise"
    other = nested_mean(*simulated(np.random.default_rng(8), 4, 3, 2))
    difference = nested_mean_difference(found, other)
    assert difference.low < difference.value < difference.high
    assert (difference.n, difference.reason) == (4, found.reason)


@pytest.mark.parametrize(
    ("values", "levels", "reason"),
    [
        ([], frame([], []), "there are none"),
        ([1.0, math.nan], frame([0, 1], [0, 0]), "NaN"),
        ([1.0, 2.0], frame([0, None], [0, 0]), "labels of seed are missing"),
        ([1.0], frame([0], [0]), "no spread"),
    ],
)
def test_no_interval_says_why(values, levels, reason):
    found = nested_mean(values, levels)
    assert reason in found.reason
    difference = nested_mean_difference(found, found)
    assert math.isnan(difference.low) and math.isnan(difference.p)
    assert difference.reason == found.reason


def test_equal_values_have_no_interval():
    alike = nested_mean([2.0] * 4, frame([0, 0, 1, 1], [0, 1, 0, 1]))
    found = nested_mean_difference(alike, alike)
    assert (alike.value, found.value, found.reason) == (2, 0, "all groups are alike")
    assert math.isnan(found.low) and math.isnan(found.p)
    one_side = nested_mean_difference(alike, nested_mean([1.0, 2.0], frame([0, 1], [0, 0])))
    assert one_side.low < one_side.value < one_side.high


def test_bad_requests():
    with pytest.raises(ShapeMismatch):
        nested_mean([1.0, 2.0], frame([0], [0]))
    with pytest.raises(ShapeMismatch):
        nested_mean([1.0], pd.DataFrame(index=[0]))
    with pytest.raises(ConfigError):
        nested_mean([1.0, 2.0], frame([0, 1], [0, 0]), n_boot=3)


def test_the_same_seed_gives_the_same_resamples():
    values, levels = simulated(np.random.default_rng(8), 4, 4, 4)
    first, second, other = (nested_mean(values, levels, seed=seed).replicates for seed in (1, 1, 2))
    assert first.tolist() == second.tolist() != other.tolist()

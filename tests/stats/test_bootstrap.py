from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from saeffect.errors import ConfigError, ShapeMismatch, UnknownName
from saeffect.stats.bootstrap import (
    Average,
    _bca_quantiles,
    _leave_one_out,
    bootstrap,
    bootstrap_difference,
    bootstrap_means,
    cluster_bootstrap,
    expanded_quantiles,
)
from saeffect.stats.estimate import Estimate

SKEWED = np.random.default_rng(11).gamma(1.5, size=40)
INTERVALS: list[Callable[[int], Estimate]] = [
    lambda seed: bootstrap(SKEWED, seed=seed),
    lambda seed: bootstrap_difference(SKEWED, SKEWED + 1, seed=seed),
    lambda seed: cluster_bootstrap(SKEWED, np.arange(40) // 4, seed=seed),
]


@pytest.mark.parametrize("interval", INTERVALS)
def test_equal_seeds_give_equal_numbers_and_others_do_not(interval: Callable[[int], Estimate]) -> None:
    assert interval(5) == interval(5)
    assert interval(5).low != interval(6).low
    assert interval(5).value == interval(6).value


@pytest.mark.parametrize("interval", INTERVALS)
def test_the_global_random_state_is_left_alone(interval: Callable[[int], Estimate]) -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    interval(0)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


@pytest.mark.parametrize(("statistic", "function"), [("mean", np.mean), ("median", np.median)])
def test_bca_agrees_with_scipy(statistic: Average, function: Callable[..., float]) -> None:
    ours = bootstrap(SKEWED, statistic, n_boot=8_000, seed=1)
    theirs = scipy.stats.bootstrap(
        (SKEWED,), function, n_resamples=8_000, method="BCa", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(function(SKEWED))
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_bca_is_not_the_percentile_interval_on_skewed_data() -> None:
    long_tail = np.exp(1.5 * scipy.stats.norm.ppf((np.arange(40) + 0.5) / 40))
    bca = bootstrap(long_tail, n_boot=20_000)
    means = np.random.default_rng(3).choice(long_tail, size=(20_000, 40)).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert bca.low > low + 0.05 * width  # both ends move towards the long tail
    assert bca.high > high + 0.05 * width


def test_bca_quantiles_by_hand() -> None:
    # Half of the replicates lie below, so bias 0. Deviations 2, -1, -1: acceleration 6 / (6 * 6**1.5).
    shares = _bca_quantiles(0.0, np.array([-1.0, 0.0, 0.0, 1.0]), np.array([-2.0, 1.0, 1.0]))
    z, acceleration = 1.959963984540054, 6**-1.5
    expected = [
        scipy.stats.norm.cdf(-z / (1 + acceleration * z)),
        scipy.stats.norm.cdf(z / (1 - acceleration * z)),
    ]
    assert shares == pytest.approx(expected)


def test_bca_falls_back_to_plain_shares() -> None:
    plain = pytest.approx([0.025, 0.975])
    spread = np.array([1.0, 2.0, 4.0])
    assert _bca_quantiles(9.0, np.array([1.0, 2.0]), spread) == plain  # all replicates below
    assert _bca_quantiles(0.0, np.array([1.0, 2.0]), spread) == plain  # all above
    assert _bca_quantiles(1.5, np.array([1.0, 2.0]), np.ones(3)) == plain  # nothing changes
    # Bias and acceleration so strong that the formula would turn round: 0.16 times 4.75 + 1.96.
    one_above = np.append(np.full(999_999, -1.0), 1.0)
    assert _bca_quantiles(0.0, one_above, np.array([-60.0] + [1.0] * 60)) == plain


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10])
@pytest.mark.parametrize(("statistic", "function"), [("mean", np.mean), ("median", np.median)])
def test_leaving_one_out_is_what_it_says(n: int, statistic: Average, function: Callable[..., float]) -> None:
    data = np.random.default_rng(n).integers(0, 6, size=n).astype(float)
    by_loop = sorted(function(np.delete(data, i)) for i in range(n))
    assert sorted(_leave_one_out(data, statistic)) == pytest.approx(by_loop)


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap(SKEWED, "median"), cluster_bootstrap(SKEWED, np.arange(40) // 4)
    # By its name in sys.modules: as an attribute of the package `bootstrap` is the function.
    monkeypatch.setattr(sys.modules["saeffect.stats.bootstrap"], "_BLOCK", 400)
    assert (bootstrap(SKEWED, "median"), cluster_bootstrap(SKEWED, np.arange(40) // 4)) == whole


@pytest.mark.simulation
def test_mean_of_normals_is_covered() -> None:
    rng = np.random.default_rng(0)
    n_studies, hits = 400, 0
    for _ in range(n_studies):
        interval = bootstrap(rng.normal(2.0, 1.0, size=30), n_boot=400, seed=rng)
        hits += interval.low <= 2.0 <= interval.high
    # A bootstrap of 30 values is known to miss a little: 0.93 to 0.94 is right, by 4 Monte-Carlo errors.
    assert hits / n_studies == pytest.approx(0.94, abs=4 * math.sqrt(0.94 * 0.06 / n_studies))


@pytest.mark.simulation
def test_difference_interval_has_theoretical_width() -> None:
    rng = np.random.default_rng(1)
    n_studies, hits = 300, 0
    for _ in range(n_studies):
        a, b = rng.normal(0, 1, size=40), rng.normal(0.5, 2, size=60)
        interval = bootstrap_difference(a, b, n_boot=400, seed=rng)
        hits += interval.low <= 0.5 <= interval.high
    assert hits / n_studies == pytest.approx(0.945, abs=4 * math.sqrt(0.945 * 0.055 / n_studies))
    interval = bootstrap_difference(a, b, n_boot=10_000)
    standard_error = math.sqrt(a.var() / 40 + b.var() / 60)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.04)


@pytest.mark.simulation
def test_clusters_are_covered_where_single_values_are_not() -> None:
    rng = np.random.default_rng(2)
    n_studies, n_clusters, size = 200, 25, 8
    clusters = np.repeat(np.arange(n_clusters), size)
    whole = single = 0
    for _ in range(n_studies):
        values = rng.normal(size=n_clusters)[clusters] + 0.3 * rng.normal(size=n_clusters * size)
        interval = cluster_bootstrap(values, clusters, n_boot=400, seed=rng)
        whole += interval.low <= 0 <= interval.high
        interval = bootstrap(values, n_boot=400, seed=rng)
        single += interval.low <= 0 <= interval.high
    assert whole / n_studies == pytest.approx(0.93, abs=4 * math.sqrt(0.93 * 0.07 / n_studies))
    assert single / n_studies < 0.7


def test_cluster_interval_by_hand() -> None:
    # Two clusters with means 0 and 3: the resampled mean is 0, 1.5 or 3 (a quarter, a half, a quarter).
    interval = cluster_bootstrap([0, 0, 3, 3], ["x", "x", "y", "y"])
    assert (interval.value, interval.low, interval.high, interval.n) == (1.5, 0.0, 3.0, 2)


def test_clusters_of_unequal_size_weigh_by_their_values() -> None:
    # Cluster x holds one value, y three: the mean of all is 9/4, and either alone gives 0 or 3.
    interval = cluster_bootstrap([0, 3, 3, 3], list("xyyy"))
    assert (interval.value, interval.low, interval.high) == (2.25, 0.0, 3.0)


def test_one_value_a_cluster_is_the_expanded_percentile_bootstrap() -> None:
    clustered = cluster_bootstrap(SKEWED, range(40), n_boot=8000)
    means = np.random.default_rng(9).choice(SKEWED, size=(20_000, 40)).mean(axis=1)
    upper = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.975, 39) * np.sqrt(40 / 39))
    low, high = np.quantile(means, [1 - upper, upper])
    assert (clustered.low, clustered.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_any_hashable_labels_clusters() -> None:
    values, numbers = SKEWED[:12], np.arange(12) // 3
    tuples = [("seed", int(i)) for i in numbers]
    assert cluster_bootstrap(values, tuples) == cluster_bootstrap(values, numbers)


NAN = pytest.approx(math.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "value", "reason"),
    [
        ([], NAN, "values: there are none"),
        ([2.0], 2.0, "values: one value shows no spread"),
        ([2.0] * 5, 2.0, "values: all 5 are equal, so resampling shows no spread"),
        ([1.0, math.nan, 2.0], NAN, "values: 1 of 3 values are NaN"),
        ([1.0, math.inf], NAN, "values: 1 of 2 values are infinite"),
    ],
)
def test_data_without_an_interval_say_why(values: list[float], value: float, reason: str) -> None:
    interval = bootstrap(values)
    assert interval.value == value
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert interval.n == len(values)
    assert interval.reason == reason


def test_differences_without_an_interval_say_why() -> None:
    assert bootstrap_difference([], [1.0, 2.0]).reason == "a: there are none"
    assert bootstrap_difference([1.0, 2.0], [1.0, math.nan]).reason == "b: 1 of 2 values are NaN"
    assert bootstrap_difference([1.0, 2.0], [3.0]).reason == "b: one value shows no spread"
    assert bootstrap_difference([1.0, 1.0], [3.0, 3.0]).reason.startswith("neither a nor b varies")
    assert bootstrap_difference([1.0, 1.0], [3.0, 3.0]).value == 2.0
    # One group without spread leaves the other's.
    interval = bootstrap_difference([1.0, 1.0], [3.0, 5.0])
    assert (interval.value, interval.low, interval.high, interval.n) == (3.0, 2.0, 4.0, 4)


def test_clusters_without_an_interval_say_why() -> None:
    assert cluster_bootstrap([], []).reason == "values: there are none"
    assert cluster_bootstrap([1.0, math.nan], [1, 2]).reason == "values: 1 of 2 values are NaN"
    assert cluster_bootstrap([1.0, 2.0], ["x", None]).reason == "clusters: 1 of 2 labels are missing"
    assert cluster_bootstrap([1.0, 1.0], ["x", "y"]).reason.startswith("values: all 2 are equal")
    single = cluster_bootstrap([1.0, 2.0], ["x", "x"])
    assert single.reason == "clusters: a single one shows no spread"
    assert single.value == 1.5
    assert math.isnan(single.low) and math.isnan(single.high)


def test_median_of_nearly_equal_values_may_have_no_width() -> None:
    interval = bootstrap([0.0] * 100 + [1.0] * 3, "median")
    assert (interval.low, interval.high, interval.reason) == (0.0, 0.0, "")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        bootstrap([[1.0, 2.0]])
    with pytest.raises(UnknownName, match="'std'"):
        bootstrap([1.0, 2.0], "std")  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        bootstrap_difference([1.0, 2.0], [1.0], "std")  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match="3 values but 2 cluster labels"):
        cluster_bootstrap([1.0, 2.0, 3.0], [1, 2])
    with pytest.raises(ConfigError):
        bootstrap([1.0, 2.0], n_boot=10)


def test_memory_does_not_grow_with_the_resamples() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    tracemalloc.start()
    bootstrap(values, "median", n_boot=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 75e6  # 80 MB would be half of n_boot * n at once


def test_a_median_difference_resamples_medians() -> None:
    # The medians of three resampled values are 1, 2 or 3 and 11, 12 or 13, so the difference lies within 8 and 12.
    interval = bootstrap_difference([1.0, 2.0, 3.0], [11.0, 12.0, 13.0], "median")
    assert (interval.value, interval.low, interval.high, interval.n) == (10.0, 8.0, 12.0, 6)


@pytest.mark.simulation
def test_difference_of_normal_means_has_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(1500):
        found = bootstrap_difference(rng.standard_normal(12), rng.standard_normal(16), n_boot=800, seed=seed)
        held += found.low <= 0 <= found.high
    # The plain percentiles hold 92 in a hundred.
    assert 0.938 < held / 1500 < 0.972


def test_few_clusters_give_an_interval_as_wide_as_students() -> None:
    """Resamples of five spread too little by the root of 4 / 5; the interval makes up for it."""
    ratios = []
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=6)
        found = cluster_bootstrap(values, list("abcdef"), n_boot=4000, seed=seed)
        ratios.append((found.high - found.low) / 2 / (scipy.stats.t.ppf(0.975, 5) * scipy.stats.sem(values)))
    # Not quite, since the tails of resamples of so few end early; without making up for it the ratio is 0.87.
    assert np.mean(ratios) == pytest.approx(0.94, abs=0.03)


def test_means_of_many_rows_agree_with_scipy() -> None:
    rows = np.random.default_rng(3).gamma(2.0, size=(3, 12))
    low, high = bootstrap_means(rows, n_boot=8_000, seed=1)
    # The expanded percentiles of 12 values, from scipy's plain ones at the level that is as wide.
    reach = scipy.stats.t.ppf(0.975, 11) * math.sqrt(12 / 11)
    level = 2 * scipy.stats.norm.cdf(reach) - 1
    for i, row in enumerate(rows):
        found = scipy.stats.bootstrap(
            (row,), np.mean, confidence_level=level, n_resamples=8_000, method="percentile", rng=2
        ).confidence_interval
        assert [low[i], high[i]] == pytest.approx([found.low, found.high], abs=0.08 * row.std())


def test_interval_of_a_row_is_independent_of_others() -> None:
    rows = np.random.default_rng(4).normal(size=(5, 8))
    together, alone = bootstrap_means(rows, seed=7), bootstrap_means(rows[2:3], seed=7)
    assert (together[0][2], together[1][2]) == (alone[0][0], alone[1][0])


@pytest.mark.simulation
@pytest.mark.parametrize(("n", "least", "most"), [(6, 0.91, 0.95), (12, 0.93, 0.97)])
def test_intervals_of_means_cover_what_is_said_of_them(n: int, least: float, most: float) -> None:
    low, high = bootstrap_means(np.random.default_rng(n).normal(size=(2_000, n)), n_boot=2_000, seed=0)
    assert least < np.mean((low < 0) & (high > 0)) < most


def test_rows_that_show_no_spread_have_no_interval() -> None:
    low, high = bootstrap_means([[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 2.0, 3.0]])
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, True, True, False]
    assert np.isnan(bootstrap_means([[1.0], [2.0]])).all()
    with pytest.raises(ShapeMismatch):
        bootstrap_means([1.0, 2.0])


def test_expanded_quantiles_by_hand() -> None:
    # Student's t with 4 degrees of freedom reaches 2.776; times the root of 5 / 4 it is 3.104, beyond 0.99905.
    low, high = expanded_quantiles(5)
    assert high == pytest.approx(scipy.stats.norm.cdf(2.7764451 * math.sqrt(1.25)))
    assert low == pytest.approx(1 - high)

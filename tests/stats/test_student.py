"""Student's and Welch's intervals against scipy, what has no interval, and what counts as independent."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from saeffect.errors import ShapeMismatch
from saeffect.stats.student import MIN_CLUSTERS, cautious_difference, independent_values, mean_interval


@pytest.mark.parametrize("n", [2, 8, 50])
def test_mean_against_scipy(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    found = mean_interval(values)
    expected = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.value == pytest.approx(values.mean()) and found.n == n and found.reason == ""
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("values", "reason"), [([], "values"), ([1.0], "one value"), ([2.0, 2.0], "equal"), ([1.0, math.nan], "values")]
)
def test_a_mean_without_interval(values: list[float], reason: str) -> None:
    found = mean_interval(values)
    assert math.isnan(found.low) and math.isnan(found.high) and reason in found.reason
    assert found.n == len(values)


def test_bad_arguments() -> None:
    with pytest.raises(ShapeMismatch):
        cautious_difference([[1.0]], [1.0])


@pytest.mark.simulation
def test_covers_the_mean_of_eight_differences() -> None:
    draws = np.random.default_rng(0).standard_normal((4000, 8))
    held = np.mean([found.low <= 0 <= found.high for found in map(mean_interval, draws)])
    assert abs(held - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 1), (3, 3), (6, 2), (2, 6), (5, 4)])
def test_cautious_interval_is_the_wider_one(n_a: int, n_b: int) -> None:
    rng = np.random.default_rng(n_a * 10 + n_b)
    a, b = rng.normal(size=n_a), rng.normal(1.0, 2.0, size=n_b)
    peers = [scipy_stats.ttest_ind(b, a, equal_var=True)]
    if min(n_a, n_b) > 1:
        peers.append(scipy_stats.ttest_ind(b, a, equal_var=False))
    ends = [peer.confidence_interval(0.95) for peer in peers]
    found = cautious_difference(a, b)
    assert found.low == pytest.approx(min(end.low for end in ends))
    assert found.high == pytest.approx(max(end.high for end in ends))
    assert found.p == pytest.approx(max(peer.pvalue for peer in peers))
    assert (found.p <= 0.05) == (found.low > 0 or found.high < 0)
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert (found.n, found.reason) == (min(n_a, n_b), "")


@pytest.mark.simulation
@pytest.mark.parametrize(("n_a", "n_b"), [(2, 1), (3, 1), (3, 3), (6, 2), (10, 2)])
def test_the_cautious_test_keeps_its_level_where_nothing_differs(n_a: int, n_b: int) -> None:
    """Welch's alone does not: 7.5 and 10 in a hundred with two values against six and ten."""
    rng, n = np.random.default_rng(3), 4000
    rate = np.mean([cautious_difference(*np.split(rng.normal(size=n_a + n_b), [n_a])).p <= 0.05 for _ in range(n)])
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)
    if n_b == 1:  # Student's alone, exact
        assert rate == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / n))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([], [1.0, 2.0], "a: there are none"),
        ([1.0, math.nan], [1.0], "a: 1 of 2 values are NaN"),
        ([1.0], [math.inf], "b: 1 of 1 values are infinite"),
        ([1.0], [2.0], "one value on either side shows no spread"),
        ([1.0, 1.0], [2.0, 2.0], "the values of a side are all alike, so they show no spread"),
        ([1.0, 1.0], [2.0], "the values of a side are all alike, so they show no spread"),
    ],
)
def test_no_cautious_interval_says_why(a: list[float], b: list[float], reason: str) -> None:
    found = cautious_difference(a, b)
    assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(found.p)
    assert found.reason == reason
    assert found.n == min(len(a), len(b))
    value = sum(b) / len(b) - sum(a) / len(a) if a and math.isfinite(sum(a) + sum(b)) else math.nan
    assert found.value == pytest.approx(value, nan_ok=True)


def test_cluster_means_are_in_label_order() -> None:
    found = independent_values([4.0, 1.0, 2.0, 3.0, 7.0], [9, 2, 2, 2, 5], min_clusters=3)
    assert found.tolist() == [2.0, 7.0, 4.0]
    assert independent_values([], []).tolist() == []


@pytest.mark.parametrize("n_clusters", [1, MIN_CLUSTERS - 1, MIN_CLUSTERS])
def test_few_clusters_leave_the_values_alone(n_clusters: int) -> None:
    found = independent_values(np.arange(2.0 * n_clusters), np.repeat(np.arange(n_clusters), 2))
    assert len(found) == (n_clusters if n_clusters >= MIN_CLUSTERS else 2 * n_clusters)


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy of equal values
def test_one_side_without_spread_borrows_the_others() -> None:
    found = cautious_difference([1.0, 1.0], [2.0, 4.0])
    peers = [scipy_stats.ttest_ind([2.0, 4.0], [1.0, 1.0], equal_var=equal) for equal in (True, False)]
    assert found.p == pytest.approx(max(peer.pvalue for peer in peers))
    assert found.high == pytest.approx(max(peer.confidence_interval().high for peer in peers))


def test_reasons_of_a_mean_in_full() -> None:
    equal, one, none = mean_interval([2.0, 2.0, 2.0]), mean_interval([3.0]), mean_interval([])
    assert (equal.reason, equal.value, equal.n) == ("values: all 3 are equal, so they show no spread", 2.0, 3)
    assert (one.reason, one.value, one.n) == ("values: one value shows no spread", 3.0, 1)
    assert (none.reason, none.n) == ("values: there are none", 0) and math.isnan(none.value)
    low, high = scipy_stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.95)
    found = mean_interval([1.0, 2.0, 4.0])
    assert (found.low, found.high, found.n, found.reason) == (pytest.approx(low), pytest.approx(high), 3, "")

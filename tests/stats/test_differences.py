from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from saeffect.stats import differences as module
from saeffect.stats.arguments import Resampling
from saeffect.stats.differences import cliffs_delta, clustered_difference, count_difference


def rows(*clusters):
    """Values and cluster ids of the given clusters."""
    values = np.concatenate([np.asarray(cluster, dtype=float) for cluster in clusters])
    return values, np.repeat(np.arange(len(clusters)), [len(cluster) for cluster in clusters])


def test_mean_difference_and_change_by_hand():
    a, b = rows([1, 3], [2, 2], [3, 1]), rows([4, 2], [3, 5])
    difference, change = clustered_difference(a, b, "mean", Resampling(), "x")
    assert (difference.value, change.value) == (pytest.approx(1.5), pytest.approx(75.0))
    assert (difference.n, change.n, difference.reason) == (5, 5, "")
    assert difference.p == change.p


def test_variance_by_hand():
    a, b = rows([1, 3], [2, 2]), rows([0, 4], [1, 3])
    # squares about 2: 1+1+0+0 and 4+4+1+1, over three
    difference, change = clustered_difference(a, b, "variance", Resampling(), "x")
    assert (difference.value, change.value) == (pytest.approx(8 / 3), pytest.approx(400.0))


def test_intervals_of_two_clusters_by_hand():
    """Resamples of two clusters have the mean of one, the other or both, so the ends are the extremes."""
    difference, change = clustered_difference(rows([1, 1], [3, 3]), rows([5, 5], [9, 9]), "mean", Resampling(), "x")
    assert (difference.low, difference.high) == (pytest.approx(2.0), pytest.approx(8.0))
    assert (change.low, change.high) == (pytest.approx(100 * (5 / 3 - 1)), pytest.approx(800.0))


def test_permutation_swaps_whole_clusters():
    a, b = rows([1, 1.5], [2, 2.5], [3, 3.1]), rows([2.7, 4], [5, 5.2], [1.1, 6])
    clusters = [cluster.mean() for cluster in np.concatenate([a[0], b[0]]).reshape(6, 2)]
    observed = np.mean(clusters[3:]) - np.mean(clusters[:3])
    splits = list(itertools.combinations(range(6), 3))
    gaps = [np.mean([clusters[i] for i in range(6) if i not in s]) - np.mean([clusters[i] for i in s]) for s in splits]
    exact = np.mean([abs(gap) >= abs(observed) - 1e-12 for gap in gaps])
    difference, _ = clustered_difference(a, b, "mean", Resampling(n_permutations=20_000), "x")
    assert difference.p == pytest.approx(exact, abs=0.015)


def test_interval_width_follows_number_of_clusters():
    rng = np.random.default_rng(0)
    # ten copies of one number per cluster: the copies must not make the interval narrower
    centres_a, centres_b = rng.normal(0, 1, 60), rng.normal(0, 1, 60)
    a, b = rows(*[[c] * 10 for c in centres_a]), rows(*[[c] * 10 for c in centres_b])
    interval = clustered_difference(a, b, "mean", Resampling(), "x")[0]
    error = np.sqrt(centres_a.var() / 60 + centres_b.var() / 60)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.simulation
@pytest.mark.parametrize("moment", ["mean", "variance"])
def test_null_p_falls_below_five_percent_about_so_often(moment):
    rng = np.random.default_rng(1)
    small = Resampling(n_boot=40, n_permutations=199)
    ids = np.repeat(np.arange(20), 5)
    hits = 0
    for _ in range(300):
        a, b = ((rng.normal(size=(20, 1)) + rng.normal(size=(20, 5))).ravel() + 50 for _ in "ab")
        hits += clustered_difference((a, ids), (b, ids), moment, small, "x")[0].p <= 0.05
    assert 4 <= hits <= 29  # 15 expected; 99.9 % of binomials with 5 % lie in 4 to 29


def test_variance_p_does_not_react_to_a_mean_difference():
    rng = np.random.default_rng(2)
    ids = np.arange(80)
    a, b = rng.normal(0, 1, 80), rng.normal(30, 1, 80)
    resampling = Resampling(n_permutations=500)
    assert clustered_difference((a, ids), (b, ids), "mean", resampling, "x")[0].p < 0.01
    assert clustered_difference((a, ids), (b, ids), "variance", resampling, "x")[0].p > 0.05


def test_counts_match_the_exact_permutation_p():
    result = count_difference(np.array([0, 0, 1]), np.array([2, 3, 3]), Resampling(n_permutations=20_000), "x")
    assert result.value == pytest.approx(7 / 3)
    assert result.p == pytest.approx(0.1, abs=0.01)  # 2 of the 20 splits


def test_counts_agree_with_the_general_way():
    rng = np.random.default_rng(3)
    a, b = rng.poisson(0.5, 300), rng.poisson(0.7, 250)
    counted = count_difference(a, b, Resampling(), "x")
    plain = [(side.astype(float), np.arange(len(side))) for side in (a, b)]
    general, _ = clustered_difference(plain[0], plain[1], "mean", Resampling(), "x")
    assert (counted.low, counted.high) == pytest.approx((general.low, general.high), abs=0.015)
    assert counted.p == pytest.approx(general.p, abs=0.01)


def delta(a, b, resampling=Resampling(n_boot=60)):
    return cliffs_delta(np.asarray(a, dtype=float), np.asarray(b, dtype=float), resampling, "x")


def test_delta_by_hand():
    assert delta([1, 2], [3, 4]).value == 1.0
    assert delta([3, 4], [1, 2]).value == -1.0
    assert delta([1, 3], [2, 2]).value == 0.0
    assert delta([1, 2, 2], [2, 3]).value == pytest.approx((4 - 0) / 6)  # 4 wins, 2 ties


def test_delta_has_mann_whitney_p_and_is_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 20, size=57), rng.integers(2, 25, size=31)  # with ties
    peer, found = scipy.stats.mannwhitneyu(b, a), delta(a, b)
    assert found.value == pytest.approx(2 * peer.statistic / (57 * 31) - 1)
    assert (found.p, found.n) == (pytest.approx(peer.pvalue), 88)
    assert delta(b, a).value == pytest.approx(-found.value)


def test_delta_does_not_depend_on_the_unit():
    a, b = np.array([1.0, 5.0, 2.0]), np.array([4.0, 3.0])
    assert delta(a, b) == delta(np.exp(a), np.exp(b))


@pytest.mark.parametrize(("a", "b"), [([], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0])])
def test_delta_needs_two_values_a_side(a, b):
    found = delta(a, b)
    assert np.isnan([found.value, found.low, found.high, found.p]).all()
    assert found.reason == f"fewer than two features in an arm ({len(a)} and {len(b)})"


def test_cliffs_delta_interval_holds_the_value_and_its_bounds():
    a, b = np.arange(20.0), np.arange(20.0) + 8
    estimate = delta(a, b, Resampling())
    assert -1 <= estimate.low < estimate.value < estimate.high <= 1


def test_too_few_clusters_are_undefined_with_a_reason():
    difference, change = clustered_difference(rows([1, 2]), rows([3, 4], [5, 6]), "mean", Resampling(), "x")
    assert difference.value == pytest.approx(3.0)
    assert np.isnan([difference.low, difference.high, difference.p, change.p]).all()
    assert difference.reason == change.reason == "fewer than two features in an arm (1 and 2)"
    assert count_difference(np.array([1]), np.array([2, 3]), Resampling(), "x").reason == difference.reason


def test_no_spread_or_ratio_gives_a_reason():
    flat = clustered_difference(rows([0], [0]), rows([0], [0]), "mean", Resampling(), "x")
    assert [estimate.reason for estimate in flat] == [
        "no spread between features in either arm",
        "the value of the first arm is not above 0",
    ]
    assert flat[0].p == 1.0
    same = clustered_difference(rows([2], [2]), rows([3], [3]), "mean", Resampling(), "x")[1]
    assert (same.value, same.reason) == (pytest.approx(50.0), "no spread between features in either arm")
    near = clustered_difference(rows([-1], [1.5]), rows([1], [2]), "mean", Resampling(), "x")[1]
    assert (near.reason, np.isnan(near.low)) == ("the value of the first arm is too near 0", True)
    assert count_difference(np.zeros(5, int), np.zeros(5, int), Resampling(), "x").reason.startswith("no spread")


@pytest.mark.simulation
def test_intervals_of_few_features_hold_the_truth():
    """Six against eight features of ten weights each: plain percentiles hold it in 89 of a hundred studies."""
    rng, hits, n = np.random.default_rng(12), 0, 400
    for study in range(n):
        arms = []
        for size in (6, 8):
            clusters = np.repeat(np.arange(size), 10)
            arms.append((rng.normal(size=size)[clusters] + rng.normal(size=10 * size), clusters))
        found = clustered_difference(arms[0], arms[1], "mean", Resampling(study, 400, 20), "x")[0]
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / n <= 0.985


def test_a_p_is_never_zero():
    values = np.concatenate([np.arange(20.0), 1000 + np.arange(20.0)])
    clusters = np.arange(20)
    found = clustered_difference((values[:20], clusters), (values[20:], clusters), "mean", Resampling(0, 50, 99), "x")
    assert found[0].p == 1 / 100  # only the real labels reach so far
    counts = count_difference(np.zeros(30, int), np.full(30, 9), Resampling(0, 50, 99), "x")
    assert counts.p == 1 / 100


def test_cliffs_delta_equals_all_pairs_in_any_chunks(monkeypatch):
    """The sorted sums are whole numbers, so they equal the sums over a matrix of all pairs to the last digit."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 6, 9).astype(float), rng.integers(1, 7, 5).astype(float)  # with ties
    times_a, times_b = rng.integers(0, 3, (40, 9)).astype(float), rng.integers(0, 3, (40, 5)).astype(float)
    every_pair = np.einsum("ri,ij,rj->r", times_a, np.sign(b[None, :] - a[:, None]), times_b)
    assert module._net_wins(a, b, times_a, times_b).tolist() == every_pair.tolist()
    whole = delta(a, b)
    monkeypatch.setattr(module, "_CELLS", 9 * 60)
    assert delta(a, b) == whole
    n = 40_000  # a matrix of all pairs would have 1.6 thousand million entries
    wide = delta(rng.normal(size=n), rng.normal(size=n), Resampling(n_boot=40))
    assert -0.03 < wide.low < wide.high < 0.03


def test_what_is_undefined_has_no_p():
    a, b = rows([1, 2], [3, 4], [2, 2]), rows([1, np.nan], [3, 4], [2, 5])
    assert np.isnan(clustered_difference(a, b, "mean", Resampling(n_boot=40, n_permutations=50), "x")[0].p)

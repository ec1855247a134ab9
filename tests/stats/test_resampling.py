from __future__ import annotations

import itertools

import numpy as np
import pytest

from saeffect.stats import resampling as module
from saeffect.stats.resampling import Resampling, cliffs_delta_interval, compare_counts, compare_moment


def rows(*clusters):
    """Values and cluster ids of the given clusters."""
    values = np.concatenate([np.asarray(cluster, dtype=float) for cluster in clusters])
    return values, np.repeat(np.arange(len(clusters)), [len(cluster) for cluster in clusters])


def test_mean_difference_and_change_by_hand():
    a, b = rows([1, 3], [2, 2], [3, 1]), rows([4, 2], [3, 5])
    result = compare_moment(a, b, "mean", Resampling(), "x")
    assert (result.value_a, result.value_b) == (2.0, 3.5)
    assert result.difference.value == pytest.approx(1.5)
    assert result.change.value == pytest.approx(75.0)


def test_variance_by_hand():
    a, b = rows([1, 3], [2, 2]), rows([0, 4], [1, 3])
    result = compare_moment(a, b, "variance", Resampling(), "x")
    # squares about 2: 1+1+0+0 and 4+4+1+1, over three
    assert (result.value_a, result.value_b) == (pytest.approx(2 / 3), pytest.approx(10 / 3))
    assert result.change.value == pytest.approx(400.0)


def test_permutation_swaps_whole_clusters():
    a, b = rows([1, 1.5], [2, 2.5], [3, 3.1]), rows([2.7, 4], [5, 5.2], [1.1, 6])
    clusters = [cluster.mean() for cluster in np.concatenate([a[0], b[0]]).reshape(6, 2)]
    observed = np.mean(clusters[3:]) - np.mean(clusters[:3])
    splits = list(itertools.combinations(range(6), 3))
    gaps = [np.mean([clusters[i] for i in range(6) if i not in s]) - np.mean([clusters[i] for i in s]) for s in splits]
    exact = np.mean([abs(gap) >= abs(observed) - 1e-12 for gap in gaps])
    result = compare_moment(a, b, "mean", Resampling(n_permutations=20_000), "x")
    assert result.p == pytest.approx(exact, abs=0.015)


def test_interval_is_as_wide_as_the_number_of_clusters_says():
    rng = np.random.default_rng(0)
    # ten copies of one number per cluster: the copies must not make the interval narrower
    centres_a, centres_b = rng.normal(0, 1, 60), rng.normal(0, 1, 60)
    a, b = rows(*[[c] * 10 for c in centres_a]), rows(*[[c] * 10 for c in centres_b])
    interval = compare_moment(a, b, "mean", Resampling(), "x").difference
    error = np.sqrt(centres_a.var() / 60 + centres_b.var() / 60)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize("moment", ["mean", "variance"])
def test_null_p_falls_below_five_percent_about_so_often(moment):
    rng = np.random.default_rng(1)
    small = Resampling(n_boot=40, n_permutations=199)
    ids = np.repeat(np.arange(20), 5)
    hits = 0
    for _ in range(300):
        a, b = ((rng.normal(size=(20, 1)) + rng.normal(size=(20, 5))).ravel() + 50 for _ in "ab")
        hits += compare_moment((a, ids), (b, ids), moment, small, "x").p <= 0.05
    assert 4 <= hits <= 29  # 15 expected; 99.9 % of binomials with 5 % lie in 4 to 29


def test_variance_p_does_not_react_to_a_mean_difference():
    rng = np.random.default_rng(2)
    ids = np.arange(80)
    a, b = rng.normal(0, 1, 80), rng.normal(30, 1, 80)
    resampling = Resampling(n_permutations=500)
    assert compare_moment((a, ids), (b, ids), "mean", resampling, "x").p < 0.01
    assert compare_moment((a, ids), (b, ids), "variance", resampling, "x").p > 0.05


def test_counts_match_the_exact_permutation_p():
    result = compare_counts(np.array([0, 0, 1]), np.array([2, 3, 3]), Resampling(n_permutations=20_000), "x")
    assert result.difference.value == pytest.approx(7 / 3)
    assert result.p == pytest.approx(0.1, abs=0.01)  # 2 of the 20 splits


def test_counts_agree_with_the_general_way():
    rng = np.random.default_rng(3)
    a, b = rng.poisson(0.5, 300), rng.poisson(0.7, 250)
    counted = compare_counts(a, b, Resampling(), "x")
    general = compare_moment(
        (a.astype(float), np.arange(300)), (b.astype(float), np.arange(250)), "mean", Resampling(), "x"
    )
    assert counted.difference.low == pytest.approx(general.difference.low, abs=0.015)
    assert counted.difference.high == pytest.approx(general.difference.high, abs=0.015)
    assert counted.p == pytest.approx(general.p, abs=0.01)


def test_cliffs_delta_interval_holds_the_value_and_its_bounds():
    a, b = np.arange(20.0), np.arange(20.0) + 8
    estimate = cliffs_delta_interval(a, b, 0.6, Resampling(), "x")
    assert -1 <= estimate.low < 0.6 < estimate.high <= 1


def test_too_few_clusters_and_no_spread_are_undefined_with_a_reason():
    one = compare_moment(rows([1, 2]), rows([3, 4], [5, 6]), "mean", Resampling(), "x")
    assert one.difference.value == pytest.approx(3.0)
    assert np.isnan([one.difference.low, one.p]).all()
    assert "fewer than two features" in one.difference.reason
    flat = compare_counts(np.zeros(5, dtype=int), np.zeros(5, dtype=int), Resampling(), "x")
    assert np.isnan(flat.difference.low)
    assert "no spread" in flat.difference.reason
    assert "not above 0" in flat.change.reason


def test_each_name_has_its_own_stream():
    assert Resampling(seed=3).seed_for("a") != Resampling(seed=3).seed_for("b")
    assert Resampling(seed=3).seed_for("a") != Resampling(seed=4).seed_for("a")


def test_intervals_of_few_features_hold_the_truth():
    """Six against eight features of ten weights each: plain percentiles hold it in 89 of a hundred studies."""
    rng, hits, n = np.random.default_rng(12), 0, 400
    for study in range(n):
        arms = []
        for size in (6, 8):
            clusters = np.repeat(np.arange(size), 10)
            arms.append((rng.normal(size=size)[clusters] + rng.normal(size=10 * size), clusters))
        found = compare_moment(arms[0], arms[1], "mean", Resampling(study, 400, 20), "x").difference
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / n <= 0.985


def test_a_p_is_never_zero():
    values = np.concatenate([np.arange(20.0), 1000 + np.arange(20.0)])
    clusters = np.arange(20)
    found = compare_moment((values[:20], clusters), (values[20:], clusters), "mean", Resampling(0, 50, 99), "x")
    assert found.p == 1 / 100  # only the real labels reach so far
    counts = compare_counts(np.zeros(30, int), np.full(30, 9), Resampling(0, 50, 99), "x")
    assert counts.p == 1 / 100


def test_cliffs_delta_is_that_of_all_pairs_whatever_fits_into_memory(monkeypatch):
    """The sorted sums are whole numbers, so they equal the sums over a matrix of all pairs to the last digit."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 6, 9).astype(float), rng.integers(1, 7, 5).astype(float)  # with ties
    times_a, times_b = rng.integers(0, 3, (40, 9)).astype(float), rng.integers(0, 3, (40, 5)).astype(float)
    every_pair = np.einsum("ri,ij,rj->r", times_a, np.sign(b[None, :] - a[:, None]), times_b)
    assert module._wins(a, b, times_a, times_b).tolist() == every_pair.tolist()
    whole = cliffs_delta_interval(a, b, 0.1, Resampling(n_boot=60), "x")
    monkeypatch.setattr(module, "_CELLS", 9 * 60)
    assert cliffs_delta_interval(a, b, 0.1, Resampling(n_boot=60), "x") == whole
    n = 40_000  # a matrix of all pairs would have 1.6 thousand million entries
    wide = cliffs_delta_interval(rng.normal(size=n), rng.normal(size=n), 0.0, Resampling(n_boot=40), "x")
    assert -0.03 < wide.low < wide.high < 0.03


def test_what_is_undefined_has_no_p():
    a, b = rows([1, 2], [3, 4], [2, 2]), rows([1, np.nan], [3, 4], [2, 5])
    assert np.isnan(compare_moment(a, b, "mean", Resampling(n_boot=40, n_permutations=50), "x").p)

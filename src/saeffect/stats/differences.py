"""Differences between two arms, of clustered values, counts and ranks; whole features are resampled."""

from __future__ import annotations

import math

import numpy as np

from saeffect.stats.arguments import LEVEL, FloatArray, IntArray, Resampling
from saeffect.stats.bootstrap import expanded_quantiles
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["cliffs_delta", "clustered_difference", "count_difference"]

_CHUNK, _CELLS = 500, 10_000_000
_Sums = tuple[FloatArray, FloatArray, FloatArray]  # count, sum and sum of squares per cluster, each [n_clusters]


def clustered_difference(
    a: tuple[FloatArray, IntArray], b: tuple[FloatArray, IntArray], moment: str, resampling: Resampling, name: str
) -> tuple[Estimate, Estimate]:
    """Difference b - a of the mean or the variance of clustered values, and the change 100 (b / a - 1) in %.

    `a` and `b` are values [n] and the cluster of each [n]; `moment` is "mean" or "variance" (ddof 1), for which both
    are first centred. Expanded percentile intervals from resampling whole clusters; two-sided p from permuting these
    between the arms. Both are NaN, with a reason, when an arm has fewer than two clusters.

    Example:
        >>> a, b = (np.array([1.0, 3.0, 2.0]), np.array([0, 0, 1])), (np.array([4.0, 2.0]), np.array([0, 1]))
        >>> [estimate.value for estimate in clustered_difference(a, b, "mean", Resampling(), "x")]
        [1.0, 50.0]
    """
    mean_a, mean_b = (float(np.mean(arm[0])) if len(arm[0]) else math.nan for arm in (a, b))
    # Centred values keep the sums of squares small, hence exact; a mean gets its centre back below.
    sums_a, sums_b = _cluster_sums(a[0] - mean_a, a[1]), _cluster_sums(b[0] - mean_b, b[1])
    values = (mean_a, mean_b) if moment == "mean" else (_variance(a[0]), _variance(b[0]))
    sizes = len(sums_a[0]), len(sums_b[0])
    if min(sizes) < 2:
        reason = f"fewer than two features in an arm ({sizes[0]} and {sizes[1]})"
        return undefined(reason, sum(sizes), values[1] - values[0]), undefined(reason, sum(sizes), _change(*values))
    rng = np.random.default_rng(resampling.seed_for(name, "bootstrap"))
    boot_a, boot_b = (
        np.concatenate([_moment(_draw(n, size, rng), sums, moment) for size in _chunks(resampling.n_boot, n)])
        for n, sums in zip(sizes, (sums_a, sums_b), strict=True)
    )
    if moment == "mean":
        boot_a, boot_b = boot_a + mean_a, boot_b + mean_b
        sums_b = _cluster_sums(b[0] - mean_a, b[1])  # one common centre, or permuting would not see the difference
    p = _permuted_p(sums_a, sums_b, moment, values[1] - values[0], resampling, name)
    return _difference(values, (boot_a, boot_b), sizes, p), _percent_change(values, (boot_a, boot_b), sizes, p)


def count_difference(a: IntArray, b: IntArray, resampling: Resampling, name: str) -> Estimate:
    """Difference b - a of the means of small whole numbers, none negative, one a feature: int64 [n_a] and [n_b].

    Bootstrap and permutation are drawn from the table of counts, so that 100,000 features cost no more than 100.

    Example:
        >>> count_difference(np.array([0, 0, 1]), np.array([2, 2, 3]), Resampling(), "x").value
        2.0
    """
    n_a, n_b = len(a), len(b)
    values = tuple(float(np.mean(arm)) if len(arm) else math.nan for arm in (a, b))
    if min(n_a, n_b) < 2:
        return undefined(f"fewer than two features in an arm ({n_a} and {n_b})", n_a + n_b, values[1] - values[0])
    levels = np.arange(int(max(a.max(), b.max())) + 1)
    table_a, table_b = (np.bincount(arm, minlength=len(levels)) for arm in (a, b))
    rng = np.random.default_rng(resampling.seed_for(name))
    boot_a = rng.multinomial(n_a, table_a / n_a, size=resampling.n_boot) @ levels / n_a
    boot_b = rng.multinomial(n_b, table_b / n_b, size=resampling.n_boot) @ levels / n_b
    pooled = table_a + table_b
    sums_a = rng.multivariate_hypergeometric(pooled, n_a, size=resampling.n_permutations, method="marginals") @ levels
    shuffled = (pooled @ levels - sums_a) / n_b - sums_a / n_a
    p = _two_sided_p(shuffled, values[1] - values[0])
    return _difference((values[0], values[1]), (boot_a, boot_b), (n_a, n_b), p)


def cliffs_delta(a: FloatArray, b: FloatArray, resampling: Resampling, name: str) -> Estimate:
    """Cliff's delta, P(b > a) - P(b < a) for one random value of each arm, finite float64 [n_a] and [n_b].

    Expanded percentile interval, p of the Mann-Whitney test; all NaN when an arm has fewer than two values. Source:
    Cliff (1993), Dominance statistics.

    Example:
        >>> delta = cliffs_delta(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]), Resampling(), "x")
        >>> delta.value, delta.p < 1  # b wins 6 of 9 pairs, loses 1, ties 2
        (0.5555555555555556, True)
    """
    n_a, n_b = len(a), len(b)
    if min(n_a, n_b) < 2:
        return undefined(f"fewer than two features in an arm ({n_a} and {n_b})", n_a + n_b)
    from scipy.stats import mannwhitneyu

    test = mannwhitneyu(a, b, alternative="two-sided")
    value = float((n_a * n_b - 2 * test.statistic) / (n_a * n_b))
    rng = np.random.default_rng(resampling.seed_for(name))
    sizes = _chunks(resampling.n_boot, max(n_a, n_b))
    margins = np.concatenate([_net_wins(a, b, _draw(n_a, size, rng), _draw(n_b, size, rng)) for size in sizes])
    low, high = np.quantile(margins / (n_a * n_b), expanded_quantiles(min(n_a, n_b)))
    return Estimate(value, float(low), float(high), n_a + n_b, p=float(test.pvalue))


def _cluster_sums(values: FloatArray, clusters: IntArray) -> _Sums:
    _, index = np.unique(clusters, return_inverse=True)
    return (
        np.bincount(index).astype(np.float64),
        np.bincount(index, weights=values).astype(np.float64),
        np.bincount(index, weights=values**2).astype(np.float64),
    )


def _moment(counts: FloatArray, sums: _Sums, moment: str) -> FloatArray:
    """Mean or variance (ddof 1) of the rows when cluster j is taken counts[i, j] times: [n_resamples]."""
    n, total, squares = (counts @ part for part in sums)
    if moment == "mean":
        return np.asarray(total / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.maximum(squares - total**2 / n, 0.0) / (n - 1))


def _net_wins(a: FloatArray, b: FloatArray, draws_a: FloatArray, draws_b: FloatArray) -> FloatArray:
    """Number of pairs in which b is larger, minus those in which a is: [n_resamples], without a matrix of all pairs."""
    order = np.argsort(a, kind="stable")
    below = np.zeros((len(draws_a), len(a) + 1))
    np.cumsum(draws_a[:, order], axis=1, out=below[:, 1:])
    first, last = (np.searchsorted(a[order], b, side=side) for side in ("left", "right"))
    # Below b lie `first` of a; above it all but `last`.
    margins = below[:, first] + below[:, last] - below[:, -1:]
    return np.asarray((draws_b * margins).sum(axis=1))


def _draw(n: int, size: int, rng: np.random.Generator) -> FloatArray:
    """How often each of n units is drawn in `size` resamples of n: float64 [size, n]."""
    drawn = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _chunks(total: int, n_units: int) -> list[int]:
    """Split `total` resamples of `n_units` units into chunks that fit in memory: their sizes."""
    size = max(1, min(_CHUNK, _CELLS // n_units))
    return [min(size, total - start) for start in range(0, total, size)]


def _permuted_p(a: _Sums, b: _Sums, moment: str, observed: float, resampling: Resampling, name: str) -> float:
    """Two-sided p of a difference when whole clusters swap arms."""
    rng = np.random.default_rng(resampling.seed_for(name, "permutation"))
    n_a, n = len(a[0]), len(a[0]) + len(b[0])
    pooled = (np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]), np.concatenate([a[2], b[2]]))
    shuffled = []
    for size in _chunks(resampling.n_permutations, n):
        in_a = (rng.random((size, n)).argsort(axis=1) < n_a).astype(np.float64)
        shuffled.append(_moment(1.0 - in_a, pooled, moment) - _moment(in_a, pooled, moment))
    return _two_sided_p(np.concatenate(shuffled), observed)


def _two_sided_p(shuffled: FloatArray, observed: float) -> float:
    if not math.isfinite(observed):
        return math.nan
    # The tolerance keeps ties when sums are added in another order; an undefined value counts as extreme.
    extreme = int(np.sum(~(np.abs(shuffled) < abs(observed) * (1 - 1e-9) - 1e-12)))
    return (extreme + 1) / (len(shuffled) + 1)


def _difference(
    values: tuple[float, float], replicates: tuple[FloatArray, FloatArray], sizes: tuple[int, int], p: float
) -> Estimate:
    value, n = values[1] - values[0], sum(sizes)
    if np.ptp(replicates[0]) == 0 and np.ptp(replicates[1]) == 0:
        return Estimate(value, math.nan, math.nan, n, "no spread between features in either arm", p)
    low, high = np.quantile(replicates[1] - replicates[0], expanded_quantiles(min(sizes)))
    return Estimate(value, float(low), float(high), n, p=p)


def _percent_change(
    values: tuple[float, float], replicates: tuple[FloatArray, FloatArray], sizes: tuple[int, int], p: float
) -> Estimate:
    """Undefined when the first arm's value, or many of its resamples, are not above 0."""
    value, n = _change(*values), sum(sizes)
    positive = replicates[0] > 0
    reason = ""
    if math.isnan(value):
        reason = "the value of the first arm is not above 0"
    elif np.ptp(replicates[0]) == 0 and np.ptp(replicates[1]) == 0:
        reason = "no spread between features in either arm"
    elif positive.mean() < LEVEL:
        reason = "the value of the first arm is too near 0"
    if reason:
        return Estimate(value, math.nan, math.nan, n, reason, p)
    changes = 100.0 * (replicates[1][positive] / replicates[0][positive] - 1.0)
    low, high = np.quantile(changes, expanded_quantiles(min(sizes)))
    return Estimate(value, float(low), float(high), n, p=p)


def _variance(values: FloatArray) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else math.nan


def _change(value_a: float, value_b: float) -> float:
    return 100.0 * (value_b / value_a - 1.0) if value_a > 0 else math.nan

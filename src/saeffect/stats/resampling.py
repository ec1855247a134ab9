"""Resampling of whole features, for statistics of two arms that have several numbers a feature.

A feature brings all its numbers along (ten token weights, say), so intervals are as wide as the number of
features allows, not the number of weights. It all runs on sums per feature: a resample is a matrix product.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from saeffect.stats.estimate import Estimate

__all__ = [
    "LEVEL",
    "Resampling",
    "TwoSample",
    "cliffs_delta_interval",
    "compare_counts",
    "compare_moment",
    "undefined",
]

LEVEL = 0.95
_CHUNK, _CELLS = 500, 10_000_000
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Resampling:
    """How much to resample, and from which seed."""

    seed: int = 0
    n_boot: int = 2_000
    n_permutations: int = 10_000

    def seed_for(self, *names: str) -> int:
        """A seed of its own for each named number, so that adding one row leaves the others as they were.

        Example:
            >>> Resampling(seed=1).seed_for("coherence") == Resampling(seed=1).seed_for("coherence")
            True
        """
        key = zlib.crc32("|".join(names).encode())
        return int(np.random.SeedSequence([self.seed, key]).generate_state(1)[0])


@dataclass(frozen=True)
class TwoSample:
    """A statistic in both arms, its difference, its percentage change (100 (b/a - 1)), and a two-sided p."""

    value_a: float
    value_b: float
    difference: Estimate
    change: Estimate
    p: float


def undefined(reason: str, n: int = 0, value: float = float("nan")) -> Estimate:
    """An estimate without an interval, and why."""
    return Estimate(value=value, low=float("nan"), high=float("nan"), n=n, reason=reason)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Count, sum and sum of squares per cluster, each float64 [n_clusters]."""

    n: FloatArray
    total: FloatArray
    squares: FloatArray

    @classmethod
    def of(cls, values: FloatArray, clusters: IntArray) -> _Sums:
        _, index = np.unique(clusters, return_inverse=True)
        return cls(
            np.bincount(index).astype(np.float64),
            np.bincount(index, weights=values).astype(np.float64),
            np.bincount(index, weights=values**2).astype(np.float64),
        )

    def joined(self, other: _Sums) -> _Sums:
        return _Sums(*(np.concatenate(pair) for pair in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return self.n, self.total, self.squares

    def statistic(self, counts: FloatArray, name: str) -> FloatArray:
        """Mean or variance (ddof 1) of the rows when cluster j is taken counts[i, j] times: [n_resamples]."""
        n, total, squares = (counts @ part for part in self.parts)
        if name == "mean":
            return total / n
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.maximum(squares - total**2 / n, 0.0) / (n - 1)


def compare_moment(
    a: tuple[FloatArray, IntArray],
    b: tuple[FloatArray, IntArray],
    moment: str,
    resampling: Resampling,
    name: str,
) -> TwoSample:
    """Compare the mean or the variance of clustered values between two arms.

    Args:
        a: Values [n] and the cluster of each [n], first arm.
        b: The same of the second arm.
        moment: "mean" or "variance" (ddof 1).
        resampling: Seed and number of resamples.
        name: Names this number; gives it a random stream of its own.

    Returns:
        Expanded percentile intervals from resampling whole clusters within each arm; p from permuting whole
        clusters between the arms. For the variance both arms are centred on their own mean first, so that
        a difference in means alone does not count. Intervals and p are NaN, with a reason, when an arm has
        fewer than two clusters.
    """
    mean_a, mean_b = (float(np.mean(arm[0])) if len(arm[0]) else float("nan") for arm in (a, b))
    # Centred values keep the sums of squares small, hence exact; a mean gets its centre back below.
    sums_a, sums_b = _Sums.of(a[0] - mean_a, a[1]), _Sums.of(b[0] - mean_b, b[1])
    value_a, value_b = (mean_a, mean_b) if moment == "mean" else (_variance(a[0]), _variance(b[0]))
    n_a, n_b = len(sums_a.n), len(sums_b.n)
    if min(n_a, n_b) < 2:
        reason = f"fewer than two features in an arm ({n_a} and {n_b})"
        gap = undefined(reason, n_a + n_b, value_b - value_a)
        return TwoSample(value_a, value_b, gap, undefined(reason, n_a + n_b, _change(value_a, value_b)), float("nan"))
    rng = np.random.default_rng(resampling.seed_for(name, "bootstrap"))
    boot_a = _bootstrap(sums_a, moment, resampling.n_boot, rng)
    boot_b = _bootstrap(sums_b, moment, resampling.n_boot, rng)
    if moment == "mean":
        boot_a, boot_b = boot_a + mean_a, boot_b + mean_b
        shift = mean_b - mean_a
        raw_b = _Sums.of(b[0] - mean_a, b[1])  # one common centre, so that permuting sees the difference
    else:
        shift, raw_b = value_b - value_a, sums_b
    p = _permute(sums_a, raw_b, moment, shift, resampling, name)
    values, boots, sizes = (value_a, value_b), (boot_a, boot_b), (n_a, n_b)
    difference, change = _difference_estimate(values, boots, sizes), _change_estimate(values, boots, sizes)
    return TwoSample(value_a, value_b, difference, change, p)


def compare_counts(a: IntArray, b: IntArray, resampling: Resampling, name: str) -> TwoSample:
    """Compare the mean of small whole numbers (match counts), one a feature.

    The same bootstrap and permutation as for any mean; drawn through the table of counts (multinomial and
    multivariate hypergeometric), so that an SAE with 100,000 features costs no more than one with 100.

    Args:
        a: Counts of the first arm, int64 [n_a], not negative.
        b: Counts of the second arm, int64 [n_b].
        resampling: Seed and number of resamples.
        name: Names this number; gives it a random stream of its own.
    """
    n_a, n_b = len(a), len(b)
    value_a, value_b = (float(np.mean(arm)) if len(arm) else float("nan") for arm in (a, b))
    if min(n_a, n_b) < 2:
        reason = f"fewer than two features in an arm ({n_a} and {n_b})"
        gap = undefined(reason, n_a + n_b, value_b - value_a)
        return TwoSample(value_a, value_b, gap, undefined(reason, n_a + n_b, _change(value_a, value_b)), float("nan"))
    top = int(max(a.max(), b.max()))
    levels = np.arange(top + 1)
    table_a, table_b = (np.bincount(arm, minlength=top + 1) for arm in (a, b))
    rng = np.random.default_rng(resampling.seed_for(name))
    boot_a = rng.multinomial(n_a, table_a / n_a, size=resampling.n_boot) @ levels / n_a
    boot_b = rng.multinomial(n_b, table_b / n_b, size=resampling.n_boot) @ levels / n_b
    pooled = table_a + table_b
    sums_a = rng.multivariate_hypergeometric(pooled, n_a, size=resampling.n_permutations, method="marginals") @ levels
    shuffled = (pooled @ levels - sums_a) / n_b - sums_a / n_a
    return TwoSample(
        value_a,
        value_b,
        _difference_estimate((value_a, value_b), (boot_a, boot_b), (n_a, n_b)),
        _change_estimate((value_a, value_b), (boot_a, boot_b), (n_a, n_b)),
        _two_sided_p(shuffled, value_b - value_a),
    )


def cliffs_delta_interval(a: FloatArray, b: FloatArray, value: float, resampling: Resampling, name: str) -> Estimate:
    """Expanded percentile bootstrap interval around Cliff's delta `value` of b against a, independent samples."""
    if min(len(a), len(b)) < 2:
        return undefined(f"fewer than two features in an arm ({len(a)} and {len(b)})", len(a) + len(b), value)
    rng = np.random.default_rng(resampling.seed_for(name))
    sizes = _chunks(resampling.n_boot, max(len(a), len(b)))
    margins = [_wins(a, b, _draw(len(a), size, rng), _draw(len(b), size, rng)) for size in sizes]
    low, high = _percentiles(np.concatenate(margins) / (len(a) * len(b)), min(len(a), len(b)))
    return Estimate(value, low, high, len(a) + len(b))


def _wins(a: FloatArray, b: FloatArray, times_a: FloatArray, times_b: FloatArray) -> FloatArray:
    """Pairs in which b is larger minus those in which a is, with each value taken so many times: [n_resamples].

    Sums over sorted values: a matrix of all pairs would not fit into memory where arms have many features. The sums are
    of whole numbers, so they are exact.

    Args:
        a: Values, [n_a].
        b: Values, [n_b].
        times_a: How often each of a is taken, [n_resamples, n_a].
        times_b: The same of b, [n_resamples, n_b].
    """
    order = np.argsort(a, kind="stable")
    below = np.zeros((len(times_a), len(a) + 1))
    np.cumsum(times_a[:, order], axis=1, out=below[:, 1:])
    first, last = (np.searchsorted(a[order], b, side=side) for side in ("left", "right"))
    # Below b lie `first` of a; above it all but `last`.
    margins = below[:, first] + below[:, last] - below[:, -1:]
    return np.asarray((times_b * margins).sum(axis=1))


def _draw(n: int, size: int, rng: np.random.Generator) -> FloatArray:
    """How often each of n units is drawn in `size` resamples of n: float64 [size, n]."""
    drawn = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _chunks(total: int, n_units: int) -> list[int]:
    """Resamples of `n_units` units at a time: where units are many they are fewer, so that memory stays bounded."""
    some = max(1, min(_CHUNK, _CELLS // n_units))
    return [min(some, total - start) for start in range(0, total, some)]


def _bootstrap(sums: _Sums, moment: str, n_boot: int, rng: np.random.Generator) -> FloatArray:
    return np.concatenate(
        [sums.statistic(_draw(len(sums.n), size, rng), moment) for size in _chunks(n_boot, len(sums.n))]
    )


def _permute(a: _Sums, b: _Sums, moment: str, observed: float, resampling: Resampling, name: str) -> float:
    """Two-sided p of a difference when whole clusters swap arms."""
    rng = np.random.default_rng(resampling.seed_for(name, "permutation"))
    both, n_a, n = a.joined(b), len(a.n), len(a.n) + len(b.n)
    shuffled = []
    for size in _chunks(resampling.n_permutations, n):
        in_a = (rng.random((size, n)).argsort(axis=1) < n_a).astype(np.float64)
        shuffled.append(both.statistic(1.0 - in_a, moment) - both.statistic(in_a, moment))
    return _two_sided_p(np.concatenate(shuffled), observed)


def _two_sided_p(shuffled: FloatArray, observed: float) -> float:
    if not math.isfinite(observed):
        return math.nan
    # The slack keeps ties counted as ties when sums are added up in another order; what is undefined may be anything.
    extreme = int(np.sum(~(np.abs(shuffled) < abs(observed) * (1 - 1e-9) - 1e-12)))
    return (extreme + 1) / (len(shuffled) + 1)


def _percentiles(values: FloatArray, n_drawn: int) -> tuple[float, float]:
    """Percentiles a little outside the nominal ones, as of `cluster_bootstrap`: few units spread too little.

    Args:
        values: Replicates, [n_boot].
        n_drawn: Units resampled in the smaller arm.
    """
    reach = float(stdtrit(n_drawn - 1, (1 + LEVEL) / 2)) * math.sqrt(n_drawn / (n_drawn - 1))
    upper = float(ndtr(reach))
    low, high = np.quantile(values, [1 - upper, upper])
    return float(low), float(high)


def _difference_estimate(
    values: tuple[float, float], boots: tuple[FloatArray, FloatArray], sizes: tuple[int, int]
) -> Estimate:
    difference, n = values[1] - values[0], sum(sizes)
    if np.ptp(boots[0]) == 0 and np.ptp(boots[1]) == 0:
        return undefined("no spread between features in either arm", n, difference)
    return Estimate(difference, *_percentiles(boots[1] - boots[0], min(sizes)), n)


def _variance(values: FloatArray) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else float("nan")


def _change(value_a: float, value_b: float) -> float:
    return 100.0 * (value_b / value_a - 1.0) if value_a > 0 else float("nan")


def _change_estimate(
    values: tuple[float, float], boots: tuple[FloatArray, FloatArray], sizes: tuple[int, int]
) -> Estimate:
    """Percentage change; undefined when the first arm's value, or many of its resamples, are not above 0."""
    value, n = _change(values[0], values[1]), sum(sizes)
    if np.isnan(value):
        return undefined("the value of the first arm is not above 0", n)
    if np.ptp(boots[0]) == 0 and np.ptp(boots[1]) == 0:
        return undefined("no spread between features in either arm", n, value)
    positive = boots[0] > 0
    if positive.mean() < LEVEL:
        return undefined("the value of the first arm is too near 0", n, value)
    low, high = _percentiles(100.0 * (boots[1][positive] / boots[0][positive] - 1.0), min(sizes))
    return Estimate(value, low, high, n)

"""Bootstrap intervals, for one sample, many rows, two independent samples, and values in clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtr, ndtri, stdtrit

from saeffect.errors import ShapeMismatch, unknown_name
from saeffect.stats.arguments import LEVEL, FloatArray, Seed, check_resamples, fault, generator, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = [
    "Average",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_means",
    "check_average",
    "cluster_bootstrap",
    "expanded_quantiles",
]

Average: TypeAlias = Literal["mean", "median"]

# Values in one block of resamples: 16 MB of indices and 16 MB of values, whatever n and n_boot are.
_BLOCK = 2_000_000


def bootstrap(values: npt.ArrayLike, statistic: Average = "mean", *, n_boot: int = 2000, seed: Seed = 0) -> Estimate:
    """The mean or median of independent draws [n], with a bias-corrected and accelerated (BCa) interval.

    Where BCa is undefined (every resample on one side of the estimate, or leaving out any value changes nothing) the
    interval is the plain percentile one. From fewer than about ten values it is too narrow. All NaN for no values or
    NaN among them; no interval for one value or equal values. Source: Efron (1987), Better bootstrap confidence
    intervals.

    Example:
        >>> bootstrap([1, 2, 3, 4, 10]).value
        4.0
        >>> bootstrap([3.0]).reason
        'values: one value shows no spread'
    """
    data, n = sample(values), np.size(values)
    check_average(statistic)
    check_resamples(n_boot)
    rng = generator(seed)
    if reason := fault(data):
        return undefined(reason, n)
    value = float(_average(data, statistic))
    if reason := _no_spread_reason(data, "values"):
        return undefined(reason, n, value)
    replicates = _replicates(data, statistic, n_boot, rng)
    low, high = np.quantile(replicates, _bca_quantiles(value, replicates, _leave_one_out(data, statistic)))
    return Estimate(value, float(low), float(high), n)


def bootstrap_means(rows: npt.ArrayLike, *, n_boot: int = 2000, seed: Seed = 0) -> tuple[FloatArray, FloatArray]:
    """Expanded percentile intervals of the mean of every row of [n_rows, n], independent draws along a row.

    All rows are resampled alike, so a row's interval does not depend on the other rows. Returns low and high ends,
    float64 [n_rows]: NaN for fewer than two values a row, for rows with NaN or infinity, and for rows of equal values.
    Source: Hesterberg (2015), What Teachers Should Know About the Bootstrap.

    Example:
        >>> low, high = bootstrap_means([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
        >>> bool(low[0] < 2.5 < high[0]), bool(np.isnan(low[1]))
        (True, True)
    """
    data = sample(rows, "rows", ndim=2)
    check_resamples(n_boot)
    rng = generator(seed)
    n_rows, n = data.shape
    low, high = np.full(n_rows, math.nan), np.full(n_rows, math.nan)
    if n < 2:
        return low, high
    usable = np.isfinite(data).all(axis=1) & (data.max(axis=1) > data.min(axis=1))
    # A mean needs only how often each value is drawn.
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_boot) / n
    quantiles = expanded_quantiles(n)
    for i in np.flatnonzero(usable):
        low[i], high[i] = np.quantile(weights @ data[i], quantiles)
    return low, high


def bootstrap_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    statistic: Average = "mean",
    *,
    n_boot: int = 2000,
    seed: Seed = 0,
) -> Estimate:
    """How much larger the mean or median is in `b` [n_b] than in `a` [n_a], each resampled on its own.

    The interval is the expanded percentile one, as wide as Student's for normal data (Hesterberg 2015). n = n_a + n_b.
    All NaN when a sample is empty or holds NaN; no interval when a sample has one value, or neither varies.

    Example:
        >>> bootstrap_difference([1, 2, 3], [4, 5, 9]).value
        4.0
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    check_average(statistic)
    check_resamples(n_boot)
    rng = generator(seed)
    n = len(data_a) + len(data_b)
    if reason := fault(data_a, "a") or fault(data_b, "b"):
        return undefined(reason, n)
    value = float(_average(data_b, statistic)) - float(_average(data_a, statistic))
    single = [name for name, data in (("a", data_a), ("b", data_b)) if len(data) == 1]
    if single:
        return undefined(f"{single[0]}: one value shows no spread", n, value)
    if np.ptp(data_a) == 0 and np.ptp(data_b) == 0:
        return undefined("neither a nor b varies, so resampling shows no spread", n, value)
    replicates = _replicates(data_b, statistic, n_boot, rng) - _replicates(data_a, statistic, n_boot, rng)
    low, high = np.quantile(replicates, expanded_quantiles(min(len(data_a), len(data_b))))
    return Estimate(value, float(low), float(high), n)


def cluster_bootstrap(
    values: npt.ArrayLike,
    clusters: Sequence[Any] | npt.NDArray[Any] | pd.Series,
    *,
    n_boot: int = 2000,
    seed: Seed = 0,
) -> Estimate:
    """The mean of values in clusters (the samples of a prompt, the features of an SAE), labelled by `clusters`.

    Whole clusters are resampled, since the values of one resemble each other (Field & Welsh 2007). The expanded
    percentile interval is too narrow for fewer than about ten. n is the number of clusters. All NaN for no values, NaN
    among them or missing labels; no interval for one cluster or equal values.

    Example:
        >>> cluster_bootstrap([1, 1, 5, 5], ["x", "x", "y", "y"]).value
        3.0
        >>> cluster_bootstrap([1, 2], ["x", "x"]).reason
        'clusters: a single one shows no spread'
    """
    data, labels = sample(values), list(clusters)
    if len(labels) != len(data):
        raise ShapeMismatch(f"{len(data)} values but {len(labels)} cluster labels.", at="clusters")
    check_resamples(n_boot)
    rng = generator(seed)
    codes, names = pd.factorize(pd.Series(labels, dtype=object))
    n, n_missing = len(names), int((codes < 0).sum())
    reason = fault(data) or (f"clusters: {n_missing} of {len(labels)} labels are missing" if n_missing else "")
    if reason:
        return undefined(reason, n)
    value = float(data.mean())
    if reason := "clusters: a single one shows no spread" if n == 1 else _no_spread_reason(data, "values"):
        return undefined(reason, n, value)
    sums, sizes = np.bincount(codes, weights=data, minlength=n), np.bincount(codes, minlength=n)
    replicates = np.empty(n_boot)
    for block in _blocks(replicates, n):
        drawn = rng.integers(0, n, size=(len(block), n))
        block[:] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(replicates, expanded_quantiles(n))
    return Estimate(value, float(low), float(high), n)


def expanded_quantiles(n_drawn: int) -> list[float]:
    """Quantiles of the replicates at which the expanded percentile interval ends, for `n_drawn` units (of the smaller
    sample), at least 2. They lie outside the nominal ones: the variance of resamples of n units is too small by
    (n - 1) / n, and for few units Student's quantiles are wider than normal ones.
    """
    z = float(stdtrit(n_drawn - 1, (1 + LEVEL) / 2)) * math.sqrt(n_drawn / (n_drawn - 1))
    upper = float(ndtr(z))
    return [1 - upper, upper]


def check_average(statistic: str) -> None:
    """Raise `UnknownName` for a statistic other than the mean and the median."""
    if statistic not in ("mean", "median"):
        raise unknown_name("statistic", statistic, ("mean", "median"), at="statistic")


def _average(data: FloatArray, statistic: Average) -> Any:
    return (np.median if statistic == "median" else np.mean)(data, axis=-1)


def _no_spread_reason(data: FloatArray, name: str) -> str:
    if len(data) == 1:
        return f"{name}: one value shows no spread"
    return f"{name}: all {len(data)} are equal, so resampling shows no spread" if np.ptp(data) == 0 else ""


def _blocks(replicates: FloatArray, n: int) -> list[FloatArray]:
    """Views of the replicates, each short enough that the resamples of `n` units for it fit in memory."""
    n_rows = max(1, _BLOCK // n)
    return [replicates[start : start + n_rows] for start in range(0, len(replicates), n_rows)]


def _replicates(data: FloatArray, statistic: Average, n_boot: int, rng: np.random.Generator) -> FloatArray:
    replicates = np.empty(n_boot)
    for block in _blocks(replicates, len(data)):
        block[:] = _average(data[rng.integers(0, len(data), size=(len(block), len(data)))], statistic)
    return replicates


def _leave_one_out(data: FloatArray, statistic: Average) -> FloatArray:
    """The statistic without each value in turn, shape [n], in no particular order."""
    n = len(data)
    if statistic == "mean":
        return np.asarray((data.sum() - data) / (n - 1))
    ordered, left_out = np.sort(data), np.arange(n)
    lower, upper = (n - 2) // 2, (n - 1) // 2  # the middle ranks of the n - 1 that stay
    return np.asarray((ordered[lower + (lower >= left_out)] + ordered[upper + (upper >= left_out)]) / 2)


def _bca_quantiles(value: float, replicates: FloatArray, leave_one_out: FloatArray) -> FloatArray:
    """Quantiles of the replicates that bound the interval, shape [2]; the nominal ones where BCa is undefined."""
    plain = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Replicates equal to the estimate count half, or a statistic of few values (a median) would seem biased.
    share_below = (np.mean(replicates < value) + np.mean(replicates <= value)) / 2
    deviations = leave_one_out.mean() - leave_one_out
    spread = float(np.sum(deviations**2))
    if not 0 < share_below < 1 or spread == 0:
        return plain
    acceleration = np.sum(deviations**3) / (6 * spread**1.5)
    bias = ndtri(share_below)
    shifted = bias + ndtri(plain)
    if np.any(1 - acceleration * shifted <= 0):
        return plain
    return np.asarray(ndtr(bias + shifted / (1 - acceleration * shifted)))

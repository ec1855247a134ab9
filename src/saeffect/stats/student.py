"""Student's intervals for means and their differences, Fieller's for their ratios.

For 24 paired differences in `benchmarks/planted`, 95 % intervals covered the truth in 95 to 96 of a hundred studies,
the bootstrap's in 86 to 94.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import LEVEL, FloatArray, fault, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["MIN_CLUSTERS", "cautious_difference", "fieller", "independent_values", "mean_interval", "ratio_of_means"]

MIN_CLUSTERS = 6
"""Fewest clusters (prompts) whose means count as independent values: 12 prompts with 2 samples are 12, not 24.

Five prompts cannot give a p below 1/32. With fewer than six, every value counts as independent, and findings hold for
these prompts alone.
"""


def independent_values(
    values: npt.ArrayLike, clusters: npt.ArrayLike, *, min_clusters: int = MIN_CLUSTERS
) -> npt.NDArray[np.float64]:
    """The mean of each cluster, or the values [n] themselves where there are fewer than `min_clusters` labels.

    Example:
        >>> independent_values([1.0, 3.0, 5.0, 5.0], ["a", "a", "b", "b"], min_clusters=2)
        array([2., 5.])
        >>> independent_values([1.0, 3.0, 5.0, 5.0], ["a", "a", "b", "b"])
        array([1., 3., 5., 5.])
    """
    numbers = np.asarray(values, dtype=np.float64)
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    sizes = np.bincount(codes)
    return numbers if len(sizes) < min_clusters else np.bincount(codes, weights=numbers) / sizes


def mean_interval(values: npt.ArrayLike) -> Estimate:
    """The mean of n independent draws (for pairs, of their differences), with Student's interval (1908).

    All NaN for no values or NaN among them; no interval for one value or equal values.

    Example:
        >>> print(mean_interval([1.0, 2.0, 3.0]))
        2 [-0.4841, 4.484] (n = 3)
        >>> mean_interval([3.0]).reason
        'values: one value shows no spread'
    """
    # scipy.special rather than scipy.stats, which takes half a second to import.
    from scipy.special import stdtrit

    data = sample(values)
    n = len(data)
    if reason := fault(data):
        return undefined(reason, n)
    value = float(data.mean())
    if n == 1:
        return undefined("values: one value shows no spread", n, value)
    if np.ptp(data) == 0:
        return undefined(f"values: all {n} are equal, so they show no spread", n, value)
    half_width = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(_squared_error(data))
    return Estimate(value, value - half_width, value + half_width, n)


def cautious_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> Estimate:
    """mean(b) - mean(a) for very few values [n_a] and [n_b], with the wider of Student's and Welch's intervals.

    Student's is exact if the two sides differ in nothing; Welch's allows for unlike spread. For unequal numbers Welch's
    alone covers too rarely: for two values against six it misses the truth in 7.5 % of studies. A side of one value is
    assumed to have the spread of the other. n is that of the smaller side; p is the larger of the two. All NaN when a
    sample is empty or holds NaN; no interval and p for fewer than three values, or when neither side varies. Source:
    Student (1908), The probable error of a mean; Welch (1947), The generalization of 'Student's' problem.

    Example:
        >>> difference = cautious_difference([1.0, 3.0], [9.0])
        >>> print(difference, round(difference.p, 4))
        7 [-15.01, 29.01] (n = 1) 0.1544
    """
    # Much faster than scipy.stats.ttest_ind twice; simulations call it thousands of times.
    from scipy.special import stdtr, stdtrit

    data_a, data_b = sample(a, "a"), sample(b, "b")
    n_a, n_b = len(data_a), len(data_b)
    n = min(n_a, n_b)
    if reason := fault(data_a, "a") or fault(data_b, "b"):
        return undefined(reason, n)
    value = float(data_b.mean() - data_a.mean())
    if n_a + n_b < 3:
        return undefined("one value on either side shows no spread", n, value)
    if np.ptp(data_a) == 0 and np.ptp(data_b) == 0:
        return undefined("the values of a side are all alike, so they show no spread", n, value)
    freedom = n_a + n_b - 2
    squares = [float(((data - data.mean()) ** 2).sum()) for data in (data_a, data_b)]
    tests = [(math.sqrt(sum(squares) / freedom * (1 / n_a + 1 / n_b)), float(freedom))]
    if n > 1:
        welch = _squared_error(data_a), _squared_error(data_b)
        error = sum(welch)
        tests.append((math.sqrt(error), error**2 / (welch[0] ** 2 / (n_a - 1) + welch[1] ** 2 / (n_b - 1))))
    half_width = max(float(stdtrit(freedom, (1 + LEVEL) / 2)) * error for error, freedom in tests)
    p = max(2 * float(stdtr(freedom, -abs(value) / error)) for error, freedom in tests)
    return Estimate(value, value - half_width, value + half_width, n, p=p)


def ratio_of_means(part: npt.ArrayLike, whole: npt.ArrayLike) -> Estimate:
    """mean(part) / mean(whole) over n units that were drawn together, [n] each, with Fieller's interval.

    The interval holds every ratio r for which Student's t does not refute that part - r · whole has mean 0: exact for
    normal data, and bounded only where the interval of mean(whole) excludes 0. Where it does not, the ratio itself is
    undefined. p is that of Student's t for mean(part) = 0. All NaN for fewer than two units or NaN among them. Source:
    Fieller (1954), Some problems in interval estimation.

    Example:
        >>> print(ratio_of_means([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
        nan [nan, nan] (n = 3; the whole, 4 [-0.9683, 8.968], is not clear of zero)
        >>> print(ratio_of_means([1.0, 1.0, 1.3], [2.0, 2.1, 2.2]))
        0.5238 [0.3539, 0.666] (n = 3)
    """
    # scipy.special rather than scipy.stats, which takes half a second to import.
    from scipy.special import stdtr, stdtrit

    a, b = sample(part, "part"), sample(whole, "whole")
    n = len(a)
    if len(b) != n:
        raise ShapeMismatch(f"part has {n} values and whole {len(b)}; expected one of each for a unit.", at="whole")
    if reason := fault(a, "part") or fault(b, "whole"):
        return undefined(reason, n)
    if n == 1:
        return undefined("one unit shows no spread", n)
    t2 = float(stdtrit(n - 1, (1 + LEVEL) / 2)) ** 2
    mean_a, mean_b = float(a.mean()), float(b.mean())
    (var_a, covariance), (_, var_b) = (np.cov(a, b, ddof=1) / n).tolist()
    clearance = mean_b**2 - t2 * var_b
    if clearance <= 0:
        half_width = math.sqrt(t2 * var_b)
        interval = f"{mean_b:.4g} [{mean_b - half_width:.4g}, {mean_b + half_width:.4g}]"
        return undefined(f"the whole, {interval}, is not clear of zero", n)
    value = mean_a / mean_b
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return undefined(f"all {n} units are equal, so they show no spread", n, value)
    centre = (mean_a * mean_b - t2 * covariance) / clearance
    # Equal on paper to the root of middle² - (mean_a² - t² var_a) / clearance, without subtracting large numbers.
    spread = var_a - 2 * value * covariance + value**2 * var_b
    determinant = var_a * var_b - covariance**2
    half_width = math.sqrt(max(t2 * (mean_b**2 * spread - t2 * determinant), 0.0)) / clearance
    p = 2 * float(stdtr(n - 1, -abs(mean_a) / math.sqrt(var_a))) if var_a > 0 else float(mean_a == 0)
    return Estimate(value, centre - half_width, centre + half_width, n, p=p)


def fieller(
    sums: tuple[npt.ArrayLike, npt.ArrayLike],
    squares: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    n: npt.ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Ends of the interval of the ratio of two sums over clusters, for many ratios at once.

    It holds the ratios for which Student's t does not refute that the residuals, numerator minus ratio times
    denominator, sum to 0; so it is valid also where the denominator is uncertain. Source: Fieller (1954), with sums
    over clusters as in survey sampling.

    `sums` are Σ numerator and Σ denominator, `squares` Σ numerator², Σ numerator · denominator, Σ denominator², each
    `[m]`; `n` the clusters on which either is not 0. low and high, float64 `[m]`, are NaN with fewer than two clusters,
    or where the denominator cannot be told from 0.

    Example:
        >>> low, high = fieller(([6.0], [3.0]), ([14.0], [6.0], [3.0]), [3])  # 1/1, 2/1 and 3/1
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([-0.484], [4.484])
    """
    from scipy.special import stdtrit

    num, den = (np.asarray(total, dtype=np.float64) for total in sums)
    count = np.asarray(n, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The spread of the residuals is about their mean, which is 0 at the ratio itself.
        t_squared = stdtrit(np.maximum(count - 1, 1), (1 + LEVEL) / 2) ** 2 * count / (count - 1)
        spread = [
            t_squared * (np.asarray(square, dtype=np.float64) - a * b / count)
            for square, a, b in zip(squares, (num, num, den), (num, den, den), strict=True)
        ]
        # Coefficients of the quadratic: of the square of the ratio, of it, and of 1.
        a, b, c = (total - error for total, error in zip((den**2, num * den, num**2), spread[::-1], strict=True))
        root = np.sqrt(np.maximum(b**2 - a * c, 0.0))
        low, high = (b - root) / a, (b + root) / a
    bounded = (count >= 2) & (a > 0)
    return np.where(bounded, low, np.nan), np.where(bounded, high, np.nan)


def _squared_error(data: FloatArray) -> float:
    return float(data.var(ddof=1)) / len(data)

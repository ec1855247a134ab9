"""Student's intervals for means. For 24 paired differences in `benchmarks/planted`, 95 % intervals covered the truth in
95 to 96 of a hundred studies, the bootstrap's in 86 to 94."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from saeffect.stats.arguments import LEVEL, FloatArray, fault, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["MIN_CLUSTERS", "cautious_difference", "independent_values", "mean_interval"]

MIN_CLUSTERS = 6
"""Fewest clusters (prompts) whose means count as independent values: 12 prompts with 2 samples are 12, not 24.

Five prompts cannot give a p below 1/32, so with fewer than six every value counts, and findings hold for these alone.
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
    found: tuple[npt.NDArray[Any], npt.NDArray[np.int64]] = np.unique(np.asarray(clusters), return_inverse=True)
    labels, place = found
    if len(labels) < min_clusters:
        return numbers
    return np.bincount(place.ravel(), weights=numbers) / np.bincount(place.ravel())


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
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(_squared_error(data))
    return Estimate(value, value - reach, value + reach, n)


def cautious_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> Estimate:
    """mean(b) - mean(a) for very few values [n_a] and [n_b], with the wider of Student's and Welch's intervals.

    Student's is exact if the two sides differ in nothing; Welch's allows for unlike spread. With unequal numbers
    Welch's alone misses the truth too often: in 7.5 of a hundred studies for two values against six. A side of one
    value is taken to spread as the other does. n is that of the smaller side; p is the larger of the two. All NaN when
    a sample is empty or holds NaN; no interval and p for fewer than three values, or when neither side varies. Source:
    Student (1908), The probable error of a mean; Welch (1947), The generalization of 'Student's' problem.

    Example:
        >>> found = cautious_difference([1.0, 3.0], [9.0])
        >>> print(found, round(found.p, 4))
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
    reach = max(float(stdtrit(freedom, (1 + LEVEL) / 2)) * error for error, freedom in tests)
    p = max(2 * float(stdtr(freedom, -abs(value) / error)) for error, freedom in tests)
    return Estimate(value, value - reach, value + reach, n, p=p)


def _squared_error(data: FloatArray) -> float:
    return float(data.var(ddof=1)) / len(data)

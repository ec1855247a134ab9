"""Intervals for means by Student's t: where there are few values they hold the truth more often than the bootstrap's.

Resamples of n values spread too little, and those of a few skewed or mostly tied values hardly ever hold the rare
large one. The benchmark of planted truth (`benchmarks/planted`) counts it: for 24 paired differences the bootstrap's
95 % intervals held the truth in 86 to 94 of a hundred studies, Student's in 95 to 96.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from saeffect.stats.arguments import FloatArray, check_level, fault, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["MIN_CLUSTERS", "cautious_difference", "independent_values", "mean_interval"]

MIN_CLUSTERS = 6
"""Clusters from which a cluster, and not a single value, is taken for what was drawn at random.

Texts that continue one prompt resemble each other. Where there are prompts enough, their samples are averaged before
anything is tested: 12 prompts with 2 samples are 12 independent differences, not 24. With five prompts no result could
be less likely by chance than one in 32, so with fewer than six every value counts, and what is found holds for them."""


def independent_values(
    values: npt.ArrayLike, clusters: npt.ArrayLike, *, min_clusters: int = MIN_CLUSTERS
) -> npt.NDArray[np.float64]:
    """The mean of each cluster, or the values themselves where clusters are few.

    Args:
        values: Finite numbers, shape [n].
        clusters: To which cluster each belongs: labels of any kind that sorts, shape [n].
        min_clusters: So many clusters are enough.

    Returns:
        Float64: [n_clusters], in the order of the labels, or [n].

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


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """The mean, and how far it could have been from this by sampling error.

    Args:
        values: Shape [n], independent draws; for pairs, their differences.

    Returns:
        In the unit of the values, with n their number. All NaN for no values or for NaN among them; no interval
        for one value, or when all are equal.

    Source:
        Student (1908), The probable error of a mean.

    Example:
        >>> print(mean_interval([1.0, 2.0, 3.0]))
        2 [-0.4841, 4.484] (n = 3)
        >>> mean_interval([3.0]).reason
        'values: one value shows no spread'
    """
    # scipy.special rather than scipy.stats, which takes half a second to import.
    from scipy.special import stdtrit

    data = sample(values)
    check_level(level)
    n = len(data)
    if reason := fault(data):
        return undefined(reason, n)
    value = float(data.mean())
    if n == 1:
        return undefined("values: one value shows no spread", n, value)
    if np.ptp(data) == 0:
        return undefined(f"values: all {n} are equal, so they show no spread", n, value)
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(_squared_error(data))
    return Estimate(value, value - reach, value + reach, n)


def cautious_difference(a: npt.ArrayLike, b: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """How much larger the mean is in `b` than in `a` where there are very few values of unequal number.

    The wider of two intervals: Student's, which is exact if nothing sets the two sides apart, and Welch's, for sides
    of unlike spread. Welch's alone misses the truth too often for few values of unequal number: with two values
    against six in 7.5 of a hundred studies, with two against ten in 10. A side of one value is taken to spread as
    the other does.

    Args:
        a: Shape [n_a], the reference sample.
        b: Shape [n_b], the other sample, independent of `a`.

    Returns:
        mean(b) - mean(a) with n the values of the smaller side, and the larger of the two p for equal means: below 0.05
        exactly where the 95 % interval leaves 0 out. All NaN when a sample is empty or holds NaN; no interval and p for
        fewer than three values, or when neither side varies.

    Source:
        Student (1908), The probable error of a mean; Welch (1947), The generalization of 'Student's' problem.

    Example:
        >>> found = cautious_difference([1.0, 3.0], [9.0])
        >>> print(found, round(found.p, 4))
        7 [-15.01, 29.01] (n = 1) 0.1544
    """
    # Faster by far than scipy.stats.ttest_ind twice, and simulations call it thousands of times.
    from scipy.special import stdtr, stdtrit

    data_a, data_b = sample(a, "a"), sample(b, "b")
    check_level(level)
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
    reach = max(float(stdtrit(freedom, (1 + level) / 2)) * error for error, freedom in tests)
    p = max(2 * float(stdtr(freedom, -abs(value) / error)) for error, freedom in tests)
    return Estimate(value, value - reach, value + reach, n, p=p)


def _squared_error(data: FloatArray) -> float:
    return float(data.var(ddof=1)) / len(data)

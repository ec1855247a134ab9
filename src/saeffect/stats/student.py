"""Intervals for means by Student's t: where there are few values they hold the truth more often than the bootstrap's.

Resamples of n values spread too little, and those of a few skewed or mostly tied values hardly ever hold the rare
large one. The benchmark of planted truth (`benchmarks/planted`) counts it: for 24 paired differences the bootstrap's
95 % intervals held the truth in 86 to 94 of a hundred studies, Student's in 95 to 96.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from saeffect.stats.arguments import FloatArray, check_level, fault, sample
from saeffect.stats.estimate import Estimate, TestResult

__all__ = ["cautious_difference", "cautious_difference_test", "mean_difference_interval", "mean_interval"]


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """The mean, and how far it could have been from this by the luck of which values were seen.

    Args:
        values: Shape [n], independent draws; for pairs, their differences.
        level: Confidence, between 0 and 1.

    Returns:
        In the unit of the values, with n their number. All NaN for no values or for NaN among them; no interval
        for one value, or when all are equal.

    Raises:
        ShapeMismatch: `values` is not one-dimensional.
        ConfigError: `level` is out of range.

    Source:
        Student (1908), The probable error of a mean.

    Example:
        >>> print(mean_interval([1.0, 2.0, 3.0]))
        2 [-0.4841, 4.484] (n = 3)
        >>> mean_interval([3.0]).reason
        'values: one value shows no spread'
    """
    data = sample(values)
    check_level(level)
    if reason := fault(data):
        return Estimate(math.nan, math.nan, math.nan, len(data), reason)
    value = float(data.mean())
    if reason := _no_spread(data, "values"):
        return Estimate(value, math.nan, math.nan, len(data), reason)
    return _interval(value, _squared_error(data), len(data) - 1, len(data), level)


def mean_difference_interval(a: npt.ArrayLike, b: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """How much larger the mean is in `b` than in `a`; the spreads of the two may differ.

    Args:
        a: Shape [n_a], the reference sample.
        b: Shape [n_b], the other sample, independent of `a`.
        level: Confidence, between 0 and 1.

    Returns:
        mean(b) - mean(a) with n = n_a + n_b. All NaN when a sample is empty or holds NaN; no interval when a
        sample has one value, or neither varies.

    Raises:
        ShapeMismatch: A sample is not one-dimensional.
        ConfigError: `level` is out of range.

    Source:
        Welch (1947), The generalization of 'Student's' problem.

    Example:
        >>> print(mean_difference_interval([1.0, 2.0, 3.0], [4.0, 6.0, 8.0]))
        4 [-0.1554, 8.155] (n = 6)
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    check_level(level)
    n = len(data_a) + len(data_b)
    if reason := fault(data_a, "a") or fault(data_b, "b"):
        return Estimate(math.nan, math.nan, math.nan, n, reason)
    value = float(data_b.mean() - data_a.mean())
    reason = next(
        (f"{name}: one value shows no spread" for name, x in (("a", data_a), ("b", data_b)) if len(x) == 1), ""
    )
    if not reason and np.ptp(data_a) == 0 and np.ptp(data_b) == 0:
        reason = "neither a nor b varies"
    if reason:
        return Estimate(value, math.nan, math.nan, n, reason)
    errors = _squared_error(data_a), _squared_error(data_b)
    total = sum(errors)
    freedom = total**2 / (errors[0] ** 2 / (len(data_a) - 1) + errors[1] ** 2 / (len(data_b) - 1))
    return _interval(value, total, freedom, n, level)


def cautious_difference(a: npt.ArrayLike, b: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """How much larger the mean is in `b` than in `a` where there are very few values of unequal number.

    The wider of two intervals: Student's, which is exact if nothing sets the two sides apart, and Welch's, for sides
    of unlike spread. Welch's alone misses the truth too often for few values of unequal number: with two values
    against six in 7.5 of a hundred studies, with two against ten in 10. A side of one value is taken to spread as
    the other does.

    Args:
        a: Shape [n_a], the reference sample.
        b: Shape [n_b], the other sample, independent of `a`.
        level: Confidence, between 0 and 1.

    Returns:
        mean(b) - mean(a) with n the values of the smaller side. All NaN when a sample is empty or holds NaN; no
        interval for fewer than three values, or when neither side varies.

    Raises:
        ShapeMismatch: A sample is not one-dimensional.
        ConfigError: `level` is out of range.

    Source:
        Student (1908), The probable error of a mean; Welch (1947), The generalization of 'Student's' problem.

    Example:
        >>> print(cautious_difference([1.0, 3.0], [9.0]))
        7 [-15.01, 29.01] (n = 1)
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    check_level(level)
    value, n, reason, errors = _few(data_a, data_b)
    if reason:
        return Estimate(value, math.nan, math.nan, n, reason)
    from scipy.special import stdtrit

    reach = max(float(stdtrit(freedom, (1 + level) / 2)) * error for error, freedom in errors)
    return Estimate(value, value - reach, value + reach, n)


def cautious_difference_test(a: npt.ArrayLike, b: npt.ArrayLike) -> TestResult:
    """Two-sided p for equal means, by the same caution: the larger of Student's and Welch's.

    Args:
        a: Shape [n_a], the reference sample.
        b: Shape [n_b], the other sample, independent of `a`.

    Returns:
        mean(b) - mean(a) and its p, below 0.05 exactly where the 95 % interval of `cautious_difference` leaves 0 out;
        NaN with a reason where there is no interval.

    Raises:
        ShapeMismatch: A sample is not one-dimensional.

    Source:
        As `cautious_difference`.

    Example:
        >>> round(cautious_difference_test([1.0, 3.0], [9.0]).p, 4)
        0.1544
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    value, n, reason, errors = _few(data_a, data_b)
    method = "the larger p of Student's and Welch's t tests"
    if reason:
        return TestResult(value, math.nan, n, method, reason)
    from scipy.special import stdtr

    p = max(2 * float(stdtr(freedom, -abs(value) / error)) for error, freedom in errors)
    return TestResult(value, p, n, method)


def _few(a: FloatArray, b: FloatArray) -> tuple[float, int, str, list[tuple[float, float]]]:
    """Difference, values of the smaller side, why there is no interval, and (standard error, degrees of freedom)."""
    n_a, n_b = len(a), len(b)
    if reason := fault(a, "a") or fault(b, "b"):
        return math.nan, min(n_a, n_b), reason, []
    value = float(b.mean() - a.mean())
    if n_a + n_b < 3:
        return value, min(n_a, n_b), "one value on either side shows no spread", []
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return value, min(n_a, n_b), "the values of a side are all alike, so they show no spread", []
    freedom = n_a + n_b - 2
    pooled = (float(((a - a.mean()) ** 2).sum()) + float(((b - b.mean()) ** 2).sum())) / freedom
    errors = [(math.sqrt(pooled * (1 / n_a + 1 / n_b)), float(freedom))]
    if min(n_a, n_b) > 1:
        squared = _squared_error(a), _squared_error(b)
        welch = sum(squared) ** 2 / (squared[0] ** 2 / (n_a - 1) + squared[1] ** 2 / (n_b - 1))
        errors.append((math.sqrt(sum(squared)), welch))
    return value, min(n_a, n_b), "", errors


def _no_spread(data: FloatArray, name: str) -> str:
    if len(data) == 1:
        return f"{name}: one value shows no spread"
    return f"{name}: all {len(data)} are equal, so they show no spread" if np.ptp(data) == 0 else ""


def _squared_error(data: FloatArray) -> float:
    return float(data.var(ddof=1)) / len(data)


def _interval(value: float, squared_error: float, freedom: float, n: int, level: float) -> Estimate:
    # scipy.special rather than scipy.stats, which takes half a second to import.
    from scipy.special import stdtrit

    reach = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(squared_error)
    return Estimate(value, value - reach, value + reach, n)

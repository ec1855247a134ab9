"""Shares of successes, their differences and ratios (b against a), with intervals that hold for few trials too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from saeffect.errors import ShapeMismatch, Undefined
from saeffect.stats.arguments import LEVEL, fault, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = [
    "bounded_mean",
    "newcombe_difference",
    "paired_difference",
    "risk_ratio",
    "sum_of_independent",
    "wilson",
]


def wilson(k: int, n: int) -> Estimate:
    """The share of `k` successes in `n` trials, 0 to 1, with Wilson's interval.

    The interval has a width even for 0 of n and n of n. NaN for no trials.
    Source: Wilson (1927), the score interval.

    Example:
        >>> print(wilson(5, 10))
        0.5 [0.2366, 0.7634] (n = 10)
    """
    from statsmodels.stats.proportion import proportion_confint  # takes a second, and few commands need it

    k, n = _counts(k, n, "k", "n")
    if n == 0:
        return undefined("there are no trials")
    low, high = proportion_confint(k, n, alpha=1 - LEVEL, method="wilson")
    # The exact ends for k = 0 and k = n are 0 and 1; rounding misses them by a last digit.
    return Estimate(k / n, float(low) if k else 0.0, float(high) if k < n else 1.0, n)


def newcombe_difference(k_a: int, n_a: int, k_b: int, n_b: int) -> Estimate:
    """p_b - p_a, the difference of two independent shares of `k` successes in `n` trials; n = n_a + n_b.

    p is two-sided, of Fisher's exact test. NaN when a group has no trials. Source: Newcombe (1998), method 10, which
    combines the Wilson intervals of both groups.

    Example:
        >>> print(newcombe_difference(48, 80, 56, 70))
        0.2 [0.05243, 0.3339] (n = 150)
    """
    from scipy.stats import fisher_exact
    from statsmodels.stats.proportion import confint_proportions_2indep

    (k_a, n_a), (k_b, n_b) = _counts(k_a, n_a, "k_a", "n_a"), _counts(k_b, n_b, "k_b", "n_b")
    if reason := _no_trials(n_a, n_b):
        return undefined(reason, n_a + n_b)
    low, high = confint_proportions_2indep(k_b, n_b, k_a, n_a, method="newcomb", compare="diff", alpha=1 - LEVEL)
    p = min(1.0, float(fisher_exact([[k_b, n_b - k_b], [k_a, n_a - k_a]]).pvalue))
    return Estimate(k_b / n_b - k_a / n_a, float(low), float(high), n_a + n_b, p=p)


def risk_ratio(k_a: int, n_a: int, k_b: int, n_b: int) -> Estimate:
    """p_b / p_a, how many times as often b succeeds as a; n = n_a + n_b.

    NaN when a group has no trials or a has no successes. No interval when b has no successes, or every trial of both
    groups succeeded. Source: Katz et al. (1978), the normal interval for the logarithm of the ratio.

    Example:
        >>> print(risk_ratio(10, 100, 20, 100))
        2 [0.9866, 4.054] (n = 200)
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    (k_a, n_a), (k_b, n_b) = _counts(k_a, n_a, "k_a", "n_a"), _counts(k_b, n_b, "k_b", "n_b")
    n = n_a + n_b
    reason = _no_trials(n_a, n_b) or ("a has no successes, so the ratio has no finite value" if k_a == 0 else "")
    if reason:
        return undefined(reason, n)
    ratio = (k_b / n_b) / (k_a / n_a)
    if k_b == 0:
        return undefined("b has no successes, and the interval needs at least one", n, ratio)
    if k_a == n_a and k_b == n_b:
        return undefined("every trial succeeded, so the standard error is zero", n, ratio)
    low, high = confint_proportions_2indep(k_b, n_b, k_a, n_a, method="log", compare="ratio", alpha=1 - LEVEL)
    return Estimate(ratio, float(low), float(high), n)


def bounded_mean(values: npt.ArrayLike) -> Estimate:
    """The mean of values between 0 and 1 [n], with Wilson's interval for a share of that size: values spread no more
    than zeros and ones of the same mean. NaN for no values or NaN among them.

    Example:
        >>> print(bounded_mean([1.0, 0.5, 0.0, 0.5]))
        0.5 [0.15, 0.85] (n = 4)
    """
    from scipy.special import ndtri

    data = sample(values)
    n = len(data)
    if reason := fault(data):
        return undefined(reason, n)
    if data.min() < 0 or data.max() > 1:
        raise Undefined(f"values must lie between 0 and 1, got {data.min():g} to {data.max():g}.", at="values")
    value, z = float(data.mean()), float(ndtri((1 + LEVEL) / 2))
    centre, half_width = value + z**2 / (2 * n), z * math.sqrt(value * (1 - value) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * half_width) / (1 + z**2 / n) for side in (-1, 1))
    return Estimate(value, low if value > 0 else 0.0, high if value < 1 else 1.0, n)


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> Estimate:
    """p_b - p_a for the same items answered twice, each [n] of zeros and ones; p is two-sided, McNemar's exact one.

    Source: Newcombe (1998), Improved confidence intervals based on paired data, method 10.

    Example:
        >>> print(paired_difference([1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]))
        0.3333 [-0.1517, 0.6463] (n = 6)
    """
    from scipy.special import bdtr

    first, second = sample(a, "a"), sample(b, "b")
    if len(first) != len(second):
        raise ShapeMismatch(f"a and b must be of the same items, got {len(first)} and {len(second)}.", at="b")
    for name, data in (("a", first), ("b", second)):
        if not np.isin(data, (0.0, 1.0)).all():
            raise Undefined(f"{name} must hold zeros and ones.", at=name)
    n = len(first)
    if n == 0:
        return undefined("there are no items")
    both, only_b, only_a = (int(x.sum()) for x in (first * second, (1 - first) * second, first * (1 - second)))
    neither = n - both - only_a - only_b
    margins = (both + only_b) * (only_a + neither) * (both + only_a) * (only_b + neither)
    agreement = float(both * neither - only_a * only_b)
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)  # Newcombe's correction
    phi = agreement / math.sqrt(margins) if margins else 0.0
    share_a, share_b = bounded_mean(first), bounded_mean(second)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    value = share_b.value - share_a.value
    low = value - distance(share_b.value - share_b.low, share_a.high - share_a.value)
    high = value + distance(share_a.value - share_a.low, share_b.high - share_b.value)
    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0
    return Estimate(value, low, high, n, p=p)


def sum_of_independent(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Weighted sum of independent numbers, with an interval from theirs (these may be asymmetric); NaN where one is
    undefined.

    Source: Zou & Donner (2008), Construction of confidence limits about effect measures (MOVER).

    Example:
        >>> print(sum_of_independent([Estimate(0.5, 0.2, 0.9, 4), Estimate(0.1, 0.0, 0.4, 4)], [1.0, -1.0]))
        0.4 [-0.02426, 0.8123] (n = 8)
    """
    n = sum(part.n for part in estimates)
    reasons = [part.reason for part in estimates if not part.defined]
    value = sum(w * part.value for w, part in zip(weights, estimates, strict=True))
    if reasons:
        return undefined(reasons[0] or "one of the parts has no interval", n, value)
    below = [w * (part.value - (part.low if w > 0 else part.high)) for w, part in zip(weights, estimates, strict=True)]
    above = [w * ((part.high if w > 0 else part.low) - part.value) for w, part in zip(weights, estimates, strict=True)]
    return Estimate(value, value - math.hypot(*below), value + math.hypot(*above), n)


def _counts(k: int, n: int, name_k: str, name_n: str) -> tuple[int, int]:
    """Both counts as plain integers, so that large numpy ones cannot overflow in a product."""
    for name, count in ((name_k, k), (name_n, n)):
        whole = isinstance(count, int | np.integer) or (isinstance(count, float) and count.is_integer())
        if isinstance(count, bool | np.bool_) or not whole:
            raise Undefined(f"{name} must be a whole number, got {count!r}.", at=name)
    if not 0 <= k <= n:
        raise Undefined(
            f"{name_k} must lie between 0 and {name_n}, got {name_k}={k}, {name_n}={n}.",
            at=name_k,
            fix=f"{name_k} counts successes among {name_n} trials; is their order right?",
        )
    return int(k), int(n)


def _no_trials(n_a: int, n_b: int) -> str:
    empty = [name for name, n in (("a", n_a), ("b", n_b)) if n == 0]
    return f"there are no trials in {' and '.join(empty)}" if empty else ""

"""The smallest true difference that a test of given size finds with a given probability (the power)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from saeffect.errors import ConfigError

__all__ = [
    "Detectable",
    "detectable_few_means",
    "detectable_mean_difference",
    "detectable_paired_mean",
    "detectable_proportion_difference",
]

# Simulated where there is no formula; a power of 0.8 is then right to within 0.003.
_N_STUDIES = 20_000


@dataclass(frozen=True)
class Detectable:
    """The smallest true difference that is found with the requested power, in the unit of the data.

    Attributes:
        low_side: For proportions, how far below the reference it must be instead (above 0, NaN where even 0 is not far
            enough); otherwise equal to `difference`.
        n: Independent units: the smaller group, or the pairs.

    Example:
        >>> Detectable(difference=0.5, low_side=0.5, n=64, method="t test").reason
        ''
    """

    difference: float
    low_side: float
    n: int
    method: str
    reason: str = ""


def detectable_mean_difference(
    spread: float, n_a: int, n_b: int, *, alpha: float = 0.05, power: float = 0.8
) -> Detectable:
    """For the means of two independent groups of pooled standard deviation `spread` (two-sided t test: Cohen 1988,
    chapter 2).

    Example:
        >>> round(detectable_mean_difference(1.0, 64, 64).difference, 2)
        0.5
    """
    method, n = "two-sided t test", min(n_a, n_b)
    too_few = f"fewer than two units in a group ({n_a} and {n_b})" if n < 2 else ""
    root_n = math.sqrt(n_a * n_b / (n_a + n_b)) if n else 0.0
    rates, freedom = (alpha, power), n_a + n_b - 2
    return _detectable(spread, n, method, too_few, lambda d: _t_power(d * root_n, freedom, alpha, 2), rates)


def detectable_few_means(
    spread: float, n_a: int, n_b: int, *, alpha: float = 0.05, power: float = 0.8, seed: int = 0
) -> Detectable:
    """For two groups of very few values, of standard deviation `spread`, tested by `cautious_difference`.

    From 20,000 simulated studies, since the larger of two p-values has no formula.

    Example:
        >>> round(detectable_few_means(1.0, 3, 3).difference, 1), round(detectable_few_means(1.0, 2, 1).difference, 0)
        (3.5, 20.0)
    """
    from scipy.stats import t

    method, n = "two-sided t test, the larger p of Student's and Welch's (simulated)", min(n_a, n_b)
    if n < 1 or n_a + n_b < 3:
        return Detectable(math.nan, math.nan, n, method, f"fewer than three values in all ({n_a} and {n_b})")
    draws = np.random.default_rng(seed).standard_normal((_N_STUDIES, n_a + n_b))
    groups = draws[:, :n_a], draws[:, n_a:]
    squares = [((group - group.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) for group in groups]
    freedom = n_a + n_b - 2
    pooled = (squares[0] + squares[1]) / freedom * (1 / n_a + 1 / n_b)
    critical = t.isf(alpha / 2, freedom) * np.sqrt(pooled)
    if n > 1:
        errors = squares[0] / (n_a * (n_a - 1)), squares[1] / (n_b * (n_b - 1))
        welch = (errors[0] + errors[1]) ** 2 / (errors[0] ** 2 / (n_a - 1) + errors[1] ** 2 / (n_b - 1))
        critical = np.maximum(critical, t.isf(alpha / 2, welch) * np.sqrt(errors[0] + errors[1]))
    noise = groups[1].mean(axis=1) - groups[0].mean(axis=1)
    return _detectable(spread, n, method, "", lambda d: float((np.abs(noise + d) >= critical).mean()), (alpha, power))


def detectable_paired_mean(spread: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> Detectable:
    """For the mean of `n` differences of standard deviation `spread` (one-sided t test: Cohen 1988, chapter 2).

    Example:
        >>> round(detectable_paired_mean(1.0, 27).difference, 2)
        0.49
    """
    method, too_few = "one-sided t test of differences", f"{n} differences show no spread" if n < 2 else ""
    rates = alpha, power
    return _detectable(spread, n, method, too_few, lambda d: _t_power(d * math.sqrt(n), n - 1, alpha, 1), rates)


def detectable_proportion_difference(
    p_a: float, n_a: int, n_b: int, *, alpha: float = 0.05, power: float = 0.8
) -> Detectable:
    """For two independent proportions (two-sided, arcsine scale: Cohen 1988, chapter 6), `p_a` being the reference.

    `difference` is how far above `p_a` the other must be, NaN where 1 is not far enough.

    Example:
        >>> round(detectable_proportion_difference(0.5, 196, 196).difference, 2)
        0.14
    """
    from scipy.special import ndtr, ndtri

    method, n = "two-sided test of proportions, arcsine scale", min(n_a, n_b)
    if n < 1:
        return Detectable(math.nan, math.nan, n, method, "nothing to count in a group")
    if not 0 <= p_a <= 1:
        raise ConfigError(f"p_a must be from 0 to 1. Got {p_a} instead.", at="p_a")
    critical, error = float(ndtri(1 - alpha / 2)), math.sqrt(1 / n_a + 1 / n_b)
    h = _solve_effect(lambda d: float(ndtr(d / error - critical) + ndtr(-d / error - critical)), alpha, power)
    angle = 2 * math.asin(math.sqrt(p_a))
    above = math.sin((angle + h) / 2) ** 2 - p_a if angle + h <= math.pi else math.nan
    below = p_a - math.sin((angle - h) / 2) ** 2 if angle >= h else math.nan
    reason = "" if math.isfinite(above) else "even a share of 1 would not be far enough"
    return Detectable(above, below, n, method, reason)


def _t_power(shift: float, freedom: int, alpha: float, sides: int) -> float:
    """Probability that a t test finds a mean `shift` standard errors from 0."""
    from scipy.stats import nct, t

    critical = float(t.isf(alpha / sides, freedom))
    # For large shifts the non-central t has too few digits; the answer is 1 there.
    power = float(np.nan_to_num(nct.sf(critical, freedom, shift), nan=1.0))
    return power + (float(np.nan_to_num(nct.cdf(-critical, freedom, shift))) if sides == 2 else 0.0)


def _detectable(
    spread: float, n: int, method: str, too_few: str, power_at: Callable[[float], float], rates: tuple[float, float]
) -> Detectable:
    """The detectable effect in the unit of the data; undefined with a reason (`too_few`) or without spread."""
    reason = too_few or ("" if spread > 0 and math.isfinite(spread) else "no spread to judge by")
    if reason:
        return Detectable(math.nan, math.nan, n, method, reason)
    effect = _solve_effect(power_at, *rates) * spread
    return Detectable(effect, effect, n, method)


def _solve_effect(power_at: Callable[[float], float], alpha: float, power: float) -> float:
    """The effect at which the power is reached; statsmodels' `solve_power` stops too early for two or three values."""
    from scipy.optimize import brentq

    if not 0 < alpha < power < 1:
        raise ConfigError(
            f"alpha and power must lie between 0 and 1, power above alpha. Got {alpha} and {power} instead.",
            at="alpha, power",
        )
    high = 1e-3
    while power_at(high) < power:
        high *= 2
    return float(brentq(lambda d: power_at(d) - power, 0.0, high, xtol=1e-10, rtol=1e-10))

"""Ratios of two means that were measured on the same units."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import check_level, fault, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["ratio_of_means"]


def ratio_of_means(part: npt.ArrayLike, whole: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """mean(part) / mean(whole) over units that were drawn together, [n] each, with Fieller's interval.

    The interval holds every ratio r for which Student's t does not refute that part - r · whole has mean 0: exact for
    normal data, unlike the delta method, and bounded only where the interval of mean(whole) excludes 0. Where it does
    not, the ratio itself is undefined. p is that of Student's t for mean(part) = 0: below 1 - level exactly where the
    interval excludes 0. n is the number of units. All NaN for fewer than two units or NaN among them; no interval where
    no unit differs from another.
    Source: Fieller (1954), Some problems in interval estimation.

    Example:
        >>> print(ratio_of_means([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
        nan [nan, nan] (n = 3; the whole, 4 [-0.9683, 8.968], is not clear of zero)
        >>> print(ratio_of_means([1.0, 1.0, 1.3], [2.0, 2.1, 2.2]))
        0.5238 [0.3539, 0.666] (n = 3)
    """
    # scipy.special rather than scipy.stats, which takes half a second to import.
    from scipy.special import stdtr, stdtrit

    a, b = sample(part, "part"), sample(whole, "whole")
    check_level(level)
    n = len(a)
    if len(b) != n:
        raise ShapeMismatch(f"part has {n} values and whole {len(b)}; expected one of each for a unit.", at="whole")
    if reason := fault(a, "part") or fault(b, "whole"):
        return undefined(reason, n)
    if n == 1:
        return undefined("one unit shows no spread", n)
    t2 = float(stdtrit(n - 1, (1 + level) / 2)) ** 2
    mean_a, mean_b = float(a.mean()), float(b.mean())
    (var_a, both), (_, var_b) = (np.cov(a, b, ddof=1) / n).tolist()
    clear = mean_b**2 - t2 * var_b
    if clear <= 0:
        reach = math.sqrt(t2 * var_b)
        around = f"{mean_b:.4g} [{mean_b - reach:.4g}, {mean_b + reach:.4g}]"
        return undefined(f"the whole, {around}, is not clear of zero", n)
    value = mean_a / mean_b
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return undefined(f"all {n} units are equal, so they show no spread", n, value)
    middle = (mean_a * mean_b - t2 * both) / clear
    # Equal on paper to the root of middle² - (mean_a² - t² var_a) / clear, but without taking large numbers apart.
    spread = var_a - 2 * value * both + value**2 * var_b
    ahead = var_a * var_b - both**2
    reach = math.sqrt(max(t2 * (mean_b**2 * spread - t2 * ahead), 0.0)) / clear
    p = 2 * float(stdtr(n - 1, -abs(mean_a) / math.sqrt(var_a))) if var_a > 0 else float(mean_a == 0)
    return Estimate(value, middle - reach, middle + reach, n, p=p)

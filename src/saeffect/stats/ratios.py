"""Ratios of two means that were measured on the same units, and of sums over clusters, with Fieller's interval."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import LEVEL, FloatArray, fault, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["fieller", "ratio_of_means"]


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


def fieller(
    sums: tuple[npt.ArrayLike, npt.ArrayLike],
    squares: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    n: npt.ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Ends of the interval of the ratio of two sums over clusters, for many ratios at once.

    The ratios whose residuals, numerator minus ratio times denominator, add up to what Student's t allows by chance. It
    holds also where the denominator is uncertain. Source: Fieller (1954), with sums over clusters as in survey
    sampling.

    `sums` are Σ numerator and Σ denominator, `squares` Σ numerator², Σ numerator · denominator, Σ denominator², each
    `[m]`; `n` the clusters on which either is not 0. low and high, float64 `[m]`, are NaN with fewer than two clusters,
    or where the denominator cannot be told from 0.

    Example:
        >>> low, high = fieller(([6.0], [3.0]), ([14.0], [6.0], [3.0]), [3])  # 1/1, 2/1 and 3/1
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([-0.484], [4.484])
    """
    from scipy.special import stdtrit

    top, bottom = (np.asarray(total, dtype=np.float64) for total in sums)
    count = np.asarray(n, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Residuals add up to 0 at the ratio itself; elsewhere the spread is about their mean.
        t_squared = stdtrit(np.maximum(count - 1, 1), (1 + LEVEL) / 2) ** 2 * count / (count - 1)
        spread = [
            t_squared * (np.asarray(square, dtype=np.float64) - a * b / count)
            for square, a, b in zip(squares, (top, top, bottom), (top, bottom, bottom), strict=True)
        ]
        a, b, c = (
            total - error for total, error in zip((bottom**2, top * bottom, top**2), _swapped(spread), strict=True)
        )
        root = np.sqrt(np.maximum(b**2 - a * c, 0.0))
        low, high = (b - root) / a, (b + root) / a
    known = (count >= 2) & (a > 0)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def _swapped(spread: list[FloatArray]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """In the order of the quadratic's coefficients: of the square of the ratio, of it, and of 1."""
    return spread[2], spread[1], spread[0]

"""Intervals for ratios of sums over clusters, such as rows of text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from saeffect.stats.arguments import LEVEL, FloatArray, check_level

__all__ = ["fieller"]


def fieller(
    sums: tuple[npt.ArrayLike, npt.ArrayLike],
    squares: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    n: npt.ArrayLike,
    *,
    level: float = LEVEL,
) -> tuple[FloatArray, FloatArray]:
    """Ends of the interval of the ratio of two sums over clusters, for many ratios at once.

    The ratios whose residuals, numerator minus ratio times denominator, add up to what Student's t allows by chance. It
    holds also where the denominator is uncertain, where the usual error of a ratio does not. Source: Fieller (1954),
    Some problems in interval estimation, with sums over clusters as in survey sampling.

    Args:
        sums: Σ numerator and Σ denominator over clusters, each `[m]`.
        squares: Σ numerator², Σ numerator · denominator, Σ denominator², each `[m]`.
        n: Clusters on which either is not 0, `[m]`.

    Returns:
        low and high, float64 `[m]`; NaN with fewer than two clusters, or where the denominator cannot be told from 0,
        so that any ratio is possible.

    Example:
        >>> low, high = fieller(([6.0], [3.0]), ([14.0], [6.0], [3.0]), [3])  # 1/1, 2/1 and 3/1
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([-0.484], [4.484])
    """
    from scipy.special import stdtrit

    check_level(level)
    top, bottom = (np.asarray(total, dtype=np.float64) for total in sums)
    count = np.asarray(n, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Residuals add up to 0 at the ratio itself; elsewhere the spread is about their mean.
        t_squared = stdtrit(np.maximum(count - 1, 1), (1 + level) / 2) ** 2 * count / (count - 1)
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

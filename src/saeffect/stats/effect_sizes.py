"""How large a difference is, on scales that do not depend on the unit. Positive: `b` is larger than `a`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from saeffect.stats.arguments import fault, sample

__all__ = ["cliffs_delta", "normalised_mean_difference"]


def cliffs_delta(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pick one value of each group: how much more often is b's the larger one than a's?

    1: every value of b exceeds every value of a; 0: neither tends to be larger; -1: every value of a is
    larger.

    Args:
        a: Shape [n_a], the reference group.
        b: Shape [n_b], the other group.

    Returns:
        P(b > a) - P(b < a), between -1 and 1. NaN when a group is empty or holds NaN or infinity.

    Raises:
        ShapeMismatch: A group is not one-dimensional.

    Source:
        Cliff (1993), Dominance statistics; equal to 2 U / (n_a n_b) - 1 with the Mann-Whitney U of b.

    Example:
        >>> cliffs_delta([1, 2, 3], [2, 3, 4])  # b wins 6 of 9 pairs, loses 1, ties 2
        0.5555555555555556
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    if fault(data_a) or fault(data_b):
        return math.nan
    ordered = np.sort(data_a)
    n_wins = int(np.searchsorted(ordered, data_b, side="left").sum())
    n_wins_or_ties = int(np.searchsorted(ordered, data_b, side="right").sum())
    n_pairs = len(data_a) * len(data_b)
    return (n_wins - (n_pairs - n_wins_or_ties)) / n_pairs


def normalised_mean_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """The difference of the means as a share of how far the values spread: 0.1 is a tenth of the usual range.

    A range is set by the two most extreme values and grows with the number of values, so compare this number
    only between groups of like size.

    Args:
        a: Shape [n_a], the reference group.
        b: Shape [n_b], the other group.

    Returns:
        (mean b - mean a) / ((range a + range b) / 2), dimensionless. NaN when a group is empty or holds NaN
        or infinity, and when neither group varies.

    Raises:
        ShapeMismatch: A group is not one-dimensional.

    Source:
        Gupta & Sica (2024), Table 2.

    Example:
        >>> normalised_mean_difference([0, 1], [1, 4])  # means 0.5 and 2.5, ranges 1 and 3
        1.0
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    if fault(data_a) or fault(data_b):
        return math.nan
    mean_range = (np.ptp(data_a) + np.ptp(data_b)) / 2
    if mean_range == 0:
        return math.nan
    return float((data_b.mean() - data_a.mean()) / mean_range)

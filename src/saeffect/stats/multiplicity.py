"""Many tests at once: test 300 useless features at 5 % and about 15 pass by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from saeffect.errors import Undefined
from saeffect.stats.arguments import FloatArray, sample

__all__ = ["benjamini_hochberg", "holm"]


def benjamini_hochberg(p: npt.ArrayLike) -> FloatArray:
    """For each p its q: call everything up to here a finding, and about this share of findings is false.

    Args:
        p: Shape [n], p-values of independent (or positively dependent) tests; NaN for tests that had no
            answer.

    Returns:
        q, float64, shape [n], each between its p and 1. NaN stays NaN and does not count as a test.

    Raises:
        ShapeMismatch: `p` is not one-dimensional.
        Undefined: A p-value is not between 0 and 1.

    Source:
        Benjamini & Hochberg (1995), Controlling the false discovery rate.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03, float("nan")])
        array([0.03, 0.04, 0.04,  nan])
    """
    data, order = _ordered(p)
    scaled = data[order] * len(order) / np.arange(1, len(order) + 1)
    q = np.full(len(data), np.nan)
    # A p may not get a larger q than a larger p gets: take the smallest from the end backwards.
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return q


def holm(p: npt.ArrayLike) -> FloatArray:
    """For each p an adjusted one: with all up to 0.05 called findings, the chance of even one false one is 5 %.

    For a handful of declared tests of which each alone would be a headline. It holds however they depend on each
    other.

    Args:
        p: Shape [n], p-values; NaN for tests that had no answer.

    Returns:
        Float64, shape [n], each between its p and 1. NaN stays NaN and does not count as a test.

    Raises:
        ShapeMismatch: `p` is not one-dimensional.
        Undefined: A p-value is not between 0 and 1.

    Source:
        Holm (1979), A simple sequentially rejective multiple test procedure.

    Example:
        >>> holm([0.01, 0.04, 0.02, float("nan")])
        array([0.03, 0.04, 0.04,  nan])
    """
    data, order = _ordered(p)
    scaled = np.minimum(1.0, data[order] * np.arange(len(order), 0, -1))
    adjusted = np.full(len(data), np.nan)
    # Once one test fails, so do all with a larger p.
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def _ordered(p: npt.ArrayLike) -> tuple[FloatArray, npt.NDArray[np.intp]]:
    """The p-values, and where those that are one stand, smallest first."""
    data = sample(p, "p")
    tested = np.flatnonzero(~np.isnan(data))
    wrong = data[tested][(data[tested] < 0) | (data[tested] > 1)]
    if len(wrong):
        raise Undefined(f"{len(wrong)} of {len(data)} p-values are not between 0 and 1 ({wrong[0]:.4g}, say).", at="p")
    return data, tested[np.argsort(data[tested], kind="stable")]

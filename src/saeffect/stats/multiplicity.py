"""Corrections for many tests: of 300 useless features tested at 5 %, about 15 pass by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from saeffect.errors import Undefined
from saeffect.stats.arguments import FloatArray, sample

__all__ = ["benjamini_hochberg", "holm", "simes"]


def benjamini_hochberg(p: npt.ArrayLike) -> FloatArray:
    """q-values of p-values [n]: of all findings up to a q, about that share is false. NaN stays NaN and is no test.

    Source: Benjamini & Hochberg (1995), for independent (or positively dependent) tests, through statsmodels.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03, float("nan")])
        array([0.03, 0.04, 0.04,  nan])
    """
    from statsmodels.stats.multitest import multipletests  # takes a second, and few commands need it

    data, tested = _tested(p)
    adjusted = np.full(len(data), np.nan)
    if tested.any():
        adjusted[tested] = multipletests(data[tested], method="fdr_bh")[1]
    return adjusted


def holm(p: npt.ArrayLike) -> FloatArray:
    """Adjusted p-values of p-values [n]: the chance of any false finding among those up to 0.05 is at most 5 %,
    however the tests depend on each other. NaN stays NaN and is no test. Source: Holm (1979), A simple sequentially
    rejective procedure.

    Example:
        >>> holm([0.01, 0.04, 0.02, float("nan")])
        array([0.03, 0.04, 0.04,  nan])
    """
    data, tested = _tested(p)
    adjusted = np.full(len(data), np.nan)
    order = np.argsort(data)[: tested.sum()]  # NaN sorts last
    # statsmodels would also collect garbage, which takes most of a second each time.
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(data[order] * np.arange(len(order), 0, -1)))
    return adjusted


def simes(p: npt.ArrayLike) -> float:
    """One p for a hypothesis that was tested several times, p [n]: the smallest of n p₍₁₎, n p₍₂₎ / 2, ..., p₍ₙ₎.

    NaN is no test; NaN if there is none. For equal p-values the result is the same p; it never exceeds that of
    Bonferroni's correction. At most alpha of true hypotheses have p ≤ alpha if the tests are independent or positively
    dependent; however they depend, at most alpha (1 + 1/2 + ... + 1/n). Sources: Simes (1986), An improved Bonferroni
    procedure; Sarkar (1998), for positive dependence; Hommel (1983), for any.

    Example:
        >>> simes([0.01, 0.9]), simes([0.03, 0.02, float("nan")])
        (0.02, 0.03)
    """
    data, tested = _tested(p)
    ordered = np.sort(data[tested])
    n = len(ordered)
    return float(np.min(n * ordered / np.arange(1, n + 1))) if n else float("nan")


def _tested(p: npt.ArrayLike) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """The p-values, and which of them are not NaN."""
    data = sample(p, "p")
    tested = ~np.isnan(data)
    wrong = data[tested & ((data < 0) | (data > 1))]
    if len(wrong):
        raise Undefined(f"{len(wrong)} of {len(data)} p-values are not between 0 and 1 ({wrong[0]:.4g}, say).", at="p")
    return data, tested

"""The rank of a fine-tune among null fine-tunes of the same recipe: for one number, and for many at once.

If a fine-tune changed nothing beyond what its recipe always does, it and its K nulls are exchangeable: each of the 1 +
K is equally likely to have the largest number. This is the only assumption of all p. Scores are computed in the same
way for all fine-tunes; ties count against a finding.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from saeffect.diffing.matched_null import NO_STRATUM
from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import FloatArray, IntArray

__all__ = [
    "COUNTING_SEARCH",
    "NO_NULLS",
    "count_scores",
    "null_range",
    "null_reason",
    "pooled_rank_p",
    "rank_p",
    "rise_scores",
    "search_p",
]

NO_NULLS = "no null fine-tunes to compare with"
"""The reason beside every p without nulls."""
COUNTING_SEARCH = "p that counts the search"
"""Which p `null_reason` is about, in tables whose other p is pooled over words."""

# Numbers equal on paper differ in the last digits when computed in another order; they must count as ties.
_TIE = 1e-9


def null_reason(n_nulls: int, alpha: float, which: str = "p") -> str:
    """Why no p can reach `alpha` with so few nulls; "" if one can. `which` p: one of a table may be pooled over words.

    Example:
        >>> null_reason(9, 0.05), null_reason(19, 0.05)
        ('with 9 nulls no p is below 1/10: it takes 19 to find something at 0.05', '')
    """
    if n_nulls == 0:
        return NO_NULLS
    needed = math.ceil(1 / alpha - 1e-9) - 1
    if n_nulls >= needed:
        return ""
    nulls = "1 null" if n_nulls == 1 else f"{n_nulls} nulls"
    return f"with {nulls} no {which} is below 1/{n_nulls + 1}: it takes {needed} to find something at {alpha:g}"


def null_range(values: npt.ArrayLike) -> dict[str, FloatArray]:
    """The median, smallest and largest of the nulls' `values` [n_nulls, n], as columns; NaN without nulls."""
    table = np.asarray(values, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # without nulls all are NaN
        if not len(table):
            table = np.full((1, *table.shape[1:]), np.nan)
        median, low, high = np.median(table, axis=0), table.min(axis=0), table.max(axis=0)
    return {"null_median": median, "null_low": low, "null_high": high}


def rank_p(values: npt.ArrayLike) -> FloatArray:
    """p of the rank of each of the fine-tune's numbers among the nulls'; high numbers are extreme.

    `values` are [1 + n_nulls, ...], first the fine-tune's. p [...], at least 1 / (1 + n_nulls); NaN where a value is.

    Example:
        >>> rank_p([[3.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
        array([0.33333333, 1.        ])
    """
    table = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(table).any(axis=0) & (len(table) > 1)
    return np.where(defined, (1 + (table[1:] >= _tie_threshold(table[0])).sum(axis=0)) / len(table), np.nan)


def rise_scores(values: npt.ArrayLike, groups: IntArray) -> FloatArray:
    """How far each fine-tune's numbers [1 + n_nulls, n] lie above the mean of the others', in units of the mean
    deviation in a group of like noise (`groups`, int64 [n]). NaN without nulls, for a NaN, or in `NO_STRATUM`.

    Example:
        >>> rise_scores([[3.0, 1.0], [1.0, 1.0]], np.zeros(2, dtype=int)).tolist()
        [[4.0, 0.0], [-4.0, 0.0]]
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or groups.shape != table.shape[1:]:
        raise ShapeMismatch(f"values must be [1 + nulls, {len(groups)}]. Got {list(table.shape)}.", at="values")
    if len(table) < 2:
        return np.full(table.shape, np.nan)
    scores = (table - table.mean(axis=0)) * (len(table) / (len(table) - 1))
    scores[:, np.isnan(scores).any(axis=0) | (groups == NO_STRATUM)] = np.nan
    deviation = np.abs(table - table.mean(axis=0)).mean(axis=0)
    for group in np.unique(groups):
        members = (groups == group) & ~np.isnan(scores[0])
        scale = deviation[members].mean() if members.any() else 0.0
        scores[:, members] /= scale if scale > 0 else 1.0  # without any deviation, scores are 0
    return scores


def count_scores(counts: npt.ArrayLike) -> FloatArray:
    """-log10 of the binomial tail of each fine-tune's count, given the sum over all fine-tunes.

    `counts` are [1 + n_nulls, n]. If a word is as likely in each fine-tune's texts, its count is binomial given the
    sum, so scores of rare and common words are comparable. Counts vary more than this; so do the nulls' scores, with
    which they are compared. NaN without nulls.

    Example:
        >>> count_scores([[2, 1], [0, 1]]).round(3).tolist()
        [[0.602, 0.125], [0.0, 0.125]]
    """
    table = np.asarray(counts, dtype=np.float64)
    if len(table) < 2:
        return np.full(table.shape, np.nan)
    tail = binom.sf(table - 1, table.sum(axis=0), 1 / len(table))
    return np.abs(np.log10(np.maximum(tail, 1e-300)))


def pooled_rank_p(scores: npt.ArrayLike) -> FloatArray:
    """p of the rank of each of the fine-tune's scores among the scores of all nulls, all items pooled.

    `scores` are [1 + n_nulls, n]. p [n], at least 1 / (1 + n_nulls · n): the share of null scores as high. For a single
    item chosen beforehand it is valid on average over items, not for each. Items of one fine-tune are dependent, so a
    false discovery rate from these p may be exceeded; the error rate of `search_p` may not.

    Example:
        >>> pooled_rank_p([[4.0, 0.0], [1.0, 2.0]]).round(3).tolist()
        [0.333, 1.0]
    """
    table = np.asarray(scores, dtype=np.float64)
    null = np.sort(table[1:][~np.isnan(table[1:])])
    as_high = len(null) - np.searchsorted(null, _tie_threshold(table[0]), side="left")
    return np.where(np.isnan(table[0]) | (len(null) == 0), np.nan, (1 + as_high) / (1 + len(null)))


def search_p(scores: npt.ArrayLike) -> FloatArray:
    """p that counts the search over all items: the share of fine-tunes with any score as high; scores [1 + n_nulls, n].

    p [n], at least 1 / (1 + n_nulls). If all fine-tunes are exchangeable, the chance that any item of the first has p ≤
    α is at most α, however items depend on each other (Westfall & Young 1993).

    Example:
        >>> search_p([[4.0, 1.0], [1.0, 2.0], [0.0, 1.0]]).round(3).tolist()
        [0.333, 1.0]
    """
    table = np.asarray(scores, dtype=np.float64)
    defined = ~np.isnan(table[0])
    highest = np.where(np.isnan(table[1:]), -np.inf, table[1:]).max(axis=1, initial=-np.inf)
    as_high = (highest[:, None] >= _tie_threshold(table[0])).sum(axis=0)
    return np.where(defined & (len(table) > 1), (1 + as_high) / len(table), np.nan)


def _tie_threshold(values: FloatArray) -> FloatArray:
    """The smallest number that counts as a tie."""
    return np.asarray(values - _TIE * np.maximum(1.0, np.abs(values)), dtype=np.float64)

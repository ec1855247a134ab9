"""Is this feature's number unusual beside what two seeds of the same model show for features like it?

Two answers. Where every SAE has a number for the same feature (how well it is matched, how far it rotated),
`exchangeable_p`: if fine-tuning did nothing, the treatment's number is one of a kind with the placebos'. Where
the SAEs have different features, `conformal_p`: rank the number among those of placebo features, stratum by
stratum. Strata hold features of similar traits (density, decoder norm), since rare features match badly anyway.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.arguments import FloatArray

__all__ = ["NO_STRATUM", "conformal_p", "exchangeable_p", "quantile_per_stratum", "strata"]

NO_STRATUM = -1
IntArray = npt.NDArray[np.int64]

# Numbers equal on paper differ in the last digits when computed in another order; they must count as ties.
_TIE = 1e-12


def strata(traits: npt.ArrayLike, min_size: int) -> IntArray:
    """Cut features into groups of similar traits.

    Groups are halved at the median of one trait after the other while both halves keep `min_size` features.
    Only the order of a trait's values matters, so a logarithm changes nothing.

    Args:
        traits: [n, n_traits]; features with a NaN among theirs get `NO_STRATUM`.
        min_size: Fewest features in a group (unless there are fewer in all).

    Returns:
        int64 [n], group numbers from 0.

    Raises:
        ConfigError: `min_size` is below 1.
        ShapeMismatch: `traits` is not two-dimensional.

    Example:
        >>> strata([[1.0], [9.0], [2.0], [8.0], [float("nan")]], min_size=2).tolist()
        [0, 1, 0, 1, -1]
    """
    if min_size < 1:
        raise ConfigError(f"min_size must be at least 1. Got {min_size} instead.", at="min_size")
    values = np.asarray(traits, dtype=np.float64)
    if values.ndim != 2:
        raise ShapeMismatch(f"traits must be [n, n_traits]. Got {list(values.shape)} instead.", at="traits")
    result = np.full(len(values), NO_STRATUM)
    known = np.flatnonzero(~np.isnan(values).any(axis=1))
    waiting, number = ([(known, 0)] if len(known) else []), 0
    while waiting:
        members, depth = waiting.pop()
        halves = _halves(values, members, depth, min_size)
        if halves is None:
            result[members] = number
            number += 1
        else:
            waiting += [(halves[1], depth + 1), (halves[0], depth + 1)]
    return result


def exchangeable_p(values: npt.ArrayLike, groups: IntArray, *, margin: float = 0.0) -> tuple[FloatArray, FloatArray]:
    """Is the first SAE's number lower than the others' for the same feature, by more than chance?

    If nothing sets the first SAE apart, each feature's numbers could be dealt to the SAEs in any order. A
    feature's score for an SAE is that SAE's number minus the mean of the others', divided by the mean
    deviation in the feature's stratum (the same however the numbers are dealt). The scores of the first SAE
    are ranked among those of all others, over all features. With one other SAE its scores are the mirror
    image of the first's: then p asks whether large drops outnumber large rises.

    Args:
        values: [n_saes, n], first the SAE in question, then at least one placebo; NaN where undefined.
        groups: int64 [n], as `strata` gives them.
        margin: A drop below the mean of the others that counts for nothing, in units of `values`: two SAEs
            may differ a little as a whole.

    Returns:
        p [n] and the drop (mean of the others minus the first's) [n]; both NaN where a value is undefined, p
        also where there is no stratum.

    Raises:
        ShapeMismatch: Fewer than two SAEs, or `groups` does not fit.

    Source:
        The sign symmetry behind knockoffs and target-decoy counting: Barber & Candès (2015).

    Example:
        >>> p, drop = exchangeable_p([[0.1, 0.9, 0.8], [0.9, 0.9, 0.8]], np.zeros(3, dtype=int))
        >>> p.tolist(), drop.tolist()
        ([0.25, 0.75, 0.75], [0.8, 0.0, 0.0])
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or len(table) < 2 or groups.shape != table.shape[1:]:
        raise ShapeMismatch(
            f"values must be [at least 2, {len(groups)}]. Got {list(table.shape)} instead.", at="values"
        )
    n_others = len(table) - 1
    scores = table - (table.sum(axis=0) - table) / n_others
    drop = 0.0 - scores[0]
    known = ~np.isnan(scores[0]) & (groups != NO_STRATUM)
    scale = np.full(table.shape[1], np.nan)
    deviation = np.abs(table - table.mean(axis=0)).mean(axis=0)
    for group in np.unique(groups[known]):
        members = known & (groups == group)
        scale[members] = deviation[members].mean()
    # A stratum without any deviation has scores of 0, whatever they are divided by.
    scale = np.where(scale > 0, scale, 1.0)
    null = np.sort((scores[1:, known] / scale[known]).ravel())
    own = (scores[0, known] + margin) / scale[known]
    p = np.full(table.shape[1], np.nan)
    p[known] = (1 + np.searchsorted(null, own + _TIE, side="right")) / (1 + len(null))
    return p, drop


def conformal_p(
    values: npt.ArrayLike, groups: IntArray, null: npt.ArrayLike, null_groups: IntArray, *, margin: float = 0.0
) -> FloatArray:
    """How low is each value among null values of features like it?

    Within a stratum values are centred on the median and divided by the mean deviation, both of values and
    null values together. These scores are ranked among the null scores of all strata, each weighted so that
    the null has as many features of a stratum as the values have. If nothing sets the values apart, theirs
    and the null's are one of a kind in every stratum, whatever its shape.

    Args:
        values: [n], NaN where undefined.
        groups: int64 [n].
        null: [n_null], the same number for features that nothing was done to.
        null_groups: int64 [n_null].
        margin: Added to the values before they are ranked: a lack that counts for nothing.

    Returns:
        p [n], at least about 1 / n_null. NaN where the value is undefined or its stratum has no null value.

    Source:
        Bates et al. (2023), Testing for outliers with conformal p-values: Benjamini-Hochberg holds for them;
        the weights are those of Tibshirani et al. (2019).

    Example:
        >>> conformal_p([0.1, 0.3], np.array([0, 0]), [0.2, 0.4, 0.6], np.array([0, 0, 0])).round(6).tolist()
        [0.25, 0.5]
    """
    data, reference = np.array(values, dtype=np.float64), np.array(null, dtype=np.float64)
    weight, null_weight = np.full(len(data), np.nan), np.zeros(len(reference))
    for group in np.unique(groups[groups != NO_STRATUM]):
        mine, theirs = (groups == group) & ~np.isnan(data), (null_groups == group) & ~np.isnan(reference)
        if not mine.any() or not theirs.any():
            continue
        both = np.concatenate([data[mine], reference[theirs]])
        middle = np.median(both)
        scale = np.abs(both - middle).mean() or 1.0
        data[mine], reference[theirs] = (data[mine] + margin - middle) / scale, (reference[theirs] - middle) / scale
        weight[mine] = null_weight[theirs] = mine.sum() / theirs.sum()
    used = null_weight > 0
    order = np.argsort(reference[used], kind="stable")
    ranked = reference[used][order]
    below = np.concatenate([[0.0], null_weight[used][order].cumsum()])
    return np.asarray((weight + below[np.searchsorted(ranked, data + _TIE, side="right")]) / (weight + below[-1]))


def quantile_per_stratum(values: npt.ArrayLike, groups: IntArray, q: float, asked: IntArray) -> FloatArray:
    """The q-quantile of `values` [n] in each stratum of `groups` [n], for features of strata `asked`; NaN where none.

    Example:
        >>> quantile_per_stratum([1.0, 3.0, 5.0], np.array([0, 0, 1]), 0.5, np.array([1, 0, 2])).tolist()
        [5.0, 2.0, nan]
    """
    data = np.asarray(values, dtype=np.float64)
    result = np.full(len(asked), np.nan)
    usable = ~np.isnan(data) & (groups != NO_STRATUM)
    for group in np.unique(groups[usable]):
        result[asked == group] = np.quantile(data[usable & (groups == group)], q)
    return result


def _halves(values: FloatArray, members: IntArray, depth: int, min_size: int) -> tuple[IntArray, IntArray] | None:
    """The members below and above the median of a trait, trying each trait once; None if no cut leaves enough."""
    for turn in range(values.shape[1]):
        trait = values[members, (depth + turn) % values.shape[1]]
        # Equal values stay together, above or below the cut, whichever splits more evenly.
        middle = np.median(trait)
        cuts = (trait < middle, trait <= middle)
        below = max(cuts, key=lambda cut: min(cut.sum(), len(cut) - cut.sum()))
        if min(below.sum(), len(below) - below.sum()) >= min_size:
            return members[below], members[~below]
    return None

"""Tests of changes by fine-tuning, with other SAE seeds of the same model as the null, among features of like
traits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import LEVEL, BoolArray, FloatArray, IntArray, Resampling
from saeffect.stats.estimate import Estimate, undefined

__all__ = [
    "MIN_STRATUM",
    "NO_STRATUM",
    "ONE_PLACEBO",
    "TRAITS",
    "conformal_p",
    "exchangeable_p",
    "excess_paired",
    "excess_unpaired",
    "quantile_per_stratum",
    "strata",
]


TRAITS = ("density", "decoder_norm")
"""Columns of the feature tables by which features are matched to null features."""
MIN_STRATUM = 200
"""Fewest features among which ranks and quantiles are taken."""
NO_STRATUM = -1
ONE_PLACEBO = "one placebo: the interval does not hold the noise of SAE training"
"""The reason beside an interval without the noise of SAE seeds."""

# Numbers equal on paper differ in the last digits when computed in another order; they must count as ties.
_TIE = 1e-12


def strata(traits: npt.ArrayLike, min_size: int) -> IntArray:
    """Cut features into groups of similar traits: int64 [n], numbers from 0; `NO_STRATUM` for a NaN trait.

    Groups are halved at the median of one trait of `traits` [n, n_traits] after the other while both halves keep
    `min_size` features. Only the order of a trait's values matters.

    Example:
        >>> strata([[1.0], [9.0], [2.0], [8.0], [float("nan")]], min_size=2).tolist()
        [0, 1, 0, 1, -1]
    """
    values = np.asarray(traits, dtype=np.float64)
    result = np.full(len(values), NO_STRATUM)
    usable = np.flatnonzero(~np.isnan(values).any(axis=1))
    pending, number = ([(usable, 0)] if len(usable) else []), 0
    while pending:
        members, depth = pending.pop()
        halves = _halves(values, members, depth, min_size)
        if halves is None:
            result[members] = number
            number += 1
        else:
            pending += [(halves[1], depth + 1), (halves[0], depth + 1)]
    return result


def _halves(values: FloatArray, members: IntArray, depth: int, min_size: int) -> tuple[IntArray, IntArray] | None:
    """The members below and above the median of a trait, trying each trait once; None if no cut leaves enough."""
    for offset in range(values.shape[1]):
        trait = values[members, (depth + offset) % values.shape[1]]
        # Equal values stay together, above or below the cut, whichever splits more evenly.
        median = np.median(trait)
        cuts = (trait < median, trait <= median)
        below = max(cuts, key=lambda cut: min(cut.sum(), len(cut) - cut.sum()))
        if min(below.sum(), len(below) - below.sum()) >= min_size:
            return members[below], members[~below]
    return None


def exchangeable_p(values: npt.ArrayLike, groups: IntArray, *, margin: float = 0.0) -> tuple[FloatArray, FloatArray]:
    """p that the first SAE's number is lower than the others' for the same feature only by chance.

    Under the null each feature's numbers are exchangeable between SAEs. A feature's score for an SAE is that SAE's
    number minus the mean of the others', divided by the mean deviation in the feature's stratum. The first SAE's scores
    are ranked among those of all others, over all features. With one other SAE, whose scores are the first's negated, p
    asks whether large drops outnumber large rises (the sign symmetry behind knockoffs: Barber & Candès 2015).

    `values` are [n_saes, n], first the SAE in question; `groups` as `strata` gives them; `margin` is a drop that does
    not count. Returns p [n] and the drop (mean of the others minus the first's) [n]; NaN where a value or, for p, the
    stratum is undefined. `ShapeMismatch` for fewer than two SAEs, or if `groups` does not fit.

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
    scores = table - (table.sum(axis=0) - table) / (len(table) - 1)
    drop = 0.0 - scores[0]
    usable = ~np.isnan(scores[0]) & (groups != NO_STRATUM)
    scale = np.full(table.shape[1], np.nan)
    deviation = np.abs(table - table.mean(axis=0)).mean(axis=0)
    for group in np.unique(groups[usable]):
        members = usable & (groups == group)
        scale[members] = deviation[members].mean()
    # A stratum without any deviation has scores of 0, whatever they are divided by.
    scale = np.where(scale > 0, scale, 1.0)
    null = np.sort((scores[1:, usable] / scale[usable]).ravel())
    own_scores = (scores[0, usable] + margin) / scale[usable]
    p = np.full(table.shape[1], np.nan)
    p[usable] = (1 + np.searchsorted(null, own_scores + _TIE, side="right")) / (1 + len(null))
    return p, drop


def conformal_p(
    values: npt.ArrayLike, groups: IntArray, null: npt.ArrayLike, null_groups: IntArray, *, margin: float = 0.0
) -> FloatArray:
    """p [n] of low values: the rank of each among null values of similar features; at least about 1 / n_null.

    Within a stratum, values [n] (plus `margin`, a difference that does not count) and null values [n_null] are centred
    on their joint median and divided by their mean deviation. The scores are ranked among the null scores of all
    strata, weighted so that the null has as many features of a stratum as the values have (Bates et al. 2023:
    Benjamini-Hochberg is valid for them; weights: Tibshirani et al. 2019). NaN where the value is undefined or its
    stratum has no null value.

    Example:
        >>> conformal_p([0.1, 0.3], np.array([0, 0]), [0.2, 0.4, 0.6], np.array([0, 0, 0])).round(6).tolist()
        [0.25, 0.5]
    """
    data, reference = np.array(values, dtype=np.float64), np.array(null, dtype=np.float64)
    weight, null_weight = np.full(len(data), np.nan), np.zeros(len(reference))
    for group in np.unique(groups[groups != NO_STRATUM]):
        rows, null_rows = (groups == group) & ~np.isnan(data), (null_groups == group) & ~np.isnan(reference)
        if not rows.any() or not null_rows.any():
            continue
        pooled = np.concatenate([data[rows], reference[null_rows]])
        median = np.median(pooled)
        scale = np.abs(pooled - median).mean() or 1.0
        data[rows] = (data[rows] + margin - median) / scale
        reference[null_rows] = (reference[null_rows] - median) / scale
        weight[rows] = null_weight[null_rows] = rows.sum() / null_rows.sum()
    used = null_weight > 0
    order = np.argsort(reference[used], kind="stable")
    ranked = reference[used][order]
    below = np.concatenate([[0.0], null_weight[used][order].cumsum()])
    return np.asarray((weight + below[np.searchsorted(ranked, data + _TIE, side="right")]) / (weight + below[-1]))


def quantile_per_stratum(values: npt.ArrayLike, groups: IntArray, q: float, wanted: IntArray) -> FloatArray:
    """The q-quantile of `values` [n] in each stratum of `groups` [n], for features of strata `wanted`; else NaN."""
    data = np.asarray(values, dtype=np.float64)
    result = np.full(len(wanted), np.nan)
    usable = ~np.isnan(data) & (groups != NO_STRATUM)
    for group in np.unique(groups[usable]):
        result[wanted == group] = np.quantile(data[usable & (groups == group)], q)
    return result


def excess_paired(treatment: BoolArray, placebos: BoolArray, resampling: Resampling, name: str) -> Estimate:
    """Count of features in the treatment minus the mean count in the placebos, same features, with a 95 % interval.

    Features are resampled together in all SAEs. With several placebos the scatter of their counts is added (Student's
    t); with one, `reason` says that the interval lacks it. `treatment` is bool [n], `placebos` bool [n_placebos, n].

    Example:
        >>> excess_paired(np.array([True, True, False]), np.array([[True, False, False]]), Resampling(), "gone").value
        1.0
    """
    n = len(treatment)
    value = float(treatment.sum() - placebos.sum(axis=1).mean()) if n else math.nan
    if n < 2:
        return undefined(f"{n} features are too few for an interval", n, value)
    # Features differ only by the SAEs in which they count: few patterns, so a resample is one multinomial draw.
    patterns, counts = np.unique(np.vstack([treatment, placebos]), axis=1, return_counts=True)
    if patterns.shape[1] == 1:
        return undefined("every feature shows the same in every SAE, so there is no spread", n, value)
    rng = np.random.default_rng(resampling.seed_for("fates", name))
    drawn = rng.multinomial(n, counts / n, size=resampling.n_boot).astype(np.float64) @ patterns.T
    return _excess(value, drawn[:, 0] - drawn[:, 1:].mean(axis=1), placebos.sum(axis=1).astype(np.float64), n)


def excess_unpaired(treatment: BoolArray, placebos: Sequence[BoolArray], resampling: Resampling, name: str) -> Estimate:
    """`excess_paired` where each SAE has its own features, resampled alone; counts are scaled to the treatment's n.

    Example:
        >>> excess_unpaired(np.array([True, True]), [np.array([True, False, False, False])], Resampling(), "new").value
        1.5
    """
    n, sizes = len(treatment), np.array([len(placebo) for placebo in placebos])
    if n < 2 or sizes.min() < 2:
        return undefined(f"{min(n, int(sizes.min()))} features are too few for an interval", n)
    shares = np.array([placebo.mean() for placebo in placebos])
    value = float(treatment.sum() - n * shares.mean())
    if treatment.mean() in (0.0, 1.0) and bool(np.isin(shares, (0.0, 1.0)).all()):
        return undefined("all features of an SAE are alike, so there is no spread", n, value)
    rng = np.random.default_rng(resampling.seed_for("fates", name))
    drawn = rng.binomial(n, treatment.mean(), size=resampling.n_boot).astype(np.float64)
    drawn_placebos = n * rng.binomial(sizes, shares, size=(resampling.n_boot, len(sizes))) / sizes
    return _excess(value, drawn - drawn_placebos.mean(axis=1), n * shares, n)


def _excess(value: float, replicates: FloatArray, placebos: FloatArray, n: int) -> Estimate:
    """Interval from resampled differences [n_boot] and the counts of the placebos [n_placebos]."""
    n_placebos = len(placebos)
    if n_placebos == 1:
        low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high), n, ONE_PLACEBO)
    feature_variance = float(replicates.var())
    seed_variance = float(placebos.var(ddof=1)) * (1 + 1 / n_placebos)
    # Two independent sources of error, each with its own quantile: the features are many, the seeds few.
    half_width = math.hypot(
        float(ndtri((1 + LEVEL) / 2)) * math.sqrt(feature_variance),
        float(stdtrit(n_placebos - 1, (1 + LEVEL) / 2)) * math.sqrt(seed_variance),
    )
    return Estimate(value, value - half_width, value + half_width, n)

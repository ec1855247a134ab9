"""Agreement of raters beyond chance: 1 is perfect, 0 chance, below 0 systematic disagreement. Krippendorff's rule of
thumb: 0.8 is reliable, 0.667 the least for a tentative conclusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import LEVEL, FloatArray, Seed, check_resamples, generator
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["cohens_kappa", "fleiss_kappa", "krippendorff_alpha", "percent_agreement"]


def cohens_kappa(
    a: Sequence[Any] | pd.Series, b: Sequence[Any] | pd.Series, *, n_boot: int = 2000, seed: Seed = 0
) -> Estimate:
    """How far two raters agree beyond chance on n items, labelled in the same order: Cohen's kappa.

    NaN for no items, missing labels, or when both raters gave one and the same label throughout. The interval resamples
    whole items. Source: Cohen (1960), A coefficient of agreement for nominal scales.

    Example:
        >>> cohens_kappa(["yes", "yes", "no", "no"], ["yes", "no", "no", "no"]).value
        0.5
    """
    check_resamples(n_boot)
    labels, n = [*a, *b], len(a)
    if len(b) != n:
        raise ShapeMismatch(f"the raters must judge the same items, got {n} and {len(b)} labels.", at="b")
    if n == 0:
        return undefined("there are no items")
    codes, categories = pd.factorize(pd.Series(labels, dtype=object))
    n_missing = int(((codes[:n] < 0) | (codes[n:] < 0)).sum())
    if n_missing:
        return undefined(f"{n_missing} of {n} items lack a label of one rater or both", n)
    if len(categories) == 1:
        return undefined(f"both raters gave every item the label {categories[0]!r}, which chance explains", n)
    one_hot_a, one_hot_b = np.split(np.eye(len(categories))[codes], 2)  # [n, n_labels] each, 1 at the label
    agreed = (one_hot_a * one_hot_b).sum(axis=1)

    def kappa(draws: FloatArray) -> FloatArray:
        chance = ((draws @ one_hot_a) * (draws @ one_hot_b)).sum(axis=1) / n**2
        return _beyond_chance(draws @ agreed / n, chance)

    return _bootstrap_items(kappa, n, n_boot, seed)


def percent_agreement(
    ratings: pd.DataFrame | npt.NDArray[Any] | Sequence[Sequence[Any]],
    *,
    n_boot: int = 2000,
    seed: Seed = 0,
) -> Estimate:
    """The share of pairs of raters, 0 to 1, that gave an item the same label, averaged over items; chance included.

    `ratings` and n are as for `krippendorff_alpha`; NaN when no item has two ratings. The interval resamples items.

    Example:
        >>> percent_agreement([["yes", "yes"], ["no", "no"], ["yes", "no"], ["no", "no"]]).value
        0.75
    """
    check_resamples(n_boot)
    counts, _ = _label_counts(ratings)
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return undefined("no item has two ratings")
    shares = _same_pairs(counts)
    return _bootstrap_items(lambda draws: draws @ shares / len(shares), len(shares), n_boot, seed)


def fleiss_kappa(
    ratings: pd.DataFrame | npt.NDArray[Any] | Sequence[Sequence[Any]],
    *,
    n_boot: int = 2000,
    seed: Seed = 0,
) -> Estimate:
    """How far several raters agree beyond chance, on the n items that all of them judged: Fleiss' kappa.

    `ratings` are as for `krippendorff_alpha`. NaN when nothing was judged by all, or with one label throughout. The
    interval resamples whole items. Source: Fleiss (1971), Measuring nominal scale agreement among many raters.

    Example:
        >>> round(fleiss_kappa([["yes", "yes"], ["no", "no"], ["yes", "no"], ["no", "no"]]).value, 4)
        0.4667
    """
    check_resamples(n_boot)
    counts, labels = _label_counts(ratings)
    raters = int(np.shape(ratings)[1])
    counts = counts[counts.sum(axis=1) == raters]
    if raters < 2 or not len(counts):
        return undefined("no item was judged by all raters" if raters >= 2 else "there is one rater", len(counts))
    if (counts.sum(axis=0) > 0).sum() == 1:
        label = labels[int(counts.sum(axis=0).argmax())]
        return undefined(f"all raters gave every item the label {label!r}, which chance explains", len(counts))
    same, n = _same_pairs(counts), len(counts)

    def kappa(draws: FloatArray) -> FloatArray:
        chance = ((draws @ counts / (n * raters)) ** 2).sum(axis=1)
        return _beyond_chance(draws @ same / n, chance)

    return _bootstrap_items(kappa, n, n_boot, seed)


def krippendorff_alpha(
    ratings: pd.DataFrame | npt.NDArray[Any] | Sequence[Sequence[Any]],
    *,
    n_boot: int = 2000,
    seed: Seed = 0,
) -> Estimate:
    """How far any number of raters agree beyond chance, also when not everybody judged everything: alpha, at most 1.

    `ratings` have one row an item, one column a rater; None or NaN where a rater did not judge the item. Any two
    different labels disagree alike. n: items that at least two raters judged. NaN when there are none or only one label
    occurs. The interval resamples whole items. Source: Krippendorff (2011), Computing Krippendorff's alpha-reliability.

    Example:
        >>> round(krippendorff_alpha([["yes", "yes"], ["no", "no"], ["yes", "no"], ["no", "no"]]).value, 4)
        0.5333
    """
    check_resamples(n_boot)
    counts, _ = _label_counts(ratings)
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return undefined("no item has two ratings")
    if (counts.sum(axis=0) > 0).sum() == 1:
        return undefined("only one label occurs, which chance explains", len(counts))
    judged = counts.sum(axis=1)
    same = judged * _same_pairs(counts)

    def alpha(draws: FloatArray) -> FloatArray:
        label_counts, n = draws @ counts, draws @ judged
        chance = (label_counts * (label_counts - 1)).sum(axis=1) / (n * (n - 1))
        return _beyond_chance(draws @ same / n, chance)

    return _bootstrap_items(alpha, len(counts), n_boot, seed)


def _bootstrap_items(statistic: Callable[[FloatArray], FloatArray], n: int, n_boot: int, seed: Seed) -> Estimate:
    """A statistic with its interval over resamples of n items; `statistic` gets how often each item is drawn."""
    value = float(statistic(np.ones((1, n)))[0])
    if n == 1:
        return undefined("one item shows no spread", n, value)
    if value == 1.0:
        return undefined("the raters agree on everything: there is no spread", n, value)
    draws = generator(seed).multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.float64)
    replicates = statistic(draws)
    n_undefined = int(np.isnan(replicates).sum())
    if n_undefined:
        reason = f"{n_undefined} of {n_boot} resamples hold a single label, where this is undefined"
        return undefined(reason, n, value)
    if np.ptp(replicates) < 1e-12:
        return undefined("the items are all alike, so resampling shows no spread", n, value)
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)


def _same_pairs(counts: FloatArray) -> FloatArray:
    """The share of pairs of raters of each item, [n_items], that gave it the same label."""
    judged = counts.sum(axis=1)
    result: FloatArray = (counts * (counts - 1)).sum(axis=1) / (judged * (judged - 1))
    return result


def _beyond_chance(agreement: FloatArray, chance: FloatArray) -> FloatArray:
    """Agreement beyond chance; NaN where chance explains everything."""
    possible = 1 - chance
    return np.divide(agreement - chance, possible, out=np.full(len(possible), np.nan), where=possible > 1e-12)


def _label_counts(ratings: Any) -> tuple[FloatArray, list[Any]]:
    """How often each item got each label, [n_items, n_labels], and the labels."""
    table = ratings.to_numpy(dtype=object) if isinstance(ratings, pd.DataFrame) else np.asarray(ratings, dtype=object)
    if table.ndim != 2:
        raise ShapeMismatch(
            f"ratings must be a table with one row an item and one column a rater, got shape {table.shape}.",
            at="ratings",
        )
    codes, labels = pd.factorize(pd.Series(table.ravel(), dtype=object))
    items = np.repeat(np.arange(table.shape[0]), table.shape[1])
    counts = np.zeros((table.shape[0], len(labels)))
    np.add.at(counts, (items[codes >= 0], codes[codes >= 0]), 1)
    return counts, list(labels)

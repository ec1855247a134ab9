"""Ranking features by their change, and testing what the most changed ones are about.

The ranking uses activations only; the concepts' words are used afterwards, to score it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from concepts import Concept
from scipy.stats import hypergeom

from saeffect.diffing.matched_null import exchangeable_p, strata
from saeffect.features.vocabulary import Vocabulary, count_matches
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = ["Named", "beyond", "chance", "concept_tests", "excess_p", "most_changed", "named_features", "standing"]

FloatArray = npt.NDArray[np.float64]
Named = Mapping[str, npt.NDArray[np.bool_]]
"""For each concept, which features are about it, bool [d_sae]."""


_STRATUM = 100  # fewest features of like density that are compared with each other


def named_features(top_tokens: Sequence[Sequence[str]], concepts: Mapping[str, Concept], min_matches: int) -> Named:
    """Features with at least `min_matches` top tokens among a concept's words, by the product's own rule."""
    return {
        name: count_matches(top_tokens, Vocabulary(name, concept.words, "")).counts >= min_matches
        for name, concept in concepts.items()
    }


def most_changed(scores: FloatArray, n: int) -> list[int]:
    """The `n` features that changed most in either direction, most first; ties by number, NaN last."""
    return [int(i) for i in np.argsort(-np.nan_to_num(np.abs(scores), nan=-np.inf), kind="stable")[:n]]


def beyond(change: FloatArray, nulls: Sequence[FloatArray]) -> FloatArray:
    """Distance of each change from the range of the nulls' changes and 0, [d_sae].

    A null in which a feature never fires shows no change of it.

    Example:
        >>> beyond(np.array([3.0, -3.0, 1.0]), [np.array([1.0, -4.0, 2.0])]).tolist()
        [2.0, 0.0, 0.0]
    """
    null_changes = np.nan_to_num(np.stack([*nulls, np.zeros_like(change)]))
    return change - np.clip(change, null_changes.min(axis=0), null_changes.max(axis=0))


def chance(n_named: int, n_features: int, top: int) -> tuple[float, float]:
    """Of `top` random features: how many are about a concept on average, and how likely at least one is.

    Example:
        >>> [round(x, 3) for x in chance(10, 1000, 10)]
        [0.1, 0.096]
    """
    return top * n_named / n_features, float(hypergeom.sf(0, n_features, n_named, top))


def concept_tests(scores: FloatArray, density: FloatArray, named: Named, top: int) -> pd.DataFrame:
    """Did a concept's features change more than as many random ones, among features that fire as often?

    In every fine-tune, null or not, features that fire often change more (README.md), and a concept's features fire
    more often than most. So each change is first compared with those of features of like density: `standing`.

    Args:
        scores: How much each feature changed, [d_sae]; NaN where it never fires.
        density: Share of tokens on which it fires, [d_sae].
        named: The concepts' features.
        top: How many most changed features count as hits.

    Returns:
        One row a concept: concept; hits (features about it among the `top` most changed); best_rank (of the most
        changed of them, from 1; NaN if the SAE has none that fires); p (chance that the best of as many random features
        stands as high among features like it); q (Benjamini-Hochberg over the concepts).
    """
    n = int(np.isfinite(scores).sum())
    by_change, by_standing = most_changed(scores, n), most_changed(standing(scores, density), n)
    rows = []
    for concept, members in named.items():
        ranks, places = (np.flatnonzero(members[order]) + 1 for order in (by_change, by_standing))
        best = int(ranks[0]) if len(ranks) else None
        p = float(hypergeom.sf(0, n, len(places), places[0])) if best else 1.0
        hits = int((ranks <= top).sum())
        rows.append({"concept": concept, "hits": hits, "best_rank": best, "p": min(1.0, p)})
    table = pd.DataFrame(rows)
    return table.assign(q=benjamini_hochberg(table["p"].to_numpy()))


def standing(scores: FloatArray, density: FloatArray) -> FloatArray:
    """How large each change is among those of features that fire as often, [d_sae], above 0; NaN where it never fires.

    The sizes of a stratum are divided by their mean deviation after their median is taken off, as in the product's
    `conformal_p`; then the smallest of all is taken off, so that the order is kept and nothing is negative.
    """
    sizes = np.abs(scores)
    groups = strata(np.where(np.isfinite(scores), density, np.nan)[:, None], min_size=_STRATUM)
    result = np.full(len(scores), np.nan)
    for group in np.unique(groups[groups >= 0]):
        members = groups == group
        median = np.median(sizes[members])
        result[members] = (sizes[members] - median) / (np.abs(sizes[members] - median).mean() or 1.0)
    return np.asarray(result - np.nanmin(result)) if np.isfinite(result).any() else result


def excess_p(own: FloatArray, others: Sequence[FloatArray], density: FloatArray) -> FloatArray:
    """Is each feature's change larger than in the other null fine-tunes? p [d_sae], NaN where it never fires.

    The product's `exchangeable_p`, with fine-tunes in the place of SAEs and changes in that of matches: it asks
    for what is lower than elsewhere, so sizes enter with a minus. Strata hold features of similar density.
    """
    table = -np.abs(np.stack([own, *others]))
    traits = np.where(np.isnan(table).any(axis=0), np.nan, density)
    return exchangeable_p(table, strata(traits[:, None], min_size=_STRATUM))[0]

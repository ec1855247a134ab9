"""Outcomes that are read off texts already there: words, and the similarity to another feature's top tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from saeffect.errors import ShapeMismatch
from saeffect.steering.outcomes import RememberedVectors, TextVectors, join_tokens, similarity
from saeffect.steering.word_outcomes import keyword_score, off_list_score

__all__ = ["score_texts", "shuffled_references"]


def score_texts(
    trials: pd.DataFrame,
    features: pd.DataFrame,
    *,
    vectors: TextVectors,
    vocabulary: Collection[str],
    seed: int,
) -> pd.DataFrame:
    """Add the outcomes that need no model to a table of trials.

    Args:
        trials: Columns feature and text; a missing text has no score.
        features: Columns feature and top_tokens; every feature of the trials, and the others that were tested. With
            a column members, sets that share a feature are not compared with each other.
        vectors: As in `run_trials`.
        vocabulary: The domain's words, lower case.
        seed: For who is compared with whose top tokens.

    Returns:
        The trials with keyword_score and off_list (see `saeffect.steering.word_outcomes`; shares of the text's
        words), shuffled_feature (whose top tokens stand in, see `shuffled_references`; -1 for none), and
        similarity_shuffled (cosine similarity to those, NaN where undefined).

    Raises:
        ShapeMismatch: A feature of the trials has no top tokens in the table.
    """
    top = {int(f): list(tokens) for f, tokens in zip(features["feature"], features["top_tokens"], strict=True)}
    unknown = set(trials["feature"]) - set(top)
    if unknown:
        raise ShapeMismatch(f"the feature table has no feature {min(unknown)}.", at="features")
    known = RememberedVectors.of(vectors)
    other = shuffled_references(list(top), seed)
    if "members" in features:
        members = {int(f): set(some) for f, some in zip(features["feature"], features["members"], strict=True)}
        other = {f: None if who is None or members[f] & members[who] else who for f, who in other.items()}
    instead = {feature: None if who is None else join_tokens(top[who]) for feature, who in other.items()}
    rows = [
        _scores(text, top[feature], vocabulary, instead[feature], known)
        for feature, text in zip(trials["feature"].tolist(), trials["text"].tolist(), strict=True)
    ]
    scored = pd.DataFrame(rows, columns=["keyword_score", "off_list", "similarity_shuffled"], index=trials.index)
    whose = trials["feature"].map({f: -1 if o is None else o for f, o in other.items()})
    return pd.concat([trials, scored.astype(np.float64)], axis=1).assign(shuffled_feature=whose.astype(np.int64))


def _scores(
    text: str | None, top: list[str], vocabulary: Collection[str], other: str | None, vectors: RememberedVectors
) -> tuple[float, float, float]:
    if not isinstance(text, str):
        return math.nan, math.nan, math.nan
    shuffled = math.nan if other is None else similarity(text, other, vectors).value
    return keyword_score(text, top), off_list_score(text, vocabulary, top), shuffled


def shuffled_references(features: Sequence[int], seed: int) -> dict[int, int | None]:
    """For each feature another one at random, none its own and none used twice; None if there is no other.

    If texts steered with one feature come as near to the top tokens of another feature of the domain, then
    steering brings up the domain at most, not what this feature says.

    Args:
        features: All different.
        seed: Equal seeds and features give equal answers, in whatever order the features come.

    Example:
        >>> shuffled_references([4, 9], seed=0), shuffled_references([4], seed=0)
        ({4: 9, 9: 4}, {4: None})
    """
    ordered = sorted(int(f) for f in features)
    if len(ordered) < 2:
        return dict.fromkeys(ordered, None)
    # Each looks at the next of a random round, so nobody looks at itself.
    around = np.random.default_rng([seed, 17]).permutation(ordered).tolist()
    return dict(sorted(zip(around, [*around[1:], around[0]], strict=True)))

"""Coherence of a feature's top tokens: equation 1 of Gupta & Sica (2024), computed in `_batch_coherence`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from saeffect.errors import BadFile, ConfigError, ShapeMismatch
from saeffect.features.embeddings import DEFAULT_EMBEDDINGS, WordVectors, load_embeddings
from saeffect.lm.tokens import normalise_token
from saeffect.stats.arguments import FloatArray

__all__ = ["EPSILON", "coherence", "coherence_score", "unique_coverage"]

EPSILON = 1e-8
"""The ε of the equation."""

# Below this sum of weight products ε causes an error above 1 %.
_SMALLEST_SUM = 100 * EPSILON
# Products of mixed sign that cancel to less than this share of their sizes leave only rounding errors.
_CANCELLED = 1e-9
_NUMBERS_PER_BATCH = 100_000  # numbers of one vector per feature: a batch fits in the processor's cache


def coherence_score(
    tokens: Sequence[str], weights: Sequence[float], *, embeddings: str | Path | WordVectors = DEFAULT_EMBEDDINGS
) -> float:
    """Coherence of one feature's top tokens: the weighted mean cosine of their pairs (Gupta & Sica 2024, equation
    1).

    Σ_{i<j} w_i w_j cos(e_i, e_j) / (Σ_{i<j} w_i w_j + ε) over the tokens (in plain, GPT-2 `Ġ` or SentencePiece `▁`
    spelling) whose word (`normalise_token`) has an embedding. Tokens of one word (" heart", "heart", " Heart") stay
    separate items of cosine 1, as in the paper's figures. 1 for one word repeated, about 0 for unrelated words, at most
    1 where the weights have one sign; NaN where undefined (`coherence` gives the reason). ShapeMismatch: not one weight
    a token; ConfigError: no list of strings.

    Example:
        >>> toy = WordVectors.from_rows(["cat", "dog", "car"], [[1, 0], [3, 4], [0, 1]], name="toy")
        >>> round(coherence_score(["Ġcat", " Dog", "xyzzy"], [3.0, 2.0, 1.0], embeddings=toy), 6)
        0.6
    """
    table = pd.DataFrame({"feature": [0], "top_tokens": [tokens], "top_weights": [weights]})
    return float(coherence(table, embeddings=embeddings)["coherence"][0])


def coherence(features: pd.DataFrame, *, embeddings: str | Path | WordVectors = DEFAULT_EMBEDDINGS) -> pd.DataFrame:
    """Coherence of every feature of a table, see `coherence_score`; one row a feature, with the index of `features`.

    `features` has columns `feature`, `top_tokens` (lists of str) and `top_weights` (lists of float, as long). Columns:
    feature; coherence, NaN where fewer than two tokens are known, a weight of a known token is not finite, or the
    products of weights vanish, cancel or overflow; n_known, the top tokens with an embedding; reason, "" where
    coherence is defined. `BadFile` if a column is missing; otherwise as `coherence_score`.
    """
    _require_columns(features, "feature", "top_tokens", "top_weights")
    vectors = _as_vectors(embeddings)
    rows, weights = _look_up_rows(list(features["top_tokens"]), list(features["top_weights"]), vectors)
    n_known = (rows >= 0).sum(axis=1)
    values = np.full(len(rows), np.nan)
    indices, units = _unit_vectors(rows, vectors)
    step = max(1, _NUMBERS_PER_BATCH // vectors.dim)
    for start in range(0, len(rows), step):
        batch = slice(start, start + step)
        values[batch] = _batch_coherence(indices[batch], units, weights[batch])
    return pd.DataFrame(
        {
            "feature": features["feature"].to_numpy(),
            "coherence": values,
            "n_known": n_known.astype(np.int64),
            "reason": [_reason(*row) for row in zip(values, n_known, weights, strict=True)],
        },
        index=features.index,
    )


def unique_coverage(features: pd.DataFrame, *, embeddings: str | Path | WordVectors = DEFAULT_EMBEDDINGS) -> float:
    """Share of the distinct words among the top tokens that have an embedding; NaN without tokens. Errors as
    `coherence`.

    Example:
        >>> toy = WordVectors.from_rows(["cat"], [[1.0]], name="toy")
        >>> unique_coverage(pd.DataFrame({"top_tokens": [["cat", "Ġcat", "zzz"], ["Cat"]]}), embeddings=toy)
        0.5
    """
    _require_columns(features, "top_tokens")
    vectors = _as_vectors(embeddings)
    words = {normalise_token(token) for tokens in features["top_tokens"] for token in _check_strings(tokens)}
    return sum(vectors.row(word) >= 0 for word in words) / len(words) if words else float("nan")


def _require_columns(features: pd.DataFrame, *names: str) -> None:
    missing = [name for name in names if name not in features.columns]
    if missing:
        raise BadFile(f"the feature table has no column {', '.join(map(repr, missing))}.", fix="make it anew.")


def _as_vectors(embeddings: str | Path | WordVectors) -> WordVectors:
    return embeddings if isinstance(embeddings, WordVectors) else load_embeddings(embeddings)


def _check_strings(tokens: Sequence[str]) -> Sequence[str]:
    if isinstance(tokens, str | bytes) or not hasattr(tokens, "__len__"):
        wrong: list[object] = [tokens]
    else:
        wrong = [token for token in tokens if not isinstance(token, str)]
    if wrong:
        shown = f"{repr(wrong[0])[:60]} ({type(wrong[0]).__name__})"
        raise ConfigError(f"top tokens must be a list of strings. Got {shown} instead.")
    return tokens


def _look_up_rows(
    tokens: Sequence[Sequence[str]], weights: Sequence[Sequence[float]], vectors: WordVectors
) -> tuple[NDArray[np.int64], FloatArray]:
    """Rows of the vectors (-1 unknown) and weights, both [n_features, k], short lists padded."""
    k = max((len(_check_strings(row)) for row in tokens), default=0)
    rows = np.full((len(tokens), k), -1, dtype=np.int64)
    padded = np.zeros((len(tokens), k))
    row_of: dict[str, int] = {}
    for i, (names, values) in enumerate(zip(tokens, weights, strict=True)):
        if len(names) != len(values):
            raise ShapeMismatch(f"there must be one weight a token. Got {len(values)} for {len(names)} tokens.")
        for token in names:
            if token not in row_of:
                row_of[token] = vectors.row(normalise_token(token))
        rows[i, : len(names)] = [row_of[token] for token in names]
        padded[i, : len(names)] = values
    return rows, padded


def _unit_vectors(rows: NDArray[np.int64], vectors: WordVectors) -> tuple[NDArray[np.int64], FloatArray]:
    """Each row's index (-1 unknown) into the unit vectors in use, and these, float64 [n, dim]."""
    known = rows >= 0
    used, inverse = np.unique(rows[known], return_inverse=True)
    units = vectors.vectors[used].astype(np.float64)  # float64, or cosines of 1 would wobble
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    indices = np.full_like(rows, -1)
    indices[known] = inverse
    return indices, units


def _batch_coherence(indices: NDArray[np.int64], units: FloatArray, weights: FloatArray) -> FloatArray:
    """Equation 1 by row, float64 [n], NaN where undefined; in k steps, as ‖Σ w_i e_i‖² - Σ w_i² would lose digits."""
    n, k = indices.shape
    w = np.where(indices >= 0, weights, 0.0)
    earlier = np.zeros((n, units.shape[1]))
    numerator, denominator, absolute, earlier_weight, earlier_size = np.zeros((5, n))
    with np.errstate(invalid="ignore", over="ignore"):  # infinite weights end as NaN, with a reason
        for j in range(k if len(units) else 0):
            unit, weight = units[indices[:, j]], w[:, j]  # an unknown word has weight 0, so any row will do
            numerator += weight * np.einsum("nd,nd->n", unit, earlier)
            denominator += weight * earlier_weight
            absolute += np.abs(weight) * earlier_size
            unit *= weight[:, None]
            earlier += unit
            earlier_weight += weight
            earlier_size += np.abs(weight)
        values = numerator / (denominator + EPSILON)
        large = np.abs(denominator) > np.maximum(_SMALLEST_SUM, _CANCELLED * absolute)
    defined = large & ((indices >= 0).sum(axis=1) >= 2) & np.isfinite(values) & np.isfinite(denominator)
    return np.where(defined, values, np.nan)


def _reason(value: float, n_known: int, weights: FloatArray) -> str:
    if not np.isnan(value):
        return ""
    if n_known < 2:
        return f"{n_known} of the top tokens in the embedding; at least 2 are needed"
    if not np.isfinite(weights).all():
        return "a weight is NaN or infinite"
    return "the products of the weights vanish, cancel or overflow"

"""Changes of features and groups of features between two models, in units of their spread over null fine-tunes.

A feature changes on up to four bases, see `raw_changes`. Groups are features that resemble each other, see `Basis`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from saeffect.diffing.coactivity import FiringLog, coactivation
from saeffect.diffing.matched_null import NO_STRATUM, strata
from saeffect.diffing.matching import unit_rows
from saeffect.diffing.trace import Trace
from saeffect.errors import BadFile, ShapeMismatch
from saeffect.stats.arguments import FloatArray, IntArray

__all__ = [
    "BASES",
    "FEWEST_NULLS",
    "FEWEST_TOKENS",
    "SIZES",
    "Basis",
    "GroupTests",
    "difference_along",
    "among_nulls",
    "differences_among_nulls",
    "group_tests",
    "prediction_limit",
    "prediction_p",
    "raw_changes",
]


FEWEST_NULLS = 5
"""With fewer null fine-tunes nothing is claimed, since four numbers do not give a scale."""
SIZES = (1, 3, 8)
"""Features a group: one feature and those nearest to it."""
BASES = ("read", "written", "expected", "difference")
"""The measures of a feature's change. Their evidence is added with equal weights, fixed before any result."""
FEWEST_TOKENS = 10
"""A feature that fires on fewer tokens than this in every model is not judged on that text."""
_STRATUM = 200  # fewest features (or tokens) of like density that share a scale


def raw_changes(
    trace: Trace, top_tokens: IntArray, directions: npt.NDArray[np.floating[Any]] | None = None
) -> dict[str, FloatArray]:
    """The change of each feature by basis, float64 [d_sae], on a scale whose noise depends little on frequency.

    "read" and "written": difference of the roots of mean activations; "expected": difference of the logarithms of the
    probabilities of its top tokens, int64 [d_sae, k], averaged over these; "difference": the mean activation difference
    along its unit row of `directions` [d_sae, d_in], left out without them.
    """
    expected = trace.expected.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(expected[1] / expected[0])
    ratio[~np.isfinite(ratio)] = 0.0  # padding rows of the unembedding are never expected
    roots = {name: np.sqrt(getattr(trace, name).astype(np.float64)[:2]) for name in ("read", "written")}
    changes = {name: root[1] - root[0] for name, root in roots.items()} | {"expected": ratio[top_tokens].mean(axis=1)}
    return changes if directions is None else changes | {"difference": difference_along(trace, directions)}


def difference_along(trace: Trace, directions: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """The mean over the text of tuned minus base at the hook, along unit rows [n, d_in]: float64 [n]."""
    return np.asarray(directions @ trace.halves.mean(axis=0), dtype=np.float64)


def _fires_enough(traces: Sequence[Trace]) -> dict[str, npt.NDArray[np.bool_]]:
    """Features that fire on `FEWEST_TOKENS` or more tokens in any model: bool [d_sae], on "read" and "written"."""
    max_tokens = {name: np.zeros(traces[0].read.shape[1]) for name in ("read", "written")}
    for trace in traces:
        for name, n_tokens in (("read", trace.numbers["n_tokens"]), ("written", trace.texts.size)):
            densities = getattr(trace, name)[2:].astype(np.float64)
            max_tokens[name] = np.maximum(max_tokens[name], densities.max(axis=0, initial=0.0) * n_tokens)
    return {name: tokens >= FEWEST_TOKENS - 0.5 for name, tokens in max_tokens.items()}  # densities are rounded


def among_nulls(
    traces: Sequence[Trace], top_tokens: IntArray, directions: npt.NDArray[np.floating[Any]] | None = None
) -> list[dict[str, FloatArray]]:
    """z of the changes of all features, by basis and "combined", float64 [d_sae] each: of the first trace, the
    fine-tune's, among the nulls, then of each null among the other nulls.

    z = (change - mean of the nulls') / scale. The scale is the root mean of two variances with equal weight: the
    feature's own over the nulls, and that of features that fire as often, of all features on the basis "difference"
    (Smyth 2004). If the z of one fine-tune have a spread above 1, they are divided by it (the empirical null of Efron
    2004). "combined" is the sum over bases divided by the square root of their number.

    NaN on a basis where a feature fires too rarely (see `FEWEST_TOKENS`); it adds nothing to "combined". Other
    arguments are as in `raw_changes`. `ShapeMismatch` if a trace has fewer than two others that are nulls; `BadFile`
    for a trace that was measured otherwise.
    """
    fires = _fires_enough(_check_comparable(traces))
    changes = [raw_changes(trace, top_tokens, directions) for trace in traces]
    result = []
    for i, trace in enumerate(traces):
        others = [change for j, change in enumerate(changes) if j not in (0, i)]
        result.append(_standardise(trace, [changes[i], *others], fires))
    return result


def differences_among_nulls(traces: Sequence[Trace], directions: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """z of the mean activation difference along unit rows [n, d_in] that need not be this SAE's: float64 [1 + K, n].

    As on the basis "difference", with one scale for all: the fine-tune among the nulls, each null among the others.
    """
    changes = np.stack([difference_along(trace, directions) for trace in traces])
    groups = np.zeros(changes.shape[1], dtype=np.int64)
    rows = range(len(changes))
    return np.stack([_z_scores(changes[i], changes[[j for j in rows if j not in (0, i)]], groups) for i in rows])


def _standardise(
    trace: Trace, changes: Sequence[Mapping[str, FloatArray]], fires: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, FloatArray]:
    """The z of the first of `changes` among the others, by basis and "combined"."""
    if len(changes) < 3:
        raise ShapeMismatch(f"a scale needs at least two null fine-tunes. Got {len(changes) - 1} instead.", at="nulls")
    density = trace.read[2].astype(np.float64)
    groups = strata(np.where(density > 0, density, np.nan)[:, None], _STRATUM)
    groups[groups == NO_STRATUM] = groups.max(initial=0) + 1  # features that never fire share a scale
    z = {}
    for name, change in changes[0].items():
        # The mean difference along a direction does not depend on how often the feature fires.
        scale_groups = np.zeros_like(groups) if name == "difference" else groups
        z[name] = _z_scores(change, np.stack([null[name] for null in changes[1:]]), scale_groups)
    for name, enough in fires.items():
        z[name] = np.where(enough, z[name], np.nan)
    return z | {"combined": np.nansum(list(z.values()), axis=0) / math.sqrt(len(z))}


def _z_scores(change: FloatArray, nulls: FloatArray, groups: IntArray) -> FloatArray:
    """z [n] of changes [n] among those of nulls [K, n]."""
    mean = nulls.mean(axis=0)
    variance = ((nulls - mean) ** 2).sum(axis=0) / (len(nulls) - 1)
    pooled = np.empty_like(variance)
    for group in np.unique(groups):
        pooled[groups == group] = variance[groups == group].mean()
    scale = np.sqrt((variance + pooled) / 2 * (1 + 1 / len(nulls)))
    z = np.divide(change - mean, scale, out=np.zeros_like(change), where=scale > 0)
    spread = float(np.median(np.abs(z - np.median(z)))) * 1.4826
    return np.asarray(z / max(1.0, spread))


def _check_comparable(traces: Sequence[Trace]) -> Sequence[Trace]:
    for trace in traces[1:]:
        if trace.made_by != traces[0].made_by:
            raise BadFile(
                f"the null {trace.name!r} was measured with another base model, SAE, hook or text.",
                at="nulls",
                fix="measure the nulls again for this study: saeffect finetune <recipe> --null <how many> --study ...",
            )
    return traces


@dataclass(frozen=True, eq=False)
class Basis:
    """The features that both models share.

    Attributes:
        W_dec: What each adds to the residual stream, float [d_sae, d_model].
        W_U: The unembedding that gave the top tokens, float [d_model, d_vocab].
        top_tokens: Ids of the tokens that each promotes most, int [d_sae, k].
        strings: Every token as text, by id.
        firing: Activations in the base model, if known.
        at_hook: Decoder rows at the hook, where they differ from W_dec.
    """

    W_dec: npt.NDArray[np.float32]
    W_U: npt.NDArray[np.float32]
    top_tokens: IntArray
    strings: Sequence[str]
    firing: FiringLog | None = None
    at_hook: npt.NDArray[np.float32] | None = None

    @cached_property
    def directions(self) -> npt.NDArray[np.float32]:
        """The decoder's rows at the hook, each of length 1."""
        return unit_rows((self.W_dec if self.at_hook is None else self.at_hook).astype(np.float32))

    @cached_property
    def _word_starts(self) -> frozenset[str]:
        starts = [text for text in self.strings if text[:1].isspace()]
        capitals = [text for text in self.strings if text[:1].isupper()] if starts else []
        return frozenset(text.strip().lower() for text in (*starts, *capitals))

    def stands_alone(self, word: str) -> bool:
        """Whether a token, stripped and in lower case, is more than the rest of a word ("plete" of "complete").

        In scripts with capitals a token that begins a word follows a space, or is written with a capital somewhere.
        False for the empty one; True for marks, and where the tokenizer shows no spaces.
        """
        has_capitals = word[:1].lower() != word[:1].upper()
        return bool(word) and (not has_capitals or not self._word_starts or word in self._word_starts)

    @cached_property
    def neighbours(self) -> IntArray:
        """Each feature, then those most similar to it, int64 [d_sae, max(SIZES)] (fewer columns for fewer features).

        Similarity is the mean of three cosines: of decoder rows, of what they do to the logits, and of activations in
        the base model (their correlation over tokens, see `coactivation`). It does not depend on any fine-tune.
        """
        logits = self.W_dec.astype(np.float32) @ _gram_root(self.W_U.astype(np.float32))
        rows = np.concatenate([unit_rows(self.W_dec.astype(np.float32)), unit_rows(logits)], axis=1)
        n = min(max(SIZES), len(rows))
        neighbours = np.empty((len(rows), n), dtype=np.int64)
        for start, correlations in self._correlation_blocks():
            stop = start + len(correlations)
            similar = rows[start:stop] @ rows.T + correlations
            similar[np.arange(len(similar)), np.arange(start, stop)] = np.inf  # itself first
            nearest = np.argpartition(-similar, n - 1, axis=1)[:, :n]
            order = np.argsort(-np.take_along_axis(similar, nearest, axis=1), axis=1, kind="stable")
            neighbours[start:stop] = np.take_along_axis(nearest, order, axis=1)
        return neighbours

    def _correlation_blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """Blocks of correlations; zeros of one column where activations are unknown."""
        if self.firing is not None:
            yield from coactivation(self.firing)
        else:
            for start in range(0, len(self.W_dec), 1024):
                yield start, np.zeros((min(1024, len(self.W_dec) - start), 1))


def _gram_root(W_U: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """R [d_in, d_in] such that lengths and angles of x @ R are those of x @ W_U."""
    values, vectors = np.linalg.eigh((W_U @ W_U.T).astype(np.float64))
    return (vectors * np.sqrt(np.clip(values, 0, None))).astype(np.float32)


@dataclass(frozen=True, eq=False)
class GroupTests:
    """Scores of all groups of a trace, float64 [len(SIZES), d_sae], by size and first feature; and the largest absolute
    score in each null, float64 [K].
    """

    scores: FloatArray
    highest: FloatArray

    def p(self, score: float) -> float:
        """The probability that a null fine-tune has a score this large anywhere; see `prediction_p`."""
        return prediction_p(score, self.highest)


def prediction_p(score: float, nulls: FloatArray) -> float:
    """The probability of a number this large, above 0, in one more null fine-tune.

    The upper tail of Student's t for one more logarithm, which assumes that the nulls' logarithms are normal. Where
    m of the nulls [K] reach the number, (1 + m) / (K + 1) if that is larger.

    Example:
        >>> nulls = np.array([1.0, 2.0, 4.0])
        >>> round(prediction_p(3.0, nulls), 3), round(prediction_p(40.0, nulls), 3)
        (0.5, 0.032)
    """
    k, (mean, spread) = len(nulls), _logarithms(nulls)
    tail = float(stdtr(k - 1, -(math.log(max(score, 1e-300)) - mean) / max(spread, 1e-12)))
    reached = int((nulls >= score).sum())
    return max(tail, (1 + reached) / (k + 1)) if reached else tail


def prediction_limit(nulls: FloatArray, alpha: float) -> float:
    """The number that one more null fine-tune exceeds with probability `alpha`, by the tail of `prediction_p`."""
    mean, spread = _logarithms(nulls)
    return math.exp(mean + float(stdtrit(len(nulls) - 1, 1 - alpha)) * spread)


def _logarithms(nulls: FloatArray) -> tuple[float, float]:
    """Mean of the nulls' logarithms, and the standard error of predicting one more."""
    logs = np.log(np.maximum(nulls, 1e-300))
    return float(logs.mean()), float(logs.std(ddof=1)) * math.sqrt(1 + 1 / len(nulls))


def group_tests(own_z: FloatArray, null_z: FloatArray, basis: Basis) -> GroupTests:
    """Scores of every group, from combined z [d_sae] of the fine-tune and [K, d_sae] of each null among the others."""
    sums = np.stack([_group_means(z, basis.neighbours) for z in (own_z, *null_z)])  # [1 + K, sizes, d_sae]
    scale = np.sqrt((sums[1:] ** 2).mean(axis=(0, 2)))[:, None]
    scale[scale == 0] = 1.0  # nothing changes on this basis
    return GroupTests(sums[0] / scale, np.abs(sums[1:] / scale).max(axis=(1, 2)))


def _group_means(z: FloatArray, neighbours: IntArray) -> FloatArray:
    """Mean z of groups of each size [sizes, d_sae]."""
    running = np.cumsum(z[neighbours], axis=1)
    return np.stack([running[:, min(size, running.shape[1]) - 1] / size for size in SIZES])

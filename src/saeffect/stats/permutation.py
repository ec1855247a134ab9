"""Permutation tests: exact for small data, else p = (b + 1) / (m + 1), b of m random permutations being at least as
extreme (Phipson & Smyth 2010, Permutation p-values should never be zero)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from saeffect.errors import ConfigError, unknown_name
from saeffect.stats.arguments import FloatArray, Seed, fault, generator, sample
from saeffect.stats.bootstrap import Average, check_average

__all__ = ["permutation_test", "sign_flip_many"]

_ALTERNATIVES = ("greater", "less", "two-sided")
_EXACT_UP_TO = 14  # pairs: 16,384 sign patterns
_BLOCK = 2_000_000  # values held at once
# Equal sums differ in the last digits when added in another order; they must count as ties.
_TIE = 1e-12


def sign_flip_many(
    differences: npt.ArrayLike,
    *,
    alternative: str = "greater",
    n_permutations: int = 10_000,
    seed: Seed = 0,
) -> FloatArray:
    """Sign-flip test of the mean of paired differences [n_features, n_pairs], for every row: p, float64 [n_features].

    All sign patterns are tried for up to 14 pairs, `n_permutations` random ones for more. All rows use the same
    patterns, so a row's p does not depend on the other rows. `alternative` is "greater" (the mean is above 0), "less"
    or "two-sided". p is at least 1 / 2**n for n pairs, and 1 where all differences are zero; NaN for rows with NaN or
    infinity.

    Example:
        >>> sign_flip_many([[1, 2, 3, 4], [-1, 2, 3, 4], [1, 2, float("nan"), 4]])
        array([0.0625, 0.125 ,    nan])
    """
    data = sample(differences, "differences", ndim=2)
    if alternative not in _ALTERNATIVES:
        raise unknown_name("alternative", alternative, _ALTERNATIVES, at="alternative")
    _check_permutations(n_permutations)
    rng = generator(seed)
    p = np.full(len(data), np.nan)
    usable = np.isfinite(data).all(axis=1)
    if data.shape[1] and usable.any():
        p[usable] = _sign_flip_p(data[usable], alternative, n_permutations, rng)
    return p


def permutation_test(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    statistic: Average = "mean",
    n_permutations: int = 10_000,
    seed: Seed = 0,
) -> float:
    """Two-sided p of statistic(b) - statistic(a) when values [n_a] and [n_b] are assigned to the groups at random.

    All splits are tried when there are at most `n_permutations`, else that many random ones. 1 when all values are
    equal, NaN when a group is empty or holds NaN.

    Example:
        >>> permutation_test([1, 2, 3], [4, 5, 6])  # 2 of the 20 splits
        0.1
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    check_average(statistic)
    _check_permutations(n_permutations)
    rng = generator(seed)
    n_a, n = len(data_a), len(data_a) + len(data_b)
    if fault(data_a) or fault(data_b):
        return math.nan
    exact = math.comb(n, n_a) <= n_permutations
    pooled = np.concatenate([data_a, data_b])
    summary = np.median if statistic == "median" else np.mean
    observed = abs(float(summary(data_b) - summary(data_a)))
    tie = _TIE * float(np.abs(pooled).max())
    n_hits = n_tried = 0
    for rows in _all_splits(pooled, n_a) if exact else _random_splits(pooled, n_permutations, rng):
        shuffled = summary(rows[:, n_a:], axis=1) - summary(rows[:, :n_a], axis=1)
        n_hits += int((np.abs(shuffled) >= observed - tie).sum())
        n_tried += len(rows)
    return n_hits / n_tried if exact else (n_hits + 1) / (n_tried + 1)


def _check_permutations(n_permutations: int) -> None:
    if isinstance(n_permutations, bool) or not isinstance(n_permutations, int | np.integer) or n_permutations < 1:
        raise ConfigError(f"n_permutations must be a positive integer, got {n_permutations!r}.", at="n_permutations")


def _sign_flip_p(rows: FloatArray, alternative: str, n_permutations: int, rng: np.random.Generator) -> FloatArray:
    n_pairs = rows.shape[1]
    exact = n_pairs <= _EXACT_UP_TO
    n_patterns = 2**n_pairs if exact else n_permutations
    # Blocks of patterns must not depend on the number of rows, or the random numbers would.
    n_at_once = max(1, min(n_patterns, _BLOCK // n_pairs))
    n_rows = max(1, _BLOCK // n_at_once)
    hits = np.zeros(len(rows), dtype=np.int64)
    for first in range(0, n_patterns, n_at_once):
        n_block = min(n_at_once, n_patterns - first)
        if exact:
            codes = np.arange(first, first + n_block)[:, None]
            bits = (codes >> np.arange(n_pairs)) & 1
        else:
            bits = rng.integers(0, 2, size=(n_block, n_pairs), dtype=np.int8)
        signs = (1.0 - 2.0 * bits).T
        for start in range(0, len(rows), n_rows):
            block = rows[start : start + n_rows]
            observed, flipped = block.sum(axis=1, keepdims=True), block @ signs
            tie = _TIE * np.abs(block).sum(axis=1, keepdims=True)
            if alternative == "greater":
                extreme = flipped >= observed - tie
            elif alternative == "less":
                extreme = flipped <= observed + tie
            else:
                extreme = np.abs(flipped) >= np.abs(observed) - tie
            hits[start : start + n_rows] += extreme.sum(axis=1)
    return hits / n_patterns if exact else (hits + 1) / (n_patterns + 1)


def _all_splits(pooled: FloatArray, n_a: int) -> Iterator[FloatArray]:
    """Blocks [n_splits, n] whose first `n_a` columns are group a, every split once."""
    n = len(pooled)
    splits = itertools.combinations(range(n), n_a)
    while block := list(itertools.islice(splits, max(1, _BLOCK // n))):
        in_a = np.zeros((len(block), n), dtype=bool)
        np.put_along_axis(in_a, np.array(block), True, axis=1)
        tiled = np.broadcast_to(pooled, in_a.shape)
        yield np.hstack([tiled[in_a].reshape(len(block), n_a), tiled[~in_a].reshape(len(block), n - n_a)])


def _random_splits(pooled: FloatArray, n_splits: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Blocks [n_splits, n] of shuffled values; the first columns are group a."""
    n_rows = max(1, _BLOCK // len(pooled))
    for start in range(0, n_splits, n_rows):
        yield rng.permuted(np.tile(pooled, (min(n_rows, n_splits - start), 1)), axis=1)

"""Tests by reshuffling: if the labels meant nothing, how often would shuffled labels look this good?

`sign_flip_test` for paired differences, `sign_flip_many` for one such test per feature, `permutation_test`
for two independent samples. Small data are enumerated (exact p); otherwise p = (b + 1) / (m + 1) from m
random reshufflings of which b look at least as good, so that p is never 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from saeffect.errors import ConfigError, unknown_name
from saeffect.stats.arguments import FloatArray, Seed, Statistic, check_alternative, fault, generator, sample
from saeffect.stats.estimate import TestResult

__all__ = ["permutation_test", "sign_flip_many", "sign_flip_test"]

_EXACT_UP_TO = 14  # pairs: 16,384 sign patterns
_BLOCK = 2_000_000  # values held at once
# Sums equal on paper differ in the last digits when added in another order; they must count as ties.
_TIE = 1e-12
_STATISTICS: dict[str, Statistic] = {"mean": np.mean, "median": np.median}


def sign_flip_test(
    differences: npt.ArrayLike,
    *,
    alternative: str = "greater",
    n_permutations: int = 10_000,
    seed: Seed = 0,
) -> TestResult:
    """How often paired differences would average this high if plus and minus were equally likely for each.

    Under "no effect" each difference (treated minus control of one pair) could as well have had the other
    sign. All sign patterns are tried for up to 14 pairs; `n_permutations` random ones for more.

    Args:
        differences: Shape [n], one a pair; pairs independent of each other.
        alternative: "greater" (the mean is above 0), "less", or "two-sided".
        n_permutations: Random sign patterns when n > 14.
        seed: Integer or numpy Generator; without effect for n <= 14.

    Returns:
        The mean difference and its p. The smallest p that n pairs can give is 1 / 2**n, so one pair never
        gives less than 0.5. All differences zero: p = 1. No values, or NaN among them: NaN.

    Raises:
        ShapeMismatch: `differences` is not one-dimensional.
        ConfigError: `alternative`, `n_permutations` or `seed` is not valid.

    Example:
        >>> sign_flip_test([1, 2, 3, 4]).p  # 1 of the 16 sign patterns
        0.0625
    """
    data = sample(differences, "differences")
    _check_permutations(alternative, n_permutations)
    rng = generator(seed)
    exact = len(data) <= _EXACT_UP_TO
    method = "exact sign-flip test" if exact else f"sign-flip test, {n_permutations} random patterns"
    method = f"{method}, {alternative}"
    if reason := fault(data, "differences"):
        return TestResult(math.nan, math.nan, len(data), method, reason)
    p = _sign_flip_p(data[None, :], alternative, n_permutations, rng)
    return TestResult(float(data.mean()), float(p[0]), len(data), method)


def sign_flip_many(
    differences: npt.ArrayLike,
    *,
    alternative: str = "greater",
    n_permutations: int = 10_000,
    seed: Seed = 0,
) -> FloatArray:
    """`sign_flip_test` of every row at once: one p a feature.

    All rows see the same sign patterns, so a row's p does not depend on which other rows are there.

    Args:
        differences: Shape [n_features, n_pairs].
        alternative: "greater", "less" or "two-sided".
        n_permutations: Random sign patterns when n_pairs > 14.
        seed: Integer or numpy Generator.

    Returns:
        p, float64, shape [n_features]. NaN for rows that hold NaN or infinity, and for all when n_pairs is 0.

    Raises:
        ShapeMismatch: `differences` is not two-dimensional.
        ConfigError: `alternative`, `n_permutations` or `seed` is not valid.

    Example:
        >>> sign_flip_many([[1, 2, 3, 4], [-1, 2, 3, 4], [1, 2, float("nan"), 4]])
        array([0.0625, 0.125 ,    nan])
    """
    data = sample(differences, "differences", ndim=2)
    _check_permutations(alternative, n_permutations)
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
    statistic: str = "mean",
    alternative: str = "two-sided",
    n_permutations: int = 10_000,
    seed: Seed = 0,
) -> TestResult:
    """How often two groups would differ this much if it were random which value belongs to which group.

    Strictly it tests for the same distribution, so groups of unlike spread can be told apart too.
    All ways to split the values are tried when there are at most `n_permutations`, else that many random.

    Args:
        a: Shape [n_a], the reference group.
        b: Shape [n_b], the other group, independent of `a`.
        statistic: "mean" or "median": what is compared.
        alternative: "greater" (`b` is larger), "less", or "two-sided" (a difference as large in either
            direction).
        n_permutations: Random splits.
        seed: Integer or numpy Generator.

    Returns:
        statistic(b) - statistic(a) and its p, n = n_a + n_b. All values equal: p = 1. NaN when a group is
        empty or holds NaN.

    Raises:
        ShapeMismatch: A group is not one-dimensional.
        ConfigError: An option is not valid.

    Source:
        Phipson & Smyth (2010), Permutation p-values should never be zero, for the (b + 1) / (m + 1).

    Example:
        >>> permutation_test([1, 2, 3], [4, 5, 6], alternative="greater").p  # 1 of the 20 splits
        0.05
    """
    data_a, data_b = sample(a, "a"), sample(b, "b")
    if statistic not in _STATISTICS:
        raise unknown_name("statistic", statistic, _STATISTICS, at="statistic")
    _check_permutations(alternative, n_permutations)
    rng = generator(seed)
    n_a, n = len(data_a), len(data_a) + len(data_b)
    exact = math.comb(n, n_a) <= n_permutations
    method = "exact permutation test" if exact else f"permutation test, {n_permutations} random splits"
    method = f"{method}, {statistic}, {alternative}"
    if reason := fault(data_a, "a") or fault(data_b, "b"):
        return TestResult(math.nan, math.nan, n, method, reason)
    pooled = np.concatenate([data_a, data_b])
    summary = _STATISTICS[statistic]
    observed = float(summary(data_b) - summary(data_a))
    tie = _TIE * float(np.abs(pooled).max())
    n_hits = n_tried = 0
    for rows in _all_splits(pooled, n_a) if exact else _random_splits(pooled, n_permutations, rng):
        shuffled = summary(rows[:, n_a:], axis=1) - summary(rows[:, :n_a], axis=1)
        n_hits += int(_at_least(shuffled, np.float64(observed), np.float64(tie), alternative).sum())
        n_tried += len(rows)
    p = n_hits / n_tried if exact else (n_hits + 1) / (n_tried + 1)
    return TestResult(observed, p, n, method)


def _check_permutations(alternative: str, n_permutations: int) -> None:
    check_alternative(alternative)
    if isinstance(n_permutations, bool) or not isinstance(n_permutations, int | np.integer) or n_permutations < 1:
        raise ConfigError(f"n_permutations must be a positive integer, got {n_permutations!r}.", at="n_permutations")


def _at_least(
    shuffled: FloatArray, observed: np.float64 | FloatArray, tie: np.float64 | FloatArray, alternative: str
) -> npt.NDArray[np.bool_]:
    """Where a reshuffling looks at least as good as what was observed."""
    if alternative == "greater":
        return np.asarray(shuffled >= observed - tie)
    if alternative == "less":
        return np.asarray(shuffled <= observed + tie)
    return np.asarray(np.abs(shuffled) >= np.abs(observed) - tie)


def _sign_flip_p(rows: FloatArray, alternative: str, n_permutations: int, rng: np.random.Generator) -> FloatArray:
    n_pairs = rows.shape[1]
    exact = n_pairs <= _EXACT_UP_TO
    n_patterns = 2**n_pairs if exact else n_permutations
    # The block of patterns must not depend on the number of rows, or the random stream would.
    n_at_once = max(1, min(n_patterns, _BLOCK // n_pairs))
    n_rows = max(1, _BLOCK // n_at_once)
    hits = np.zeros(len(rows), dtype=np.int64)
    for first in range(0, n_patterns, n_at_once):
        n_here = min(n_at_once, n_patterns - first)
        if exact:
            codes = np.arange(first, first + n_here)[:, None]
            bits = (codes >> np.arange(n_pairs)) & 1
        else:
            bits = rng.integers(0, 2, size=(n_here, n_pairs), dtype=np.int8)
        signs = (1.0 - 2.0 * bits).T
        for start in range(0, len(rows), n_rows):
            some = rows[start : start + n_rows]
            observed = some.sum(axis=1, keepdims=True)
            tie = _TIE * np.abs(some).sum(axis=1, keepdims=True)
            hits[start : start + n_rows] += _at_least(some @ signs, observed, tie, alternative).sum(axis=1)
    return hits / n_patterns if exact else (hits + 1) / (n_patterns + 1)


def _all_splits(pooled: FloatArray, n_a: int) -> Iterator[FloatArray]:
    """Blocks [n_splits, n] whose first `n_a` columns are group a, every split once."""
    n = len(pooled)
    splits = itertools.combinations(range(n), n_a)
    while some := list(itertools.islice(splits, max(1, _BLOCK // n))):
        in_a = np.zeros((len(some), n), dtype=bool)
        np.put_along_axis(in_a, np.array(some), True, axis=1)
        tiled = np.broadcast_to(pooled, in_a.shape)
        yield np.hstack([tiled[in_a].reshape(len(some), n_a), tiled[~in_a].reshape(len(some), n - n_a)])


def _random_splits(pooled: FloatArray, n_splits: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Blocks [n_splits, n] of shuffled values; the first columns are group a."""
    n_rows = max(1, _BLOCK // len(pooled))
    for start in range(0, n_splits, n_rows):
        yield rng.permuted(np.tile(pooled, (min(n_rows, n_splits - start), 1)), axis=1)

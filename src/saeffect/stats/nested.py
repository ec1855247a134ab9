"""Means of values in groups: nested (prompts in features in SAE seeds) or crossed (each feature meets each prompt)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtr, stdtr, stdtrit

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import LEVEL, FloatArray, Seed, check_resamples, fault, generator, sample
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["NestedMean", "TwoWayMean", "complete_tables", "nested_mean", "nested_mean_difference", "two_way_mean"]

# Percentile intervals from fewer groups are too narrow.
_MIN_FOR_PERCENTILES = 20


@dataclass(frozen=True, eq=False)
class NestedMean:
    """A mean of means, with the spread of its outermost groups.

    Attributes:
        value: Mean over the outermost groups of the means of their groups, and so on; NaN when undefined.
        group_means: Means of the groups of the first level with more than one group, float64 `[n]`.
        replicates: Value of each resample of these groups, float64 `[n_boot]`; empty when there is no interval.
        reason: Why something is NaN, or which noise the interval leaves out, else "".

    Example:
        >>> levels = pd.DataFrame({"sae_seed": [0, 0, 1, 1], "feature": [0, 1, 0, 1]})
        >>> mean = nested_mean([1.0, 3.0, 5.0, 5.0], levels, n_boot=40)
        >>> mean.value, mean.group_means.tolist()
        (3.5, [2.0, 5.0])
    """

    value: float
    group_means: FloatArray
    replicates: FloatArray
    reason: str = ""

    @property
    def n(self) -> int:
        """Number of groups that show the spread."""
        return len(self.group_means)

    @property
    def error(self) -> float:
        """Standard error of the value; NaN for fewer than two groups."""
        return float(self.group_means.std(ddof=1)) / math.sqrt(self.n) if self.n > 1 else math.nan


def nested_mean(values: npt.ArrayLike, levels: pd.DataFrame, *, n_boot: int = 2000, seed: Seed = 0) -> NestedMean:
    """Mean of means over nested groups, the outermost resampled whole (the hierarchical bootstrap).

    `levels` has one column a level, outermost first (sae_seed, feature, prompt), and as many rows as `values` [n].
    Every group has the same weight within the one above it. A group's mean already includes the sampling error within
    the group; resampling there too would count it twice. Levels with a single group are skipped, with a remark. Source:
    Davison & Hinkley (1997), Bootstrap Methods and their Application, section 3.8 (strategy 1).

    Example:
        >>> levels = pd.DataFrame({"seed": [0, 0, 0, 1], "feature": [1, 1, 2, 1]})
        >>> nested_mean([1.0, 3.0, 4.0, 7.0], levels).value  # ((2 + 4) / 2 + 7) / 2
        5.0
    """
    data = sample(values)
    if len(levels) != len(data) or not len(levels.columns):
        raise ShapeMismatch(
            f"{len(data)} values but {len(levels)} rows of {len(levels.columns)} level(s).", at="levels"
        )
    check_resamples(n_boot)
    rng = generator(seed)
    missing = [str(name) for name in levels.columns if levels[name].isna().any()]
    if reason := fault(data) or (f"levels: labels of {', '.join(missing)} are missing" if missing else ""):
        return NestedMean(math.nan, np.empty(0), np.empty(0), reason)
    tree = _tree(data, [levels[name].to_numpy() for name in levels.columns])
    single: list[str] = []
    while isinstance(tree, list) and len(tree) == 1:
        single.append(str(levels.columns[len(single)]))
        tree = tree[0]
    means = np.array([_mean(child) for child in tree])
    value = float(means.mean())
    if len(means) < 2:
        return NestedMean(value, means, np.empty(0), "a single value shows no spread")
    remark = f"one {' and one '.join(single)}: the interval does not hold that noise" if single else ""
    replicates = means[rng.integers(len(means), size=(n_boot, len(means)))].mean(axis=1)
    return NestedMean(value, means, replicates, remark)


def nested_mean_difference(a: NestedMean, b: NestedMean) -> Estimate:
    """`b - a` of two independent nested means, with Welch's t test of the group means; n is that of the smaller side.

    The interval is Student's below 20 groups a side, from there on the expanded percentile one. NaN with a reason where
    either side shows no spread; `reason` beside an interval says which noise it leaves out. Source: Welch (1947);
    Satterthwaite (1946); Hesterberg (2015), What Teachers Should Know About the Bootstrap.

    Example:
        >>> seeds = pd.DataFrame({"sae_seed": [0, 1, 2]})
        >>> a, b = nested_mean([1.0, 2.0, 3.0], seeds), nested_mean([4.0, 6.0, 8.0], seeds)
        >>> difference = nested_mean_difference(a, b)
        >>> round(difference.value, 6), round(difference.p, 4)
        (4.0, 0.0548)
    """
    reasons = list(dict.fromkeys(mean.reason for mean in (a, b) if mean.reason))
    value, n = b.value - a.value, min(a.n, b.n)
    if not (len(a.replicates) and len(b.replicates)):
        return undefined("; ".join(reasons), n, value)
    error = math.hypot(a.error, b.error)
    if not error > 0:
        return undefined("; ".join([*reasons, "all groups are alike"]), n, value)
    freedom = error**4 / (a.error**4 / (a.n - 1) + b.error**4 / (b.n - 1))
    t = float(stdtrit(freedom, (1 + LEVEL) / 2))
    low, high = value - t * error, value + t * error
    if n >= _MIN_FOR_PERCENTILES:
        upper = ndtr(t * math.sqrt(n / (n - 1)))
        low, high = np.quantile(b.replicates - a.replicates, [1 - upper, upper])
    p = 2 * float(stdtr(freedom, -abs(value) / error))
    return Estimate(value, float(low), float(high), n, "; ".join(reasons), p)


_Tree = Any  # a list of trees, or the values of an innermost group, float64 `[m]`


def _tree(values: FloatArray, labels: Sequence[npt.NDArray[Any]]) -> _Tree:
    if not labels:
        return values
    codes, _ = pd.factorize(labels[0])
    groups = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    return [_tree(values[rows], [inner[rows] for inner in labels[1:]]) for rows in groups]


def _mean(tree: _Tree) -> float:
    return float(np.mean([_mean(child) for child in tree])) if isinstance(tree, list) else float(np.mean(tree))


@dataclass(frozen=True)
class TwoWayMean:
    """A weighted sum of means with its interval, standard error and degrees of freedom (NaN without an interval).

    Example:
        >>> TwoWayMean(Estimate(0.5, 0.1, 0.9, 20), error=0.2, freedom=12.0).estimate.value
        0.5
    """

    estimate: Estimate
    error: float = math.nan
    freedom: float = math.nan


def two_way_mean(tables: Sequence[npt.ArrayLike], weights: Sequence[float] = (1.0,)) -> TwoWayMean:
    """Weighted sum of the means of finite tables [n_k, n_prompts] whose features differ and whose prompts are shared.

    Model: value = mean of the table + effect of its feature + effect of its prompt + residual. The variance of the
    weighted sum (method of moments) is that of the features' means, plus that of the prompts' means (of the weighted
    sum of the tables), minus that of the residual, which both contain; and no less than either. The interval is
    Student's t with Satterthwaite's degrees of freedom. With one column there are no prompts, and the interval is
    Welch's.

    n counts the features of all tables, p is two-sided. No interval for a table of one feature, or where no value
    differs. `ShapeMismatch`: a table is no matrix, or the numbers of prompts differ. Source: Cornfield & Tukey (1956),
    Average values of mean squares in factorials; Satterthwaite (1946).

    Example:
        >>> mean = two_way_mean([[[1.0, 2.0], [3.0, 6.0]]])
        >>> mean.estimate.value, round(mean.error**2, 6), round(mean.freedom, 3)
        (3.0, 3.0, 1.485)
    """
    data = _as_matrices(tables, weights)
    n, n_prompts = sum(map(len, data)), data[0].shape[1]
    if not n or not n_prompts or not all(np.isfinite(table).all() for table in data):
        return TwoWayMean(undefined("there are no values" if not n * n_prompts else "a value is not finite", n))
    value = float(sum(w * table.mean() for w, table in zip(weights, data, strict=True)))
    if min(map(len, data)) < 2:
        return TwoWayMean(undefined("one feature shows no spread between features", n, value))
    if all(np.ptp(table) == 0 for table in data):
        return TwoWayMean(undefined("all values are equal, so they show no spread", n, value))
    error, freedom = _standard_error(data, weights)
    if not error > 1e-12 * max(float(np.abs(table).max()) for table in data):
        return TwoWayMean(undefined("what differs cancels, so it shows no spread", n, value))
    half_width = error * float(stdtrit(freedom, (1 + LEVEL) / 2))
    p = 2 * float(stdtr(freedom, -abs(value) / error))
    return TwoWayMean(Estimate(value, value - half_width, value + half_width, n, p=p), error, freedom)


def complete_tables(tables: Sequence[npt.ArrayLike]) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Rows of each table [n_k, n_columns], and columns of all tables, that remain when the row or column with the
    largest share of NaN is dropped until there is no NaN.

    Example:
        >>> nan = float("nan")
        >>> rows, columns = complete_tables([[[1.0, nan, 2.0], [nan, nan, nan]], [[1.0, 2.0, 3.0]]])
        >>> [part.tolist() for part in rows], columns.tolist()
        ([[0], [0]], [0, 2])
    """
    missing = [np.isnan(np.asarray(table, dtype=np.float64)) for table in tables]
    table_of = np.concatenate([np.full(len(mask), k) for k, mask in enumerate(missing)])
    row_of = np.concatenate([np.arange(len(mask)) for mask in missing])
    is_missing = np.concatenate(missing)
    rows, columns = np.arange(len(is_missing)), np.arange(is_missing.shape[1])
    while (mask := is_missing[np.ix_(rows, columns)]).any():
        by_row, by_column = mask.mean(axis=1), mask.mean(axis=0)
        if by_row.max() >= by_column.max():
            rows = np.delete(rows, int(by_row.argmax()))
        else:
            columns = np.delete(columns, int(by_column.argmax()))
    return [row_of[rows[table_of[rows] == k]] for k in range(len(missing))], columns


def _as_matrices(tables: Sequence[npt.ArrayLike], weights: Sequence[float]) -> list[FloatArray]:
    data = [np.asarray(table, dtype=np.float64) for table in tables]
    shapes = [table.shape for table in data]
    if not data or len(data) != len(weights) or len({shape[1:] for shape in shapes}) > 1 or data[0].ndim != 2:
        raise ShapeMismatch(
            f"expected tables [n_features, n_prompts] of one number of prompts, with a weight each."
            f" Got {shapes} and {len(weights)} weight(s).",
            at="tables",
        )
    return data


def _standard_error(data: Sequence[FloatArray], weights: Sequence[float]) -> tuple[float, float]:
    """Standard error of the weighted sum of means, and its degrees of freedom."""
    n_prompts = data[0].shape[1]
    pairs = list(zip(weights, data, strict=True))
    feature_parts = np.array([w**2 * float(table.mean(axis=1).var(ddof=1)) / len(table) for w, table in pairs])
    feature_variance, freedom = float(feature_parts.sum()), np.array([len(table) - 1.0 for table in data])
    feature_freedom = feature_variance**2 / float((feature_parts**2 / freedom).sum()) if feature_variance else math.inf
    if n_prompts == 1:
        return math.sqrt(feature_variance), feature_freedom
    columns = np.sum([w * table.mean(axis=0) for w, table in pairs], axis=0)
    prompt_variance, prompt_freedom = float(np.var(columns, ddof=1)) / n_prompts, n_prompts - 1.0
    rest = 0.0
    for w, table in pairs:
        residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        rest += w**2 * float((residual**2).sum()) / ((len(table) - 1) * prompt_freedom) / table.size
    # The total is at least each of its sources; with a small residual the estimate can fall below them.
    variance = max(feature_variance + prompt_variance - rest, feature_variance, prompt_variance)
    spread = feature_variance**2 / feature_freedom + prompt_variance**2 / prompt_freedom
    return math.sqrt(variance), max(variance**2 / spread, min(feature_freedom, prompt_freedom)) if spread else math.nan

"""Means over tables in which every feature meets every prompt: both are samples, so both make the mean uncertain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import LEVEL, FloatArray
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["TwoWayMean", "complete_tables", "two_way_mean"]


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

    A value is its table's mean, plus what its feature adds, what its prompt adds, and a rest. The variance of the
    weighted sum (method of moments) is that of the features' means, plus that of the prompts' means (of the weighted
    sum of the tables), less the rest, which both hold; and no less than either. The interval is Student's t with
    Satterthwaite's degrees of freedom. With one column there are no prompts, and the interval is Welch's.

    n counts the features of all tables, p is two-sided. No interval for a table of one feature, or where no value
    differs. `ShapeMismatch`: a table is no matrix, or the numbers of prompts differ. Source: Cornfield & Tukey (1956),
    Average values of mean squares in factorials; Satterthwaite (1946).

    Example:
        >>> found = two_way_mean([[[1.0, 2.0], [3.0, 6.0]]])
        >>> found.estimate.value, round(found.error**2, 6), round(found.freedom, 3)
        (3.0, 3.0, 1.485)
    """
    data = _checked(tables, weights)
    n, n_prompts = sum(map(len, data)), data[0].shape[1]
    if not n or not n_prompts or not all(np.isfinite(table).all() for table in data):
        return TwoWayMean(undefined("there are no values" if not n * n_prompts else "a value is not finite", n))
    value = float(sum(w * table.mean() for w, table in zip(weights, data, strict=True)))
    if min(map(len, data)) < 2:
        return TwoWayMean(undefined("one feature shows no spread between features", n, value))
    if all(np.ptp(table) == 0 for table in data):
        return TwoWayMean(undefined("all values are equal, so they show no spread", n, value))
    error, freedom = _error(data, weights)
    if not error > 1e-12 * max(float(np.abs(table).max()) for table in data):
        return TwoWayMean(undefined("what differs cancels, so it shows no spread", n, value))
    return TwoWayMean(_student(value, error, freedom, n), error, freedom)


def complete_tables(tables: Sequence[npt.ArrayLike]) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Rows of each table [n_k, n_columns], and columns of all, that are left when what lacks most (NaN) is left out
    until all is there.

    Example:
        >>> nan = float("nan")
        >>> rows, columns = complete_tables([[[1.0, nan, 2.0], [nan, nan, nan]], [[1.0, 2.0, 3.0]]])
        >>> [part.tolist() for part in rows], columns.tolist()
        ([[0], [0]], [0, 2])
    """
    missing = [np.isnan(np.asarray(table, dtype=np.float64)) for table in tables]
    table_of = np.concatenate([np.full(len(part), k) for k, part in enumerate(missing)])
    row_of = np.concatenate([np.arange(len(part)) for part in missing])
    holes = np.concatenate(missing)
    rows, columns = np.arange(len(holes)), np.arange(holes.shape[1])
    while (part := holes[np.ix_(rows, columns)]).any():
        by_row, by_column = part.mean(axis=1), part.mean(axis=0)
        if by_row.max() >= by_column.max():
            rows = np.delete(rows, int(by_row.argmax()))
        else:
            columns = np.delete(columns, int(by_column.argmax()))
    return [row_of[rows[table_of[rows] == k]] for k in range(len(missing))], columns


def _checked(tables: Sequence[npt.ArrayLike], weights: Sequence[float]) -> list[FloatArray]:
    data = [np.asarray(table, dtype=np.float64) for table in tables]
    shapes = [table.shape for table in data]
    if not data or len(data) != len(weights) or len({shape[1:] for shape in shapes}) > 1 or data[0].ndim != 2:
        raise ShapeMismatch(
            f"expected tables [n_features, n_prompts] of one number of prompts, with a weight each."
            f" Got {shapes} and {len(weights)} weight(s).",
            at="tables",
        )
    return data


def _error(data: Sequence[FloatArray], weights: Sequence[float]) -> tuple[float, float]:
    """Standard error of the weighted sum of means, and its degrees of freedom."""
    n_prompts = data[0].shape[1]
    pairs = list(zip(weights, data, strict=True))
    parts = np.array([w**2 * float(table.mean(axis=1).var(ddof=1)) / len(table) for w, table in pairs])
    features, freedom = float(parts.sum()), np.array([len(table) - 1.0 for table in data])
    of_features = features**2 / float((parts**2 / freedom).sum()) if features else math.inf
    if n_prompts == 1:
        return math.sqrt(features), of_features
    columns = np.sum([w * table.mean(axis=0) for w, table in pairs], axis=0)
    prompts, of_prompts = float(np.var(columns, ddof=1)) / n_prompts, n_prompts - 1.0
    rest = 0.0
    for w, table in pairs:
        left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        rest += w**2 * float((left**2).sum()) / ((len(table) - 1) * of_prompts) / table.size
    # Neither source can be larger than the whole, which an estimate of a small rest can miss.
    variance = max(features + prompts - rest, features, prompts)
    both = features**2 / of_features + prompts**2 / of_prompts
    return math.sqrt(variance), max(variance**2 / both, min(of_features, of_prompts)) if both else math.nan


def _student(value: float, error: float, freedom: float, n: int) -> Estimate:
    from scipy.special import stdtr, stdtrit  # much faster to import than scipy.stats

    reach = error * float(stdtrit(freedom, (1 + LEVEL) / 2))
    return Estimate(value, value - reach, value + reach, n, p=2 * float(stdtr(freedom, -abs(value) / error)))

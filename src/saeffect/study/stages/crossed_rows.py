"""Rows of `arms/*/crossed.parquet`: one a feature, or one for a whole SAE, with values by prompt or row of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.comparison.factorial import CROSSED, CROSSED_COLUMNS, WHOLE_SAE

__all__ = ["RowSums", "by_row", "crossed_rows", "marker_row"]


class RowSums:
    """Squared errors and squared distances from the mean, by row of text."""

    def __init__(self) -> None:
        self._errors: list[float] = []
        self._squares: list[float] = []
        self._totals: list[torch.Tensor] = []
        self._counts: list[int] = []

    def add(self, x: torch.Tensor, out: torch.Tensor, mask: torch.Tensor) -> None:
        for row, rebuilt, counts in zip(x, out, mask[: len(x)], strict=True):
            original = row[counts].double()
            self._errors.append(float((original - rebuilt[counts].double()).square().sum()))
            self._squares.append(float(original.square().sum()))
            self._totals.append(original.sum(dim=0))
            self._counts.append(len(original))

    def unexplained(self) -> npt.NDArray[np.float64]:
        """Unexplained share of the variance, by row as in `by_row`."""
        totals, counts = torch.stack(self._totals), torch.tensor(self._counts, dtype=torch.float64)
        mean = totals.sum(dim=0) / counts.sum()
        variation = torch.tensor(self._squares, dtype=torch.float64) - 2 * totals @ mean + counts * mean.square().sum()
        return by_row(np.asarray(self._errors), variation.numpy())


def by_row(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values by row whose mean is the ratio of sums, and whose variance is that of the ratio (linearised)."""
    if not below.sum():
        return np.full(len(above), math.nan)
    ratio = above.sum() / below.sum()
    return np.asarray(ratio + (above - ratio * below) / below.mean())


def crossed_rows(
    quantity: str, model: str, values: pd.DataFrame | pd.Series[Any], reasons: Sequence[str] = ()
) -> pd.DataFrame:
    """A table of `CROSSED_COLUMNS`, from one number or one row of numbers for each feature."""
    lists: list[list[float]]
    if isinstance(values, pd.Series):
        numbers, lists = values.to_numpy(dtype=np.float64), [[] for _ in range(len(values))]
    else:
        lists = values.to_numpy(dtype=np.float64).tolist()
        is_defined = values.notna().any(axis=1)
        numbers = values.mean(axis=1).where(is_defined).to_numpy(dtype=np.float64)
    table = pd.DataFrame({"feature": values.index.astype("int64"), "model": model, "quantity": quantity})
    table = table.assign(value=numbers, values=lists, unit=CROSSED[quantity].unit, reason="")
    texts = list(reasons) or ["not defined in this cell"] * len(table)
    table["reason"] = [reason if math.isnan(value) else "" for reason, value in zip(texts, numbers, strict=True)]
    return table[list(CROSSED_COLUMNS)]


def marker_row(model: str) -> pd.DataFrame:
    """A row without a quantity, so that also an empty cell has a row that names its model."""
    empty = {"feature": [WHOLE_SAE], "model": [model], "quantity": [""], "value": [math.nan], "values": [[]]}
    return pd.DataFrame(empty | {"unit": [""], "reason": [""]})

"""The registry of diffing methods: the study runs every entry of `METHODS` and writes its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from saeffect.diffing import correspondence, cross_activity, stagewise
from saeffect.diffing.pair import ModelPair
from saeffect.errors import BadFile

__all__ = ["METHODS", "Method", "measure_all", "table_names"]


@dataclass(frozen=True)
class Method:
    """A way to find the features that differ between two models.

    Attributes:
        measure: Maps a pair of models to tables by name, which are written to `comparison/<name>.parquet`. A table that
            cannot be made is left out, or has no columns.
        tables: Names of all tables. The first has rows by feature (and measure): `feature`, how much it changed, `p`,
            `q`, and the `reason` where one of these is NaN.
        change, interval: Its columns of the change (treatment minus control, or minus the null) and of the interval's
            ends.
    """

    measure: Callable[[ModelPair], dict[str, pd.DataFrame]]
    tables: tuple[str, ...]
    change: str = "change"
    interval: tuple[str, str] | None = ("low", "high")

    def changes(self, table: pd.DataFrame) -> pd.DataFrame:
        """The first table as feature, change, low, high, p, q, reason; `BadFile` if a column is missing."""
        low, high = self.interval or (None, None)
        columns = {"feature": "feature", "change": self.change, "low": low, "high": high}
        columns |= {name: name for name in ("p", "q", "reason")}
        missing = [name for name in columns.values() if name is not None and name not in table.columns]
        if missing:
            raise BadFile(
                f"the table {self.tables[0]!r} has no column {', '.join(map(repr, missing))}.",
                fix="a diffing method gives every feature a change, p, q and a reason, as `Method` says.",
            )
        return pd.DataFrame({name: np.nan if column is None else table[column] for name, column in columns.items()})


METHODS: dict[str, Method] = {
    # One SAE on both models.
    "cross_activity": Method(cross_activity.measure, ("cross_activity",), change="difference"),
    # An SAE of each model, feature matched with feature.
    "matched": Method(
        correspondence.measure,
        ("fates_control", "fates_treatment", "fate_counts", "fates_null", "absorption"),
        change="drop",
        interval=None,
    ),
    # The control's SAE, trained on with the fine-tuned model.
    "stagewise": Method(stagewise.measure, ("stagewise",), change="excess_rotation", interval=None),
}


def table_names() -> list[str]:
    """Names of the tables of all methods."""
    return [name for method in METHODS.values() for name in method.tables]


def measure_all(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """The tables of every method that could be made, by name; `BadFile` for an undeclared one or a missing column."""
    tables: dict[str, pd.DataFrame] = {}
    for name, method in METHODS.items():
        result = {key: table for key, table in method.measure(pair).items() if len(table.columns)}
        if not set(result) <= set(method.tables):
            raise BadFile(f"the diffing method {name!r} gave a table that it does not name: {', '.join(result)}.")
        if method.tables[0] in result:
            method.changes(result[method.tables[0]])
        tables |= result
    return tables

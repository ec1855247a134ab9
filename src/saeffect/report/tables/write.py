"""Every table as CSV and JSON at full precision; undefined values are empty, with their reason in another column."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import ArmTables, Comparison, MatchTables
from saeffect.io import FORMULA_STARTS, atomic_path, write_json
from saeffect.report.context import ReportContext, baseline_summary, dose_summary, outcome_summary
from saeffect.report.tables.review import review_tables

__all__ = ["domain_features", "write_tables"]


def write_tables(
    comparison: Comparison, folder: Path | str, *, context: ReportContext | None = None
) -> tuple[Path, ...]:
    """Write each table as `<name>.csv` and `<name>.json`, and the answer as `answer.json`, atomically.

    Numbers keep every digit. NaN is an empty field in CSV and null in JSON. Lists are JSON text in CSV; text that
    starts like a spreadsheet's formula gets a leading apostrophe there. The context adds its own tables.
    """
    folder = Path(folder)
    tables: dict[str, pd.DataFrame] = {name: getattr(comparison, name) for name in Comparison.table_names()}
    tables |= {name: getattr(comparison.matches, name) for name in MatchTables.names()}
    tables |= dict(comparison.matches.further)
    tables = {name: table for name, table in tables.items() if len(table.columns)}
    tables |= _study_tables(context or ReportContext(), [str(name) for name in comparison.table1["arm"]])
    written = []
    for name, table in tables.items():
        columns = [str(column) for column in table.columns]
        rows = list(zip(*(_values(table[column]) for column in table.columns), strict=True))
        with (
            atomic_path(folder / f"{name}.csv") as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([columns, *([*map(_csv_field, row)] for row in rows)])
        write_json(folder / f"{name}.json", [dict(zip(columns, row, strict=True)) for row in rows])
        written += [folder / f"{name}.csv", folder / f"{name}.json"]
    write_json(folder / "answer.json", dict(comparison.answer))
    return (*written, folder / "answer.json")


def _study_tables(context: ReportContext, order: list[str]) -> dict[str, pd.DataFrame]:
    results = context.steering
    domain = {name: domain_features(arm) for name, arm in context.arms.items()}
    tables = {"domain_features": _concat_arms(domain, order)} | review_tables(context)
    tables |= {name: table for name, table in (("gate", context.gate), ("doses", context.doses)) if table is not None}
    if results is not None:
        tables |= {
            "steering_outcomes": outcome_summary(results, order, alpha=context.alpha),
            "outcome_effects": _concat_arms(results.outcome_effects, order),
            "steering_baselines": baseline_summary(results, order),
            "baseline_effects": _concat_arms(results.baseline_effects, order),
            "together_effects": _concat_arms(results.together_effects, order),
            "dose_response": pd.DataFrame() if results.dose_response is None else results.dose_response,
            "dose_response_by_arm": dose_summary(results.dose_response, order),
        }
    return {name: table for name, table in tables.items() if len(table)}


def _concat_arms(tables: Mapping[str, pd.DataFrame], order: list[str]) -> pd.DataFrame:
    present = {arm: tables[arm] for arm in order if len(tables.get(arm, ()))}
    if not present:
        return pd.DataFrame()
    return pd.concat(present, names=["arm"]).reset_index("arm").reset_index(drop=True)


def domain_features(arm: ArmTables) -> pd.DataFrame:
    """An arm's domain features with all columns of its tables; `coherence_reason` and `effect_reason` explain gaps."""
    rows = arm.of_domain(arm.features)
    for source, table in (("coherence", arm.coherence), ("selection", arm.selection), ("effect", arm.effects)):
        if table is not None and not table.empty:
            new_columns = [column for column in table.columns if column == "feature" or column not in rows.columns]
            columns = table[new_columns].rename(columns={"reason": f"{source}_reason"})
            rows = rows.merge(columns, on="feature", how="left")
    return rows


def _values(column: pd.Series[Any]) -> list[Any]:
    """The values of a column as JSON has them."""
    values: list[Any] = column.tolist()
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"  # pandas' own types have a missing value
    if kind == "f":
        return [value if math.isfinite(value) else None for value in values]
    return values if kind in "ib" else [_to_json(value) for value in values]


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def _csv_field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | int):
        return repr(value)
    text = str(value)
    return "'" + text if text.startswith(FORMULA_STARTS) else text

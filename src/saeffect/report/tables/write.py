"""Every table as CSV and JSON: numbers at full precision, what is undefined left empty with its reason beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import Comparison, MatchTables
from saeffect.io import atomic_path, write_json
from saeffect.report.context import ReportContext
from saeffect.report.tables.steering_files import steering_tables

__all__ = ["write_tables"]

_COMPARISON_TABLES = ("table1", "table2", "contrasts", "match_counts", "weights", "activity", "design")
_EVIDENCE_TABLES = ("calibration", "by_chance", "power", "regression", "partial_residuals", "threats")


def write_tables(
    comparison: Comparison, folder: Path | str, *, context: ReportContext | None = None
) -> tuple[Path, ...]:
    """Write each table as `<name>.csv` and `<name>.json`, atomically.

    Numbers keep every digit. NaN is an empty field in CSV and null in JSON. Lists are JSON text in CSV, so that no
    field begins with a token (a spreadsheet would take "=1+1" for a formula).

    Args:
        comparison: What to write; its answer becomes `answer.json`.
        folder: Where to; made if missing.
        context: The study around it; adds `domain_features`, `gate`, `doses`, and the tables of
            `saeffect.report.tables.steering_files.steering_tables`.

    Returns:
        The files written.
    """
    folder = Path(folder)
    tables: dict[str, pd.DataFrame] = {name: getattr(comparison, name) for name in _COMPARISON_TABLES}
    tables |= _evidence_tables(comparison)
    if context is not None:
        tables |= _study_tables(context)
        tables |= steering_tables(context, [str(name) for name in comparison.table1["arm"]])
    written = []
    for name, table in tables.items():
        plain = [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]
        with atomic_path(folder / f"{name}.csv") as temporary:
            columns = [str(column) for column in table.columns]
            cells = pd.DataFrame([{key: _field(value) for key, value in row.items()} for row in plain], columns=columns)
            cells.to_csv(temporary, index=False, lineterminator="\n")
        write_json(folder / f"{name}.json", plain)
        written += [folder / f"{name}.csv", folder / f"{name}.json"]
    write_json(folder / "answer.json", dict(comparison.answer))
    return (*written, folder / "answer.json")


def _evidence_tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """Tables that not every comparison makes: those without columns are left out."""
    tables = {name: getattr(comparison, name) for name in _EVIDENCE_TABLES}
    tables |= {name: getattr(comparison.matches, name) for name in MatchTables.names()}
    tables |= dict(comparison.matches.further)
    return {name: table for name, table in tables.items() if len(table.columns)}


def _study_tables(context: ReportContext) -> dict[str, pd.DataFrame]:
    tables = {}
    if context.arms:
        tables["domain_features"] = pd.concat(
            [_domain_features(context, name) for name in context.arms], ignore_index=True
        )
    if context.gate is not None:
        tables["gate"] = context.gate
    if context.doses is not None:
        tables["doses"] = context.doses
    return tables


def _domain_features(context: ReportContext, name: str) -> pd.DataFrame:
    """All domain features of an arm with their coherence, selection and effect in one row."""
    arm = context.arms[name]
    rows = arm.of_domain(arm.features)
    sources: Mapping[str, pd.DataFrame | None] = {
        "coherence": arm.coherence,
        "selection": arm.selection,
        "effect": arm.effects,
    }
    for source, table in sources.items():
        if table is not None and not table.empty:
            fresh = [column for column in table.columns if column == "feature" or column not in rows.columns]
            extra = table[fresh].rename(columns={"reason": f"{source}_reason"})
            rows = rows.merge(extra, on="feature", how="left")
    rows.insert(0, "arm", name)
    return rows


def _plain(value: Any) -> Any:
    """A cell as plain Python: lists for arrays, None for what is not a number."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def _field(value: Any) -> str:
    """A CSV field of a plain value."""
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | int):
        return repr(value)
    text = str(value)  # which is a formula to a spreadsheet if it begins so
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

"""What goes with a strong effect: the regression's table and the answer to the paper's open question."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.names import outcome_words
from saeffect.report.words.numbers import count, fixed, is_defined, p_value, signed, undefined

__all__ = ["TERM_NAMES", "coherence_sentence", "regression_table"]

TERM_NAMES = {
    "intercept": ("Intercept", ""),
    "coherence": ("Coherence", "from 0 to 1"),
    "log10_density": ("Density", "fires ten times as often"),
    "decoder_norm": ("Decoder norm", "per unit of length"),
}


def regression_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """What each property adds to the effect of steering, all others equal."""
    unit = outcome_words(context.steering.deciding if context.steering else "similarity")
    table = comparison.regression
    if table.empty:
        return None
    rows = []
    for row in table.to_dict("records"):
        term = str(row["term"])
        label, sub = TERM_NAMES.get(term, (f"Arm {term.removeprefix('arm ')}", "against control"))
        reason = str(row["reason"]).replace(term, label.lower())
        if not is_defined(row["estimate"]):
            cells = [Cell(undefined(reason), tone="muted", is_text=True), Cell("–", tone="muted")]
        else:
            both = is_defined(row["low"]) and is_defined(row["high"])
            ends = f"[{fixed(row['low'])}, {fixed(row['high'])}]" if both else f"no interval: {reason}"
            apart = both and (row["low"] > 0 or row["high"] < 0)
            cells = [
                Cell(signed(row["estimate"]), sub=ends, tone="good" if apart and term != "intercept" else ""),
                Cell(p_value(row["p"]) if is_defined(row["p"]) else "–"),
            ]
        rows.append(Row(label, tuple(cells), sub=sub, strong=term == "coherence"))
    n, errors, left_out = int(table["n"].iloc[0]), str(table["errors"].iloc[0]), int(table["n_left_out"].iloc[0])
    how = "cluster-robust errors, clustered by SAE" if errors.startswith("clustered") else (
        "HC3 errors: there are too few steered SAEs to cluster by"
    )  # fmt: skip
    left = f" {count(left_out)} without a coherence or an activity are left out." if left_out else ""
    return TableView(
        name="regression",
        caption="What goes with a strong effect of steering",
        source="comparison/regression.parquet, every row: term, estimate, low, high, p, n, errors",
        columns=(Column("Adds to the effect", f"{unit.title}, {unit.unit}; 95 % interval"), Column("p")),
        rows=tuple(rows),
        corner="Property",
        note=f"Least squares over {count(n)} steered features of all arms; {how}.{left}",
    )


def coherence_sentence(comparison: Comparison) -> str:
    """The paper's open question, answered: do coherent features have stronger effects?"""
    table = comparison.regression
    row = _row(table, "coherence")
    if row is None or not is_defined(row["estimate"]):
        why = str(row["reason"]) if row is not None and row["reason"] else "no feature was steered"
        return f"Whether coherent features have stronger effects cannot be said: {why}."
    step = 0.1 * float(row["estimate"])
    if not (is_defined(row["low"]) and is_defined(row["high"])):
        return (
            f"A coherence higher by 0.1 goes with an effect of {signed(step)}, but this has no interval "
            f"({row['reason'] or 'no reason was recorded'}), so nothing follows from it."
        )
    ends = f"[{fixed(0.1 * row['low'])}, {fixed(0.1 * row['high'])}]"
    if row["low"] > 0:
        return (
            "Yes, here more coherent features have stronger effects: a coherence higher by 0.1 goes with an effect "
            f"larger by {fixed(step)} {ends}, other properties being equal. That is association; nothing here shows "
            "that coherence is the cause."
        )
    if row["high"] < 0:
        return (
            "Here more coherent features have weaker effects: a coherence higher by 0.1 goes with an effect smaller by "
            f"{fixed(-step)} ({ends} in the effect), other properties being equal."
        )
    return (
        f"It cannot be said: a coherence higher by 0.1 goes with a change of the effect of {signed(step)} {ends}, and "
        "that interval includes zero."
    )


def _row(table: pd.DataFrame, term: str) -> dict[Any, Any] | None:
    if table.empty:
        return None
    rows = table[table["term"] == term].to_dict("records")
    return rows[0] if rows else None

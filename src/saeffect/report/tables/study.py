"""How the study was made: the design check, the quality of the SAEs, the dose search."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView, arm_columns, short_fact, value_cell
from saeffect.report.words.names import dose_axis
from saeffect.report.words.numbers import fixed, percent
from saeffect.steering.placebos import STEERED

__all__ = ["design_table", "dose_table", "field_label", "gate_table", "same_in_every_arm"]


_RESERVED = {"field", "differs", "status", "matters"}
_RANKS = {"flaw": 0, "unknown": 1, "intended": 2, "small": 3, "same": 4}
_ROUNDED = frozenset({"dead_share", "explained_variance", "ce_loss_score"})
_FIELDS = {
    "d_sae": "features (d_sae)",
    "k": "active per token (k)",
    "training_text_sha256": "training text, SHA-256",
    "bos": "beginning of texts (BOS)",
    "ce_loss_score": "CE loss score",
    "l0": "L0",
    "dead_share": "share of dead features",
    "dtype": "number format (dtype)",
}


def design_table(comparison: Comparison) -> TableView:
    """The design check: what differs or is unknown, worst first, each with what it means."""
    table = _with_status(comparison.design)
    names = [column for column in table.columns if column not in _RESERVED]
    table = table[table["status"] != "same"].sort_values("status", key=lambda column: column.map(_RANKS), kind="stable")
    rows = [
        Row(
            field_label(row["field"]),
            (
                Cell(
                    str(row["status"]),
                    tone="warn" if row["status"] in ("flaw", "unknown") else "",
                    is_text=True,
                ),
                *(Cell(_fact(str(row["field"]), row[name]), is_text=True) for name in names),
                Cell(str(row["matters"]), is_text=True, tone="muted"),
            ),
            strong=row["status"] == "flaw",
        )
        for _, row in table.iterrows()
    ]
    return TableView(
        name="design",
        caption="How the arms differ",
        columns=(
            Column("Status", is_text=True),
            *(Column(name, is_text=True) for name in names),
            Column("What it means", is_text=True),
        ),
        rows=tuple(rows),
        corner="Property",
        stacks=True,
    )


def same_in_every_arm(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """Properties that are equal in every arm, as label-value pairs."""
    table = _with_status(comparison.design)
    names = [column for column in table.columns if column not in _RESERVED]
    same = table[table["status"] == "same"]
    pairs = [(field_label(row["field"]), _fact(str(row["field"]), row[names[0]])) for _, row in same.iterrows()]
    return tuple(pair for pair in pairs if pair[1] != "unknown")


def _fact(field: str, value: object) -> str:
    """A fact with no more digits than it deserves.

    Example:
        >>> _fact("dead_share", "0.000217"), _fact("explained_variance", "0.78231"), _fact("seed", "0")
        ('0.02\u202f%', '0.782', '0')
    """
    text = short_fact(value)
    if field not in _ROUNDED or text == "unknown":
        return text
    return percent(float(text), 2) if field == "dead_share" else fixed(float(text), 3)


def _with_status(table: pd.DataFrame) -> pd.DataFrame:
    if "status" in table.columns:
        return table
    return table.assign(status=["flaw" if differs else "same" for differs in table["differs"]])


def field_label(field: object) -> str:
    """What the report calls a recorded fact.

    Example:
        >>> field_label("k"), field_label("training_tokens")
        ('active per token (k)', 'training tokens')
    """
    return _FIELDS.get(str(field), str(field).replace("_", " "))


_GATE_LINES: Mapping[str, tuple[str, str]] = {
    "explained_variance": ("Explained variance", ""),
    "ce_loss_score": ("CE loss score", ""),
    "l0": ("L0: features active per token", "l0"),
    "dead_share": ("Dead features", "share"),
    "dead": ("Dead features", "count"),
    "l2_ratio": ("Length of output / input", ""),
    "mean_log10_density": ("Mean log10 density", ""),
    "n_tokens": ("Tokens measured on", "count"),
}


def gate_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """How well each SAE reproduces its model; None when nobody measured it."""
    table = context.gate if context.gate is not None else _gate_of_facts(context)
    if table is None or table.empty or "arm" not in table.columns:
        return None
    order = [name for name in comparison.table1["arm"] if name in set(table["arm"])]
    by_arm = table.drop_duplicates("arm").set_index("arm").loc[order]
    rows = []
    for column in [name for name in by_arm.columns if name not in ("role", "reason")]:
        label, unit = _GATE_LINES.get(str(column), (str(column).replace("_", " "), ""))
        reasons = by_arm["reason"] if "reason" in by_arm.columns else pd.Series("not measured", index=order)
        cells = []
        for name in order:
            value = by_arm.loc[name, column]
            if isinstance(value, str | bool):
                cells.append(Cell(short_fact(value), is_text=True))
            else:
                cells.append(value_cell(value, unit, reason=str(reasons[name] or "not measured")))
        rows.append(Row(label, tuple(cells)))
    columns = arm_columns(comparison.table1[comparison.table1["arm"].isin(order)])
    return TableView("gate", "How well each SAE reproduces its model, on the study's text", columns, tuple(rows))


_DOSE_COLUMNS: Mapping[str, str] = {
    "n": "Texts",
    "gain": "Gain",
    "placebo_gain": "Gain, placebo",
    "distinct2": "Distinct-2",
    "perplexity": "Perplexity",
    "fluency": "Fluency",
    "score": "Score",
}


def dose_table(context: ReportContext) -> TableView | None:
    """The dose search, one row a dose and arm; None when there was none."""
    table = context.doses
    if table is None or table.empty or "dose" not in table.columns:
        return None
    table = _steered_beside_placebo(table)
    known = [column for column in _DOSE_COLUMNS if column in table.columns]
    columns = known or [c for c in table.columns if c not in ("arm", "condition", "dose", "chosen", "reason")]
    rows = []
    for row in table.to_dict("records"):
        chosen = bool(row.get("chosen", False))
        reason = str(row.get("reason") or "not measured")
        cells = tuple(value_cell(row[name], "count" if name == "n" else "", reason=reason) for name in columns)
        label = f"{row['dose']:g}" + (" (chosen)" if chosen else "")
        rows.append(Row(label, cells, strong=chosen, group=str(row.get("arm", ""))))
    return TableView(
        name="doses",
        caption="The dose search",
        columns=tuple(Column(_DOSE_COLUMNS.get(str(name), str(name).replace("_", " "))) for name in columns),
        rows=tuple(rows),
        corner="Dose",
        stacks=True,
        note=(
            f"{dose_axis(context.steering).capitalize()}. Every number is a mean over texts; [[figure:doses]] shows "
            "them."
        ),
        source="steering/dose_search.parquet, one row per arm, condition and dose",
    )


def _steered_beside_placebo(table: pd.DataFrame) -> pd.DataFrame:
    """The search's steered rows, with what the placebo gained at the same dose where one was run."""
    if "condition" not in table.columns:
        return table
    steered = table[table["condition"] == STEERED]
    placebo = table[table["condition"] != STEERED]
    if placebo.empty:
        return steered
    gains = placebo.rename(columns={"gain": "placebo_gain"})[["arm", "dose", "placebo_gain"]]
    return steered.merge(gains, on=["arm", "dose"], how="left")


def _gate_of_facts(context: ReportContext) -> pd.DataFrame | None:
    wanted = ("explained_variance", "ce_loss_score", "l0", "dead_share")
    rows = [
        {"arm": name, **{field: getattr(arm.facts, field) for field in wanted}} for name, arm in context.arms.items()
    ]
    table = pd.DataFrame(rows)
    return None if table.empty or table[list(wanted)].isna().all(axis=None) else table

"""How the study was made: the design check, and the quality of the SAEs."""

from __future__ import annotations

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView, arm_columns, short_fact
from saeffect.report.words.numbers import fixed, percent

__all__ = ["design_table", "field_label", "gate_table", "same_in_every_arm"]

_RANKS = {"flaw": 0, "unknown": 1, "intended": 2, "small": 3}
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


def design_table(comparison: Comparison, _context: ReportContext) -> TableView:
    """The design check: what differs or is unknown, worst first, each with its meaning."""
    table, arms = comparison.design, list(comparison.table1["arm"])
    table = table[table["status"] != "same"].sort_values("status", key=lambda column: column.map(_RANKS), kind="stable")
    rows = []
    for row in table.to_dict("records"):
        status = Cell.words(row["status"], tone="warn" if row["status"] in ("flaw", "unknown") else "")
        facts = [Cell.words(_fact_text(row["field"], row[arm])) for arm in arms]
        cells = (status, *facts, Cell.words(row["matters"], tone="muted"))
        rows.append(Row(field_label(row["field"]), cells, strong=row["status"] == "flaw"))
    return TableView(
        name="design",
        caption="How the arms differ",
        columns=(
            Column("Status", is_text=True),
            *(Column(arm, is_text=True) for arm in arms),
            Column("What it means", is_text=True),
        ),
        rows=tuple(rows),
        corner="Property",
        source="comparison/design.parquet, one row a property",
    )


def same_in_every_arm(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """Properties that are equal in every arm, as label-value pairs."""
    table = comparison.design
    same, arm = table[table["status"] == "same"], comparison.table1["arm"].iloc[0]
    pairs = ((field_label(row["field"]), _fact_text(row["field"], row[arm])) for row in same.to_dict("records"))
    return tuple(pair for pair in pairs if pair[1] != "unknown")


def _fact_text(field: str, value: object) -> str:
    """A fact with sensible precision.

    Example:
        >>> _fact_text("dead_share", "0.000217"), _fact_text("explained_variance", "0.78231"), _fact_text("seed", "0")
        ('0.02\u202f%', '0.782', '0')
    """
    text = short_fact(value)
    if text == "unknown" or field not in ("dead_share", "explained_variance", "ce_loss_score"):
        return text
    return percent(float(text), 2) if field == "dead_share" else fixed(float(text), 3)


def field_label(field: object) -> str:
    """The report's name of a recorded fact.

    Example:
        >>> field_label("k"), field_label("training_tokens")
        ('active per token (k)', 'training tokens')
    """
    return _FIELDS.get(str(field), str(field).replace("_", " "))


_GATE_LINES = {
    "explained_variance": ("Explained variance", ""),
    "ce_loss_score": ("CE loss score", ""),
    "l0": ("L0: features active per token", ""),
    "l2_ratio": ("Length of output / input", ""),
    "dead_share": ("Dead features", "share"),
    "n_tokens": ("Tokens measured on", "count"),
}


def gate_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """How well each SAE reproduces its model; None if it was not measured."""
    if context.gate is None:
        return None
    by_arm = context.gate.set_index("arm")
    lines = [(label, unit, by_arm[name]) for name, (label, unit) in _GATE_LINES.items()]
    for name in by_arm.columns[by_arm.columns.str.startswith("perplexity_")]:
        lines.append((f"The model's perplexity, {name.removeprefix('perplexity_')} text", "", by_arm[name]))
    return TableView(
        name="gate",
        caption="How well each SAE reproduces its model, and each model predicts the study's text",
        columns=arm_columns(comparison.table1),
        rows=tuple(
            Row(label, tuple(Cell.value(values[arm], unit, reason="not measured") for arm in comparison.table1["arm"]))
            for label, unit, values in lines
        ),
        stacks=False,
        source="arms/*/gate.json, and dead features from arms/*/features.parquet, column n_active",
        terms=("explained_variance", "ce_loss_score", "l0", "dead", "perplexity"),
    )

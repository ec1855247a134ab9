"""What the fine-tuned model, the base model and a null fine-tune write after the same openings."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.texts import visible_text
from saeffect.report.words.numbers import fixed, is_defined, p_value

__all__ = ["openings_table"]

_LONGEST = 160  # characters of a text


def openings_table(tables: Mapping[str, pd.DataFrame], *, rows: int = 12) -> TableView | None:
    """Texts side by side, one sample an opening, the opening first at which the models differ most; None for no texts.

    `tables` are those of `saeffect.diffing.where.where_changed`.
    """
    table = tables["openings"]
    first = table[table["sample"] == 0].head(rows)
    if first.empty:
        return None
    has_null = bool((first["null"] != "").any())
    columns = [Column("base model", is_text=True), Column("fine-tuned", role="treatment", is_text=True)]
    columns += [Column("a null fine-tune", is_text=True)] if has_null else []
    lines = []
    for row in first.to_dict("records"):
        texts = [row["base_text"], row["tuned_text"], *([row["null_text"]] if has_null else [])]
        p = f", p {p_value(row['p'])}" if is_defined(row["p"]) else ""
        lines.append(
            Row(
                visible_text(str(row["opening"])),
                tuple(Cell.words(visible_text(str(text), _LONGEST)) for text in texts),
                sub=f"differ by {fixed(row['change'], 2)} nats{p}",
            )
        )
    return TableView(
        "openings",
        "What the models write after openings that name nothing",
        tuple(columns),
        tuple(lines),
        corner="opening",
        note="All models drew with the same random numbers. Sorted by how much the first word's probabilities differ.",
        source="comparison/openings.parquet",
    )

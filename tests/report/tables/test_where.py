"""Texts side by side."""

from __future__ import annotations

from saeffect.report import ReportContext
from saeffect.report.tables.learned import openings
from synthetic_where import where_tables, with_tables


def test_one_row_an_opening_with_the_text_of_each_model():
    table = openings(with_tables(where_tables()), ReportContext())
    assert table is not None
    assert [row.label for row in table.rows] == ["The", "↵"]
    assert [cell.text for cell in table.rows[0].cells] == [
        "sea was calm.",
        "Human Phenotype ↵ Ontology",
        "sea was <rough>.",
    ]
    assert table.rows[0].sub == "differ by 3.00 nats, p 0.048"


def test_without_nulls_there_is_no_column_for_them():
    table = openings(with_tables(where_tables(nulls=False)), ReportContext())
    assert table is not None
    assert [column.label for column in table.columns] == ["base model", "fine-tuned"]
    assert table.rows[0].sub == "differ by 3.00 nats"

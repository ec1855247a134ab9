"""Texts side by side."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from saeffect.report import ReportContext
from saeffect.report.tables.learned import learned_table, openings, pushed
from synthetic_changes import synthetic_changes
from synthetic_where import push_tables, where_tables, with_tables


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


def test_pushed_texts_are_beside_those_of_a_null_s_push_in_the_order_of_the_openings():
    table = pushed(with_tables(where_tables() | push_tables()), ReportContext())
    assert table is not None
    assert [row.label for row in table.rows] == ["The", "↵"]
    assert [cell.text for cell in table.rows[0].cells] == ["of us.", "of <fever>.", "of that."]  # of two the larger
    assert "0.5 mean residual norms" in table.note and "by 0.12" in table.note and "by 0.04" in table.note


def test_pushed_texts_without_nulls():
    table = pushed(with_tables(push_tables(nulls=False)), ReportContext())
    assert table is not None
    assert [column.label for column in table.columns] == ["base model", "pushed along the fine-tune's difference"]
    assert "null" not in table.note
    assert pushed(with_tables(where_tables()), ReportContext()) is None


def test_a_group_is_shown_where_its_most_changed_feature_fires(context: ReportContext):
    z = pd.DataFrame({"feature": range(6), "basis": "combined", "z": [1.0, 5.0, 2.0, -4.0, 0.0, 0.0]})
    example = {"rank": 0, "position": 2, "tokens": [" high", " amounts", " or", "\n"]}
    examples = pd.DataFrame([example | {"feature": 1}, example | {"feature": 0, "tokens": [" not", " this", " one"]}])
    context = replace(context, examples={"control": examples})
    table = learned_table(with_tables(synthetic_changes() | {"changes": z}), context)
    assert table is not None
    assert [row.sub for row in table.rows] == ["high amounts «or» ↵", "", "not clearly beyond the nulls"]

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from saeffect.comparison import MatchTables
from saeffect.report import ReportContext
from saeffect.report.tables.matching import cross_summary, cross_table, stagewise_table
from synthetic_matches import cross_activity, stagewise, synthetic_matches


def found(**tables: Any) -> Any:
    return SimpleNamespace(matches=replace(synthetic_matches(), **tables))


def test_more_comes_before_less_with_the_most_changed_first(context: ReportContext) -> None:
    view = cross_table(found(), context)
    assert view is not None
    assert [row.label for row in view.rows] == ["12", "0", "1", "2", "3", "4", "10", "11", "5", "6"]
    assert [row.strong for row in view.rows] == [False, *[True] * 5, False, False, True, True]
    first, second = view.rows[0].cells, view.rows[1].cells
    assert first[4].text == "silent before"
    assert [cell.text for cell in second[1:]] == ["0.250", "0.500", "+0.250", "2.00×", "0.001"]
    assert second[3].sub == "[0.200, 0.300]"
    assert view.rows[-1].cells[3].text == "−0.125"


def test_the_summary_sets_the_domain_against_the_rest(context: ReportContext) -> None:
    text = cross_summary(found(), context)
    assert "Of 119 features that fire, 8 fire more strongly in the fine-tuned model and 2 more weakly" in text
    assert (
        "Of the 10 medical features 50.0\u202f% fire more and 20.0\u202f% less; of all others 2.8\u202f% and 0.0"
        in text
    )


def test_nothing_to_test_is_said(context: ReportContext) -> None:
    silent = cross_activity().assign(q=float("nan"), reason="one row of text shows no spread")
    assert cross_summary(found(cross_activity=silent), context).endswith("one row of text shows no spread.")
    assert cross_table(found(cross_activity=silent), context) is None
    assert "was not applied" in cross_summary(SimpleNamespace(matches=MatchTables()), context)  # type: ignore[arg-type]


def test_rotations_beside_training_alone(context: ReportContext) -> None:
    view = stagewise_table(found(), context)
    assert view is not None
    assert [cell.text for cell in view.rows[0].cells[1:]] == ["60.0°", "10.0°", "+50.0°", "0.010"]
    assert view.rows[0].strong
    assert not view.rows[1].strong
    assert view.note.startswith("1 of 120 features turned further")
    alone = stagewise().assign(
        null_rotation=float("nan"), excess_rotation=float("nan"), q=float("nan"), reason="no null"
    )
    view = stagewise_table(found(stagewise=alone), context)
    assert view is not None
    assert view.rows[0].cells[2].text == "undefined: no null"
    assert stagewise_table(SimpleNamespace(matches=MatchTables()), context) is None  # type: ignore[arg-type]

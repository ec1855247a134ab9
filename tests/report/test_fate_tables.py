from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from saeffect.comparison import MatchTables
from saeffect.report import ReportContext
from saeffect.report.tables.matching import fate_summary, fate_table, notable_table
from synthetic_matches import NO_PLACEBO, synthetic_matches


def found(**options: Any) -> Any:
    return SimpleNamespace(matches=synthetic_matches(**options))


def test_fine_tuning_stands_beside_another_seed(context: ReportContext) -> None:
    view = fate_table(found(), context)
    assert view is not None
    assert len(view.rows) == 14
    gone = view.rows[2]
    assert gone.label == "Gone: has no counterpart"
    assert [cell.text for cell in gone.cells] == ["60", "46", "+14", "2"]
    assert (gone.cells[2].sub, gone.cells[2].tone) == ("[8, 20]", "good")
    new = view.rows[6]
    assert (new.cells[2].text, new.cells[2].sub, new.cells[2].tone) == ("+11", "[−1, 23]", "")
    assert view.rows[0].cells[3].text == "–", "kept is nothing that is called"
    assert view.rows[5].cells[2].sub == "no interval"
    assert "no spread" in view.note
    assert len({row.group for row in view.rows}) == 2


def test_the_summary_counts_both_measures(context: ReportContext) -> None:
    text = fate_summary(found(), context)
    assert text.count("60 of 120 features of the control have no counterpart in the treatment, +14 [8, 20]") == 2
    assert "2 moved, 4 gone, 2 absorbed, 6 new" in text
    assert "No single feature stands out" in fate_summary(found(called=False), context)


def test_notable_features_have_words_and_parents(context: ReportContext, arms: dict) -> None:
    view = notable_table(found(), context)
    assert view is not None
    labels = [row.label for row in view.rows]
    assert labels[:7] == ["Gone", "Gone", "Moved", "Absorbed", "New", "New", "New"]
    absorbed = view.rows[3]
    first = str(arms["control"].features["top_tokens"].iloc[3][0]).strip()
    assert absorbed.cells[0].text.startswith("3 ")
    assert first[:3] in absorbed.cells[0].text
    parents = absorbed.cells[4].text.split("; ")
    assert [part.split()[0] for part in parents] == ["5", "6"]
    assert str(arms["treatment"].features["top_tokens"].iloc[5][0]).strip() in parents[0]
    assert "features that moved, are gone" in view.caption


def test_when_nothing_is_called_the_nearest_are_shown_and_said_to_be_no_finding(context: ReportContext) -> None:
    view = notable_table(found(called=False), context)
    assert view is not None
    assert {row.label for row in view.rows} == {"Not called gone", "Not called new"}
    assert view.note.startswith("None of them can be called gone or new")


def test_without_other_seeds_every_number_has_a_reason(context: ReportContext) -> None:
    view = fate_table(found(placebo=False), context)
    assert view is not None
    assert view.rows[2].cells[0].text == f"undefined: {NO_PLACEBO}"
    assert not any("nan" in cell.text + cell.sub for row in view.rows for cell in row.cells)
    assert notable_table(found(placebo=False), context) is None
    assert fate_summary(found(placebo=False), context) == ""


@pytest.mark.parametrize("made", [fate_table, notable_table])
def test_nothing_was_matched(made: Any, context: ReportContext) -> None:
    assert made(SimpleNamespace(matches=MatchTables()), context) is None


def test_without_the_arms_features_go_by_their_number() -> None:
    view = notable_table(found(), ReportContext())
    assert view is not None
    assert view.rows[0].cells[0].text == "0"

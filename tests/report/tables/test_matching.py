"""Fates, cross-activity and rotations as tables, from matches with known contents."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from saeffect.comparison import MatchTables
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.report import ReportContext
from saeffect.report.tables.matching import (
    cross_table,
    fate_table,
    notable_table,
    stagewise_table,
)
from saeffect.report.words.evidence import cross_summary, fate_summary
from synthetic_matches import NO_PLACEBO, cross_activity, stagewise, synthetic_matches


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
    text = cross_summary(cross_activity(), context.alpha, "medical")
    assert "Of 119 features that fire, 8 fire more strongly in the fine-tuned model and 2 more weakly" in text
    assert (
        "Of the 10 medical features 50.0\u202f% fire more and 20.0\u202f% less; of all others 2.8\u202f% and 0.0"
        in text
    )


def test_nothing_to_test_is_said(context: ReportContext) -> None:
    silent = cross_activity().assign(q=float("nan"), reason="one row of text shows no spread")
    assert cross_summary(silent, context.alpha).endswith("one row of text shows no spread.")
    assert cross_table(found(cross_activity=silent), context) is None
    assert "was not applied" in cross_summary(MatchTables().cross_activity, context.alpha)


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


def matched(**options: Any) -> Any:
    return SimpleNamespace(matches=synthetic_matches(**options))


def test_fine_tuning_stands_beside_another_seed(context: ReportContext) -> None:
    view = fate_table(matched(), context)
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
    text = fate_summary(matched().matches.fate_counts, context.alpha)
    assert text.count("60 of 120 features of the control have no counterpart in the treatment, +14 [8, 20]") == 2
    assert "2 moved, 4 gone, 2 absorbed, 6 new" in text
    few = matched().matches.fate_counts.assign(reason=ONE_PLACEBO)
    assert "With one other seed these intervals" in fate_summary(few, context.alpha)
    assert "No single feature stands out" in fate_summary(matched(called=False).matches.fate_counts, context.alpha)


def test_notable_features_have_words_and_parents(context: ReportContext, arms: dict) -> None:
    view = notable_table(matched(), context)
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


def test_nearest_features_are_shown_if_none_is_called(context: ReportContext) -> None:
    view = notable_table(matched(called=False), context)
    assert view is not None
    assert {row.label for row in view.rows} == {"Not called gone", "Not called new"}
    assert view.note.startswith("None of them can be called gone or new")


def test_without_other_seeds_every_number_has_a_reason(context: ReportContext) -> None:
    view = fate_table(matched(placebo=False), context)
    assert view is not None
    assert view.rows[2].cells[0].text == f"undefined: {NO_PLACEBO}"
    assert not any("nan" in cell.text + cell.sub for row in view.rows for cell in row.cells)
    assert notable_table(matched(placebo=False), context) is None
    assert fate_summary(matched(placebo=False).matches.fate_counts, context.alpha).endswith(f"or new: {NO_PLACEBO}.")


@pytest.mark.parametrize("made", [fate_table, notable_table])
def test_nothing_was_matched(made: Any, context: ReportContext) -> None:
    assert made(SimpleNamespace(matches=MatchTables()), context) is None


def test_without_the_arms_features_go_by_their_number() -> None:
    view = notable_table(matched(), ReportContext())
    assert view is not None
    assert view.rows[0].cells[0].text == "0"


def test_nulls_stand_beside_what_fires_more(context: ReportContext) -> None:
    cross = cross_activity().assign(q_nulls=0.01, n_nulls=20)
    cross.loc[0, "q_nulls"] = 0.3
    assert "7 fire more strongly in the fine-tuned model and 2 more weakly (q ≤ 0.05, both over rows of text and" in (
        said := cross_summary(cross, context.alpha, "medical")
    )
    assert "against 20 null fine-tunes)" in said and "Any further training" not in said
    view = cross_table(found(cross_activity=cross), context)
    assert view is not None
    assert "0" not in [row.label for row in view.rows]
    assert view.columns[-1].sub == "against nulls" and view.rows[0].cells[-1].text == "0.010"

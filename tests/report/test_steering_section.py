"""What the section on steering says, and what it says where nothing can be concluded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest

from saeffect.comparison import Comparison
from saeffect.report import ReportContext, render_report
from saeffect.report.sections import steering_section
from saeffect.report.tables.steering import (
    baseline_sentences,
    baseline_table,
    outcome_pairs,
    outcome_table,
    together_table,
)
from saeffect.report.words.names import terms

Compare = Callable[[dict], Comparison]


def _with(context: ReportContext, **changes: object) -> ReportContext:
    assert context.steering is not None
    return replace(context, steering=replace(context.steering, **changes))


def _section(page: str) -> str:
    start = page.index('<section id="steering"')
    return page[start : page.index("</section>", start)]


def test_the_outcomes_are_grouped_and_marked_in_words(comparison: Comparison, context: ReportContext) -> None:
    table = outcome_table(comparison, context)
    assert table is not None
    groups = list(dict.fromkeys((row.group.split(" (")[0], row.tag) for row in table.rows))
    assert groups == [
        ("Features that pass", "declared"),
        ("Similarity", "declared, decides"),
        ("Off-list words", "declared"),
        ("Direct effect", "exploratory"),
        ("KL", "exploratory"),
        ("Distinct-2", "exploratory"),
    ]
    similarity = [row for row in table.rows if row.group.startswith("Similarity")]
    assert [row.label for row in similarity] == ["… random direction", "… shuffled reference"]
    assert [row.strong for row in similarity] == [True, False]


def test_deciding_row_is_the_mean_effect(comparison: Comparison, context: ReportContext, arms: dict) -> None:
    table = outcome_table(comparison, context)
    assert table is not None
    row = next(row for row in table.rows if row.tag == "declared, decides")
    for cell, name in zip(row.cells, comparison.table1["arm"], strict=True):
        effects = arms[name].effects
        assert cell.text.startswith(f"+{effects['effect'].mean():.3f} [")
    ours, papers = table.rows[0], table.rows[1]
    for place, one in enumerate(comparison.table1.to_dict("records")):
        assert ours.cells[place].sub == f"{one['passed']} of {one['tested']}"
        assert papers.cells[place].sub == f"{one['paper_passed']} of {one['tested']}"


def test_each_outcome_and_control_is_explained_on_the_page(page: str) -> None:
    section = _section(page)
    for term in ("forest plot", "exploratory", "declared", "random direction", "shuffled reference", "reversed share",
                 "off-list words", "KL", "distinct-2", "common random numbers", "difference of means",
                 "prompt that names it", "steered at once"):  # fmt: skip
        assert page.count(f"<dt>{term}</dt>") >= 2, term  # where it first appears, and in the glossary
        assert f"<dt>{term}</dt>" in section or term == "KL", term
    assert max(len(term.meaning) for term in terms(ReportContext()).values()) < 450


def test_steering_section_names_its_source_files(page: str) -> None:
    section = _section(page)
    blocks = section.count("<table") + section.count("<figure")
    assert blocks == 4 + 4
    assert section.count("Source: ") == blocks
    for file in ("arms/*/outcome_effects.parquet", "arms/*/baseline_effects.parquet", "arms/*/together_effects.parquet",
                 "arms/treatment/effects.parquet", "steering/dose_response.parquet", "steering/dose_search.parquet"):  # fmt: skip
        assert file in section, file


def test_the_baselines_are_summed_up_in_a_plain_sentence(comparison: Comparison, context: ReportContext) -> None:
    prompt, means = baseline_sentences(comparison, context)
    assert prompt.startswith("Steering is weaker than simply asking")
    assert "of 6 features it is stronger on 0 (clearly on 0) and weaker on 6 (clearly on 6)" in prompt
    assert means.startswith("Steering is neither clearly stronger nor clearly weaker than an equal push")
    assert "of 3 features it is stronger on 3 (clearly on 0)" in means
    table = baseline_table(comparison, context)
    assert table is not None
    assert len(table.rows) == 6
    assert [cell.text for cell in table.rows[0].cells] == ["0.300", "0.400", "0.500", "−0.100", "0.380", "+0.020"]
    assert table.rows[1].cells[-1].text == "undefined: it never fired on general text"


def test_a_clear_win_is_called_one(comparison: Comparison, context: ReportContext) -> None:
    assert context.steering is not None
    better = {
        arm: table.assign(effect=0.3, low=0.2, high=0.4) for arm, table in context.steering.baseline_effects.items()
    }
    first = baseline_sentences(comparison, _with(context, baseline_effects=better))[0]
    assert first.startswith("Steering is stronger than simply asking")


def test_a_baseline_that_could_not_be_run_says_why(comparison: Comparison, context: ReportContext) -> None:
    assert context.steering is not None
    none = {
        arm: table.assign(effect=math.nan, low=math.nan, high=math.nan, reason="no word to name")
        for arm, table in context.steering.baseline_effects.items()
    }
    sentences = baseline_sentences(comparison, _with(context, baseline_effects=none))
    assert all(one.endswith("cannot be said: no word to name.") for one in sentences)


def test_a_set_stands_beside_its_members(comparison: Comparison, context: ReportContext, arms: dict) -> None:
    table = together_table(comparison, context)
    assert table is not None
    first = arms["control"].effects["feature"].iloc[0]
    assert table.rows[0].label.startswith(f"Set 1: {first:.0f} + ")
    assert f"{first:.0f}: " in table.rows[0].cells[-1].text
    assert together_table(comparison, _with(context, together_effects={})) is None


def test_a_card_has_the_features_other_outcomes(page: str, context: ReportContext, arms: dict) -> None:
    tested = arms["control"].effects["feature"].tolist()
    assert set(outcome_pairs(context, "control", tested[:2])) == set(tested[:2])
    pairs = outcome_pairs(context, "control", tested)
    assert set(pairs) == set(tested)
    labels = [label for label, _ in next(iter(pairs.values()))]
    assert labels == [
        "Similarity: steered minus …",
        "Other declared outcomes: steered − random direction",
        "Exploratory outcomes: steered − random direction",
    ]
    assert page.count("Exploratory outcomes: steered − random direction") == sum(len(a.effects) for a in arms.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"operator": "ablate", "dose_response": None},
            (
                "An ablation has one dose, so there is no dose-response curve.",
                "Features were steered by switching them off",
                "passes for an effect below zero: it had been bringing its concept in",
            ),
        ),
        (
            {"operator": "clamp", "dose": 5.0, "n_prompts": 1, "samples": 1},
            (
                "by setting their activation to 5 × its maximum",
                "what the feature&#39;s activation is set to, in multiples of its maximum",
                "a single pair shows no spread",
            ),
        ),
        (
            {"unit": "coefficient", "dose": 20.0, "placebos": (), "n_prompts": 1, "samples": 4}
            | {"dose_note": "the best dose is at the edge of those tried"},
            (
                "as long as 20 × the decoder row",
                "The study steers along no placebo",
                "whether the effects hold on any other cannot be said",
                "A reservation: the best dose is at the edge",
            ),
        ),
    ],
    ids=["ablate", "clamp", "add"],
)
def test_the_way_of_steering_is_told(
    comparison: Comparison, context: ReportContext, changes: dict, said: tuple[str, ...]
) -> None:
    section = _section(render_report(comparison, context=_with(context, **changes), figures=()))
    assert [words for words in said if words not in section] == []


def test_one_dose_has_no_curve_and_says_so(comparison: Comparison, context: ReportContext) -> None:
    one = replace(_with(context, dose_response=None), doses=None)
    assert "One dose, 0.4, was set in the study file" in steering_section(comparison, one).doses[0]


def test_nothing_steered(unsteered: Comparison, unsteered_page: str, untested: dict, context: ReportContext) -> None:
    unknown = replace(context, arms=untested, steering=None, doses=None)
    for page in (unsteered_page, render_report(unsteered, context=unknown, figures=())):
        assert "No feature was steered, so nothing can be said about what the features cause." in _section(page)
        assert "<table" not in _section(page)
    assert "Not drawn: no feature was tested by steering." in _section(unsteered_page)


@pytest.mark.usefixtures("unsaved_figures")
def test_an_empty_arm_and_an_arm_of_one_feature(arms: dict, context: ReportContext, compare_quickly: Compare) -> None:
    assert context.steering is not None
    few = dict(arms)
    few["placebo"] = replace(
        arms["placebo"],
        effects=arms["placebo"].effects.head(0),
        interventions=arms["placebo"].interventions.head(0),
        direct_effects=arms["placebo"].direct_effects.head(0),
    )
    few["control"] = replace(arms["control"], effects=arms["control"].effects.head(1))
    outcomes = {"treatment": context.steering.outcome_effects["treatment"]}
    lone = replace(_with(context, outcome_effects=outcomes), arms=few)
    page = _section(render_report(compare_quickly(few), context=lone))
    assert "No feature of placebo was tested: nothing can be said about what its features cause." in page
    assert "One feature of control was tested: the arm&#39;s mean has no interval." in page
    assert "no feature of placebo has an effect" in page
    assert "undefined: no feature of this arm was tested" in page


def test_nan_intervals_are_words(comparison: Comparison, context: ReportContext) -> None:
    assert context.steering is not None
    blank = {
        arm: table.assign(effect=math.nan, low=math.nan, high=math.nan, p=math.nan, q=math.nan, reason="one pair")
        for arm, table in context.steering.outcome_effects.items()
    }
    page = _section(render_report(comparison, context=_with(context, outcome_effects=blank), figures=()))
    assert "undefined: one pair" in page
    assert "nan" not in pd.Series(page.lower().split()).tolist()

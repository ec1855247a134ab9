"""Forest plots and dose-response panels: what is drawn is what the tables say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import ArmTables, Comparison
from saeffect.report import DrawnFigure, ReportContext
from saeffect.report.figures import FIGURES
from saeffect.report.figures.steering import MAX_ROWS
from synthetic_study import HOSTILE


def _named(figures: tuple[DrawnFigure, ...], name: str) -> DrawnFigure:
    return next(figure for figure in figures if figure.name == name)


def _drawn(name: str, comparison: Comparison, context: ReportContext) -> tuple[DrawnFigure, ...]:
    """One kind of figure, without the others."""
    return next(kind for kind in FIGURES if kind.name == name).drawn(comparison, context)


def _labels(drawn: DrawnFigure) -> list[str]:
    assert drawn.figure is not None
    return [label.get_text() for label in drawn.figure.axes[0].get_yticklabels()]


def _many(arm: ArmTables, n: int) -> ArmTables:
    """The arm with n tested features, effects 0, 0.001, 0.002, ..."""
    row = arm.effects.iloc[0].to_dict()
    rows = [row | {"feature": i, "effect": 0.001 * i, "effect_low": 0.001 * i - 0.1, "effect_high": 0.001 * i + 0.1}
            for i in range(n)]  # fmt: skip
    return replace(arm, effects=pd.DataFrame(rows))


def test_rows_are_the_features_by_effect(figures: tuple[DrawnFigure, ...], arms: dict) -> None:
    effects = arms["treatment"].effects.sort_values("effect", ascending=False)
    labels = _labels(_named(figures, "effects_b"))
    assert labels[0] == f"mean of {len(effects)}"
    assert [int(label.split("·")[-1]) for label in labels[1:]] == effects["feature"].tolist()


def test_marks_are_filled_if_passed(figures: tuple[DrawnFigure, ...], arms: dict) -> None:
    drawn = _named(figures, "effects_b").figure
    assert drawn is not None
    effects = arms["treatment"].effects.sort_values("effect", ascending=False)
    marks = [line for line in drawn.axes[0].lines if line.get_marker() == "s"]
    assert [float(line.get_xdata()[0]) for line in marks] == pytest.approx(effects["effect"].tolist())
    assert [line.get_markerfacecolor() != "#ffffff" for line in marks] == effects["passed"].tolist()
    mean = next(line for line in drawn.axes[0].lines if line.get_marker() == "D")
    assert float(mean.get_xdata()[0]) == pytest.approx(effects["effect"].mean())


def test_all_arms_share_one_scale_of_one_width(figures: tuple[DrawnFigure, ...]) -> None:
    axes = [_named(figures, f"effects_{letter}").figure.axes[0] for letter in "abc"]  # type: ignore[union-attr]
    assert len({ax.get_xlim() for ax in axes}) == 1
    assert len({(ax.get_position().x0, ax.get_position().x1) for ax in axes}) == 1


def test_hostile_tokens_are_visible_text(figures: tuple[DrawnFigure, ...]) -> None:
    drawn = _named(figures, "effects_a")
    text = drawn.svg
    assert "<script>" not in text
    assert "\u202e" not in text
    assert "&lt;script&gt;" in text
    assert len(HOSTILE) > 2


def test_five_hundred_features_are_capped_with_both_ends(
    arms: dict, context: ReportContext, comparison: Comparison
) -> None:
    many = arms | {"treatment": _many(arms["treatment"], 500)}
    features = pd.DataFrame({"feature": range(500), "top_tokens": [[" a", " b"]] * 500})
    many["treatment"] = replace(many["treatment"], features=many["treatment"].features.merge(
        features, how="outer", on="feature", suffixes=("_old", "")))  # fmt: skip
    drawn = _named(_drawn("effects", comparison, replace(context, arms=many)), "effects_b")
    labels = _labels(drawn)
    assert len(labels) == MAX_ROWS + 2
    assert labels[1].endswith("499")
    assert "… 460 between …" in labels
    assert "a, b · 0" in labels
    assert "Of 500 features the 30 largest and 10 smallest effects are drawn" in drawn.caption


def test_a_huge_interval_is_cut_with_an_arrow(arms: dict, context: ReportContext, comparison: Comparison) -> None:
    effects = arms["treatment"].effects.copy()
    effects.loc[effects.index[0], ["effect_low", "effect_high"]] = (-90.0, 90.0)
    wide = arms | {"treatment": replace(arms["treatment"], effects=effects)}
    drawn = _named(_drawn("effects", comparison, replace(context, arms=wide)), "effects_b").figure
    assert drawn is not None
    low, high = drawn.axes[0].get_xlim()
    assert high - low < 3
    assert {"<", ">"} <= {line.get_marker() for line in drawn.axes[0].lines}


def test_an_effect_without_interval_is_drawn_without_a_line(
    arms: dict, context: ReportContext, comparison: Comparison
) -> None:
    bare = arms["control"].effects.head(1).assign(effect_low=math.nan, effect_high=math.nan, q=math.nan)
    one = {"control": replace(arms["control"], effects=bare)}
    drawn = _named(_drawn("effects", comparison, replace(context, arms=one)), "effects_a")
    assert drawn.figure is not None
    assert "without an interval" in drawn.caption
    assert len([line for line in drawn.figure.axes[0].lines if line.get_marker() == "o"]) == 1


def test_dose_panels_have_a_hollow_placebo(figures: tuple[DrawnFigure, ...], context: ReportContext) -> None:
    drawn = _named(figures, "doses")
    assert drawn.figure is not None
    assert context.steering is not None
    gain = drawn.figure.axes[0]
    line = next(line for line in gain.lines if line.get_label() == "control")
    assert np.asarray(line.get_ydata()) == pytest.approx([0.4, 0.8, 1.6])  # dose x the mean of 1, 2, 3
    hollow = [line for line in gain.lines if line.get_markerfacecolor() == "#ffffff"]
    assert len(hollow) == len(context.arms)  # one an arm, at every dose
    assert np.asarray(hollow[0].get_ydata()) == pytest.approx([0.04, 0.08, 0.16])
    assert "Dotted and hollow, in the colour of its arm: random direction at the same dose" in drawn.caption
    perplexity = next(ax for ax in drawn.figure.axes if "perplexity" in ax.get_title(loc="left"))
    assert perplexity.get_yscale() == "log"
    assert np.asarray(perplexity.lines[2].get_ydata()) == pytest.approx([10.0, 10.0, 10.0])
    assert "steering/dose_response.parquet" in drawn.source


def test_without_a_placebo_the_panels_say_so(comparison: Comparison, context: ReportContext) -> None:
    assert context.steering is not None
    assert context.steering.dose_response is not None
    bare = context.steering.dose_response.query("condition == 'steered'")
    alone = replace(context, steering=replace(context.steering, dose_response=bare))
    drawn = _drawn("doses", comparison, alone)[0]
    assert drawn.figure is not None
    assert not [line for line in drawn.figure.axes[0].lines if line.get_markerfacecolor() == "#ffffff"]
    assert "No placebo was run at these doses" in drawn.caption


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "dose (multiples of the hook's mean residual norm)"),
        ({"unit": "coefficient"}, "dose (multiples of the decoder row)"),
        ({"operator": "clamp"}, "dose (multiples of the feature's maximum activation)"),
    ],
)
def test_the_axis_names_the_operators_unit(
    comparison: Comparison, context: ReportContext, changes: dict, label: str
) -> None:
    assert context.steering is not None
    changed = replace(context, steering=replace(context.steering, **changes))
    drawn = _drawn("doses", comparison, changed)[0].figure
    assert drawn is not None
    assert drawn.axes[-1].get_xlabel() == label


def test_an_ablation_has_no_panel(comparison: Comparison, context: ReportContext) -> None:
    assert context.steering is not None
    ablated = replace(context, steering=replace(context.steering, operator="ablate"))
    drawn = _drawn("doses", comparison, ablated)[0]
    assert drawn.figure is None
    assert drawn.reason == "an ablation has one dose, so there is no dose-response curve."

"""Every outcome of steering against every control, the declared ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.outcome_summary import outcome_summary
from saeffect.report.tables.view import Cell, Row, TableView, arm_columns
from saeffect.report.words.names import control_words, effect_text, interval_text, outcome_words
from saeffect.report.words.numbers import amount_interval, count, is_defined, percent, undefined

__all__ = ["CONTROL_TERMS", "OUTCOME_TERMS", "outcome_pairs", "outcome_table"]

OUTCOME_TERMS: Mapping[str, str] = {
    "keyword_score": "keyword_score",
    "off_list": "off_list",
    "direct_effect": "direct_effect",
    "kl": "kl",
    "perplexity": "perplexity",
    "distinct2": "distinct_2",
}
"""Which entry of the glossary explains an outcome."""

CONTROL_TERMS: Mapping[str, str] = {"matched": "matched", "random": "random", "shuffled": "shuffled"}
"""Which entry of the glossary explains a control."""


def outcome_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Every outcome × control, one column an arm; None where no outcome was recorded."""
    results = context.steering
    if results is None:
        return None
    arms = comparison.table1
    table = outcome_summary(results, [str(name) for name in arms["arm"]], alpha=context.alpha)
    if table.empty:
        return None
    rows = list(_pass_rows(comparison, table))
    for outcome in dict.fromkeys(table["outcome"]):
        mine = table[table["outcome"] == outcome]
        rows += _outcome_rows(str(outcome), mine, list(arms["arm"]))
    return TableView(
        name="outcomes",
        caption=(
            "Every outcome of steering against every control: mean effect [95 % interval], and features with "
            f"q\u00a0≤\u00a0{context.alpha:g}"
        ),
        columns=arm_columns(arms),
        rows=tuple(rows),
        corner="Steered minus …",
        note=_why_none(table)
        + (
            "Means over an arm's features; intervals are Student's t over features, where [[table:table1]] has the "
            "bootstrap's. Outcomes without a direction (KL, perplexity, distinct-2) are tested two-sided: there, q "
            "counts features that changed them, either way. Only the control in bold under the deciding outcome "
            "decides what passes."
        ),
        source=(
            "arms/*/outcome_effects.parquet, rows by outcome and placebo, columns effect and q; the first two rows "
            "arms/*/effects.parquet, columns passed and paper_pass. Summed up in tables/steering_outcomes.csv"
        ),
    )


def _why_none(table: pd.DataFrame) -> str:
    """Why some means have no interval."""
    bare = table[table["mean"].notna() & table["low"].isna()]
    if bare.empty:
        return ""
    if (bare["n_defined"] == 1).all():
        return "No interval: one feature alone shows no spread. "
    return "No interval: every feature of the arm has the same effect. "


def outcome_pairs(context: ReportContext, arm: str) -> Mapping[int, tuple[tuple[str, str], ...]]:
    """For each feature of an arm its outcomes beside the deciding control, and the other controls of the decision.

    Returns:
        By feature, label-value pairs for its card.
    """
    results = context.steering
    table = None if results is None else results.outcome_effects.get(arm)
    if results is None or table is None or table.empty:
        return {}
    found: dict[int, tuple[tuple[str, str], ...]] = {}
    for feature, rows in table.groupby("feature"):
        against = [_against(row) for row in rows.to_dict("records") if row["outcome"] == results.deciding]
        others = rows[(rows["outcome"] != results.deciding) & (rows["placebo"] == results.placebo)].to_dict("records")
        pairs = [(f"{outcome_words(results.deciding).title.capitalize()}: steered minus …", "; ".join(against))]
        for is_declared, label in ((True, "Other declared outcomes"), (False, "Exploratory outcomes")):
            some = [_named(row) for row in others if results.declared(str(row["outcome"])) == is_declared]
            pairs.append((f"{label}: steered − {control_words(results.placebo)}", ", ".join(some)))
        found[int(feature)] = tuple((label, value) for label, value in pairs if value)  # type: ignore[call-overload]
    return found


def _against(row: Mapping[Any, Any]) -> str:
    text = effect_text(row["effect"], str(row["outcome"]))
    ends = f" {interval_text(row['low'], row['high'], str(row['outcome']))}" if is_defined(row["low"]) else ""
    return f"{control_words(str(row['placebo']))} {text}{ends}"


def _named(row: Mapping[Any, Any]) -> str:
    unit = " nats" if "nats" in outcome_words(str(row["outcome"])).unit and is_defined(row["effect"]) else ""
    return f"{outcome_words(str(row['outcome'])).title} {effect_text(row['effect'], str(row['outcome']))}{unit}"


def _pass_rows(comparison: Comparison, table: pd.DataFrame) -> Sequence[Row]:
    """Ours and the paper's rule, one below the other."""
    arms = comparison.table1
    decisive = table[table["decides"]].drop_duplicates("arm").set_index("arm")
    ours, papers, reverses = [], [], []
    for row in arms.to_dict("records"):
        tested = int(row["tested"])
        ours.append(_rate(row["passed"], tested, row["pass_low"], row["pass_high"]))
        papers.append(_rate(row["paper_passed"], tested))
        share = decisive["reversed_share"].get(row["arm"])
        text = percent(share) if is_defined(share) else undefined("no feature was tested")
        reverses.append(Cell(text, tone="" if is_defined(share) else "muted", is_text=not is_defined(share)))
    group, tag = "Features that pass", "declared"
    return (
        Row("Our test", tuple(ours), sub="against the placebo, q corrected", strong=True, group=group, tag=tag),
        Row("The paper's rule", tuple(papers), sub="a coin passes half", group=group, tag=tag),
        Row("Prompts where the effect reverses", tuple(reverses), sub="mean over features", group=group, tag=tag),
    )


def _rate(passed: object, tested: int, low: object = None, high: object = None) -> Cell:
    if not tested or not is_defined(passed):
        return Cell(undefined("no feature was tested"), tone="muted", is_text=True)
    ends = f" {amount_interval(low, high, 'share')}" if is_defined(low) and is_defined(high) else ""
    return Cell(percent(float(passed) / tested) + ends, sub=f"{count(passed)} of {count(tested)}")


def _outcome_rows(outcome: str, mine: pd.DataFrame, arms: Sequence[str]) -> list[Row]:
    words = outcome_words(outcome)
    decides, declared = bool(mine["decides"].any()), bool(mine["declared"].iloc[0])
    tag = "declared, decides" if decides else "declared" if declared else "exploratory"
    rows = []
    for control in dict.fromkeys(mine["control"]):
        some = mine[mine["control"] == control].set_index("arm")
        rows.append(
            Row(
                f"… {control_words(str(control))}",
                tuple(_cell(some.loc[arm], outcome) if arm in some.index else _nothing() for arm in arms),
                strong=bool(some["decides"].any()),
                group=f"{words.title[:1].upper()}{words.title[1:]} ({words.unit})",
                tag=tag,
            )
        )
    return rows


def _nothing() -> Cell:
    return Cell(undefined("no feature of this arm was tested"), tone="muted", is_text=True)


def _cell(row: pd.Series[Any], outcome: str) -> Cell:
    if not is_defined(row["mean"]):
        return Cell(undefined(str(row["reason"])), tone="muted", is_text=True)
    passed = f"{count(row['n_passed'])} of {count(row['n_tested'])}" if row["n_tested"] else "none tested"
    return Cell(
        f"{effect_text(row['mean'], outcome)} {interval_text(row['low'], row['high'], outcome)}",
        sub=passed,
    )

"""Features steered at once, each set beside what its members do alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.names import (
    control_words,
    effect_text,
    feature_names,
    interval_text,
    level_text,
    outcome_words,
)
from saeffect.report.words.numbers import is_defined, is_true, p_value, undefined

__all__ = ["together_table"]


def together_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """One row a set; None where the study steers no sets."""
    results = context.steering
    if results is None:
        return None
    rows = []
    for arm in map(str, comparison.table1["arm"]):
        table = results.together_effects.get(arm)
        if table is not None:
            alone = _alone(context, arm)
            names = feature_names(context, arm, 2)
            rows += [_row(arm, one, alone, names) for one in table.to_dict("records")]
    if not rows:
        return None
    title = outcome_words(results.deciding).title
    control = control_words(results.placebo)
    return TableView(
        name="together",
        caption=f"Features steered at once: {title}",
        columns=(
            Column("Unsteered"),
            Column("Steered"),
            Column(f"{control[0].upper()}{control[1:]}"),
            Column("Effect", "95 % interval"),
            Column("q"),
            Column("Members alone", is_text=True),
        ),
        rows=tuple(rows),
        corner="Set",
        stacks=True,
        note=(
            "The texts of a set are compared with the top tokens of all its members, those of a member alone with its "
            "own: the two effects are not on the same footing."
        ),
        source=(
            "arms/*/together_effects.parquet, columns set, members, unsteered_mean, steered_mean, placebo_mean, "
            "effect, effect_low, effect_high, q; members alone: arms/*/effects.parquet, column effect"
        ),
    )


def _alone(context: ReportContext, arm: str) -> Mapping[int, float]:
    table = context.arms[arm].effects if arm in context.arms else None
    if table is None or table.empty:
        return {}
    effects = pd.to_numeric(table["effect"], errors="coerce")
    return {int(f): float(e) for f, e in zip(table["feature"], effects, strict=True) if is_defined(e)}


def _row(arm: str, one: Mapping[Any, Any], alone: Mapping[int, float], names: Mapping[int, str]) -> Row:
    outcome = str(one.get("outcome", "similarity"))
    members = [int(member) for member in one["members"]]
    means = [
        Cell(level_text(one[name], outcome), tone="" if is_defined(one[name]) else "muted")
        for name in ("unsteered_mean", "steered_mean", "placebo_mean")
    ]
    if is_defined(one["effect"]):
        ends = interval_text(one["effect_low"], one["effect_high"], outcome)
        effect = Cell(effect_text(one["effect"], outcome), sub=ends)
    else:
        effect = Cell(undefined(str(one.get("reason") or "")), tone="muted", is_text=True)
    q = p_value(one["q"]) + (" ✓" if is_true(one.get("passed")) else "") if is_defined(one["q"]) else "undefined"
    tested = [member for member in members if member in alone]
    each = ", ".join(f"{m}: {effect_text(alone[m], outcome) if m in alone else 'not tested'}" for m in members)
    one_by_one = Cell(each if tested else "none was tested alone", tone="" if tested else "muted", is_text=True)
    return Row(
        f"Set {int(one['set']) + 1}: {' + '.join(map(str, members))}",
        (
            *means,
            effect,
            Cell(q),
            one_by_one,
        ),
        sub="; ".join(names[m] for m in members if m in names),
        group=arm,
        tag="",
    )
